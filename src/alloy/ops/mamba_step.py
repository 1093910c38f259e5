"""The whole Mamba-2 mixer between its two projections, for one token of each row: convolution, recurrence, gated norm.

Paper: Mamba-2 (Dao and Gu, 2024), section 7. arXiv:2405.21060
"""

import torch
from torch import Tensor

from alloy.ops import backend
from alloy.ops.conv import causal_conv1d_step
from alloy.ops.cpu import mamba_step as cpu
from alloy.ops.norm import gated_rms_norm
from alloy.ops.slots import check_slots
from alloy.ops.ssd import check_sizes, ssd_step


def mamba_step(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    dt_limit: tuple[float, float],
    slots: Tensor | None = None,
    sr_seed: Tensor | None = None,
) -> Tensor:
    """One token for each row; both states are updated in place. Legend in `alloy.ops.ssd`.

    Args:
        projected: (batch, inner + channels + heads), what in_proj gives: z, x, B, C, dt; inner = heads * head_dim and
            channels = inner + 2 * groups * state
        conv_state: (slots, channels, kernel - 1), any strides
        ssm_state: (slots, heads, head_dim, state)
        conv_weight: (channels, kernel)
        conv_bias: (channels,)
        A: (heads,), like D and dt_bias
        D: (heads,)
        dt_bias: (heads,)
        norm_weight: (inner,)
        eps: of the gated norm, whose groups are those of B and C
        heads: of the recurrence
        head_dim: of x
        groups: of B and C
        state: width of B and C
        dt_limit: as in `ssd_scan`
        slots: as in `ssd_step`
        sr_seed: as in `ssd_step`

    Returns:
        (batch, inner) in projected's dtype
    """
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    if projected.dim() != 2 or projected.shape[1] != inner + channels + heads:
        raise ValueError(
            f"mamba_step: projected is {tuple(projected.shape)}; expected (batch, {inner + channels + heads}) for "
            f"{heads} heads of {head_dim}, {groups} groups of {state}"
        )
    check_sizes("mamba_step", heads, groups, head_dim, state)
    if ssm_state.shape[1:] != (heads, head_dim, state):
        raise ValueError(
            f"mamba_step: ssm_state is {tuple(ssm_state.shape)}; expected ('slots', {heads}, {head_dim}, {state})"
        )
    if conv_state.shape != (ssm_state.shape[0], channels, conv_weight.shape[1] - 1):
        raise ValueError(
            f"mamba_step: conv_state is {tuple(conv_state.shape)}; "
            f"expected ({ssm_state.shape[0]}, {channels}, {conv_weight.shape[1] - 1})"
        )
    if sr_seed is not None and ssm_state.dtype != torch.float16:
        raise ValueError(f"mamba_step: sr_seed is for a float16 state, this one is {ssm_state.dtype}; leave it out")
    check_slots(slots, ssm_state, projected.shape[0])
    sizes = (heads, head_dim, groups, state)
    states = (conv_state, ssm_state)
    given = (*states, conv_weight, conv_bias, A, D, dt_bias, norm_weight, eps, sizes, dt_limit, slots, sr_seed)
    if not torch.is_grad_enabled():
        return backend.run("mamba_step", projected, *given)
    with torch.no_grad():
        return backend.run("mamba_step", projected, *given)


def _mamba_step(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    sizes: tuple[int, int, int, int],
    dt_limit: tuple[float, float],
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> Tensor:
    """Reference: the parts one after another, each on the backend of its own."""
    heads, head_dim, groups, state = sizes
    inner, wide = heads * head_dim, groups * state
    if slots is not None:
        # what a row without a slot holds is not read
        projected = torch.where((slots >= 0)[:, None], projected, 0)
    z, xbc, dt = projected.split([inner, inner + 2 * wide, heads], dim=-1)
    xbc = causal_conv1d_step(conv_state, xbc, conv_weight, conv_bias, slots=slots)
    x, B, C = xbc.split([inner, wide, wide], dim=-1)
    y = ssd_step(
        ssm_state,
        x.unflatten(-1, (heads, -1)),
        dt,
        A,
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        slots=slots,
        sr_seed=sr_seed,
    )
    return gated_rms_norm(y.flatten(1), z, norm_weight, eps, inner // groups)


def _mamba_step_cpu(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    sizes: tuple[int, int, int, int],
    dt_limit: tuple[float, float],
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> Tensor:
    """Fused where states and inputs have one dtype, else part after part."""
    given = (projected, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, norm_weight, eps, sizes, dt_limit)
    if cpu.fits(projected, conv_state, ssm_state, conv_weight):
        return cpu.mamba_rows(*given, slots)
    return _mamba_step(*given, slots, sr_seed)


backend.add("mamba_step", "torch", _mamba_step)
backend.add("mamba_step", "cpu", _mamba_step_cpu)
backend.add("mamba_step", "triton", "alloy.ops.triton.mamba_step:mamba_step")
