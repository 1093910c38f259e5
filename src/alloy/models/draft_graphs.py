"""Steps with drafts as CUDA graphs: one that shows the multi-token prediction what is new, drafts and verifies, one that accepts.

Both are captured per batch bucket and number of drafts, when first wanted. What the multi-token prediction has not seen yet (the
tokens that the step before accepted, with the hidden states before them) waits in fixed buffers, which the second graph fills:
a batch that stays as it is copies only token ids and counts to the device, and reads only token ids back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from alloy.models.base import CausalLM
from alloy.models.graphs import capture, fill
from alloy.models.paged import PagedCache, StaticView
from alloy.ops.decode import take_largest


@dataclass(frozen=True)
class Buffers:
    """What steps with one number of drafts read and write, for the largest bucket; width is the number of drafts and one.

    Attributes:
        tokens: (rows, width) int64 that follow `hidden`; the last real one of a row is its newest token
        hidden: (rows, width, hidden)
        counts: (rows,) int64, how many of each row are real; 1 where a row is padding
        guesses: (rows, width - 1) int64
        said: (rows, 2 * width - 1) int64, the guesses and the token of the largest logit at each position, -1 as in `StepOutput`
        logits: fp32 (places, vocab), those of position j of row i at i * width + j
        new: (rows, width, hidden) after the final norm
    """

    tokens: Tensor
    hidden: Tensor
    counts: Tensor
    guesses: Tensor
    said: Tensor
    logits: Tensor
    new: Tensor


class DraftGraphs:
    """Captured steps with drafts.

    Args:
        model: with multi-token prediction
        pool: the cache; see `may_capture`
        buckets: batch sizes
        longest: most drafts of a step
        handle: of the memory that captured steps share; None: nothing is captured, the calls are made one by one
    """

    def __init__(
        self, model: CausalLM, pool: PagedCache, buckets: Sequence[int], longest: int, handle: Any = None
    ) -> None:
        self._model, self._pool, self._buckets, self._handle = model, pool, buckets, handle
        self._slots = torch.full((buckets[-1],), -1, dtype=torch.int32, device=model.embed.weight.device)
        self._rows: list[int] = []
        self._longest = longest
        self._buffers: dict[int, Buffers] = {}
        self._steps: dict[tuple[int, int], tuple[Callable[[], None], Callable[[], None]]] = {}
        # real tokens per row of what waits in the buffers
        self._counts: list[int] = []

    def step(
        self, rows: Sequence[int], tokens: Tensor, hidden: Tensor, counts: Tensor | None, length: int
    ) -> tuple[list[list[int]], list[list[int]], Buffers]:
        """Draft `length` tokens for each of `rows` (slots) and verify them.

        Args:
            rows: as many as the largest bucket at most
            tokens: (rows, up to length + 1) int64 that the multi-token prediction has not seen
            hidden: (rows, the same, hidden) before them
            counts: (rows,) int64, how many of each row are real, from 1; None: all
            length: from 1

        Returns:
            per row the drafts, and the greedy choice at each position; the buffers' first rows, until the next step
        """
        count, width = len(rows), length + 1
        size = next(bucket for bucket in self._buckets if bucket >= count)
        buffers = self._buffers.get(length) or self._make(length)
        if (size, length) not in self._steps:
            self._rows = []
            fill(self._slots, [-1] * len(self._slots))
            self._steps[size, length] = self._capture(size, length, buffers)
        if tokens.data_ptr() != buffers.tokens.data_ptr():
            self._counts = [tokens.shape[1]] * count if counts is None else cast(list[int], counts.tolist())
            buffers.tokens[:count, : tokens.shape[1]] = tokens
            buffers.hidden[:count, : tokens.shape[1]] = hidden
            fill(buffers.counts, self._counts + [1] * (len(self._slots) - count))
        mtp = self._pool.mtp
        assert mtp is not None, "only models with multi-token prediction draft"
        self._pool.reserve(rows, width)
        mtp.reserve(rows, width + length - 1)
        if list(rows) != self._rows:
            self._rows = list(rows)
            fill(self._slots, self._rows + [-1] * (len(self._slots) - count))
        self._steps[size, length][0]()
        mtp.count(rows, self._counts)
        said = cast(list[list[int]], buffers.said[:count].tolist())
        return [row[:length] for row in said], [row[length:] for row in said], buffers

    def accept(self, taken: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keep these tokens, one at least, of each row of the step before: `tokens`, `hidden` and `counts` of the next step."""
        buffers, count = self._buffers[length], len(taken)
        size = next(bucket for bucket in self._buckets if bucket >= count)
        self._counts = [len(tokens) for tokens in taken]
        fill(buffers.tokens, [token for tokens in taken for token in (*tokens, *[0] * (length + 1 - len(tokens)))])
        fill(buffers.counts, self._counts + [1] * (len(self._slots) - count))
        self._steps[size, length][1]()
        self._pool.count(self._rows, self._counts)
        return buffers.tokens[:count], buffers.hidden[:count], buffers.counts[:count]

    def _make(self, length: int) -> Buffers:
        most, width, config, weight = len(self._slots), length + 1, self._model.config, self._model.embed.weight

        def ids(*shape: int) -> Tensor:
            return torch.zeros(most, *shape, dtype=torch.int64, device=weight.device)

        def states() -> Tensor:
            return torch.zeros(most, width, config.hidden, dtype=weight.dtype, device=weight.device)

        # the largest by far: one for all numbers of drafts
        shared = next((b.logits for b in self._buffers.values()), None)
        logits = (
            torch.zeros(most * (self._longest + 1), config.vocab, device=weight.device) if shared is None else shared
        )
        self._buffers[length] = Buffers(
            ids(width), states(), ids() + 1, ids(length), ids(width + length), logits, states()
        )
        return self._buffers[length]

    def _capture(self, size: int, length: int, buffers: Buffers) -> tuple[Callable[[], None], Callable[[], None]]:
        view = StaticView(self._pool, self._slots[:size])
        draft, accept = partial(self._draft, view, length, buffers), partial(self._accept, view, buffers)
        if self._handle is not None:
            (draft, accept), _ = capture([draft, accept], self._slots.device, self._handle)
        return draft, accept

    def _draft(self, view: StaticView, length: int, buffers: Buffers) -> None:
        model, rows, width = self._model, view.batch, length + 1
        mtp = view.mtp
        assert mtp is not None, "only models with multi-token prediction draft"
        tokens, counts = buffers.tokens[:rows], buffers.counts[:rows]
        # what is padding is overwritten: only real tokens are counted
        out = model.mtp_step(tokens, buffers.hidden[:rows], view, logits=None)
        mtp.advance(counts - width)
        last = (counts - 1)[:, None]
        hidden = out.last_hidden.gather(1, last[..., None].expand(-1, 1, out.last_hidden.shape[2]))
        guesses = [model.head(hidden[:, 0]).float().argmax(-1, keepdim=True)]
        for _ in range(length - 1):
            hidden = model.mtp_step(guesses[-1], hidden, view, logits=None).last_hidden
            guesses.append(model.head(hidden[:, 0]).float().argmax(-1, keepdim=True))
        mtp.advance(1 - length)
        buffers.guesses[:rows] = torch.cat(guesses, 1)
        with view.drafting():
            out = model(torch.cat([tokens.gather(1, last), *guesses], 1), cache=view, logits=None)
        buffers.new[:rows] = out.last_hidden
        chosen, spare = torch.empty_like(tokens).flatten(), torch.empty_like(tokens).flatten()
        take_largest(model.head(out.last_hidden.flatten(0, 1)), buffers.logits[: rows * width], chosen, spare)
        buffers.said[:rows] = torch.cat([*guesses, chosen.view(rows, width)], 1)

    def _accept(self, view: StaticView, buffers: Buffers) -> None:
        view.keep(buffers.counts[: view.batch])
        buffers.hidden[: view.batch] = buffers.new[: view.batch]


def may_capture(pool: PagedCache) -> bool:
    """Whether the prediction blocks hold no recurrent states: wrong drafts are taken back by counting."""
    return pool.mtp is not None and not pool.mtp.states.layers
