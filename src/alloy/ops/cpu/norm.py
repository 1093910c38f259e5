"""RMSNorm and gated RMSNorm for CPU cores: few passes over memory, and hand-written backwards that keep only the inputs.

Reference, formulas and papers: `alloy.ops.norm`.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops.precision import wide

# up to this many rows, a product of each with itself that adds `eps` costs less than passes over a column of norms
FEW_ROWS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> Tensor:
    """As `alloy.ops.rms_norm`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, cast_first)
    if x.dtype == weight.dtype == torch.float32:
        return x.mul(inverse_rms(x, eps)).mul_(weight)
    return _scaled(_normalized(x.to(wide(x)), eps)[0], x, weight, cast_first)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """As `alloy.ops.add_rms_norm`."""
    total = residual + x
    normed = rms_norm(total, weight, eps, cast_first)
    return (normed if normed.dtype == x.dtype else normed.to(x.dtype)), total.to(residual.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """As `alloy.ops.gated_rms_norm`."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, weight)):
        return _GatedRMSNorm.apply(x, gate, weight, eps, group_size)
    kind = wide(x)
    gated = F.silu(gate.to(kind)).mul_(x).unflatten(-1, (-1, group_size))
    return gated.mul_(inverse_rms(gated, eps)).flatten(-2).mul_(weight.to(kind)).to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension of x (..., width), as (..., 1)."""
    width = x.shape[-1]
    if x.dim() == 3 and x.shape[1] == 1 and len(x) <= FEW_ROWS:
        return torch.baddbmm(_constant(eps, x.dtype), x, x.transpose(1, 2), alpha=1 / width).rsqrt_()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / width).add_(eps).rsqrt_()


@cache
@torch.inference_mode(False)
def _constant(value: float, kind: torch.dtype) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=kind)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse = inverse_rms(x, eps)
    return x * inverse, inverse


def _scaled(normed: Tensor, x: Tensor, weight: Tensor, cast_first: bool) -> Tensor:
    """normed * weight in the dtype that `rms_norm` promises; normed (new, wide) may be overwritten."""
    if cast_first:
        return normed.to(x.dtype) * weight
    return normed.mul_(weight.to(normed.dtype)).to(x.dtype)


def _norm_backward(dnormed: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x for normed = x * inverse; dnormed is overwritten."""
    mean = (dnormed * normed).mean(-1, keepdim=True)
    return dnormed.addcmul_(normed, mean, value=-1).mul_(inverse)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> Tensor:
        normed, inverse = _normalized(x.to(wide(x)), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.cast_first = cast_first
        return _scaled(normed, x, weight, cast_first)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        dy = dy.to(normed.dtype)
        seen = normed.to(x.dtype) if ctx.cast_first else normed
        dweight = (dy * seen).flatten(0, -2).sum(0)
        dx = _norm_backward(dy * weight.to(dy.dtype), normed, inverse)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
        kind = wide(x)
        gated = F.silu(gate.to(kind)).mul_(x).unflatten(-1, (-1, group_size))
        inverse = inverse_rms(gated, eps)
        ctx.save_for_backward(x, gate, weight, inverse)
        return gated.mul_(inverse).flatten(-2).mul_(weight.to(kind)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, gate, weight, inverse = ctx.saved_tensors
        kind = inverse.dtype
        size = x.shape[-1] // inverse.shape[-2]
        wide_gate = gate.to(kind)
        opened = F.silu(wide_gate)
        normed = (opened * x).unflatten(-1, (-1, size)).mul_(inverse)
        dy = dy.to(kind)
        dweight = (dy * normed.flatten(-2)).flatten(0, -2).sum(0)
        dgated = _norm_backward((dy * weight.to(kind)).unflatten(-1, (-1, size)), normed, inverse).flatten(-2)
        dx = opened.mul_(dgated)
        dgate = torch.ops.aten.silu_backward(dgated.mul_(x), wide_gate)
        return dx.to(x.dtype), dgate.to(gate.dtype), dweight.to(weight.dtype), None, None
