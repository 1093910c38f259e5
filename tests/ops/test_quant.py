"""Weights of low precision: what is lost in a round trip, and products against dequantised ones in float64."""

import pytest
import torch
from torch import Tensor

from alloy.ops.cpu.quant import FEW_WEIGHTS, has_bf16, has_vnni, plain
from alloy.ops.quant import WEIGHTS, LowWeight, Weights, dequantize, lay_out, low_experts, low_linear, quantize

# below and above the size from which int8 has a kernel of its own, and inputs that are no multiple of a block
SHAPES = [(17, 33), (48, 64), (2050, 1040)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tolerance(weight: LowWeight) -> float:
    """Relative error of a product: that of a 16-bit fixed-point input, of bfloat16 in and out, or of fp32."""
    if weight.scale is not None and weight.codes.is_mkldnn:
        return 2e-4
    return 8e-3


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int8_is_within_half_a_step(outputs: int, inputs: int) -> None:
    """Every weight is at most half a step off, the largest uses nearly all codes, and the second trip loses nothing."""
    weight = draw(outputs, inputs) * torch.logspace(-6, 3, outputs)[:, None]
    weight[3] = 0
    low = quantize(weight, "int8")
    assert low.scale is not None
    scale = low.scale.float()
    back = dequantize(low)
    assert ((back - weight).abs() <= scale[:, None] * 0.5001).all()
    assert back[3].eq(0).all()
    largest = low.codes.abs().amax(1)
    assert largest[torch.arange(outputs) != 3].min() >= 126
    assert int(low.codes.min()) >= -127
    again = quantize(back, "int8")
    assert torch.equal(dequantize(again), back) or (dequantize(again) - back).abs().max() <= scale.max() * 0.5001
    assert low.nbytes == outputs * inputs + 2 * outputs


def test_bf16_is_a_cast() -> None:
    """Every weight is the nearest bfloat16."""
    weight = draw(33, 17)
    assert torch.equal(dequantize(quantize(weight, "bf16")), weight.bfloat16().float())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_keeps_the_matrix(kind: Weights, shape: tuple[int, int]) -> None:
    """The order that a kernel reads holds the same numbers in the same bytes."""
    low = quantize(draw(*shape), kind)
    laid = lay_out(low)
    assert torch.equal(plain(laid.codes), low.codes)
    assert torch.equal(dequantize(laid), dequantize(low))
    assert laid.codes.nbytes == low.codes.nbytes
    if kind == "bf16":
        assert laid.codes.is_mkldnn == has_bf16()
    else:
        assert laid.codes.is_mkldnn == (has_vnni() and low.codes.numel() >= FEW_WEIGHTS)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 1), (33,), (0,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(kind: Weights, shape: tuple[int, int], rows: tuple[int, ...], has_bias: bool) -> None:
    """Any number of rows, strided: as the dequantised matrix in float64."""
    outputs, inputs = shape
    low = lay_out(quantize(draw(outputs, inputs), kind))
    x = draw(*rows, inputs + 3, seed=1)[..., 2:-1]
    bias = draw(outputs, seed=2) if has_bias else None
    y = low_linear(x, low, bias)
    truth = x.double() @ dequantize(low).double().T
    truth = truth if bias is None else truth + bias
    assert y.shape == (*rows, outputs)
    assert y.dtype == x.dtype
    assert (y - truth).norm() <= tolerance(low) * truth.norm()
    narrow = low_linear(x.bfloat16(), low, bias)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - truth).norm() <= 1.5e-2 * truth.norm()


@pytest.mark.skipif(not has_vnni(), reason="the kernel for large int8 matrices needs VNNI")
def test_rows_do_not_meet() -> None:
    """A row has its own unit: beside rows of other sizes, zeros and NaN its answer stays what it is alone."""
    low = lay_out(quantize(draw(2050, 1040), "int8"))
    x = draw(5, 1040, seed=1) * torch.tensor([1e-6, 1.0, 0.0, 1e6, 1.0])[:, None]
    x[4, 7] = torch.nan
    y = low_linear(x, low)
    for i in range(4):
        alone = low_linear(x[i : i + 1], low)[0]
        assert (y[i] - alone).norm() <= 1e-4 * alone.norm()
    assert y[2].eq(0).all()
    assert y[4].isnan().all()
    assert low_linear(x[4:], low).isnan().all()
    # a row with one large number keeps the others to 2^-16 of it
    x = draw(1, 1040, seed=3)
    x[0, 0] = 1000
    truth = x.double() @ dequantize(low).double().T
    assert (low_linear(x, low) - truth).norm() <= 1e-3 * truth.norm()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("width", "ffn"), [(33, 17), (64, 48)])
def test_experts(kind: Weights, tokens: int, gated: bool, width: int, ffn: int) -> None:
    """Routed experts, one token and many, against a loop over float64 matrices."""
    x, weights = draw(tokens, width), draw(tokens, 3, seed=1).sigmoid()
    chosen = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i))[:3] for i in range(tokens)])

    def experts(rows: int, columns: int, seed: int) -> list[LowWeight]:
        return [lay_out(quantize(matrix * columns**-0.5, kind)) for matrix in draw(7, rows, columns, seed=seed)]

    up, down = experts(ffn, width, 2), experts(width, ffn, 3)
    gate = experts(ffn, width, 4) if gated else None
    activation = "silu" if gated else "relu2"
    y = low_experts(x, chosen, weights, up, down, gate, activation)
    truth = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for expert, weight in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            inner = x[t].double() @ dequantize(up[expert]).double().T
            if gate is None:
                hidden = inner.relu() ** 2
            else:
                hidden = torch.nn.functional.silu(x[t].double() @ dequantize(gate[expert]).double().T) * inner
            truth[t] += weight * (hidden @ dequantize(down[expert]).double().T)
    assert y.dtype == x.dtype
    assert (y - truth).norm() <= 1.5e-2 * truth.norm()


def test_a_gradient_is_refused() -> None:
    """Nothing is dropped silently."""
    low = lay_out(quantize(draw(16, 16), "int8"))
    x = draw(1, 16).requires_grad_()
    with pytest.raises(ValueError, match="pass no gradient"):
        low_linear(x, low)
    with torch.no_grad():
        low_linear(x, low)
