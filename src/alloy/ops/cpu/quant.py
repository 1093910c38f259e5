"""Products with matrices of low precision on CPU cores. Kernels are PyTorch's and oneDNN's, chosen by kind and size:

    bf16                 oneDNN on weights in its own order; activations and results rounded to bfloat16
    int8, large          oneDNN's integer product (VNNI): a row becomes 16-bit fixed point, whose high and low bytes are two
                         rows of one product, summed in exact integers; so the activations lose 2^-16 of a row's largest
    int8, few weights    PyTorch's `_weight_int8pack_mm` for few rows, where oneDNN's call costs more than reading them;
                         activations and results rounded to bfloat16
    anything else        dequantised for the call

Measured on one AMD EPYC core (torch 2.13), one row of 512 times (5152, 512): fp32 346 us, bf16 165, int8 115 through oneDNN
and 168 through PyTorch; 512 rows: fp32 12.4 ms, bf16 5.9, int8 through oneDNN 6.6.
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
FEW_WEIGHTS = 1 << 21
# up to this many rows PyTorch's int8 product beats dequantising, in whole blocks of this many inputs
FEW_ROWS, BLOCK = 16, 16
# largest magnitude of a fixed-point number whose two bytes, of which the low one is signed too, fit
_LARGEST = 127 * 256 + 127
# moves fixed-point numbers to the low 16 bits of a float's mantissa, as 32896 and more: both bytes offset by 128
_SHIFT = torch.tensor(2.0**23 + 128 * 256 + 128)
_BYTES = torch.tensor([[0], [8]], dtype=torch.int32)
# rows below this are zero
_TINY = 1e-30
# the binding of torch starts sooner than the one of torch.ops
_int8_product = getattr(torch, "_weight_int8pack_mm")  # noqa: B009
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
    """The opposite of `lay_out`: codes (outputs, inputs) in plain order."""
    if not codes.is_mkldnn:
        return codes
    # oneDNN's int8 weights are stored transposed
    return codes.to_dense() if codes.dtype == torch.bfloat16 else codes.to_dense().t()


def low_linear(x: Tensor, weight: "LowWeight", bias: Tensor | None) -> Tensor:
    """As `alloy.ops.quant.low_linear`."""
    y = product(x.reshape(-1, x.shape[-1]), weight)
    y = y if bias is None else y + bias
    return (y if y.dtype == x.dtype else y.to(x.dtype)).view(*x.shape[:-1], y.shape[1])


def product(rows: Tensor, weight: "LowWeight") -> Tensor:
    """rows (rows, inputs) times `weight` (outputs, inputs): (rows, outputs) in the dtype that the kernel gives."""
    codes, scale = weight.codes, weight.scale
    count, inputs = rows.shape
    if codes.is_mkldnn and count:
        if scale is not None:
            return _fixed_point_product(rows.float(), codes, scale)
        return torch.ops.mkldnn._linear_pointwise(rows.to(torch.bfloat16), codes, None, "none", [], "")
    if scale is not None and 0 < count <= FEW_ROWS and inputs % BLOCK == 0:
        narrow = rows if rows.dtype == torch.bfloat16 else rows.to(torch.bfloat16)
        return _int8_product(narrow.contiguous(), codes, scale)
    matrix = plain(codes).float()
    return linear(rows.float(), matrix if scale is None else matrix.mul_(scale[:, None]))


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
    if x.shape[0] == 1:
        return _one_token(x, chosen, weights, up, down, gate, activation)
    act = ACTIVATIONS[activation]
    pairs = Pairs(chosen, len(up))

    def each(rows: Tensor, matrices: Sequence["LowWeight"]) -> Tensor:
        return torch.cat([product(rows[part], matrices[expert]) for expert, part in pairs.slices]).to(x.dtype)

    rows = x.index_select(0, pairs.token)
    inner = each(rows, up)
    hidden = act(inner) if gate is None else act(each(rows, gate)) * inner
    return pairs.add_up(each(hidden, down), weights).to(x.dtype)


def _one_token(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence["LowWeight"],
    down: Sequence["LowWeight"],
    gate: Sequence["LowWeight"] | None,
    activation: str,
) -> Tensor:
    """Decode of a single row: nothing is sorted, and what the kernels read is rounded once for all experts."""
    act = ACTIVATIONS[activation]
    experts = chosen[0].tolist()
    kind = torch.float32 if up[0].codes.is_mkldnn and up[0].scale is not None else torch.bfloat16
    row = x.to(kind)
    inner = torch.cat([product(row, up[expert]) for expert in experts]).to(x.dtype)  # (top_k, ffn)
    opened = None if gate is None else torch.cat([product(row, gate[expert]) for expert in experts]).to(x.dtype)
    hidden = (act(inner) if opened is None else act(opened) * inner).to(kind)
    y = torch.cat([product(each, down[expert]) for each, expert in zip(hidden.split(1), experts, strict=True)])
    return torch.mm(weights, y.to(weights.dtype)).to(x.dtype)


def _fixed_point_product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """rows fp32 (rows, inputs) times the packed matrix of `codes` and `scale`: fp32 (rows, outputs).

    Each row is a multiple of its own unit; a single one, whose operations are what costs, has it as a number.
    """
    factor = 1.0
    if rows.shape[0] == 1:
        lowest, highest = torch.aminmax(rows)
        unit = None
        factor = max(-lowest.item(), highest.item(), _TINY) / _LARGEST
        numbers = torch.add(_SHIFT, rows, alpha=1 / factor)
    else:
        unit = rows.abs().amax(1, keepdim=True).clamp_(min=_TINY).mul_(1 / _LARGEST)  # (rows, 1)
        numbers = (rows / unit).add_(_SHIFT)
    # (rows, 2, inputs), low and high bytes, where the integers lie in the mantissas
    bytes_ = (numbers.view(torch.int32)[:, None] >> _BYTES).to(torch.uint8)
    y = torch.ops.onednn.qlinear_pointwise.default(
        bytes_.flatten(0, 1), factor, 128, codes, scale, _NO_OFFSET, None, 1.0, 0, torch.float32, "none", [], ""
    )
    low, high = y.view(-1, 2, y.shape[1]).unbind(1)
    y = torch.add(low, high, alpha=256)
    return y if unit is None else y.mul_(unit)
