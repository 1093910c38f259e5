"""The scan's kernels against the reference in float64: widths, ragged lengths, documents, walks, every configuration."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alloy.ops import backend, ssd_scan, use_backend
from alloy.ops.triton import tuning

# its import registers the configurations
pytest.importorskip("alloy.ops.triton.ssd_forward")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TENSORS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "h0")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 2,
    seq: int = 150,
    heads: int = 4,
    head_dim: int = 16,
    groups: int = 2,
    state: int = 16,
    plain: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the scan by name; x, B and C are views of one array, as a projection gives them."""
    g = torch.Generator().manual_seed(seed)
    sizes = [heads * head_dim, groups * state, groups * state, heads]
    packed = torch.randn(batch, seq, sum(sizes), generator=g)
    packed[..., sizes[0] : -heads] *= state**-0.25
    x, B, C, dt = packed.to(device, dtype).split(sizes, dim=-1)
    draw = {"D": (heads,), "dt_bias": (heads,), "h0": (batch, heads, head_dim, state)}
    rest = {name: None if plain else torch.randn(*shape, generator=g).to(device) for name, shape in draw.items()}
    return {
        "x": x.unflatten(2, (heads, head_dim)),
        "dt": dt,
        "A": (-torch.rand(heads, generator=g) * 2 - 0.05).to(device),
        "B": B.unflatten(2, (groups, state)),
        "C": C.unflatten(2, (groups, state)),
        **rest,
    }


def exact(inputs: dict[str, Any], **options: Any) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The inputs in float64, on the CPU and requiring gradients, and the reference's outputs."""
    leaves = {k: None if v is None else v.detach().cpu().double().requires_grad_() for k, v in inputs.items()}
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    with use_backend("torch"):
        return leaves, ssd_scan(**leaves, **options, return_state=True)


def run(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    with use_backend("triton"):
        return ssd_scan(**inputs, **options, return_state=True)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm())


def compare(inputs: dict[str, Any], forward: float, backward: float, **options: Any) -> None:
    """Values, the state, and the gradients of half the sum of their squares, a sum over tokens that does not cancel."""
    inputs = {k: None if v is None else v.detach().requires_grad_() for k, v in inputs.items()}
    leaves, want = exact(inputs, **options)
    got = run(inputs, **options)
    assert got[0].dtype == inputs["x"].dtype
    assert got[1].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < forward
    directions = [t.detach() for t in want]
    names = [name for name in TENSORS if inputs[name] is not None]
    theirs = torch.autograd.grad(want, [leaves[name] for name in names], directions)
    device = got[0].device
    ours = torch.autograd.grad(
        got, [inputs[name] for name in names], [d.to(device, t.dtype) for d, t in zip(directions, got, strict=True)]
    )
    errors = {name: relative(a, b) for name, a, b in zip(names, ours, theirs, strict=True)}
    assert max(errors.values()) < backward, " ".join(f"{k}={v:.1e}" for k, v in errors.items())


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    return (1e-5, 1e-4) if dtype == torch.float32 else (4e-3, 1e-2)


SMALL = [
    {"batch": 2, "seq": 150},
    {"batch": 3, "seq": 1, "head_dim": 5, "state": 7},
    {"batch": 1, "seq": 64, "heads": 3, "groups": 1, "plain": True},
    {"batch": 1, "seq": 300, "heads": 1, "groups": 1, "head_dim": 80, "state": 32},
    {"batch": 1, "seq": 70, "heads": 8, "groups": 8, "head_dim": 48, "state": 24},
    {"batch": 1, "seq": 65, "heads": 2, "groups": 1, "head_dim": 32, "state": 256},
    {"batch": 1, "seq": 65, "heads": 1, "groups": 1, "head_dim": 160, "state": 16},
    {"batch": 1, "seq": 130, "heads": 2, "groups": 1, "head_dim": 72, "state": 40},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SMALL)
