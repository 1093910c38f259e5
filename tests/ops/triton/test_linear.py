"""The linear map of few rows against float64, in every configuration; what it leaves to the library."""

import pytest
import torch
from torch import Tensor

from alloy.ops import linear, use_backend
from alloy.ops.triton import tuning

kernels = pytest.importorskip("alloy.ops.triton.linear")

CANDIDATES = [(op, config) for op in ("linear_one", "linear_few") for config in tuning.CANDIDATES[op]]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def make(device: torch.device, rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(inputs + outputs)
    shapes = ((*rows, inputs), (outputs, inputs), (outputs,))
    return [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize(("op", "config"), CANDIDATES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(1064, 33), (136, 70)])
def test_few_rows_equal_float64(
    inputs: int, outputs: int, op: str, config: tuning.Config, device: torch.device
) -> None:
    """Sizes that no block divides, inputs that are split and that are not, with and without bias."""
    for rows in ((1, 1),) if op == "linear_one" else ((2,), (1, 7), (16,)):
        for has_bias in (False, True):
            x, weight, bias = make(device, rows, inputs, outputs, torch.float16)
            with use_backend("triton"), tuning.override(op, config):
                y = linear(x, weight, bias if has_bias else None)
                again = linear(x, weight, bias if has_bias else None)
            want = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
            assert y.shape == (*rows, outputs)
            assert relative(y, want) < 4e-3
            assert torch.equal(y, again)


def test_what_needs_a_gradient_or_has_another_form_is_the_librarys(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows, no rows, fp32, autocast, inputs that 16-byte loads do not divide, strided rows, and anything that learns."""

    def fail(*_: object) -> Tensor:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernels, "_linear", fail)
    x, weight, bias = make(device, (3,), 64, 40, torch.bfloat16)
    many, none = x.repeat(6, 1), x[:0]
    with use_backend("triton"):
        for a, w in ((many, weight), (none, weight), (x.float(), weight.float()), (x[:, 1:], weight[:, 1:])):
            assert linear(a, w).shape == (len(a), 40)
        assert linear(many[::2, :][:3], weight).shape == (3, 40)
        with torch.autocast(device.type, torch.bfloat16):
            assert linear(x.float(), weight.float()).dtype == torch.bfloat16
        weight.requires_grad_()
        linear(x, weight, bias).sum().backward()
        assert weight.grad is not None
        with torch.no_grad(), pytest.raises(AssertionError, match="the kernel was called"):
            linear(x, weight)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "config"), CANDIDATES, ids=str)
def test_real_sizes_compile_and_repeat_in_a_graph(op: str, config: tuning.Config, device: torch.device) -> None:
    """A chain of maps, each reading what the one before has just written."""
    rows = (1,) if op == "linear_one" else (8,)
    x, first, _ = make(device, rows, 2688, 4096, torch.bfloat16)
    second = make(device, rows, 4096, 2688, torch.bfloat16)[1] / 64
    first = first / 50

    def f(x: Tensor) -> Tensor:
        for _ in range(20):
            x = linear(linear(x, first), second)
            x = x / x.norm(dim=-1, keepdim=True) * 50
        return x

    with torch.no_grad(), use_backend("triton"), tuning.override(op, config):
        want = f(x)
        one = linear(x, first)
        assert relative(one, x.double() @ first.double().T) < 4e-3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = f(x)
        for _ in range(20):
            y.zero_()
            graph.replay()
            assert torch.equal(y, want)
        compiled = torch.compile(lambda x: linear(x, first), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), one)
