"""Schedules by hand-computed values, Muon against torch's own, and who decays."""

import math

import pytest
import torch
from torch import nn

from alloy.train.optim import (
    Muon,
    Optimizers,
    clip_gradients,
    gradient_norm,
    is_muon_parameter,
    lr_factor,
    orthogonalize,
)


@pytest.mark.parametrize(
    ("progress", "settings", "expected"),
    [
        (0.05, {"warmup": 0.1}, 0.5),
        (0.3, {"warmup": 0.1, "decay": 0.5}, 1.0),
        (0.75, {"decay": 0.5}, 0.5),
        (0.75, {"decay": 0.5, "floor": 0.1}, 0.55),
        (1.0, {"decay": 0.5, "floor": 0.1}, 0.1),
        # a quarter of the decay has passed: 1 - sqrt(1/4)
        (0.625, {"decay": 0.5, "shape": "minus_sqrt"}, 0.5),
        (0.625, {"decay": 0.5, "shape": "minus_sqrt", "floor": 0.01}, 0.01 + 0.99 * 0.5),
        (0.55, {"schedule": "cosine", "warmup": 0.1}, 0.5),
        (0.325, {"schedule": "cosine", "warmup": 0.1}, (1 + math.cos(math.pi / 4)) / 2),
        (0.55, {"schedule": "linear", "warmup": 0.1, "floor": 0.2}, 0.6),
        (0.99, {"schedule": "constant"}, 1.0),
        # a time limit may be passed by part of a step
        (1.2, {"decay": 0.5, "floor": 0.1}, 0.1),
        (1.0, {"decay": 0.0}, 1.0),
    ],
)
def test_schedule_values(progress: float, settings: dict[str, float], expected: float) -> None:
    """Each schedule at a point that is easy to work out."""
    assert lr_factor(progress, **settings) == pytest.approx(expected)  # type: ignore[arg-type]  # literals by name


def test_gradient_norm_is_summed_in_fp32() -> None:
    """bf16 gradients beside fp32 ones: the norm that float64 gives, which a sum in bf16 misses by more than 1e-3."""
    shapes = [(61, 37)] * 40 + [(37,)] * 40
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    wanted = torch.stack([g.double().norm() for g in gradients]).norm()
    assert abs(nn.utils.get_total_norm(gradients).double() / wanted - 1) > 1e-3
    found = gradient_norm(gradients)
    assert found.dtype == torch.float32
    assert abs(found.double() / wanted - 1) < 1e-5
    gradients.insert(3, torch.randn(5, generator=generator) * 1e3)
    wanted = torch.stack([g.double().norm() for g in gradients]).norm()
    assert abs(gradient_norm(gradients).double() / wanted - 1) < 1e-5


