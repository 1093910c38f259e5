"""Causal attention of whole sequences for CPU cores: blocks of queries against the keys they can see.

The heads that share keys become rows of one matmul, so that keys and values are not expanded and a block's scores stay in
the cache; a block reads no key after its last query. The backward computes the weights again and keeps q, k, v and y.

Reference, formulas and papers: `alloy.ops.attention`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alloy.ops.documents import segment_ids

# rows of a matmul, which are queries times heads that share keys, and the fewest queries of a block
_ROWS, _LEAST = 128, 16


def attn_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, documents: Tensor | None, window: int | None
) -> Tensor:
    """As `alloy.ops.attention` without a cache."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, scale, documents, window)
    return _forward(_Blocks(q, k, v, scale, documents, window))


class _Block(NamedTuple):
    start: int  # queries start .. stop, keys first .. stop
    stop: int
    first: int
    mask: Tensor  # 0 or -inf, broadcasts to (batch, kv_heads, share, queries, keys from `cut` on)
    cut: int  # keys before this one are seen by all queries of the block


class _Blocks:
    """Inputs laid out as (batch, kv_heads, share, seq, head_dim) and (batch * kv_heads, seq, head_dim)."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, documents: Tensor | None, window: int | None
    ) -> None:
        self.scale = q.shape[3] ** -0.5 if scale is None else scale
        self.window = q.shape[2] if window is None else window
        self.segments = self.real = None
        if documents is not None:
            self.segments, self.real = segment_ids(documents)
            q, k, v = (self.blank(t) for t in (q, k, v))
        self.q = q.unflatten(1, (k.shape[1], -1))
        self.k, self.v = (t.reshape(-1, *t.shape[2:]) for t in (k, v))
        self.tokens = min(max(_ROWS // self.q.shape[2], _LEAST), q.shape[2])

    def blank(self, t: Tensor) -> Tensor:
        """t (batch, heads, seq, head_dim) with zeros at padding."""
        return t if self.real is None else torch.where(self.real[:, None, :, None], t, 0)

    def __iter__(self) -> Iterator[_Block]:
        seq = self.q.shape[3]
        for start in range(0, seq, self.tokens):
            stop = min(start + self.tokens, seq)
            first = max(0, start - self.window + 1)
            # without documents or a window only the block's own square has keys that are not seen
            cut = start if self.segments is None and self.window >= seq else first
            query = torch.arange(start, stop, device=self.q.device)[:, None]
            key = torch.arange(cut, stop, device=self.q.device)
            hidden = (key > query) | (key <= query - self.window)
            if self.segments is not None:
                own = self.segments[:, start:stop, None] != self.segments[:, None, cut:stop]
                hidden = (hidden | own)[:, None, None]
            yield _Block(
                start, stop, first, torch.zeros_like(hidden, dtype=self.q.dtype).masked_fill_(hidden, -math.inf), cut
            )

    def rows(self, t: Tensor, block: _Block) -> Tensor:
        """The block's rows of t (batch, kv_heads, share, seq, head_dim): (batch * kv_heads, share * queries, head_dim)."""
        return t[:, :, :, block.start : block.stop].flatten(0, 1).flatten(1, 2)

    def buffer(self) -> Tensor:
        """Room for the scores of any block."""
        return self.q.new_empty(self.k.shape[0] * self.q.shape[2] * self.tokens * self.k.shape[1])

    def shaped(self, buffer: Tensor, block: _Block) -> Tensor:
        """A part of `buffer` as (batch * kv_heads, share * queries, keys)."""
        shape = self.k.shape[0], self.q.shape[2] * (block.stop - block.start), block.stop - block.first
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def weights(self, block: _Block, queries: Tensor, scores: Tensor, weights: Tensor) -> None:
        """weights = softmax over the keys of `queries`, scaled already; both as from `shaped`, scores is room to work."""
        torch.bmm(queries, self.k[:, block.first : block.stop].transpose(1, 2), out=scores)
        split = scores.view(*self.q.shape[:3], block.stop - block.start, block.stop - block.first)
        split[..., block.cut - block.first :].add_(block.mask)
        torch.softmax(scores, -1, out=weights)


def _forward(blocks: _Blocks) -> Tensor:
    batch, kv_heads, share, seq, head_dim = blocks.q.shape
    # laid out by token, as the projection after it reads
    y = blocks.q.new_empty(batch, seq, kv_heads, share, head_dim).permute(0, 2, 3, 1, 4)
    buffers = blocks.buffer(), blocks.buffer()
    for block in blocks:
        scores, weights = (blocks.shaped(t, block) for t in buffers)
        blocks.weights(block, blocks.rows(blocks.q, block) * blocks.scale, scores, weights)
        place = y[:, :, :, block.start : block.stop]
        place.copy_(torch.bmm(weights, blocks.v[:, block.first : block.stop]).view(place.shape))
    return blocks.blank(y.flatten(1, 2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, documents: Tensor | None, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, documents)
        ctx.settings = scale, window
        return _forward(_Blocks(q, k, v, scale, documents, window))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, documents = ctx.saved_tensors
        scale, window = ctx.settings
        blocks = _Blocks(q, k, v, scale, documents, window)
        dy = blocks.blank(dy).unflatten(1, (k.shape[1], -1))
        batch, kv_heads, share, seq, head_dim = blocks.q.shape
        dq = blocks.q.new_empty(batch, seq, kv_heads, share, head_dim).permute(0, 2, 3, 1, 4)
        dk, dv = torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
        buffers = blocks.buffer(), blocks.buffer(), blocks.buffer()
        for block in blocks:
            scores, weights, dweights = (blocks.shaped(t, block) for t in buffers)
            queries, dy_block = blocks.rows(blocks.q, block) * blocks.scale, blocks.rows(dy, block)
            keys = slice(block.first, block.stop)
            blocks.weights(block, queries, scores, weights)
            torch.bmm(dy_block, blocks.v[:, keys].transpose(1, 2), out=dweights)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype, grad_input=scores)
            # sums in place on contiguous parts; slices of dk and dv would be computed without BLAS
            dv[:, keys] += torch.bmm(weights.transpose(1, 2), dy_block)
            dk[:, keys] += torch.bmm(dscores.transpose(1, 2), queries)
            place = dq[:, :, :, block.start : block.stop]
            place.copy_(torch.bmm(dscores, blocks.k[:, keys]).mul_(blocks.scale).view(place.shape))
        return blocks.blank(dq.flatten(1, 2)), dk.view(k.shape), dv.view(v.shape), None, None, None
