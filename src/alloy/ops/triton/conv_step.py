# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""One token, drafted tokens and accepted tokens of the causal convolution: one kernel, one program a block of channels.

The window of the last inputs stays in registers while the tokens pass: y_t = silu(bias + sum_k weight[:, k] window_k).
A step and a replay write the window back. The bound is launch time at small batches, bandwidth at large ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops import conv
from alloy.ops.precision import wide
from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import num_blocks

tuning.register("conv_step", {"BLOCK": 256, "num_warps": 4}, {"BLOCK": 128, "num_warps": 1})


@triton.jit
def _conv_kernel(
    state,
    x,
    weight,
    bias,
    slots,
    counts,
    y,
    channels,
    state_slot,
    state_channel,
    state_tap,
    x_batch,
    x_token,
    weight_channel,
    weight_tap,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    used = slot >= 0
    total = TOKENS
    if HAS_COUNTS:
        total = tl.load(counts + row).to(tl.int32)
        used = used & (total > 0)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    real = inside & used
    state += slot * state_slot + c * state_channel
    window = ()
    for k in tl.static_range(TAPS):
        window += (tl.load(state + k * state_tap, mask=real, other=0.0),)
    x += row * x_batch + c
    y += row * TOKENS * channels + c
    taps = ()
    if READS:
        for k in tl.static_range(TAPS + 1):
            tap = tl.load(weight + c * weight_channel + k * weight_tap, mask=inside, other=0.0)
            taps += (tap.to(tl.float32),)
    for t in tl.static_range(TOKENS):
        # inputs pass through the state's dtype, as they do when they come in one by one
        new = tl.load(x + t * x_token, mask=real & (t < total), other=0.0)
        if READS:
            out = taps[TAPS] * new.to(tl.float32)
            for k in tl.static_range(TAPS):
                out += taps[k] * window[k].to(tl.float32)
            if HAS_BIAS:
                out += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
            if SILU:
                out = out / (1.0 + tl.exp(-out))
            tl.store(y + t * channels, tl.where(used, out, 0.0).to(y.dtype.element_ty), mask=inside)
        moved = ()
        for k in tl.static_range(TAPS):
            following = window[k + 1] if k + 1 < TAPS else new.to(state.dtype.element_ty)
            moved += (tl.where(t < total, following, window[k]),)
        window = moved
    if WRITES:
        # a value may have been read by more threads than the one that writes it
        tl.debug_barrier()
        for k in tl.static_range(TAPS):
            tl.store(state + k * state_tap, window[k], mask=real)


def _launch(
    state: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    slots: Tensor | None,
    counts: Tensor | None,
    y: Tensor | None,
    writes: bool,
) -> None:
    """x (batch, tokens, channels); y (like x) None: only the state is wanted."""
    if x.stride(-1) != 1:
        raise ValueError(f"x has strides {x.stride()}; the channels of a token must lie next to each other")
    batch, tokens, channels = x.shape
    config = tuning.pick("conv_step", str(state.dtype).removeprefix("torch."))
    _conv_kernel[(num_blocks(channels, config["BLOCK"]), batch)](
        state,
        x,
        weight,
        bias,
        slots,
        counts,
        x if y is None else y,
        channels,
        *state.stride(),
        *x.stride()[:2],
        *((0, 0) if weight is None else weight.stride()),
        TAPS=state.shape[2],
        TOKENS=tokens,
        READS=y is not None,
        WRITES=writes,
        HAS_BIAS=bias is not None,
        SILU=activation == "silu",
        HAS_SLOTS=slots is not None,
        HAS_COUNTS=counts is not None,
        **config,
    )


@torch.library.custom_op("alloy::causal_conv1d_step", mutates_args=("state",))
def _causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(state, x[:, None], weight, bias, activation, slots, None, y[:, None], True)
    return y


@torch.library.custom_op("alloy::causal_conv1d_multi", mutates_args=())
def _causal_conv1d_multi(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(state, x, weight, bias, activation, slots, None, y, False)
    return y


@torch.library.custom_op("alloy::conv_replay", mutates_args=("state",))
def _conv_replay(state: Tensor, x: Tensor, counts: Tensor, slots: Tensor | None) -> None:
    _launch(state, x, None, None, None, slots, counts, None, True)


@_causal_conv1d_step.register_fake
def _(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_causal_conv1d_multi.register_fake
def _(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: conv.Activation, slots: Tensor | None
) -> Tensor:
    """As `alloy.ops.causal_conv1d_step`; float64 inputs are the reference's."""
    if wide(x) is torch.float64:
        return conv._causal_conv1d_step(state, x, weight, bias, activation, slots)
    return _causal_conv1d_step(state, x, weight, bias, activation, slots)


def causal_conv1d_multi(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: conv.Activation, slots: Tensor | None
) -> Tensor:
    """As `alloy.ops.causal_conv1d_multi`; float64 inputs are the reference's."""
    if wide(x) is torch.float64:
        return conv._causal_conv1d_multi(state, x, weight, bias, activation, slots)
    return _causal_conv1d_multi(state, x, weight, bias, activation, slots)


def conv_replay(state: Tensor, x: Tensor, counts: Tensor, slots: Tensor | None) -> None:
    """As `alloy.ops.conv_replay`; float64 inputs are the reference's."""
    if wide(x) is torch.float64:
        return conv._conv_replay(state, x, counts, slots)
    return _conv_replay(state, x, counts, slots)
