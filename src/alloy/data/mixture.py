"""Weighted mixing of token corpora into training batches: deterministic, resumable, the same for any number of ranks.

One global sequence of samples (rows) is defined by the sources, the weights and the seed. Which source gives sample t
follows the weights with an error below one sample at every prefix; which row of the source it is follows from how many the
source has given: rows are shuffled anew each epoch by (seed, epoch). So the whole state is one count per source, and rank
r of w takes samples r, r + w, ... of every batch.

Paper: Proportionate progress (Baruah et al., 1996): a unit job with release floor(c / w) and deadline ceil((c + 1) / w) for
sample c of a source of share w, earliest deadline first, keeps every count within one of its share.
Deviation from data.md 11.3: the last row of an epoch is padded, so that an epoch is every token once.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alloy.core.recipe import Config
from alloy.data.packing import ConcatPacking, Piece, Row, fill_row, num_concat_rows, pack_best_fit
from alloy.data.shards import Ids, TokenCorpus
from alloy.data.tokens import tokenizer_hash
from alloy.errors import DataError, RecipeError

Pack = Literal["concat", "best_fit"]


class Source(Config):
    """A folder of token shards (or the prefix of one .bin/.idx pair) and its share of the samples."""

    path: str
    weight: float = 1.0
    # what phases call it; None: its path
    name: str | None = None
    # key or column of text that is still to be tokenized
    column: str = "text"
    # most times that its tokens may be seen
    max_epochs: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of `rows` rows (None: to the end) in which the sources have these weights."""

    rows: int | None
    weights: tuple[float, ...]


