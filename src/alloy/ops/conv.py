"""Causal depthwise convolution of the Mamba-2 mixer: over a sequence, one step, and several steps to be verified.

y_t = silu(bias + sum_k weight[:, k] * x_{t - kernel + 1 + k}) for each channel. The state of a row is its last kernel - 1
inputs before the convolution, oldest first.

Paper: Mamba-2 (Dao and Gu, 2024), section 7. arXiv:2405.21060
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.cpu import conv as cpu
from alloy.ops.documents import as_documents, segment_ids
from alloy.ops.precision import wide
from alloy.ops.slots import check_slots, read_slots, used_rows, write_slots

Activation = Literal["silu"] | None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    init: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own taps, looking back only, and never across a document start.

    Args:
        x: (batch, seq, channels)
        weight: (channels, kernel)
        bias: (channels,)
        activation: "silu" or None
        init: (batch, channels, kernel - 1), the inputs before x, oldest first; belongs to the first document of a row
        documents: int (batch, seq); -1 is padding, only at a row's end: never read, output 0
        cu_seqlens: int (docs + 1,) instead of `documents` when batch == 1
        return_state: also return the last kernel - 1 inputs

    Returns:
        y (batch, seq, channels) in x's dtype; the state (batch, channels, kernel - 1) in x's dtype after the last real
        token of the row's last document; with `cu_seqlens` (docs, channels, kernel - 1), one of each document
    """
    batch, seq, channels = x.shape
    _check_taps(weight, channels)
    documents = as_documents(documents, cu_seqlens, batch, seq)
    y = backend.run("causal_conv1d", x, weight, bias, activation, init, documents)
    if not return_state:
        return y
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        return y, _last_inputs(x.expand(len(bounds) - 1, -1, -1), weight.shape[1] - 1, init, bounds[:-1], bounds[1:])
    if documents is None:
        start = torch.zeros(batch, dtype=torch.int64, device=x.device)
        return y, _last_inputs(x, weight.shape[1] - 1, init, start, start + seq)
    segments, real = segment_ids(documents)
    last = (segments == segments[:, -1:]) & real
    end = real.sum(1)
    return y, _last_inputs(x, weight.shape[1] - 1, init, end - last.sum(1), end)


@torch.no_grad()
def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    slots: Tensor | None = None,
) -> Tensor:
    """One token for each row; the state takes it in, in place.

    Args:
        state: (slots, channels, kernel - 1), any strides
        x: (batch, channels)
        weight: (channels, kernel)
        bias: (channels,)
        activation: "silu" or None
        slots: int (batch,), the state row of each batch row, distinct; -1: no read, no write, output 0. None: in order

    Returns:
        y (batch, channels) in x's dtype
    """
    _check_taps(weight, x.shape[1])
    _check_state("causal_conv1d_step", state, x, weight.shape[1] - 1, slots)
    return backend.run("causal_conv1d_step", state, x, weight, bias, activation, slots)


def causal_conv1d_multi(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    slots: Tensor | None = None,
) -> Tensor:
    """What `tokens` steps would give, with the state left as it is (drafts to be verified).

    Args:
        state: (slots, channels, kernel - 1)
        x: (batch, tokens, channels)
        weight: (channels, kernel)
        bias: (channels,)
        activation: "silu" or None
        slots: as in `causal_conv1d_step`

    Returns:
        y (batch, tokens, channels) in x's dtype
    """
    _check_taps(weight, x.shape[2])
    _check_state("causal_conv1d_multi", state, x, weight.shape[1] - 1, slots)
    return backend.run("causal_conv1d_multi", state, x, weight, bias, activation, slots)


@torch.no_grad()
def conv_replay(state: Tensor, x: Tensor, counts: Tensor, slots: Tensor | None = None) -> None:
    """Advance the state in place by the first counts[b] tokens of each row (drafts that were accepted).

    Args:
        state: (slots, channels, kernel - 1)
        x: (batch, tokens, channels), what `causal_conv1d_multi` was given
        counts: int (batch,), 0 .. tokens
        slots: as in `causal_conv1d_step`
    """
    _check_state("conv_replay", state, x, state.shape[2], slots)
    backend.run("conv_replay", state, x, counts, slots)


def _check_taps(weight: Tensor, channels: int) -> None:
    if weight.dim() != 2 or weight.shape[0] != channels:
        raise ValueError(
            f"conv weight has shape {tuple(weight.shape)}; expected ({channels}, kernel) for {channels} channels"
        )


def _check_state(op: str, state: Tensor, x: Tensor, taps: int, slots: Tensor | None) -> None:
    """Refuse a state of another layer, and slots that are not one for each row."""
    if state.shape[1:] != (x.shape[-1], taps):
        raise ValueError(
            f"{op}: state is {tuple(state.shape)}; expected {('slots', x.shape[-1], taps)} for x {tuple(x.shape)}"
        )
    check_slots(slots, state, x.shape[0])


