"""One token of a few rows through the Mamba-2 mixer on a CPU core: the fewest operations, since each costs about a microsecond.

Reference and paper: `alloy.ops.mamba_step`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops.cpu.compiled import Loop, state_rows
from alloy.ops.cpu.norm import inverse_rms
from alloy.ops.cpu.ssd import NO_LIMIT
from alloy.ops.slots import consecutive, slot_numbers

# bytes of states that stay in a core's cache over the passes of the recurrence, and how many there are
CACHED = 1 << 19
PASSES = 3


def fits(projected: Tensor, conv_state: Tensor, ssm_state: Tensor, conv_weight: Tensor) -> bool:
    """Whether `mamba_rows` takes these (shapes as `alloy.ops.mamba_step`): one dtype up to the states'."""
    kind = projected.dtype
    return kind in (torch.float32, torch.float64) and conv_state.dtype == ssm_state.dtype == conv_weight.dtype == kind


def mamba_rows(
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
) -> Tensor:
    """As `alloy.ops.mamba_step` for what `fits`; quick where the channels of a tap lie side by side, in state and weight.

    Rows whose states fit into the cache together are computed together, others one after another, unless a compiled loop
    passes over the states once.
    """
    heads, head_dim, groups, state = sizes
    inner, wide = heads * head_dim, groups * state

    def mixed(projected: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """All rows at once, each with the states at its own index."""
        batch = projected.shape[0]
        z, xbc, dt = projected.split([inner, inner + 2 * wide, heads], dim=1)
        before = conv_state.transpose(1, 2)  # (batch, kernel - 1, channels)
        window = torch.cat([before, xbc[:, None]], 1)
        before.copy_(window[:, 1:])
        xbc = window.mul_(conv_weight.t()).sum(1)
        xbc = F.silu(xbc if conv_bias is None else xbc.add_(conv_bias), inplace=True)
        d = F.softplus(dt + dt_bias)
        d = d if dt_limit == NO_LIMIT else d.clamp_(*dt_limit)
        given = ssm_state, xbc, d, (d * A).exp_(), D, sizes
        y = _recur(*given) if loop is None else _recur_in_one_pass(loop, *given)
        gated = F.silu(z).mul_(y).view(batch * groups, 1, -1)
        return gated.mul_(inverse_rms(gated, eps)).view(batch, -1).mul_(norm_weight)

    projected, batch = projected.contiguous(), projected.shape[0]
    numbers = list(range(batch)) if slots is None else slot_numbers(slots, ssm_state, batch)
    rows = slice(batch) if slots is None else consecutive(numbers)
    own_bytes = ssm_state.shape[1] * ssm_state.stride(1) * ssm_state.element_size()
    is_cached = batch * own_bytes <= CACHED
    loop = state_rows() if _suits_loop(ssm_state, (A, D, dt_bias), is_cached) else None
    if rows is not None and (is_cached or loop is not None):
        return mixed(projected, conv_state[rows], ssm_state[rows])
    y = projected.new_zeros(batch, inner)
    used = [row for row, slot in enumerate(numbers) if slot >= 0]
    if is_cached and used:
        index = torch.tensor([numbers[row] for row in used])
        conv, ssm = conv_state[index], ssm_state[index]
        y[used] = mixed(projected[used], conv, ssm)
        conv_state[index], ssm_state[index] = conv, ssm
        return y
    for row in used:
        place = slice(numbers[row], numbers[row] + 1)
        y[row] = mixed(projected[row : row + 1], conv_state[place], ssm_state[place])[0]
    return y


def _recur(
    ssm_state: Tensor, xbc: Tensor, d: Tensor, decay: Tensor, D: Tensor, sizes: tuple[int, int, int, int]
) -> Tensor:
    """Update ssm_state (batch, heads, head_dim, state) from xbc (batch, channels) and d and decay (batch, heads) -> (batch,
    inner), in passes."""
    heads, head_dim, groups, state = sizes
    batch, inner = len(xbc), heads * head_dim
    x, B, C = xbc.split([inner, groups * state, groups * state], dim=1)
    x = x.view(batch, heads, head_dim)
    # a state is contiguous, those of a layer are not: other layers' lie between
    own = ssm_state.mul_(decay[..., None, None]).view(batch, groups, -1, state)
    B, C = B.view(batch, groups, 1, state), C.view(batch, groups, 1, state)
    own.addcmul_((x * d[..., None]).view(batch, groups, -1, 1), B)
    # the products of a group, or of a row where there are fewer: rows times matrices into contiguous memory, as torch is
    # many times slower with columns of stride 1, and twice as slow into any other
    outer = int(batch > groups)
    pairs = zip(C.unbind(outer), own.transpose(2, 3).unbind(outer), strict=True)
    products = [torch.bmm(a, b) for a, b in pairs]
    y = products[0] if batch == 1 else torch.stack(products, outer)
    return y.view(x.shape).addcmul_(x, D[:, None]).view(batch, inner)


def _recur_in_one_pass(
    loop: Loop, ssm_state: Tensor, xbc: Tensor, d: Tensor, decay: Tensor, D: Tensor, sizes: tuple[int, int, int, int]
) -> Tensor:
    """As `_recur`."""
    y = xbc.new_empty(len(xbc), sizes[0] * sizes[1])
    given = [t.data_ptr() for t in (ssm_state, xbc, d, decay, D, y)]
    loop(*given, len(xbc), *sizes, ssm_state.stride(0), xbc.stride(0))
    return y


def _suits_loop(ssm_state: Tensor, by_head: tuple[Tensor, ...], is_cached: bool) -> bool:
    """Whether one core in one pass is the quickest, and the numbers (`by_head`: (heads,) each) lie as the compiled loop reads
    them."""
    _, head_dim, state = ssm_state.shape[1:]
    return (
        # gradients and transforms do not see what has no operation
        torch.is_inference_mode_enabled()
        and ssm_state.dtype == torch.float32
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in by_head)
        and ssm_state.stride()[1:] == (head_dim * state, state, 1)
        and (is_cached or torch.get_num_threads() <= PASSES)
    )