def test_scan_equals_reference(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Values and all gradients, at widths that fill their tiles and at others."""
    compare(make(device, dtype, **shape), *tolerances(dtype))


def packed(device: torch.device) -> Tensor:
    """Documents that begin at a chunk's edge and inside, one of one token, padding, and a row of padding only."""
    rows = [
        [4] * 64 + [1] + [2] * 30 + [3] * 40 + [-1] * 15,
        [0] * 128 + [1] * 22,
        [-1] * 150,
        [7] * 60 + [8] * 3 + [-1] * 87,
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_documents(dtype: torch.dtype, device: torch.device) -> None:
    """No document sees another; NaN in the padding of the inputs and of the incoming gradient is not read."""
    documents = packed(device)
    inputs = make(device, dtype, batch=4, heads=2, groups=1, head_dim=24)
    leaves, want = exact(inputs, documents=documents)
    real = documents >= 0
    mask = real[..., None, None]
    for name in ("x", "B", "C"):
        inputs[name] = torch.where(mask, inputs[name], math.nan)
    inputs["dt"] = torch.where(mask[..., 0], inputs["dt"], math.nan)
    ours = [inputs[name].requires_grad_() for name in TENSORS]
    y, state = run(inputs, documents=documents)
    assert not y[~real].any()
    theirs = torch.autograd.grad(want, [leaves[name] for name in TENSORS], [t.detach() for t in want])
    dy = torch.where(mask, want[0].detach().to(device, dtype), math.nan)
    gradients = torch.autograd.grad((y, state), ours, (dy, want[1].detach().to(device, torch.float32)))
    forward, backward = tolerances(dtype)
    assert max(relative(a, b) for a, b in zip((y, state), want, strict=True)) < forward
    assert max(relative(a, b) for a, b in zip(gradients, theirs, strict=True)) < backward


def test_cu_seqlens(device: torch.device) -> None:
    """Boundaries, with and without the state of every document."""
    inputs = make(device, torch.float32, batch=1, heads=2)
    bounds = torch.tensor([0, 64, 65, 100, 150], dtype=torch.int32, device=device)
    compare(inputs, 1e-5, 1e-4, cu_seqlens=bounds)
    with use_backend("triton"):
        y = ssd_scan(**inputs, cu_seqlens=bounds)
    _, (want, _) = exact(inputs, cu_seqlens=bounds)
    assert relative(y, want.detach()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"dt_limit": (0.4, 1.1)},
        {"dt_softplus": False, "dt_limit": (0.2, 0.9)},
        {"dt_softplus": False, "dt_bias": None, "positive": True},
    ],
)
def test_step_sizes(options: dict[str, Any], device: torch.device) -> None:
    """Bounds and softplus as in the reference; a clamped step has no gradient."""
    inputs = make(device, torch.float32, batch=1, seq=70, heads=2)
    options = dict(options)
    if options.pop("positive", False):
        inputs["dt"] = inputs["dt"].abs()
    inputs.update({k: options.pop(k) for k in ("dt_bias",) if k in options})
    compare(inputs, 1e-5, 1e-4, **options)


@pytest.mark.parametrize("shift", [-1e4, -40.0, -12.0, 60.0, 1e4])
def test_extreme_steps_stay_finite(shift: float, device: torch.device) -> None:
    """Decays that underflow and steps that vanish."""
    inputs = make(device, torch.float32, batch=1, seq=70, heads=2)
    inputs["dt"] = inputs["dt"] + shift
    leaves = [inputs[name].detach().requires_grad_() for name in TENSORS]
    y, state = run(dict(zip(TENSORS, leaves, strict=True)))
    _, (want, want_state) = exact(inputs)
    assert relative(y, want.detach()) < 1e-5
    assert relative(state, want_state.detach()) < 1e-5
    gradients = torch.autograd.grad(y.sum() + state.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)


def test_products_beyond_the_range_of_float16(device: torch.device) -> None:
    """C B^T of float16 inputs may pass 65,504; the small steps by which it is multiplied bring it back."""
    inputs = make(device, torch.float16, batch=1, seq=70, heads=2, groups=1, state=64, plain=True)
    inputs["B"], inputs["C"] = inputs["B"] * 300, inputs["C"] * 300
    assert torch.einsum("lgn,mgn->lm", inputs["C"][0].double(), inputs["B"][0].double()).abs().max() > 65_504
    inputs["dt"] = inputs["dt"] - 10
    y, state = run(inputs)
    _, (want, want_state) = exact(inputs)
    assert relative(y, want.detach()) < 4e-3
    assert relative(state, want_state.detach()) < 4e-3