def _last_inputs(x: Tensor, taps: int, init: Tensor | None, start: Tensor, end: Tensor) -> Tensor:
    """The last `taps` inputs of the documents at [start, end) of each row of x, oldest first; zeros or, for a document
    that begins its row, `init` where the document is shorter. Returns (rows, channels, taps)."""
    rows, seq, channels = x.shape
    position = end[:, None] - taps + torch.arange(taps, device=x.device)  # (rows, taps)
    index = position.clamp(0, seq - 1)[..., None].expand(-1, -1, channels)
    own = (position >= start[:, None])[..., None]
    state = torch.where(own, x.gather(1, index), 0)
    if init is not None:
        index = (position + taps).clamp(0, max(taps - 1, 0))[:, None].expand(-1, channels, -1)
        before = init.expand(rows, -1, -1).to(x.dtype).gather(2, index).transpose(1, 2)
        state = torch.where((position < 0)[..., None] & (start == 0)[:, None, None], before, state)
    return state.transpose(1, 2)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    init: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Reference: one shifted product a tap."""
    kind = wide(x)
    batch, seq, channels = x.shape
    taps = weight.shape[1] - 1
    before = x.new_zeros(batch, taps, channels) if init is None else init.transpose(1, 2).to(x.dtype)
    segments = real = None
    if documents is not None:
        segments, real = segment_ids(documents)
        x = torch.where(real[..., None], x, 0)
        # the inputs before the row belong to its first document
        segments = F.pad(segments, (taps, 0))
    window = torch.cat([before, x], dim=1).to(kind)
    y = torch.zeros_like(x, dtype=kind) if bias is None else bias.to(kind).expand(batch, seq, channels)
    for k in range(taps + 1):
        shifted = window[:, k : k + seq]
        if segments is not None:
            same = segments[:, k : k + seq] == segments[:, taps:]
            shifted = torch.where(same[..., None], shifted, 0)
        y = torch.addcmul(y, shifted, weight[:, k].to(kind))
    y = F.silu(y) if activation == "silu" else y
    if real is not None:
        y = torch.where(real[..., None], y, 0)
    return y.to(x.dtype)


def _causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, slots: Tensor | None
) -> Tensor:
    """One product a tap, then the taps move up; quick where the channels of a tap lie next to each other."""
    rows, used = used_rows(slots, state, x.shape[0])
    if used is not None:
        assert isinstance(rows, Tensor), "rows are left out"
        y = _causal_conv1d_step(state, x[used], weight, bias, activation, rows)
        return y.new_zeros(x.shape).index_copy_(0, used, y)
    window = read_slots(state, rows, x.shape[0])
    kind = wide(x)
    taps = window.shape[2]
    weight = weight.to(kind)
    y = x * weight[:, taps] if bias is None else torch.addcmul(bias.to(kind), x.to(kind), weight[:, taps])
    for k in range(taps):
        y.addcmul_(window[..., k].to(kind), weight[:, k])
    for k in range(taps):
        window[..., k].copy_(window[..., k + 1] if k + 1 < taps else x)
    if isinstance(rows, Tensor):
        write_slots(state, rows, window)
    return (F.silu(y, inplace=True) if activation == "silu" else y).to(x.dtype)


def _causal_conv1d_multi(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, slots: Tensor | None
) -> Tensor:
    """The convolution over the drafts, with the state before them."""
    rows, used = used_rows(slots, state, x.shape[0])
    before = read_slots(state, rows, x.shape[0])
    y = _causal_conv1d(x if used is None else x[used], weight, bias, activation, before, None)
    return y if used is None else y.new_zeros(x.shape).index_copy(0, used, y)


def _conv_replay(state: Tensor, x: Tensor, counts: Tensor, slots: Tensor | None) -> None:
    """A window of the state and the drafts that starts counts[b] later."""
    rows, used = used_rows(slots, state, x.shape[0])
    if used is not None:
        x, counts = x[used], counts[used]
    window = torch.cat([read_slots(state, rows, x.shape[0]), x.transpose(1, 2).to(state.dtype)], dim=2)
    taps = torch.arange(state.shape[2], device=x.device) + counts.long()[:, None]  # (batch, kernel - 1)
    write_slots(state, rows, window.gather(2, taps[:, None].expand(-1, x.shape[2], -1)))


backend.add("causal_conv1d", "torch", _causal_conv1d)
backend.add("causal_conv1d", "cpu", cpu.causal_conv1d)
backend.add("causal_conv1d", "triton", "alloy.ops.triton.conv:causal_conv1d")
backend.add("causal_conv1d_step", "torch", _causal_conv1d_step)
backend.add("causal_conv1d_step", "triton", "alloy.ops.triton.conv_step:causal_conv1d_step")
backend.add("causal_conv1d_multi", "torch", _causal_conv1d_multi)
backend.add("causal_conv1d_multi", "triton", "alloy.ops.triton.conv_step:causal_conv1d_multi")
backend.add("conv_replay", "torch", _conv_replay)
backend.add("conv_replay", "triton", "alloy.ops.triton.conv_step:conv_replay")
