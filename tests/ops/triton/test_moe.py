"""Routing and experts in Triton against the reference in float64."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alloy.models.checkpointing import run_block
from alloy.ops import expert_counts, moe_experts, route, router_logits, sequence_balance, use_backend

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(device, dtype)


def pick(tokens: int, experts: int, top_k: int, device: torch.device) -> Tensor:
    """Uneven choices: some experts get many tokens, the last of four or more none."""
    g = torch.Generator().manual_seed(tokens + experts)
    lean = torch.randn(experts, generator=g)
    if experts >= max(4, top_k + 1):
        lean[-1] = -100
    return (torch.randn(tokens, experts, generator=g) + lean).topk(top_k).indices.to(device)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b).norm() / b.norm().clamp(min=1e-30))


def check_experts(
    device: torch.device,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    ffn: int,
    dtype: torch.dtype,
    gated: bool = False,
    activation: str = "relu2",
    chosen: Tensor | None = None,
) -> None:
    """Values and all gradients, twice the same bits, with and without gradients."""
    forward, backward = (1e-5, 1e-4) if dtype == torch.float32 else (6e-3, 1e-2)
    chosen = pick(tokens, experts, top_k, device) if chosen is None else chosen
    x = draw(tokens, width, device=device, dtype=dtype)
    up = draw(experts, ffn, width, device=device, dtype=dtype, seed=1) / width**0.5
    down = draw(experts, width, ffn, device=device, dtype=dtype, seed=2) / ffn**0.5
    gate = draw(experts, ffn, width, device=device, dtype=dtype, seed=3) / width**0.5 if gated else None
    weights = draw(tokens, top_k, device=device, seed=4).sigmoid()
    dy = draw(tokens, width, device=device, dtype=dtype, seed=5)

    def compute(wide: bool) -> list[Tensor]:
        leaves = [
            t if t is None else (t.double() if wide else t).detach().requires_grad_()
            for t in (x, weights, up, down, gate)
        ]
        y = moe_experts(leaves[0], chosen, leaves[1], *leaves[2:], activation)
        given = [t for t in leaves if t is not None]
        return [y, *torch.autograd.grad(y, given, dy.to(y.dtype))]

    with use_backend("torch"):
        want = compute(True)
    with use_backend("triton"):
        ours, again = compute(False), compute(False)
        with torch.no_grad():
            plain = moe_experts(x, chosen, weights, up, down, gate, activation)
    assert error(plain, want[0]) < forward
    assert error(ours[0], want[0]) < forward
    for a, b in zip(ours[1:], want[1:], strict=True):
        assert a.isfinite().all()
        assert error(a, b) < backward
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(
    ("tokens", "gated", "activation"),
    [(1, True, "silu"), (5, False, "relu2"), (5, True, "relu"), (18, False, "gelu"), (18, True, "silu")],
)
def test_experts_in_fp32(device: torch.device, tokens: int, gated: bool, activation: str) -> None:
    """Few tokens stream, more are sorted; widths that fill no block; an expert without tokens."""
    check_experts(device, tokens, 6, 2, 40, 72, torch.float32, gated, activation)


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_on_few_experts(device: torch.device, top_k: int) -> None:
    """The others are empty."""
    chosen = torch.arange(2, 2 + top_k, device=device).expand(40, top_k)
    check_experts(device, 40, 8, top_k, 24, 16, torch.float32, chosen=chosen)


def test_an_expert_of_each_token(device: torch.device) -> None:
    """One token an expert, and a shape with more experts than pairs."""
    check_experts(device, 6, 12, 1, 24, 16, torch.float32, chosen=torch.arange(6, device=device)[:, None] * 2)


def gemm_cases() -> list[tuple[str, dict[str, int], int]]:
    """Every configuration that may run, with the tokens (of 4 experts, 2 a token) that lead to its block."""
    tuning = pytest.importorskip("alloy.ops.triton.tuning")
    pytest.importorskip("triton")
    __import__("alloy.ops.triton.moe_experts")
    tokens = {
        "moe_gemm_16": 14,
        "moe_gemm_64": 100,
        "moe_gemm_128": 300,
        "moe_wgrad": 300,
        "moe_pairs_up": 2,
        "moe_pairs_down": 2,
    }
    return [(op, config, n) for op, n in tokens.items() for config in tuning.CANDIDATES[op]]


@pytest.mark.parametrize("case", range(20))
@pytest.mark.parametrize("gated", [False, True])
def test_every_configuration(device: torch.device, case: int, gated: bool) -> None:
    """Gradients of every configuration; the interpreter multiplies fp16 but not bf16."""
    tuning = pytest.importorskip("alloy.ops.triton.tuning")
    cases = gemm_cases()
    assert len(cases) <= 20
    if case >= len(cases):
        pytest.skip("no such configuration")
    op, config, tokens = cases[case]
    on_cuda = device.type == "cuda"
    with tuning.override(op, config):
        if on_cuda:
            check_experts(device, tokens, 4, 2, 320, 584, torch.bfloat16, gated, "silu" if gated else "relu2")
        elif op == "moe_gemm_128" and config["BN"] == 128 and not gated:
            # the interpreter sees few rows, and one configuration whose rows are sorted beforehand
            check_experts(device, 70, 1, 1, 72, 136, torch.float16)
        else:
            pytest.skip("large for the interpreter")


def test_a_view_of_wider_rows_and_a_broadcast_gradient(device: torch.device) -> None:
    """x need not be contiguous, nor dy."""
    wide = draw(20, 64, device=device)
    up, down = draw(4, 16, 24, device=device), draw(4, 24, 16, device=device, seed=1)
    chosen, weights = pick(20, 4, 2, device), torch.ones(20, 2, device=device)
    found = []
    for backend, kind in (("torch", torch.float64), ("triton", torch.float32)):
        x = wide.to(kind).requires_grad_()
        with use_backend(backend):
            y = moe_experts(x[:, 8:32], chosen, weights.to(kind), up.to(kind), down.to(kind))
            found.append(torch.autograd.grad(y.sum(), x)[0])
    assert error(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("gated", [False, True])
def test_widths_that_are_no_whole_16_bytes(device: torch.device, gated: bool) -> None:
    """They are filled up with zeros."""
    check_experts(device, 9, 4, 2, 25, 18, torch.float32, gated, "silu")


def test_no_tokens(device: torch.device) -> None:
    """An empty batch has an empty answer and zero gradients."""
    up, down = draw(4, 16, 24, device=device).requires_grad_(), draw(4, 24, 16, device=device)
    with use_backend("triton"):
        empty = torch.zeros(0, 2, device=device)
        assert moe_experts(up[0, :0], empty.long(), empty, up, down).shape == (0, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, r"up is \(4, 16, 24\) torch.bfloat16"),
        ({"activation": "tanh"}, 'activation = "tanh"; known: relu2'),
        ({"down": 5}, r"down is \(5, 24, 16\)"),
        ({"stride": 2}, "last dimension must be contiguous"),
    ],
)
def test_experts_refuse(device: torch.device, change: dict, message: str) -> None:
    """Shapes that the kernels do not take."""
    x = torch.zeros(3, 24, change.get("stride", 1), device=device)[..., 0]
    up = torch.zeros(4, 16, 24, device=device, dtype=change.get("dtype", torch.float32))
    down = torch.zeros(change.get("down", 4), 24, 16, device=device)
    chosen = torch.zeros(3, 1, dtype=torch.int64, device=device)
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        moe_experts(x, chosen, torch.ones(3, 1, device=device), up, down, None, change.get("activation", "relu2"))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_k"),
    [(12, 1, 1, 3), (24, 4, 2, 5), (12, 3, 1, 4), (24, 2, 2, 12), (128, 1, 1, 6), (512, 1, 1, 22), (256, 8, 4, 8)],
)
@pytest.mark.parametrize(("normalize", "scale", "biased"), [(True, 2.5, True), (False, 1.0, False)])
def test_route_equals_the_reference(
    device: torch.device,
    scoring: str,
    experts: int,
    groups: int,
    top_groups: int,
    top_k: int,
    normalize: bool,
    scale: float,
    biased: bool,
) -> None:
    """The same experts, weights and scores, and gradients through both."""
    logits = draw(7, experts, device=device).requires_grad_()
    bias = draw(experts, device=device, seed=9) * 0.3 if biased else None
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            chosen, weights, scores = route(
                logits,
                bias,
                top_k,
                scoring=scoring,
                num_groups=groups,
                top_groups=top_groups,
                normalize=normalize,
                scale=scale,
            )
        order = chosen.argsort(1)
        weights = weights.gather(1, order)
        toward = torch.arange(top_k, device=device)
        found.append(
            (
                chosen.gather(1, order),
                weights,
                scores,
                torch.autograd.grad((weights * toward).sum(), logits, retain_graph=True)[0],
                torch.autograd.grad((scores * draw(7, experts, device=device)).sum(), logits, retain_graph=True)[0],
                torch.autograd.grad(weights.square().sum() + scores.square().sum(), logits)[0],
            )
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_route_takes_the_lowest_id_of_equal_choices_and_never_repeats(device: torch.device) -> None:
    """Ties, NaN and -inf leave ids in range; bf16 logits and strided rows are taken as they are."""
    logits = torch.zeros(4, 12, device=device, dtype=torch.bfloat16)
    logits[1, 5], logits[2], logits[3, :10] = 1.0, torch.nan, -torch.inf
    wide = torch.cat((logits, logits), 1)[:, :12]
    with use_backend("triton"):
        for given in (logits, wide):
            chosen, weights, scores = route(given, None, 3)
            assert chosen.tolist() == [[0, 1, 2], [5, 0, 1], [0, 1, 2], [10, 11, 0]]
            assert weights.dtype == scores.dtype == torch.float32
        assert route(logits.double(), None, 3)[1].dtype == torch.float64


def model(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
    """Router and experts as one function of x, x, and its parameters."""
    router = (draw(8, 64, device=device, seed=8) / 8).requires_grad_()
    up = (draw(8, 96, 64, device=device, dtype=dtype) / 8).requires_grad_()
    down = (draw(8, 64, 96, device=device, dtype=dtype) / 10).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        chosen, weights, _ = route(x.float() @ router.T, None, 2)
        return moe_experts(x, chosen, weights, up, down)

    return layer, draw(40, 64, device=device, dtype=dtype), [router, up, down]


def test_compiles_without_a_break(device: torch.device) -> None:
    """One graph, with gradients and without; the ops' fakes tell the truth."""
    layer, x, parameters = model(device, torch.float32)
    with use_backend("triton"):
        # the kernels' modules are imported before: that cannot be traced
        layer(x[:1])
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
        x = x if device.type == "cuda" else x[:6]
        ours, want = ([y, *torch.autograd.grad(y.sum(), parameters)] for y in (compiled(x), layer(x)))
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


