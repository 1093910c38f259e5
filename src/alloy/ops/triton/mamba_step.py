# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""The Mamba-2 mixer between its projections for one token of each row, in two launches.

1. One program takes TILES tiles of (BLOCK_P, state) of one head's state, as in `ssd_step`. It convolves the channels of x
   that it needs, and those of B and C of its group, which the heads of the group do again, from the level-2 cache.
2. One program a group and row multiplies with the gate and norms y where it lies, and moves the windows of the group's
   channels, which are no longer read.
The bound is bandwidth: the state is moved twice, everything else is small. Windows are read quickest where the channels of
a tap lie next to each other.

H200, torch 2.11 and Triton 3.6, both launches, fraction of copy bandwidth (4.25 TB/s), state fp32 / fp16 / fp16 rounded by
chance:
    Nano-9B, batch 64           0.92 / 0.89 / 0.79; batch 1 takes 6.8 us with fp32, of which the state's bytes are 2.5
    Nemotron 3 Nano, batch 256  0.94 / 0.85 / 0.85; batch 1 takes 5.0 us
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from alloy.ops.mamba_step import _mamba_step as reference
from alloy.ops.precision import wide
from alloy.ops.triton import chain, tuning
from alloy.ops.triton.elementary import power_of_2
from alloy.ops.triton.ssd_step import round_to_half, step_size, tiles

tuning.register(
    "mamba_step",
    {"BLOCK_P": 16, "TILES": 8, "num_warps": 4},
    {"BLOCK_P": 16, "TILES": 2, "num_warps": 4},
)


