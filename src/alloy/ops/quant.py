"""Matrices stored in fewer bits than they are computed in, for inference: quantise, dequantise, multiply.

    "bf16"  every weight rounded to bfloat16
    "int8"  symmetric per output channel: codes = round(weight / scale) in -127 .. 127, scale = largest weight / 127

A decoded token is bound by the bytes of the weights, so that storing them narrower is the gain; activations and sums keep
the model's dtype as far as the kernel of a device lets them (`ops/cpu/quant.py`).

Paper: LLM.int8 (Dettmers et al., 2022), section 2.1, for weights per channel. arXiv:2208.07339
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.activation import ACTIVATIONS
from alloy.ops.cpu import quant as cpu
from alloy.ops.precision import wide

Weights = Literal["bf16", "int8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
LARGEST_CODE = 127


@dataclass(frozen=True, slots=True)
class LowWeight:
    """A matrix of low precision.

    Attributes:
        codes: (outputs, inputs) bfloat16 or int8; after `lay_out` perhaps in an order of the kernel's own
        scale: (outputs,), numbers that bfloat16 holds, in that dtype or fp32; None for bfloat16
    """

    codes: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)


@torch.no_grad()
def quantize(weight: Tensor, kind: Weights) -> LowWeight:
    """weight (outputs, inputs) of any floating dtype in low precision, in plain order."""
    if kind == "bf16":
        return LowWeight(weight.detach().to(torch.bfloat16).contiguous(), None)
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / LARGEST_CODE
    # rounded up to bfloat16, so that kernels may hold it as either dtype and no code passes the largest
    rounded = scale.to(torch.bfloat16)
    rounded = torch.where(rounded < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
    codes = weight / torch.where(rounded > 0, rounded, 1).float()[:, None]
    return LowWeight(codes.round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), rounded)


def dequantize(low: LowWeight) -> Tensor:
    """The fp32 matrix (outputs, inputs) that `low` stands for."""
    codes = cpu.plain(low.codes).float()
    return codes if low.scale is None else codes.mul_(low.scale[:, None])


def lay_out(low: LowWeight) -> LowWeight:
    """The same matrix in the order that its device's kernel reads fastest."""
    return LowWeight(*cpu.lay_out(low.codes, low.scale)) if low.codes.device.type == "cpu" else low


def low_linear(x: Tensor, weight: LowWeight, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, without gradient.

    Args:
        x: (..., inputs)
        weight: (outputs, inputs)
        bias: (outputs,)

    Returns:
        (..., outputs) in x's dtype
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("low_linear: weights of low precision pass no gradient on; train with the full ones")
    return backend.call("low_linear", x, weight, bias)


def low_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[LowWeight],
    down: Sequence[LowWeight],
    gate: Sequence[LowWeight] | None = None,
    activation: str = "relu2",
) -> Tensor:
    """As `alloy.ops.moe_experts` with one matrix of low precision an expert, without gradient.

    Args:
        x: (tokens, width)
        chosen: int64 (tokens, top_k)
        weights: (tokens, top_k)
        up: per expert (ffn, width)
        down: per expert (width, ffn)
        gate: per expert (ffn, width)
        activation: a name of `ACTIVATIONS`

    Returns:
        (tokens, width) in x's dtype
    """
    return backend.call("low_experts", x, chosen, weights, up, down, gate, activation)


def _low_linear(x: Tensor, weight: LowWeight, bias: Tensor | None) -> Tensor:
    """Reference: dequantise, then multiply."""
    matrix = dequantize(weight)
    y = F.linear(x.to(matrix.dtype), matrix)
    return (y if bias is None else y + bias).to(x.dtype)


def _low_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Sequence[LowWeight],
    down: Sequence[LowWeight],
    gate: Sequence[LowWeight] | None,
    activation: str,
) -> Tensor:
    """Reference: a loop over the experts that were hit."""
    act = ACTIVATIONS[activation]
    total = torch.zeros(x.shape, dtype=wide(x), device=x.device)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        inner = _low_linear(x[rows], up[expert], None)
        inner = act(inner) if gate is None else act(_low_linear(x[rows], gate[expert], None)) * inner
        y = _low_linear(inner, down[expert], None).to(total.dtype)
        total = total.index_add(0, rows, y * weights[rows, place, None])
    return total.to(x.dtype)


backend.add("low_linear", "torch", _low_linear)
backend.add("low_linear", "cpu", cpu.low_linear)
backend.add("low_experts", "torch", _low_experts)
backend.add("low_experts", "cpu", cpu.low_experts)
