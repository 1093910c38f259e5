"""Convolution and scan as one operator: the backward convolves again instead of keeping the result.

One pass of the convolution takes a tenth of the scan's backward and spares (tokens, channels) of memory, which is a fifth of
what a Mamba-2 block keeps. The gradients of x, B and C are laid side by side once, as the convolution's backward reads them.

Formulas: `alloy.ops.conv`, `alloy.ops.ssd`.
"""

from typing import Any, cast

import torch
from torch import Tensor

from alloy.ops.mamba_scan import _mamba_scan as parts
from alloy.ops.mamba_scan import split
from alloy.ops.precision import wide
from alloy.ops.triton import conv, ssd_backward, ssd_scan


def mamba_scan(
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    head_dim: int,
    groups: int,
    dt_limit: tuple[float, float],
    documents: Tensor | None,
) -> Tensor:
    """As `alloy.ops.mamba_scan.mamba_scan`."""
    state = (xbc.shape[2] - dt.shape[2] * head_dim) // (2 * groups)
    fits = conv_weight.shape[1] <= conv.MOST_TAPS and ssd_scan.num_parts(head_dim, state, xbc.dtype) == 1
    if wide(xbc) == torch.float64 or not xbc.shape[0] or not fits:
        return parts(xbc, dt, A, D, dt_bias, conv_weight, conv_bias, head_dim, groups, dt_limit, documents)
    return _forward(xbc, dt, A, D, dt_bias, conv_weight, conv_bias, head_dim, groups, *dt_limit, documents)


@torch.library.custom_op("alloy::mamba_scan", mutates_args=())
def _forward(
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    head_dim: int,
    groups: int,
    low: float,
    high: float,
    documents: Tensor | None,
) -> Tensor:
    mixed = conv.causal_conv1d(xbc, conv_weight, conv_bias, "silu", None, documents)
    x, B, C = split(mixed, dt.shape[2] * head_dim, head_dim, groups)
    limit = (low, high)
    y, _ = ssd_scan.ssd_scan(x, dt, A, B, C, D, dt_bias, True, limit, None, documents, ssd_scan.CHUNK, False)
    return y


@torch.library.custom_op("alloy::mamba_scan_backward", mutates_args=())
def _backward(
    dy: Tensor,
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    head_dim: int,
    groups: int,
    low: float,
    high: float,
    documents: Tensor | None,
) -> list[Tensor]:
    mixed = conv.causal_conv1d(xbc, conv_weight, conv_bias, "silu", None, documents)
    x, B, C = split(mixed, dt.shape[2] * head_dim, head_dim, groups)
    grads = ssd_backward.backward(
        dy, None, x, dt, A, B, C, D, dt_bias, True, (low, high), None, documents, ssd_scan.CHUNK
    )
    dx, ddt, dA, dB, dC, dD, dbias = cast(tuple[Tensor, ...], grads[:7])
    del mixed, x, B, C
    dmixed = torch.cat([part.flatten(2) for part in (dx, dB, dC)], dim=-1)
    del grads, dx, dB, dC
    dxbc, dweight, dconv_bias, _ = torch.ops.alloy.causal_conv1d_backward(
        dmixed, xbc, conv_weight, conv_bias, None, documents, True
    )
    return [dxbc, ddt, dA, dD, dbias, dweight, dconv_bias]


@_forward.register_fake
def _(xbc: Tensor, dt: Tensor, A: Tensor, D: Tensor, *rest: Any) -> Tensor:
    head_dim = rest[3]
    return xbc.new_empty(*dt.shape, head_dim)


@_backward.register_fake
def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
    xbc, dt, A, D, dt_bias, conv_weight = inputs[:6]
    made = [t.new_empty(t.shape) for t in (xbc, dt, A, D, dt_bias, conv_weight)]
    return [*made, conv_weight.new_empty(conv_weight.shape[0])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7], inputs[11])
    ctx.sizes = inputs[7:11]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, documents = ctx.saved_tensors
    *grads, dconv_bias = _backward(dy, *tensors, *ctx.sizes, documents)
    bias = tensors[6]
    return *grads, None if bias is None else dconv_bias.to(bias.dtype), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
