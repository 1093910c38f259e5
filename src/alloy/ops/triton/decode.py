# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Kernels of `alloy.ops.decode`: three small launches in the place of sixteen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton.elementary import num_blocks, power_of_2

# ids that one program looks at
BLOCK = 4096


def take_largest(scores: Tensor, logits: Tensor, chosen: Tensor, tokens: Tensor) -> None:
    """As `alloy.ops.take_largest`."""
    _take_largest(scores, logits, chosen, tokens)


def count_tokens(lengths: Tensor, slots: Tensor, count: int) -> None:
    """As `alloy.ops.count_tokens`."""
    _count_tokens(lengths, slots, count)


@torch.library.custom_op("alloy::take_largest", mutates_args=("logits", "chosen", "tokens"))
def _take_largest(scores: Tensor, logits: Tensor, chosen: Tensor, tokens: Tensor) -> None:
    rows, vocab = scores.shape
    parts = num_blocks(vocab, BLOCK)
    peaks = torch.empty(rows, parts, dtype=torch.float32, device=scores.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=scores.device)
    _part[(parts, rows)](
        scores, logits, peaks, places, vocab, parts, scores.stride(0), logits.stride(0), BLOCK=BLOCK, num_warps=8
    )
    _whole[(rows,)](peaks, places, chosen, tokens, parts, chosen.stride(0), tokens.stride(0), WIDTH=power_of_2(parts))


@torch.library.custom_op("alloy::count_tokens", mutates_args=("lengths",))
def _count_tokens(lengths: Tensor, slots: Tensor, count: int) -> None:
    rows = slots.numel()
    _count[(1,)](lengths, slots, rows, count, WIDTH=power_of_2(rows), num_warps=1)


@triton.jit
def _part(scores, logits, peaks, places, vocab, parts, scores_row, logits_row, BLOCK: tl.constexpr):
    """The largest of one block of one row; NaN counts as infinite."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = part * BLOCK + tl.arange(0, BLOCK)
    inside = i < vocab
    value = tl.load(scores + row * scores_row + i, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(logits + row * logits_row + i, value, mask=inside)
    value = tl.where(value == value, value, float("inf"))
    peak, place = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(peaks + row * parts + part, peak)
    tl.store(places + row * parts + part, part * BLOCK + place)


@triton.jit
def _whole(peaks, places, chosen, tokens, parts, chosen_row, tokens_row, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    value = tl.load(peaks + row * parts + i, mask=i < parts, other=float("-inf"))
    peak, part = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(places + row * parts + part).to(tl.int64)
    finite = (peak < float("inf")) & (peak > float("-inf"))
    tl.store(chosen + row * chosen_row, tl.where(finite, token, -1))
    tl.store(tokens + row * tokens_row, tl.where(finite, token, 0))


@triton.jit
def _count(lengths, slots, rows, count, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)
    slot = tl.load(slots + i, mask=i < rows, other=-1)
    held = tl.load(lengths + slot, mask=slot >= 0, other=0)
    tl.store(lengths + slot, held + count, mask=slot >= 0)