@gpu
@on_gpu
@pytest.mark.parametrize("tokens", [3, 70])
def test_logits_of_bf16_are_as_exact_as_of_fp32(device: torch.device, tokens: int) -> None:
    """Values, and gradients of fp32 up to the last rounding to bf16."""
    x = draw(tokens, 320, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = draw(24, 320, device=device, dtype=torch.bfloat16, seed=1).requires_grad_()
    dlogits = draw(tokens, 24, device=device)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = wide[0] @ wide[1].T
    with use_backend("triton"):
        logits = router_logits(x, weight)
        with torch.no_grad():
            assert error(router_logits(x, weight), want) < 1e-5
    assert error(logits, want) < 1e-5
    exact = torch.autograd.grad(want, wide, dlogits.double())
    for a, b in zip(torch.autograd.grad(logits, (x, weight), dlogits), exact, strict=True):
        assert error(a, b) < error(b.bfloat16(), b) * 1.05


@gpu
@on_gpu
def test_balancing_asks_nothing_of_the_device(device: torch.device) -> None:
    """Counts and balance loss of packed rows, without synchronisation."""
    scores = draw(2, 50, 16, device=device).sigmoid().requires_grad_()
    chosen = scores.detach().topk(3, dim=-1).indices
    documents = torch.arange(50, device=device).expand(2, 50).div(13, rounding_mode="floor").clone()
    documents[:, 45:] = -1
    want = sequence_balance(scores.cpu(), chosen.cpu(), documents.cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts = expert_counts(chosen.flatten(0, 1), 16, (documents >= 0).flatten())
        loss = sequence_balance(scores, chosen, documents)
        (gradient,) = torch.autograd.grad(loss, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), want)
    assert counts.sum() == 2 * 45 * 3
    assert not gradient[:, 45:].any()


@gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
def test_is_captured_in_a_graph(device: torch.device, tokens: int) -> None:
    """Other tokens through the same graph, without synchronisation; the backward too."""
    layer, x, parameters = model(device, torch.bfloat16)
    x = x[:tokens].clone()

    def run() -> list[Tensor]:
        with torch.no_grad():
            plain = layer(x)
        return [plain, layer(x), *torch.autograd.grad(layer(x).sum(), parameters)]

    with use_backend("triton"):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        x.copy_(x.flip(0) * 0.5 + 0.1)
        graph.replay()
        for a, b in zip(found, run(), strict=True):
            assert torch.equal(a, b)


@gpu
@on_gpu
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "ffn"),
    [
        (1, 16, 6, 2688, 1856),
        (7, 16, 6, 2688, 1856),
        (24, 16, 6, 2688, 1856),
        (300, 16, 6, 2688, 1856),
        (9, 40, 22, 1024, 2688),
    ],
)
def test_experts_of_published_widths(
    device: torch.device, tokens: int, experts: int, top_k: int, width: int, ffn: int
) -> None:
    """bf16, forward and backward, at the widths of Nemotron 3 Nano and of LatentMoE."""
    check_experts(device, tokens, experts, top_k, width, ffn, torch.bfloat16)


def test_selective_checkpointing_keeps_the_products(device: torch.device) -> None:
    """The experts run once a step, and gradients are the same bits."""
    x = draw(40, 32, device=device)
    up, down = (draw(4, *shape, device=device) / 6 for shape in ((48, 32), (32, 48)))
    chosen, weights = pick(40, 4, 2, device), draw(40, 2, device=device).sigmoid()
    results, calls = [], []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: Any = (), kwargs: Any = None) -> Any:
            calls[-1] += str(func) == "alloy.moe_experts_kept.default"
            return cast(Any, func)(*args, **(kwargs or {}))

    for mode in ("none", "selective", "full"):
        leaves = [t.clone().requires_grad_() for t in (x, weights, up, down)]
        calls.append(0)
        with use_backend("triton"), Count():
            y = run_block(mode, lambda x, w, up, down: moe_experts(x.sin(), chosen, w, up, down), *leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert calls == [1, 1, 2]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
