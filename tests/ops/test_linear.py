"""The linear product of the CPU backend against float64: values and gradients."""

import itertools
import math

import pytest
import torch

from alloy.ops.backend import use_backend
from alloy.ops.cpu import compiled
from alloy.ops.linear import linear


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 1), (5, 7), (201,), (0,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 17), (515, 8), (515, 258)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients(rows: tuple[int, ...], inputs: int, outputs: int, has_bias: bool) -> None:
    """Any shape, strided input, with and without a gradient; a summed output has a gradient of stride 0."""
    generator = torch.Generator().manual_seed(0)
    # the input is a slice of something wider
    x = torch.randn(*rows, inputs + 3, generator=generator)[..., 2:-1].detach().requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
    bias = torch.randn(outputs, generator=generator, requires_grad=True) if has_bias else None
    given = [t for t in (x, weight, bias) if t is not None]
    double = [t.detach().double().requires_grad_() for t in given]
    truth = double[0] @ double[1].T + (double[2] if has_bias else 0)

    y = linear(x, weight, bias)
    assert y.shape == (*rows, outputs)
    torch.testing.assert_close(y, truth.float(), atol=3e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), truth.float(), atol=3e-4, rtol=1e-4)
    for factor in (torch.randn(y.shape, generator=generator), torch.ones(())):
        grads = torch.autograd.grad((y * factor).sum(), given, retain_graph=True)
        expected = torch.autograd.grad((truth * factor).sum(), double, retain_graph=True)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=5e-3, rtol=1e-3)
    grads = torch.autograd.grad(y.sum(), given)
    for ours, theirs in zip(grads, torch.autograd.grad(truth.sum(), double), strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=5e-3, rtol=1e-3)


def test_other_dtypes_and_autocast_are_torch() -> None:
    """bf16 and autocast go to torch; a frozen weight gets no gradient."""
    x, weight = torch.randn(5, 33), torch.randn(17, 33)
    low = linear(x.bfloat16(), weight.bfloat16())
    assert torch.equal(low, torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    x.requires_grad_()
    linear(x, weight).square().sum().backward()
    assert weight.grad is None
    bias = torch.zeros(17, requires_grad=True)
    linear(x.detach(), weight, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [5.0] * 17
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight[:, 1:])
    with use_backend("torch"):
        torch.testing.assert_close(linear(x, weight), x @ weight.T)


@pytest.mark.parametrize(
    "shape", [(1, 33), (1, 1, 33), (2, 33), (4, 1, 33), (3, 2, 33), (8, 600), (19, 33), (0, 33), (33,)]
)
@pytest.mark.parametrize("outputs", [1, 7, 16, 34])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_matmul(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    """Few rows and many, odd numbers of outputs, strided weights, with the strides of a new tensor."""
    g = torch.Generator().manual_seed(outputs)
    x = torch.randn(*shape, generator=g)
    weight = torch.randn(outputs, 2 * shape[-1], generator=g)[:, : shape[-1]]
    b = torch.randn(outputs, generator=g) if bias else None
    y = linear(x, weight, b)
    want = (x.double() @ weight.double().T + (0 if b is None else b.double())).float()
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    assert y.is_contiguous()


@pytest.mark.parametrize("width", [4, 8, None])
def test_the_compiled_loop_reads_and_writes_what_it_should(width: int | None) -> None:
    """Against float64, for sizes around its tiles and vectors; what lies around x, w and y is NaN, and stays."""
    pytest.importorskip("llvmlite")
    loop = compiled.few_rows(width)
    assert loop is not None
    generator = torch.Generator().manual_seed(0)

    def framed(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((math.prod(shape) + 64,), torch.nan)
        return whole, whole[32:-32].view(shape).copy_(torch.randn(shape, generator=generator))

    for rows, outputs, inputs in itertools.product((1, 2, 4, 5, 9), (1, 3, 4, 6), (1, 3, 16, 31, 33, 100)):
        (_, x), (_, w), (whole, y) = framed(rows, inputs), framed(outputs, inputs), framed(rows, outputs)
        loop(x.data_ptr(), w.data_ptr(), y.data_ptr(), rows, outputs, inputs)
        torch.testing.assert_close(y, (x.double() @ w.double().T).float(), atol=1e-4, rtol=1e-4)
        assert whole[:32].isnan().all()
        assert whole[-32:].isnan().all()
    loop(x.data_ptr(), w.data_ptr(), y.data_ptr(), rows, outputs, 0)
    assert not y.any()


def test_infinity_and_nan_pass_through_the_loop() -> None:
    """As in torch, and only in their own row and column."""
    x, w = torch.randn(5, 40), torch.randn(7, 40).abs()
    x[1, 3], x[2, 39], w[4, 0] = torch.inf, torch.nan, -torch.inf
    with torch.inference_mode():
        y = linear(x, w)
    torch.testing.assert_close(y, x @ w.T, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 33), (5, 1, 33), (2, 4, 33), (24, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_take_the_loop(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only values are wanted, with the same values as where llvmlite is missing; strided input too."""
    pytest.importorskip("llvmlite")
    x, weight = torch.randn(*shape[:-1], 40)[..., 3:36], torch.randn(19, 33)
    b = torch.randn(19) if bias else None
    taken: list[int] = []
    real = compiled.few_rows()
    assert real is not None

    def counted(*given: int) -> None:
        taken.append(given[3])
        real(*given)

    monkeypatch.setattr("alloy.ops.cpu.linear.few_rows", lambda: counted)
    with torch.inference_mode():
        y = linear(x, weight, b)
    assert taken == [math.prod(shape[:-1])]
    assert y.shape == (*shape[:-1], 19)
    with torch.no_grad():
        plain = linear(x, weight, b)
    with torch.inference_mode():
        linear(x[..., :0], weight[:, :0])
        linear(x.double(), weight.double())
        linear(x, torch.randn(66, 19).t()[:, :33])
        linear(torch.randn(9, 512), torch.randn(256, 512))
    assert len(taken) == 1
    monkeypatch.setattr("alloy.ops.cpu.linear.few_rows", lambda: None)
    with torch.inference_mode():
        missing = linear(x, weight, b)
    torch.testing.assert_close(y, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y, missing, atol=1e-4, rtol=1e-4)


def test_several_cores_keep_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core takes many weights alone only where it is alone."""
    pytest.importorskip("llvmlite")
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr("alloy.ops.cpu.linear.few_rows", lambda: lambda *given: taken.append(given))
    x, weight = torch.randn(3, 512), torch.randn(256, 512)
    for threads, count in ((2, 0), (1, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.inference_mode():
            linear(x, weight)
        assert len(taken) == count


def test_a_processor_that_llvm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes, and one line says so."""
    binding = pytest.importorskip("llvmlite.binding")

    def fail() -> None:
        raise RuntimeError("failed to get host cpu features")

    said: list[str] = []
    monkeypatch.setattr(binding, "get_host_cpu_features", fail)
    monkeypatch.setattr(compiled.log, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr("alloy.ops.cpu.linear.few_rows", compiled.few_rows.__wrapped__)
    x, weight = torch.randn(3, 33), torch.randn(7, 33)
    with torch.inference_mode():
        y = linear(x, weight)
    torch.testing.assert_close(y, x @ weight.T)
    assert len(said) == 1
    assert "failed to get host cpu features" in said[0]