@pytest.mark.parametrize(
    ("op", "config"),
    [(op, c) for op in ("ssd_scan", "ssd_carries") for c in tuning.CANDIDATES[op]],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_every_configuration(op: str, config: dict[str, int], device: torch.device) -> None:
    """Values and gradients with each one of the shipped candidates, over several walks."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    size = (
        {"head_dim": 80, "state": 128, "seq": 1500}
        if device.type == "cuda"
        else {"head_dim": 48, "seq": 300, "heads": 2}
    )
    inputs = make(device, dtype, batch=1, groups=1, **size)
    with tuning.override(op, config):
        compare(inputs, *tolerances(dtype))


def test_runs_are_bit_equal_and_any_cut_continues(device: torch.device) -> None:
    """The same bits again; two prefills joined by the state equal one."""
    inputs = make(device, torch.float32, batch=1, seq=520, heads=1, groups=1)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for at in (63, 64, 259):
        left = {k: v[:, :at] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        right = {k: v[:, at:] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        y, state = run(left)
        rest, state = run({**right, "h0": state})
        torch.testing.assert_close(torch.cat([y, rest], dim=1), first[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state, first[1], atol=1e-4, rtol=1e-4)


def test_outputs_alone_and_in_float64(device: torch.device) -> None:
    """Only y used: its gradients; float64 is computed by the reference."""
    inputs = make(device, torch.float32, batch=1, seq=70)
    leaves, (want, _) = exact(inputs)
    ours = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    with use_backend("triton"):
        y = ssd_scan(**ours)
        wide = ssd_scan(**{k: v.double() for k, v in inputs.items()})
    assert relative(wide, want.detach()) < 1e-12
    got = torch.autograd.grad(y.square().sum(), list(ours.values()))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), list(leaves.values())), strict=True):
        assert relative(a, b) < 1e-4


def test_operator_is_well_formed(device: torch.device) -> None:
    """Schema, shapes on fake tensors and autograd registration."""
    i = make(device, torch.float32, batch=1, seq=70, heads=2, groups=1)
    args = (i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], None, True, 0.0, math.inf, i["h0"], None)
    backend.resolve("ssd_scan", "cpu")
    with use_backend("triton"):
        backend.resolve("ssd_scan", device.type)
    grads = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(
        torch.ops.alloy.ssd_scan, grads, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_refuses_strided_columns(device: torch.device) -> None:
    """The last dimension must be contiguous; nothing is copied behind the caller's back."""
    inputs = make(device, torch.float32)
    inputs["B"] = inputs["B"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"B has stride 2 in its last dimension; pass B.contiguous\(\)"):
        run(inputs)


REAL = [
    {"batch": 1, "seq": 4096, "heads": 16, "head_dim": 80, "groups": 1, "state": 128},
    {"batch": 2, "seq": 1000, "heads": 16, "head_dim": 64, "groups": 8, "state": 128},
    {"batch": 1, "seq": 777, "heads": 4, "head_dim": 128, "groups": 2, "state": 64},
    {"batch": 1, "seq": 130, "heads": 4, "head_dim": 256, "groups": 1, "state": 256},
    {"batch": 1, "seq": 333, "heads": 6, "head_dim": 112, "groups": 3, "state": 200},
]


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", REAL)
def test_real_widths(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """The shapes of published models and the largest allowed, with documents of several chunks."""
    inputs = make(device, dtype, **shape)
    compare(inputs, *tolerances(dtype))
    documents = torch.arange(shape["seq"], device=device).div(200, rounding_mode="floor").expand(shape["batch"], -1)
    compare(inputs, *tolerances(dtype), documents=torch.where(documents < 3, documents, 3))


@gpu
@pytest.mark.gpu
def test_cuda_graph_and_full_graph(device: torch.device) -> None:
    """Captured without a synchronisation, with documents; compiled without a break, forward and backward."""
    inputs = make(device, torch.bfloat16, batch=4, head_dim=80, state=128)
    documents = packed(device)
    want = run(inputs, documents=documents)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(inputs, documents=documents)
    got[0].fill_(math.nan)
    graph.replay()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])

    def loss(**kwargs: Any) -> Tensor:
        return ssd_scan(**kwargs, documents=documents).float().square().sum()

    results = []
    for fn in (loss, torch.compile(loss, fullgraph=True)):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        results.append(torch.autograd.grad(fn(**leaves), list(leaves.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
