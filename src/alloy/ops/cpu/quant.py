"""Products with matrices of low precision on CPU cores. Kernels are PyTorch's and oneDNN's, chosen by kind and size:

    bf16                 oneDNN on weights in its own order; activations and results rounded to bfloat16
    int8, large          oneDNN's integer product (VNNI): a row becomes 16-bit fixed point, whose high and low bytes are two
                         rows of one product, summed in exact integers; so the activations lose 2^-16 of a row's largest
    int8, few weights    PyTorch's `_weight_int8pack_mm` for few rows, where oneDNN's call costs more than reading them;
                         activations and results rounded to bfloat16
    anything else        dequantised for the call

Measured on one AMD EPYC core (torch 2.13), one row of 512 times (5152, 512): fp32 346 us, bf16 165, int8 115.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alloy.ops.activation import ACTIVATIONS
from alloy.ops.cpu.linear import HAS_ONEDNN, linear
from alloy.ops.cpu.moe import Pairs

if TYPE_CHECKING:
    from alloy.ops.quant import LowWeight

# below this many weights, oneDNN's integer product is slower than reading them in PyTorch's
FEW_WEIGHTS = 3 << 19
# up to this many rows PyTorch's int8 product beats dequantising, in whole blocks of this many inputs
FEW_ROWS, BLOCK = 16, 16
# largest magnitude of a fixed-point number whose two bytes, of which the low one is signed too, fit
_LARGEST = 127 * 256 + 127
# moves fixed-point numbers to the low 16 bits of a float's mantissa, as 32896 and more: both bytes offset by 128
_SHIFT = float(2**23 + 128 * 256 + 128)
_TINY = torch.finfo(torch.float32).tiny
_NO_OFFSET = torch.zeros(1, dtype=torch.int64)


def has_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 here without emulation that is slower than fp32."""
    return HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_vnni() -> bool:
    """Whether integer products are exact here: without VNNI, sums of two products overflow 16 bits."""
    return HAS_ONEDNN and bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def lay_out(codes: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """codes (outputs, inputs) and scale (outputs,) as `low_linear` reads them fastest."""
    if codes.numel() == 0 or codes.is_mkldnn:
        return codes, scale
    if scale is None:
        return (torch.ops.mkldnn._reorder_linear_weight(codes, 1) if has_bf16() else codes), None
    if codes.numel() < FEW_WEIGHTS or not has_vnni():
        return codes, scale
    return torch.ops.onednn.qlinear_prepack(codes, None), scale.float()


def plain(codes: Tensor) -> Tensor:
    """The opposite of `lay_out`."""
    if not codes.is_mkldnn:
        return codes
    # oneDNN's int8 weights are stored transposed
    return codes.to_dense() if codes.dtype == torch.bfloat16 else codes.to_dense().t()


def low_linear(x: Tensor, weight: "LowWeight", bias: Tensor | None) -> Tensor:
    """As `alloy.ops.quant.low_linear`."""
    codes, scale = weight.codes, weight.scale
    rows = x.reshape(-1, x.shape[-1])  # (rows, inputs)
    if scale is None and codes.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(rows.to(torch.bfloat16), codes, None, "none", [], "")
    elif scale is not None and codes.is_mkldnn:
        y = _fixed_point_product(rows, codes, scale)
    elif scale is not None and 0 < len(rows) <= FEW_ROWS and codes.shape[1] % BLOCK == 0:
        rows = rows.to(torch.bfloat16).contiguous()
        y = torch._weight_int8pack_mm(rows, codes, scale)
    else:
        matrix = plain(codes).float()
        y = linear(rows.float(), matrix if scale is None else matrix.mul_(scale[:, None]))
    y = y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def low_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence["LowWeight"],
    down: Sequence["LowWeight"],
    gate: Sequence["LowWeight"] | None,
    activation: str,
) -> Tensor:
    """As `alloy.ops.quant.low_experts`."""
    act = ACTIVATIONS[activation]
    if len(x) == 1:
        hit = [(expert, slice(i, i + 1)) for i, expert in enumerate(chosen[0].tolist())]
        pairs, rows = None, x.expand(len(hit), -1)
    else:
        pairs = Pairs(chosen, len(up))
        hit, rows = pairs.slices, x.index_select(0, pairs.token)

    def product(rows: Tensor, matrices: Sequence["LowWeight"]) -> Tensor:
        return torch.cat([low_linear(rows[part], matrices[expert], None) for expert, part in hit])

    inner = product(rows, up)
    hidden = act(inner) if gate is None else act(product(rows, gate)) * inner
    y = product(hidden, down)
    total = weights.to(y.dtype) @ y if pairs is None else pairs.add_up(y, weights)
    return total.to(x.dtype)


def _fixed_point_product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """rows (rows, inputs) times the matrix of `codes` and `scale`, fp32 (rows, outputs)."""
    rows = rows.float()
    unit = rows.abs().amax(1, keepdim=True).clamp_(min=_TINY).mul_(1 / _LARGEST)  # (rows, 1)
    numbers = (rows / unit).add_(_SHIFT).view(torch.int32)
    low_high = torch.empty(len(rows), 2, rows.shape[1], dtype=torch.uint8)
    low_high[:, 0].copy_(numbers)
    low_high[:, 1].copy_(numbers.bitwise_right_shift_(8))
    bytes_ = low_high.view(-1, rows.shape[1])
    y = torch.ops.onednn.qlinear_pointwise(
        bytes_, 1.0, 128, codes, scale, _NO_OFFSET, None, 1.0, 0, torch.float32, "none", [], ""
    ).view(len(rows), 2, -1)
    return torch.add(y[:, 0], y[:, 1], alpha=256).mul_(unit)