@triton.jit
def _load_channels(
    x, state, weight, bias, channels, state_channel, state_tap, mask, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """What the convolution of `channels` (block,) reads: a tuple of the input x, the bias, the window and the taps."""
    new = tl.load(x + channels, mask=mask, other=0.0)
    shift = tl.load(bias + channels, mask=mask, other=0.0) if HAS_BIAS else 0.0
    read = (new, shift)
    for k in tl.static_range(TAPS):
        read += (tl.load(state + channels * state_channel + k * state_tap, mask=mask, other=0.0),)
    if TAPS == 3:
        # the taps of a channel lie in 8 or 16 bytes
        read += (tl.load(weight + channels[:, None] * 4 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0),)
    else:
        for k in tl.static_range(TAPS + 1):
            read += (tl.load(weight + channels * (TAPS + 1) + k, mask=mask, other=0.0),)
    return read


@triton.jit
def _convolve(read, TAPS: tl.constexpr):
    """silu of the convolution of what `_load_channels` has read, in fp32 (block,)."""
    out = tl.zeros_like(read[0].to(tl.float32)) + read[1]
    if TAPS == 3:
        even, odd = read[5].to(tl.float32).reshape(read[0].shape[0], 2, 2).split()
        first, third = even.split()
        second, last = odd.split()
        taps = (first, second, third, last)
    else:
        taps = read[2 + TAPS :]
    out += taps[TAPS].to(tl.float32) * read[0].to(tl.float32)
    for k in tl.static_range(TAPS):
        out += taps[k].to(tl.float32) * read[2 + k].to(tl.float32)
    return out / (1.0 + tl.exp(-out))


@triton.jit
def _read_windows(x, state, channels, state_channel, state_tap, mask, TAPS: tl.constexpr):
    """The windows of `channels` (block,) once they have moved: a tuple, oldest first."""
    window = ()
    for k in tl.static_range(TAPS - 1):
        window += (tl.load(state + channels * state_channel + (k + 1) * state_tap, mask=mask, other=0.0),)
    window += (tl.load(x + channels, mask=mask, other=0.0).to(state.dtype.element_ty),)
    return window


@triton.jit
def _write_windows(window, state, channels, state_channel, state_tap, mask, TAPS: tl.constexpr):
    for k in tl.static_range(TAPS):
        tl.store(state + channels * state_channel + k * state_tap, window[k], mask=mask)


@triton.jit
def _heads_kernel(
    projected,
    conv_state,
    state,
    conv_weight,
    conv_bias,
    A,
    D,
    dt_bias,
    slots,
    seed,
    y,
    low,
    high,
    projected_row,
    conv_slot,
    conv_channel,
    conv_tap,
    state_slot,
    state_head,
    state_row,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    TILES: tl.constexpr,
):
    if CHAINED:
        gdc_wait()
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    used = slot >= 0
    p = tl.program_id(0) * (TILES * BLOCK_P) + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    real = (n < WIDTH) & used
    inner: tl.constexpr = HEADS * HEAD_DIM
    channels: tl.constexpr = inner + 2 * GROUPS * WIDTH
    state += slot * state_slot + head * state_head
    conv_state += slot * conv_slot
    # behind z
    projected += row * projected_row + inner
    # everything is read before anything is written: loads do not pass stores
    tiles = ()
    for i in tl.static_range(TILES):
        rows = p + i * BLOCK_P
        mask = (rows < HEAD_DIM)[:, None] & real[None, :]
        tiles += (tl.load(state + rows[:, None] * state_row + n[None, :], mask=mask, other=0.0).to(tl.float32),)
    q = tl.program_id(0) * (TILES * BLOCK_P) + tl.arange(0, BLOCK_U)
    mask = (q < HEAD_DIM) & used
    own = head * HEAD_DIM + q
    x = _load_channels(projected, conv_state, conv_weight, conv_bias, own, conv_channel, conv_tap, mask, TAPS, HAS_BIAS)
    own = inner + (head // (HEADS // GROUPS)) * WIDTH + n
    b = _load_channels(projected, conv_state, conv_weight, conv_bias, own, conv_channel, conv_tap, real, TAPS, HAS_BIAS)
    own += GROUPS * WIDTH
    c = _load_channels(projected, conv_state, conv_weight, conv_bias, own, conv_channel, conv_tap, real, TAPS, HAS_BIAS)
    raw = tl.load(projected + channels + head)
    bias = tl.load(dt_bias + head)
    rate = tl.load(A + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    if STOCHASTIC:
        chance = tl.load(seed)
    if CHAINED:
        gdc_launch_dependents()
    b = _convolve(b, TAPS)
    c = _convolve(c, TAPS)
    x = tl.where(mask, _convolve(x, TAPS), 0.0)
    d = tl.where(used, step_size(raw, bias, low, high, True, True), 0.0)
    decay = tl.exp(d * rate)
    y += row * inner + head * HEAD_DIM
    for i in tl.static_range(TILES):
        rows = p + i * BLOCK_P
        u = tl.gather(x, i * BLOCK_P + tl.arange(0, BLOCK_P), 0) if TILES > 1 else x
        new = tiles[i] * decay + (d * u)[:, None] * b[None, :]
        out = tl.sum(new * c[None, :], 1) + skip * u
        tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < HEAD_DIM)
        if STOCHASTIC:
            new = round_to_half(new, chance, slot.to(tl.int32), head * HEAD_DIM + rows, BLOCK_P, BLOCK_N, WIDTH)
        mask = (rows < HEAD_DIM)[:, None] & real[None, :]
        tl.store(state + rows[:, None] * state_row + n[None, :], new.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    y,
    projected,
    conv_state,
    norm_weight,
    slots,
    eps,
    projected_row,
    conv_slot,
    conv_channel,
    conv_tap,
    INNER: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    used = slot >= 0
    size: tl.constexpr = INNER // GROUPS
    i = tl.arange(0, BLOCK)
    inside = i < size
    real = inside & used
    own = group * size + i
    projected += row * projected_row
    y += row * INNER
    conv_state += slot * conv_slot
    gate = tl.load(projected + own, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + own, mask=inside, other=0.0).to(tl.float32)
    projected += INNER
    n = tl.arange(0, BLOCK_N)
    real_n = (n < WIDTH) & used
    b_own = INNER + group * WIDTH + n
    c_own = b_own + GROUPS * WIDTH
    x_window = _read_windows(projected, conv_state, own, conv_channel, conv_tap, real, TAPS)
    b_window = _read_windows(projected, conv_state, b_own, conv_channel, conv_tap, real_n, TAPS)
    c_window = _read_windows(projected, conv_state, c_own, conv_channel, conv_tap, real_n, TAPS)
    # what the first kernel does not write may be read while it runs
    if CHAINED:
        gdc_wait()
    value = tl.load(y + own, mask=real, other=0.0).to(tl.float32)
    value = value * gate / (1.0 + tl.exp(-gate))
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    if CHAINED:
        gdc_launch_dependents()
    # what is written here may have been read by more threads than the one that writes it
    tl.debug_barrier()
    tl.store(y + own, (value * scale * weight).to(y.dtype.element_ty), mask=inside)
    _write_windows(x_window, conv_state, own, conv_channel, conv_tap, real, TAPS)
    _write_windows(b_window, conv_state, b_own, conv_channel, conv_tap, real_n, TAPS)
    _write_windows(c_window, conv_state, c_own, conv_channel, conv_tap, real_n, TAPS)


@torch.library.custom_op("alloy::mamba_step", mutates_args=("conv_state", "ssm_state"))
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
    groups: int,
    low: float,
    high: float,
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> Tensor:
    if ssm_state.stride(-1) != 1 or projected.stride(-1) != 1 or not conv_weight.is_contiguous():
        raise ValueError(
            f"strides of ssm_state {ssm_state.stride()}, projected {projected.stride()}, conv_weight "
            f"{conv_weight.stride()}: the last must be 1, and conv_weight contiguous"
        )
    batch = projected.shape[0]
    heads, head_dim, width = ssm_state.shape[1:]
    inner, taps = heads * head_dim, conv_state.shape[2]
    y = torch.empty(batch, inner, dtype=projected.dtype, device=projected.device)
    blocks, block_sizes = tiles("mamba_step", ssm_state)
    _heads_kernel[(blocks, heads, batch)](
        projected,
        conv_state,
        ssm_state,
        conv_weight,
        conv_bias,
        A,
        D,
        dt_bias,
        slots,
        sr_seed,
        y,
        low,
        high,
        projected.stride(0),
        *conv_state.stride(),
        *ssm_state.stride()[:3],
        HEADS=heads,
        HEAD_DIM=head_dim,
        GROUPS=groups,
        WIDTH=width,
        TAPS=taps,
        HAS_BIAS=conv_bias is not None,
        HAS_SLOTS=slots is not None,
        STOCHASTIC=sr_seed is not None,
        **chain.options(y),
        BLOCK_U=power_of_2(block_sizes["BLOCK_P"] * block_sizes["TILES"]),
        **block_sizes,
    )
    _norm_kernel[(groups, batch)](
        y,
        projected,
        conv_state,
        norm_weight,
        slots,
        eps,
        projected.stride(0),
        *conv_state.stride(),
        INNER=inner,
        GROUPS=groups,
        WIDTH=width,
        TAPS=taps,
        HAS_SLOTS=slots is not None,
        **chain.options(y),
        BLOCK=power_of_2(inner // groups),
        BLOCK_N=block_sizes["BLOCK_N"],
        num_warps=4,
    )
    return y


@_mamba_step.register_fake
def _(projected: Tensor, conv_state: Tensor, ssm_state: Tensor, *_: object) -> Tensor:
    return projected.new_empty(projected.shape[0], ssm_state.shape[1] * ssm_state.shape[2])


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
    sizes: tuple[int, int, int, int],
    dt_limit: tuple[float, float],
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> Tensor:
    """As `alloy.ops.mamba_step`; float64 is the reference's."""
    # as it is on a GPU; the interpreter gets what a model keeps for a CPU
    conv_weight = conv_weight.contiguous()
    given = (projected, conv_state, ssm_state, conv_weight, conv_bias, A, D, dt_bias, norm_weight, eps)
    if wide(projected) is torch.float64 or wide(ssm_state) is torch.float64:
        return reference(*given, sizes, dt_limit, slots, sr_seed)
    return _mamba_step(*given, sizes[2], *dt_limit, slots, sr_seed)
