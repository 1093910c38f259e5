"""Convolution and recurrence of the Mamba-2 mixer over a sequence, as training needs them: from zero states, one result.

Paper: Mamba-2 (Dao and Gu, 2024), section 7. arXiv:2405.21060
"""

from typing import cast

from torch import Tensor

from alloy.ops import backend
from alloy.ops.conv import causal_conv1d
from alloy.ops.ssd import check_length, check_sizes, ssd_scan


def mamba_scan(
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    head_dim: int,
    groups: int,
    dt_limit: tuple[float, float],
    documents: Tensor | None = None,
) -> Tensor:
    """`ssd_scan` of the convolved x, B and C; differentiable in every tensor. Legend in `alloy.ops.ssd`.

    Args:
        xbc: (batch, seq, channels), x, B and C before the convolution; channels = heads * head_dim + 2 * groups * state
        dt: (batch, seq, heads)
        A: (heads,)
        D: (heads,)
        dt_bias: (heads,)
        conv_weight: (channels, kernel)
        conv_bias: (channels,)
        head_dim: of x
        groups: of B and C
        dt_limit: as in `ssd_scan`
        documents: as in `ssd_scan`

    Returns:
        (batch, seq, heads, head_dim) in xbc's dtype
    """
    heads, channels = dt.shape[2], xbc.shape[2]
    if (channels - heads * head_dim) % (2 * groups) or channels <= heads * head_dim:
        raise ValueError(
            f"mamba_scan: {channels} channels do not hold {heads} heads of {head_dim} and B and C of {groups} groups"
        )
    state = (channels - heads * head_dim) // (2 * groups)
    check_sizes("mamba_scan", heads, groups, head_dim, state)
    check_length("mamba_scan", xbc.shape[1])
    return backend.run(
        "mamba_scan", xbc, dt, A, D, dt_bias, conv_weight, conv_bias, head_dim, groups, dt_limit, documents
    )


def split(xbc: Tensor, inner: int, head_dim: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(..., channels) -> x (..., heads, head_dim), B and C (..., groups, state), views; inner = heads * head_dim."""
    width = (xbc.shape[-1] - inner) // 2
    x, b, c = xbc.split([inner, width, width], dim=-1)
    return x.unflatten(-1, (-1, head_dim)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))


def _mamba_scan(
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
    mixed = cast(Tensor, causal_conv1d(xbc, conv_weight, conv_bias, documents=documents))
    x, B, C = split(mixed, dt.shape[2] * head_dim, head_dim, groups)
    return cast(Tensor, ssd_scan(x, dt, A, B, C, D, dt_bias=dt_bias, dt_limit=dt_limit, documents=documents))


backend.add("mamba_scan", "torch", _mamba_scan)
backend.add("mamba_scan", "triton", "alloy.ops.triton.mamba_scan:mamba_scan")