def test_gradient_norm_of_fp32_is_torchs() -> None:
    """The same bits, so that a run in fp32 stays what it was."""
    gradients = [p.detach() for p in parameters((61, 37), (5,), (3, 7, 11))]
    assert torch.equal(gradient_norm(gradients), nn.utils.get_total_norm(gradients))


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_gradients_are_clipped_to_the_limit(limit: float) -> None:
    """As torch clips fp32; of two dtypes, to the limit's norm; a norm below the limit changes nothing."""
    held = [nn.Parameter(p) for p in parameters((5, 7), (3,))]
    for p in held:
        p.grad = torch.randn_like(p)
    gradients = [p.grad.clone() for p in held if p.grad is not None]
    mixed = [gradients[0].clone(), gradients[1].bfloat16()]
    for each in (gradients, mixed):
        before = gradient_norm(each).item()
        clip_gradients(each, before, limit)
        assert gradient_norm(each).item() == pytest.approx(min(before, limit), rel=2e-3)
    nn.utils.clip_grad_norm_(held, limit)
    for found, p in zip(gradients, held, strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gradient_norm_neither_waits_nor_copies() -> None:
    """On a GPU it is queued, and takes less memory than one gradient in fp32."""
    gradients = [torch.randn(2**20, device="cuda", dtype=torch.bfloat16) for _ in range(9)]
    gradients += [torch.randn(7, device="cuda")]
    wanted = torch.stack([g.double().norm() for g in gradients]).norm()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradient_norm(gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2**22
    assert abs(found.double() / wanted - 1) < 1e-5


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_is_torch_muon_for_matrices() -> None:
    """Three steps on wide, tall and square matrices equal torch.optim.Muon, which computes in bf16 one by one."""
    shapes = [(24, 40), (40, 24), (16, 16), (24, 40)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    mine = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        reference.step()
    for a, b, start in zip(ours, theirs, parameters(*shapes), strict=True):
        # bf16 iterations may run in another order: compare the moves, not the weights
        assert (a - b).norm() <= 0.01 * (b - start).norm()


def test_stacked_experts_are_separate_matrices() -> None:
    """A stack (experts, out, in) moves as its matrices would alone."""
    stack = parameters((5, 12, 20))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack[0].detach()]
    give_gradients(stack, 3)
    for p, gradient in zip(alone, stack[0].grad, strict=True):  # type: ignore[arg-type]  # was just set
        p.grad = gradient.clone()
    Muon(stack, dtype=torch.float32).step()
    Muon(alone, dtype=torch.float32).step()
    torch.testing.assert_close(stack[0].detach(), torch.stack([p.detach() for p in alone]))


def test_orthogonalize_evens_singular_values() -> None:
    """Singular values of very different sizes come out near 1 with the same vectors."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(3, 12, 12, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(3, 20, 20, generator=generator))
    values = torch.linspace(0.1, 5, 12)
    matrices = u @ torch.diag(values) @ v[:, :12]
    done = orthogonalize(matrices)
    inner = u.mT @ done @ v[:, :12].mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(inner - torch.diag_embed(diagonal), torch.zeros_like(inner), atol=1e-4, rtol=0)


def test_muon_refuses_vectors() -> None:
    """A one-dimensional parameter is the author's mistake."""
    with pytest.raises(ValueError, match="not a tensor of shape"):
        Muon(parameters((7,)))


NAMES = {
    "embed.weight": (31, 8),
    "head.weight": (31, 8),
    "layers.0.norm.weight": (8,),
    "layers.0.mixer.in_proj.weight": (20, 8),
    "layers.0.mixer.conv.weight": (12, 4),
    "layers.0.mixer.A_log": (2,),
    "layers.1.mixer.gate.weight": (4, 8),
    "layers.1.mixer.experts.up": (4, 6, 8),
    "layers.1.mixer.experts.gate": (4, 6, 8),
    "mtp.0.eh_proj.weight": (8, 16),
}


def test_who_is_trained_by_muon() -> None:
    """Matrices of the blocks, experts included; not embedding, head, router, convolution or vectors."""
    chosen = {name for name, shape in NAMES.items() if is_muon_parameter(name, torch.empty(shape))}
    assert chosen == {
        "layers.0.mixer.in_proj.weight",
        "layers.1.mixer.experts.up",
        "layers.1.mixer.experts.gate",
        "mtp.0.eh_proj.weight",
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_reaches_matrices_and_conv_but_no_vectors(kind: str) -> None:
    """With zero gradients only decay moves weights: by lr * decay for everything of two dimensions, by nothing otherwise."""
    model = nn.Module()
    for name, shape in NAMES.items():
        owner = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.ones(shape)))
    optimizers = Optimizers(model, kind, lr=0.1, muon_lr=0.2, weight_decay=0.5)  # type: ignore[arg-type]  # literal
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.set_lr(0.5)
    optimizers.step()
    for name, p in model.named_parameters():
        rate = 0.2 if kind == "muon" and is_muon_parameter(name, p) else 0.1
        expected = 1.0 - 0.5 * rate * 0.5 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
        assert p.grad is None


def test_norm_of_nothing_and_of_float64() -> None:
    """No gradients have the norm 0; float64 ones, of checks, are not narrowed on the way."""
    assert gradient_norm([]) == 0
    mixed = [torch.full((3,), 2.0, dtype=torch.float64), torch.full((4,), 1.0)]
    assert gradient_norm(mixed) == 4
