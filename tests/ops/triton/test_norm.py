"""The norm kernels against the reference in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from alloy.ops import add_rms_norm, gated_rms_norm, rms_norm, use_backend

pytest.importorskip("triton")
from twins import check, check_captured, check_compiled, draw, error, gpu, run

from alloy.ops.triton import norm, tuning

FORWARD, BACKWARD = tuning.CANDIDATES["rms_norm"], tuning.CANDIDATES["rms_norm_backward"]
DTYPES = [torch.float32, gpu(torch.bfloat16), gpu(torch.float16)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5)


def gated(x: Tensor, gate: Tensor, weight: Tensor, size: int) -> Tensor:
    return gated_rms_norm(x, gate, weight, 1e-5, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 128, gpu(2688), gpu(4480), gpu(10240), gpu(2045)])
def test_rms_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of rows of a view that is not contiguous, and of one row."""
    check(lambda x, w: plain(x[:, 1:5, 8 : 8 + width], w), [draw(3, 7, width + 24), draw(width)], dtype, device)
    check(plain, [draw(width), draw(width, seed=1)], dtype, device)


def test_cast_first_rounds_before_the_weight(device: torch.device) -> None:
    """Results of the reference in bf16, but for last bits; fp32 weights give fp32 results."""
    x, weight = draw(9, 96).to(device, torch.bfloat16), draw(96, seed=1).to(device, torch.bfloat16)
    op = partial(rms_norm, eps=1e-5, cast_first=True)
    with use_backend("triton"):
        got = run(op, [x, weight])
        assert op(x, weight.float()).dtype == torch.float32
    with use_backend("torch"):
        want = run(op, [x, weight])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b.double()) < 8e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "size"), [(3, 40), (2, 300), gpu(8, 1280), gpu(8, 512), gpu(1, 10240), gpu(4, 128), gpu(5, 77)]
)
def test_gated_rms_norm(groups: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """x and the gate are views of one wider array."""
    width = groups * size

    def op(wide: Tensor, weight: Tensor) -> Tensor:
        return gated(wide[..., :width], wide[..., width + 8 : 2 * width + 8], weight, size)

    check(op, [draw(2, 3, 2 * width + 24), draw(width)], dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, gpu(2048), gpu(4480)])
def test_add_rms_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Both results, both gradients."""
    inputs = [draw(2, 7, width + 24), draw(2, 4, width, seed=1), draw(width, seed=2)]
    check(lambda x, r, w: add_rms_norm(x[:, 1:5, 8 : 8 + width], r, w, 1e-5), inputs, dtype, device)


def test_add_rms_norm_keeps_a_wide_residual(device: torch.device) -> None:
    """An fp32 stream under bf16 layers: the total is exact, each gradient has its input's dtype; one result is enough."""
    x, residual, weight = draw(5, 48), draw(5, 48, seed=1), draw(48, seed=2)
    inputs = [x.to(device, torch.bfloat16), residual.to(device, torch.float32), weight.to(device, torch.float32)]
    op = partial(add_rms_norm, eps=1e-5)
    with use_backend("triton"):
        got = run(op, inputs)
        (alone,) = run(lambda x, r, w: op(x, r, w)[0], inputs)[1:2]
        total = run(lambda x, r, w: op(x, r, w)[1] + 0 * w, inputs)
    with use_backend("torch"):
        want = run(op, inputs)
        (wanted,) = run(lambda x, r, w: op(x, r, w)[0], inputs)[1:2]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b.double()) < (8e-3 if a.dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(got[1], want[1])
    assert error(alone, wanted.double()) < 8e-3
    assert torch.equal(total[2], total[2])
    assert total[1].dtype == torch.bfloat16


@pytest.mark.parametrize("configs", [*zip(FORWARD, BACKWARD, strict=True)])
@pytest.mark.parametrize("size", [300, gpu(1280), gpu(4480)])
def test_every_configuration(size: int, configs: tuple[tuning.Config, ...], device: torch.device) -> None:
    """Several rows a program, chunks that end within the group."""
    for op in ("rms_norm", "add_rms_norm", "gated_rms_norm"):
        assert tuning.CANDIDATES[op] == FORWARD
        assert all(config in BACKWARD for config in tuning.CANDIDATES[f"{op}_backward"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 5000 if device.type == "cuda" else 11
    with tuning.override("gated_rms_norm", configs[0]), tuning.override("gated_rms_norm_backward", configs[1]):
        op = partial(gated, size=size)
        check(op, [draw(rows, 2 * size), draw(rows, 2 * size, seed=1), draw(2 * size, seed=2)], dtype, device)


def test_zeros_and_empty_rows(device: torch.device) -> None:
    """Zeros have finite gradients; no rows, a zero gradient of the weight."""
    zeros, weight = torch.zeros(3, 40, device=device), torch.ones(40, device=device)
    with use_backend("triton"):
        y, dx, _ = run(plain, [zeros, weight])
        assert not y.any()
        assert dx.isfinite().all()
        y, dx, dweight = run(plain, [zeros[:0], weight])
    assert y.shape == dx.shape == (0, 40)
    assert not dweight.any()


def test_compiles_without_breaks(device: torch.device) -> None:
    """In one graph with its backward."""
    check_compiled(plain, [draw(5, 40), draw(40)], device)
    check_compiled(partial(gated, size=20), [draw(5, 40), draw(5, 40, seed=1), draw(40)], device)
    op = partial(add_rms_norm, eps=1e-5)
    check_compiled(op, [draw(5, 40), draw(5, 40, seed=1), draw(40)], device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graph_capture(device: torch.device) -> None:
    """Forward and backward."""
    check_captured(plain, [draw(500, 512), draw(512)], device)
    check_captured(partial(gated, size=128), [draw(50, 512), draw(50, 512, seed=1), draw(512)], device)
    check_captured(partial(add_rms_norm, eps=1e-5), [draw(50, 512), draw(50, 512, seed=1), draw(512)], device)


assert norm
