"""The head's cross entropy with its kernel against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.losses.lm import linear_cross_entropy
from alloy.ops import use_backend

pytest.importorskip("triton")
from twins import check_captured, check_compiled, draw, error, gpu

from alloy.ops.triton import cross_entropy, tuning


def example(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Hidden states, weight, labels: a third is ignored, the first and the last id occur."""
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    labels[:2] = torch.tensor([0, vocab - 1])
    labels[3::3] = -100
    x, weight = draw(tokens, hidden), draw(vocab, hidden, seed=1) * hidden**-0.5 * 3
    return [x.to(device, dtype), weight.to(device, dtype), labels.to(device)]


def check_loss(x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, tolerances: tuple[float, float]) -> None:
    """Loss and gradients under an outer factor, the same bits twice."""
    results = []
    for _ in range(2):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with use_backend("triton"):
            loss = linear_cross_entropy(*inputs, labels, chunk)
        assert loss.dtype == torch.float32
        results.append([loss.detach(), *torch.autograd.grad(loss * 0.37, inputs)])
    inputs = x.double().requires_grad_(), weight.double().requires_grad_()
    want = F.cross_entropy(inputs[0] @ inputs[1].T, labels, reduction="sum")
    wanted = [want.detach(), *torch.autograd.grad(want * 0.37, inputs)]
    for i, (a, b, c) in enumerate(zip(*results, wanted, strict=True)):
        assert torch.equal(a, b)
        assert error(a, c) < tolerances[i > 0], i
    with use_backend("triton"), torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, labels, chunk), results[0][0])


@pytest.mark.parametrize("config", tuning.CANDIDATES["linear_ce"])
def test_every_configuration(config: tuning.Config, device: torch.device) -> None:
    """Vocabularies that end within a block, and within the first one."""
    with tuning.override("linear_ce", config):
        for vocab in (config["BLOCK"] * config["UNROLL"] + 9, 23):
            check_loss(*example(5, 7, vocab, torch.float32, device), 3, (1e-5, 1e-4))


@pytest.mark.parametrize("chunk", [None, 1, 7, 17, 1000])
def test_any_chunk(chunk: int | None, device: torch.device) -> None:
    """Also one that does not divide the tokens."""
    check_loss(*example(17, 13, 29, torch.float32, device), chunk, (1e-5, 1e-4))


@pytest.mark.parametrize("vocab", [gpu(65536), gpu(50257)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """16-bit matmuls; the weight's gradient is added up in fp32 over chunks."""
    check_loss(*example(700, 512, vocab, dtype, device), 256, (4e-3, 1e-2))


def test_extreme_and_ignored(device: torch.device) -> None:
    """Logits of -inf and far apart; rows that are all ignored have loss and gradients 0; an id that does not
    exist is not passed over in silence."""
    x = torch.ones(2, 1, device=device)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], device=device).requires_grad_()
    labels = torch.tensor([0, 2], device=device)
    with use_backend("triton"):
        loss = linear_cross_entropy(x, weight, labels)
        assert loss.item() == 1e4
        (grad,) = torch.autograd.grad(loss, weight)
        # logits are multiplied by log2(e), which costs a logit of 1e4 half of its bits behind the point
        torch.testing.assert_close(grad, torch.tensor([[1.0], [0.0], [-1.0]], device=device), atol=1e-4, rtol=0)
        loss = linear_cross_entropy(x, weight, torch.full_like(labels, -100))
        (grad,) = torch.autograd.grad(loss, weight)
        outside = linear_cross_entropy(x, weight, torch.full_like(labels, 3))
    assert loss.item() == 0
    assert not grad.any()
    assert outside.isnan()


def test_the_outer_gradient_is_not_rounded(device: torch.device) -> None:
    """A factor that bf16 does not hold scales bf16 gradients without a bias."""
    x, weight, labels = example(64, 32, 512, torch.bfloat16, device)
    weight.requires_grad_()
    with use_backend("triton"):
        (one,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), weight)
        (third,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels) / 3, weight)
    ratio = (third.double().abs().sum() / one.double().abs().sum()).item()
    # the interpreter rounds towards zero
    assert ratio == pytest.approx(1 / 3, rel=2e-4 if device.type == "cuda" else 4e-3)


def test_autocast_and_a_frozen_head(device: torch.device) -> None:
    """Under bf16 autocast an fp32 weight's gradient stays fp32; only what requires a gradient gets one."""
    x, weight, labels = example(17, 13, 29, torch.float32, device)
    with use_backend("triton"), torch.autocast(device.type, dtype=torch.bfloat16):
        weight.requires_grad_()
        loss = linear_cross_entropy(x, weight, labels)
        (grad,) = torch.autograd.grad(loss, weight)
        x.requires_grad_()
        frozen = linear_cross_entropy(x, weight.detach(), labels)
    (dx,) = torch.autograd.grad(frozen, x)
    want = F.cross_entropy(x.double() @ weight.double().T, labels, reduction="sum")
    wanted = torch.autograd.grad(want, (x, weight))
    assert grad.dtype == dx.dtype == torch.float32
    assert error(loss.detach(), want.detach()) < 4e-3
    assert error(dx, wanted[0].double()) < 1e-2
    assert error(grad, wanted[1].double()) < 1e-2


def test_compiles_without_breaks(device: torch.device) -> None:
    """In one graph with its backward."""
    x, weight, labels = example(17, 13, 29, torch.float32, device)
    check_compiled(lambda x, w: linear_cross_entropy(x, w, labels, 7), [x, weight], device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graph_capture(device: torch.device) -> None:
    """Forward and backward."""
    x, weight, labels = example(64, 64, 512, torch.float32, device)
    check_captured(lambda x, w: linear_cross_entropy(x, w, labels, 32), [x, weight], device)


assert cross_entropy
