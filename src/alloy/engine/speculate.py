"""Self-speculation: multi-token prediction drafts, one backbone pass checks them, wrong ones are rolled back.

A draft is a point guess, so rejection sampling (accept d with probability p(d), else draw from p without d) is the same
as drawing x from p and accepting when x = d. The engine does exactly that, with the same random number per position as
without drafts: greedy and seeded sampled answers are the same tokens either way, penalties and bans included.

Paper: Fast Inference from Transformers via Speculative Decoding (Leviathan et al., 2023), arXiv:2211.17192;
DeepSeek-V3 (2024), section 2.2, arXiv:2412.19437.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alloy.models.base import CausalLM, ModelOutput
from alloy.models.cache import Cache
from alloy.models.paged import PagedView

# published runs peak at six drafts for a batch of one (performance.md, appendix B)
LONGEST_DRAFT = 6
FIRST_DRAFT = 3
# each length of the first measurement runs this often, the fastest counts
TRIALS = 3
# steps between two looks at a length that was not chosen
PROBE_EVERY = 64
DECAY = 0.98
# pairs that steps without drafts let wait
MOST_PENDING = 16
# the most that can be asked for: as many pairs wait then, and must fit behind the longest sequence (SLACK in paged.py)
MOST_DRAFTS = 16


@dataclass
class Pairs:
    """What the MTP blocks have not seen yet: backbone outputs with the token that follows each.

    Attributes:
        tokens: (rows, width) int64
        hidden: (rows, width, hidden)
        counts: (rows,) int64, real pairs per row, the rest of a row is padding; None: all are real
    """

    tokens: Tensor
    hidden: Tensor
    counts: Tensor | None = None

    def select(self, rows: Tensor) -> "Pairs":
        """Keep the given rows."""
        return Pairs(self.tokens[rows], self.hidden[rows], None if self.counts is None else self.counts[rows])

    def mask(self) -> Tensor:
        """(rows, width) bool, real pairs."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        if self.counts is None:
            return (index >= 0).expand_as(self.tokens)
        return index < self.counts[:, None]

    def show(self, model: CausalLM, cache: Cache, logits: Literal["last"] | None = None) -> ModelOutput:
        """Let the MTP blocks of a model see them."""
        documents = documents_of(self.tokens, self.counts)
        return model.mtp_step(self.tokens, self.hidden, cache, documents=documents, logits=logits)


class Drafter:
    """Drafts for the rows of one cache; follows the rows as they come and go."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._pending: list[Pairs] = []

    @property
    def width(self) -> int:
        """Pairs that wait in the fullest row, or more."""
        return sum(pairs.tokens.shape[1] for pairs in self._pending)

    def observe(self, tokens: Tensor, hidden: Tensor, counts: Tensor | None = None) -> None:
        """Remember tokens (rows, width) and the hidden states (rows, width, hidden) they followed.

        counts (rows,): how many of each row are real.
        """
        self._pending.append(Pairs(tokens, hidden, counts))

    def waiting(self) -> Pairs:
        """All pairs that wait."""
        self._pending = [merge(self._pending)]
        return self._pending[0]

    def replace(self, pairs: Pairs) -> None:
        """What waited has been seen; this waits now."""
        self._pending = [pairs]

    def draft(self, cache: Cache, length: int) -> Tensor:
        """The greedy guess of the next `length` tokens after the last observed one: (rows, length) int64."""
        mtp = cache.mtp
        assert mtp is not None, "the engine drafts only for models with MTP"
        pairs = merge(self._pending)
        out = pairs.show(self._model, cache, logits="last")
        self._pending = []
        hidden = out.last_hidden[:, -1:]
        if pairs.counts is not None:
            last = (pairs.counts - 1)[:, None, None].expand(-1, 1, out.last_hidden.shape[2])
            hidden = out.last_hidden.gather(1, last)
        drafts = [_greedy(out.logits)]
        if length > 1:
            mark = mtp.mark()
            for _ in range(length - 1):
                out = self._model.mtp_step(drafts[-1], hidden, cache, logits="last")
                hidden = out.last_hidden
                drafts.append(_greedy(out.logits))
            mtp.rollback(mark)
        return torch.cat(drafts, 1)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows."""
        self._pending = [pairs.select(rows) for pairs in self._pending] if len(rows) else []

    def join(self, behind: Sequence[int], newest: int, hidden: Tensor | None) -> None:
        """Append a row: hidden (pairs, hidden) states and the tokens that follow them, `newest` last; None: nothing yet."""
        weight, counts = self._model.embed.weight, None
        if hidden is None:
            hidden = weight.new_zeros(1, self._model.config.hidden)
            counts = torch.zeros(1, dtype=torch.int64, device=weight.device)
        pairs = Pairs(torch.tensor([[*behind, newest]], device=weight.device), hidden[None], counts)
        self._pending = [stack(merge(self._pending), pairs)] if self._pending else [pairs]

    def leave(self, row: int) -> tuple[tuple[int, ...], Tensor | None]:
        """What `join` needs to bring a row back: tokens behind the newest one, and the hidden states before all of them."""
        pairs = merge(self._pending)
        self._pending = [pairs]
        count = pairs.tokens.shape[1] if pairs.counts is None else int(pairs.counts[row])
        if not count:
            return (), None
        return tuple(int(token) for token in pairs.tokens[row, : count - 1]), pairs.hidden[row, :count].clone()

    def flush(self, view: PagedView) -> None:
        """Show the MTP blocks what waits, once it is much; steps without drafts call this before `observe`."""
        if self.width < MOST_PENDING:
            return
        pairs, self._pending = merge(self._pending), []
        if pairs.counts is None:
            pairs.show(self._model, view)
            return
        # rows of which nothing is known wait for their first pair; what no row has is not written
        counts = [int(count) for count in pairs.counts]
        rows = [row for row, count in enumerate(counts) if count]
        if rows:
            some = pairs.select(torch.tensor(rows, device=pairs.counts.device))
            most = max(counts)
            Pairs(some.tokens[:, :most], some.hidden[:, :most], some.counts).show(
                self._model, view.pool.view([view.rows[row] for row in rows])
            )
            view.refresh()


