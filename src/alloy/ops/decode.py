"""What ends a decode step on the device: the greedy choice of each row, and the count of its tokens."""

import torch
from torch import Tensor

from alloy.ops import backend
from alloy.ops.sampling import greedy


@torch.no_grad()
def take_largest(scores: Tensor, logits: Tensor, chosen: Tensor, tokens: Tensor) -> None:
    """Write the head's output in fp32, and the id of its largest value, the lowest among equals.

    Args:
        scores: (rows, vocab), any floating dtype
        logits: fp32 (rows, vocab), written
        chosen: int64 (rows,), written; -1 where the largest value is not finite, as where one is NaN
        tokens: int64 (rows,), written: the same with 0 in the place of -1
    """
    backend.run("take_largest", scores, logits, chosen, tokens)


@torch.no_grad()
def count_tokens(lengths: Tensor, slots: Tensor, count: int) -> None:
    """Add `count` in place to lengths int32 (slots,) at each of slots int32 (rows,); -1 is passed over."""
    backend.run("count_tokens", lengths, slots, count)


def _take_largest(scores: Tensor, logits: Tensor, chosen: Tensor, tokens: Tensor) -> None:
    logits.copy_(scores)
    chosen.copy_(torch.where(logits.amax(-1).isfinite(), greedy(logits), -1))
    tokens.copy_(chosen.clamp(min=0))


def _count_tokens(lengths: Tensor, slots: Tensor, count: int) -> None:
    # of a slot that is named twice, as -1 may be, either write is right
    index = slots.long()
    lengths[index] = (lengths[index] + count * (slots >= 0)).to(lengths.dtype)


backend.add("take_largest", "torch", _take_largest)
backend.add("take_largest", "triton", "alloy.ops.triton.decode:take_largest")
backend.add("count_tokens", "torch", _count_tokens)
backend.add("count_tokens", "triton", "alloy.ops.triton.decode:count_tokens")
