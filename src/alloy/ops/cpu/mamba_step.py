"""One token of one row through the Mamba-2 mixer on a CPU core: the fewest operations, since each costs about a microsecond.

Reference and paper: `alloy.ops.mamba_step`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops.cpu.ssd import NO_LIMIT


def fits(projected: Tensor, conv_state: Tensor, ssm_state: Tensor, conv_weight: Tensor, slots: Tensor | None) -> bool:
    """Whether `mamba_row` takes these (shapes as `alloy.ops.mamba_step`): one row in slot 0, one dtype up to the state's."""
    kind = projected.dtype
    return (
        slots is None
        and projected.shape[0] == 1
        and kind in (torch.float32, torch.float64)
        and conv_state.dtype == ssm_state.dtype == conv_weight.dtype == kind
    )


def mamba_row(
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
) -> Tensor:
    """As `alloy.ops.mamba_step` for what `fits`; quick where the channels of a tap lie side by side, in state and weight."""
    heads, head_dim, groups, state = sizes
    inner, wide = heads * head_dim, groups * state
    z, xbc, dt = projected[0].split([inner, inner + 2 * wide, heads])
    before = conv_state[0].t()  # (kernel - 1, channels)
    window = torch.cat([before, xbc[None]])
    before.copy_(window[1:])
    xbc = window.mul_(conv_weight.t()).sum(0)
    xbc = F.silu(xbc if conv_bias is None else xbc.add_(conv_bias), inplace=True)
    x, B, C = xbc.split([inner, wide, wide])
    x = x.view(heads, head_dim)
    d = F.softplus(dt + dt_bias)
    d = d if dt_limit == NO_LIMIT else d.clamp_(*dt_limit)
    own = ssm_state[0].mul_((d * A).exp_().view(-1, 1, 1)).view(groups, -1, state)
    own.addcmul_((x * d[:, None]).view(groups, -1, 1), B.view(groups, 1, state))
    # rows times matrices: with C as columns of stride 1, torch takes a product that is eight times slower
    y = torch.bmm(C.view(groups, 1, state), own.transpose(1, 2)).view(heads, head_dim).addcmul_(x, D[:, None])
    gated = F.silu(z).mul_(y.view(-1)).view(groups, -1)
    return F.rms_norm(gated, (inner // groups,), eps=eps).view(1, -1).mul_(norm_weight)
