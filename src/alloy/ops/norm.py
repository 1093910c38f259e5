"""Normalisations whose statistics and weight product are computed in fp32.

Papers: RMSNorm (Zhang and Sennrich, 2019), eq. 4. arXiv:1910.07467; Mamba-2 (Dao and Gu, 2024), section 7. arXiv:2405.21060
"""

import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.cpu import norm as cpu
from alloy.ops.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, cast_first: bool = False) -> Tensor:
    """x / rms(x) * weight over the last dimension.

    Args:
        x: (..., width)
        weight: (width,)
        eps: added to the mean square
        cast_first: cast to x's dtype before the weight product (Llama) instead of once at the end (Nemotron)

    Returns:
        (..., width) in x's dtype; with `cast_first` in the dtype that x and weight promote to
    """
    return backend.run("rms_norm", x, weight, eps, cast_first)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMSNorm of x * silu(gate), separately in groups of `group_size` channels; the gate comes before the norm.

    Args:
        x: (..., width)
        gate: (..., width)
        weight: (width,)
        eps: added to the mean square
        group_size: channels that share one mean square; divides width

    Returns:
        (..., width) in x's dtype
    """
    if x.shape[-1] % group_size:
        raise ValueError(f"gated_rms_norm: width {x.shape[-1]} is not a multiple of group_size = {group_size}")
    return backend.run("gated_rms_norm", x, gate, weight, eps, group_size)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    """total = residual + x, and its RMSNorm: what lies between two layers of a residual stream, in one pass.

    Args:
        x: (..., width), what a layer adds to the stream
        residual: (..., width), the stream, perhaps in a wider dtype
        weight: (width,)
        eps: added to the mean square
        cast_first: as in `rms_norm`, of the total

    Returns:
        the normed total (..., width) in x's dtype; total (..., width) in the residual's dtype
    """
    return backend.run("add_rms_norm", x, residual, weight, eps, cast_first)


def layer_norm_1p(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with weight stored minus one (Nemotron-4): x (..., width), weight and bias (width,) -> like x."""
    kind = wide(x)
    return F.layer_norm(x.to(kind), (x.shape[-1],), weight.to(kind) + 1, bias.to(kind), eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> Tensor:
    kind = wide(x)
    if cast_first:
        return weight * F.rms_norm(x.to(kind), (x.shape[-1],), eps=eps).to(x.dtype)
    return F.rms_norm(x.to(kind), (x.shape[-1],), weight.to(kind), eps).to(x.dtype)


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    kind = wide(x)
    gated = (x.to(kind) * F.silu(gate.to(kind))).unflatten(-1, (-1, group_size))
    normed = F.rms_norm(gated, (group_size,), eps=eps).flatten(-2)
    return (normed * weight.to(kind)).to(x.dtype)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    total = (residual + x).to(residual.dtype)
    # the norm by what runs on the device
    return rms_norm(total, weight, eps, cast_first).to(x.dtype), total


backend.add("rms_norm", "torch", _rms_norm)
backend.add("rms_norm", "cpu", cpu.rms_norm)
backend.add("rms_norm", "triton", "alloy.ops.triton.norm:rms_norm")
backend.add("add_rms_norm", "torch", _add_rms_norm)
backend.add("add_rms_norm", "cpu", cpu.add_rms_norm)
backend.add("add_rms_norm", "triton", "alloy.ops.triton.norm:add_rms_norm")
backend.add("gated_rms_norm", "torch", _gated_rms_norm)
backend.add("gated_rms_norm", "cpu", cpu.gated_rms_norm)
backend.add("gated_rms_norm", "triton", "alloy.ops.triton.norm:gated_rms_norm")