class DraftLength:
    """How many tokens to draft: a fixed number, or the one with most expected tokens per second so far.

    Expected tokens come from the acceptance rate of each draft position, seconds from the steps of the same batch size
    (in powers of two). Lengths that were never run are interpolated from those that were.
    """

    def __init__(self, setting: int | Literal["auto"]) -> None:
        self._fixed = None if setting == "auto" else setting
        self.longest = LONGEST_DRAFT if setting == "auto" else setting
        self._tried = [1.0] * LONGEST_DRAFT
        self._kept = [0.7] * LONGEST_DRAFT
        self._seconds: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._steps = 0

    def choose(self, rows: int) -> int:
        """Draft length of the next step of `rows` rows."""
        if self._fixed is not None:
            return self._fixed
        seconds = self._seconds[rows.bit_length()]
        for length in (FIRST_DRAFT, 0, 1):
            if len(seconds[length]) < TRIALS:
                return length
        self._steps += 1
        # a step gives one token, and each draft if it and all before it are kept
        expected = np.cumprod([1.0, *np.divide(self._kept, self._tried)]).cumsum()
        best = int(np.argmax(expected / _costs(seconds)))
        if self._steps % PROBE_EVERY == 0:
            return best + 1 if best < LONGEST_DRAFT else best - 1
        return best

    def record(self, rows: int, length: int, seconds: float, accepted: Sequence[int]) -> None:
        """Note one step: its time, and how many drafts each row kept."""
        if self._fixed is not None:
            return
        times = self._seconds[rows.bit_length()][length]
        times.append(seconds)
        del times[: -4 * TRIALS]
        for i in range(length):
            tried = sum(kept >= i for kept in accepted)
            self._tried[i] = DECAY * self._tried[i] + tried
            self._kept[i] = DECAY * self._kept[i] + sum(kept > i for kept in accepted)


def documents_of(tokens: Tensor, counts: Tensor | None) -> Tensor | None:
    """What a model is told of padded rows (rows, width): int32, 0 where they are real, else -1; None: all are."""
    if counts is None:
        return None
    return (torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]).to(torch.int32) - 1


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens (rows, width) int64, zeros behind them; and (rows,) how many of each are real, None: all."""
    counts = [len(row) for row in rows]
    width = max(counts)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return tokens, None if min(counts) == width else torch.tensor(counts, device=device)


def merge(pending: Sequence[Pairs]) -> Pairs:
    """Successive pairs of the same rows as one, real pairs first in each row."""
    if len(pending) == 1:
        return pending[0]
    tokens = torch.cat([p.tokens for p in pending], 1)
    hidden = torch.cat([p.hidden for p in pending], 1)
    if all(p.counts is None for p in pending):
        return Pairs(tokens, hidden)
    real = torch.cat([p.mask() for p in pending], 1)
    counts = real.sum(1)
    order = (~real).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    return Pairs(tokens.gather(1, order), hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[2])), counts)


def stack(above: Pairs, below: Pairs) -> Pairs:
    """Rows of both, padded to one width."""
    tokens = pad_sequence([*above.tokens, *below.tokens], batch_first=True)
    hidden = pad_sequence([*above.hidden, *below.hidden], batch_first=True)
    counts = torch.cat([above.mask().sum(1), below.mask().sum(1)])
    uniform = above.counts is None and below.counts is None and above.tokens.shape[1] == below.tokens.shape[1]
    return Pairs(tokens, hidden, None if uniform else counts)


def _costs(seconds: Mapping[int, Sequence[float]]) -> NDArray[np.float64]:
    """Seconds of a step with each number of drafts: medians of those that ran, the rest on the lines between them."""
    known = sorted((n, sorted(times)[len(times) // 2]) for n, times in seconds.items() if times)
    # beyond the longest run: as much per draft as the last ones cost
    (before, less), (last, most) = known[-2:]
    slope = max(0.0, most - less) / (last - before)
    known.append((LONGEST_DRAFT + 1, most + slope * (LONGEST_DRAFT + 1 - last)))
    lengths, medians = zip(*known, strict=True)
    return np.interp(range(LONGEST_DRAFT + 1), lengths, medians)


def _greedy(logits: Tensor | None) -> Tensor:
    """logits (rows, 1, vocab) -> (rows, 1)."""
    assert logits is not None, "mtp_step was asked for logits"
    return logits.argmax(-1)