@dataclass
class Batch:
    """Rows for one forward pass. tokens, labels int64 (rows, seq); documents int32 (rows, seq), -1 = padding.

    The label of a position is the next token of the same document, else -100.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        parts = (self.tokens, self.labels, self.documents)
        tokens, labels, documents = (part.to(device, non_blocking=True) for part in parts)
        return Batch(tokens, labels, documents)


class WeightedChoice:
    """Which source gives the next sample; |count - share * samples| < 1 for each source at every prefix."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(share.denominator for share in shares))
        self._parts = [int(share * scale) for share in shares]
        self._total = sum(self._parts)
        self.counts = [0] * len(weights)

    def next(self) -> int:
        """Index of the source of the next sample."""
        time, best, earliest = sum(self.counts) + 1, -1, 0
        for source, (count, part) in enumerate(zip(self.counts, self._parts, strict=True)):
            if count * self._total >= part * time:
                continue
            deadline = -(-(count + 1) * self._total // part)
            if best < 0 or deadline < earliest:
                best, earliest = source, deadline
        assert best >= 0, "shares sum to one, so some source is behind its share"
        self.counts[best] += 1
        return best


class Mixture:
    """Batches from weighted sources. `batch` on every rank, with the same arguments, advances the same global state."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        seq: int,
        pack: Pack = "concat",
        validation: float = 0.0,
        tokenizer: PreTrainedTokenizerFast | None = None,
        rank: int = 0,
        world: int = 1,
        phases: Sequence[Phase] = (),
    ) -> None:
        """
        Args:
            sources: corpora with weights
            seed: of the shuffles and the validation split
            seq: tokens in a row
            pack: "concat" or "best_fit" (see data/packing.py)
            validation: fraction of the documents of each source kept out of training
            tokenizer: checked against the one that made the shards
            rank: of this process
            world: number of processes
            phases: weights that change on the way, in place of those of the sources; the last one goes on for ever
        """
        _check_sources(sources)
        corpora = [TokenCorpus(source.path) for source in sources]
        _check_tokenizers(sources, corpora, tokenizer)
        self.seed, self.seq, self.pack = seed, seq, pack
        self.rank, self.world = rank, world
        self.sources = [_Rows(corpus, index, seed, seq, pack, validation) for index, corpus in enumerate(corpora)]
        self._phases = [phase for phase in phases if phase.rows != 0] or [Phase(None, tuple(s.weight for s in sources))]
        # rows given when each phase begins
        self._begins = [0, *itertools.accumulate(phase.rows or 0 for phase in self._phases[:-1])]
        self._enter([0] * len(sources))
        self._identity = {
            "seed": seed,
            "seq": seq,
            "pack": pack,
            "validation": validation,
            "weights": [source.weight for source in sources],
            "tokens": [corpus.num_tokens for corpus in corpora],
        }
        if phases:
            self._identity["phases"] = [[phase.rows, list(phase.weights)] for phase in phases]

    @property
    def num_tokens(self) -> int:
        """Training tokens in one epoch of every source."""
        return sum(rows.num_tokens for rows in self.sources)

    @property
    def epochs(self) -> list[float]:
        """Epochs given so far, by source."""
        return [count / rows.num_rows for count, rows in zip(self.counts, self.sources, strict=True)]

    @property
    def counts(self) -> list[int]:
        """Samples given so far, by source."""
        return [before + now for before, now in zip(self._before, self._choice.counts, strict=True)]

    def _enter(self, before: list[int]) -> None:
        """Begin the phase that comes when `before` samples were given, by source."""
        self._before, total = before, sum(before)
        self._phase = bisect.bisect_right(self._begins, total) - 1
        self._choice = WeightedChoice(self._phases[self._phase].weights)
        last = self._phase + 1 == len(self._phases)
        self._left = None if last else self._begins[self._phase + 1] - total

    def _next(self) -> tuple[int, int]:
        """The source of the next sample, and the number of that sample in its source."""
        if self._left == 0:
            self._enter(self.counts)
        if self._left is not None:
            self._left -= 1
        source = self._choice.next()
        return source, self._before[source] + self._choice.counts[source] - 1

    def batch(self, rows: int) -> Batch:
        """The next `rows` rows of this rank; rows * world samples of the global sequence are used up."""
        mine: list[Row] = []
        for sample in range(rows * self.world):
            source, number = self._next()
            if sample % self.world == self.rank:
                mine.append(self.sources[source].row(number))
        return Batch(
            tokens=torch.from_numpy(np.stack([row.tokens for row in mine])),
            labels=torch.from_numpy(np.stack([row.labels for row in mine])),
            documents=torch.from_numpy(np.stack([row.documents for row in mine])),
        )

    def validation_documents(self, max_tokens: int | None = None) -> list[Ids]:
        """Token ids of documents never used in training, one of each source in turn; the last is cut at `max_tokens`."""
        documents: list[Ids] = []
        room = sum(rows.corpus.num_tokens for rows in self.sources) if max_tokens is None else max_tokens
        for place in range(max(len(rows.held_out) for rows in self.sources)):
            for rows in self.sources:
                # one token alone predicts nothing
                if place < len(rows.held_out) and room > 1:
                    documents.append(rows.corpus[int(rows.held_out[place])][:room])
                    room -= len(documents[-1])
        return documents

    def state(self) -> dict[str, Any]:
        """All that a later `load_state` needs; plain values, the same on every rank."""
        phase = {"phase_begin": list(self._before)} if "phases" in self._identity else {}
        return {"counts": self.counts, "identity": self._identity, **phase}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, on any number of ranks."""
        for key in {**state["identity"], **self._identity}:
            before, now = state["identity"].get(key), self._identity.get(key)
            if before != now:
                raise RecipeError(
                    f"cannot resume: data {key} was {before} and is now {now}; restore the old setting or start a new run."
                )
        self._enter(list(state.get("phase_begin", [0] * len(self.sources))))
        self._choice.counts = [now - before for now, before in zip(state["counts"], self._before, strict=True)]
        if self._left is not None:
            self._left -= sum(self._choice.counts)


class _Rows:
    """The endless sequence of rows of one source: epoch after epoch, each with its own shuffle."""

    def __init__(self, corpus: TokenCorpus, index: int, seed: int, seq: int, pack: Pack, validation: float) -> None:
        self.corpus, self.seq = corpus, seq
        # sources of one size are shuffled apart
        self._stream = [seed, 0, index]
        number = corpus.num_documents
        held_out = math.ceil(validation * number)
        if held_out and held_out >= number:
            raise RecipeError(
                f"data.validation = {validation} keeps {held_out} of {number} documents of {corpus.path} out of training; "
                f"set it to 0, or cut the text into more documents."
            )
        # a stream of its own: the split depends on neither the epoch nor the other sources
        shuffled = np.random.default_rng([seed, 1]).permutation(number)
        self.held_out: NDArray[np.int64] = np.sort(shuffled[:held_out])
        self._documents: NDArray[np.int64] = np.sort(shuffled[held_out:])
        self.num_tokens = int(corpus.lengths[self._documents].sum())
        self._bins = pack_best_fit(corpus.lengths[self._documents], seq) if pack == "best_fit" else None
        self.num_rows = num_concat_rows(self.num_tokens, seq) if self._bins is None else len(self._bins)
        self._epoch = -1

    def row(self, sample: int) -> Row:
        """The row given as number `sample`, counted from the start of training."""
        epoch, index = divmod(sample, self.num_rows)
        if epoch != self._epoch:
            self._shuffle(epoch)
        return fill_row(self.corpus, self._pieces(int(self._order[index])), self.seq)

    def _shuffle(self, epoch: int) -> None:
        rng = np.random.default_rng([*self._stream, epoch])
        if self._bins is None:
            self._concat = ConcatPacking(self.corpus.lengths, rng.permutation(self._documents), self.seq)
        self._order = rng.permutation(self.num_rows)
        self._epoch = epoch

    def _pieces(self, row: int) -> Sequence[Piece]:
        if self._bins is None:
            return self._concat[row]
        return [piece._replace(document=int(self._documents[piece.document])) for piece in self._bins[row]]


def _check_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise RecipeError("data.sources is empty; name at least one folder made by `alloy data tokenize`.")
    for index, source in enumerate(sources):
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise RecipeError(
                f"data.sources[{index}].weight = {source.weight} ({source.path}); weights are finite and not negative."
            )
        if not Path(source.path).exists() and not Path(f"{source.path}.idx").exists():
            raise DataError(
                f'data.sources[{index}].path = "{source.path}" does not exist. Run `alloy data tokenize` first.'
            )
    if not any(source.weight for source in sources):
        raise RecipeError("all weights in data.sources are 0; give at least one source a positive weight.")


def _check_tokenizers(
    sources: Sequence[Source], corpora: Sequence[TokenCorpus], tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """All shards and the tokenizer in use must agree; a foreign Megatron pair does not say and is trusted."""
    known = [(f"the tokenizer {tokenizer.name_or_path}".strip(), tokenizer_hash(tokenizer))] if tokenizer else []
    known += [
        (source.path, corpus.tokenizer_hash)
        for source, corpus in zip(sources, corpora, strict=True)
        if corpus.tokenizer_hash
    ]
    for name, value in known[1:]:
        if value != known[0][1]:
            raise DataError(
                f"{name} was tokenized with another tokenizer than {known[0][0]} (hashes {value[:12]} and {known[0][1][:12]}); "
                f"tokenize it again with the tokenizer in use."
            )
