"""A small scorer of documents, trained in seconds: hashed words and word pairs under an ordinal logistic model.

Features of a text are its words and pairs of neighbours, hashed to 2^bits places: (1 + log count) x inverse document
frequency, the vector scaled to length 1. Grades 0..5 are modelled by proportional odds (McCullagh, 1980): P(grade >= k) =
sigmoid(w x + b_k), one weight vector and five ordered steps, and the score is the expected grade, their sum. The objective is convex
and solved over all documents at once by L-BFGS, so that nothing depends on an order or a learning rate.

Words are hashed as fastText does (Joulin et al., 2016, arXiv:1607.01759), here with CRC-32.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloy.core.runs import atomic_path, atomic_write
from alloy.data.prose import windows
from alloy.data.score import HIGHEST
from alloy.errors import CheckpointError

BITS = 20
# characters of a document that are read, from its centre
CENTRE_CHARS = 20_000
WEIGHTS_FILE, FACTS_FILE = "scorer.safetensors", "scorer.json"

_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d|[^\w\s]")
_SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class _Hashes(dict[str, int]):
    """CRC-32 of each word, computed when first met."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1_000_000:
            self.clear()
        value = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return value


_HASHES = _Hashes()


def features(text: str, bits: int = BITS) -> tuple[Ints, Floats]:
    """Places (sorted, each once) and 1 + log count of a text's words and word pairs."""
    (shown,) = windows(text, 1, CENTRE_CHARS)
    words = np.fromiter(map(_HASHES.__getitem__, _TOKEN.findall(shown.lower())), np.uint64)
    words *= _SPREAD[0]
    pairs = (words[:-1] ^ (words[1:] >> np.uint64(7))) * _SPREAD[1]
    places, counts = np.unique(np.concatenate([words, pairs]) >> np.uint64(64 - bits), return_counts=True)
    return places.astype(np.int64), 1 + np.log(counts, dtype=np.float32)


@dataclass
class Matrix:
    """Feature vectors of documents: row i has values[starts[i]:starts[i + 1]] at places[...]."""

    places: Ints
    values: Floats
    starts: Ints

    @classmethod
    def of(cls, rows: Sequence[tuple[Ints, Floats]]) -> "Matrix":
        """From one pair of places and values a document."""
        starts = np.cumsum([0, *(len(places) for places, _ in rows)])
        empty = np.zeros(0, np.int64), np.zeros(0, np.float32)
        places, values = (np.concatenate(column) for column in zip(empty, *rows, strict=True))
        return cls(places, values, starts)

    def scaled(self, frequency: Floats) -> "Matrix":
        """Times the inverse document frequency of each place, (2^bits,), and each row then to length 1."""
        values = self.values * frequency[self.places]
        sums = np.concatenate([[0.0], np.cumsum(values.astype(np.float64) ** 2)])[self.starts]
        lengths = np.sqrt(np.maximum(np.diff(sums), 1e-12))
        return Matrix(self.places, (values / np.repeat(lengths, np.diff(self.starts))).astype(np.float32), self.starts)

    def without_zeros(self) -> "Matrix":
        """The same vectors, with only what is not 0 stored."""
        kept = self.values != 0
        starts = np.concatenate([[0], np.cumsum(kept)])[self.starts]
        return Matrix(self.places[kept], self.values[kept], starts)


@dataclass
class LinearScorer:
    """Scores from 0 to 5 of hashed words.

    Attributes:
        weights: (2^bits,) of the places
        frequency: (2^bits,) inverse document frequencies
        steps: (5,) falling biases of P(grade >= 1) .. P(grade >= 5)
        facts: how it was trained and how good it is; saved with it
    """

    weights: Floats
    frequency: Floats
    steps: Floats
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Of a place."""
        return len(self.weights).bit_length() - 1

    def score(self, texts: Sequence[str]) -> list[float]:
        """A score for each text, in order; 0 for a blank one."""
        rows = [features(text, self.bits) if text.strip() else None for text in texts]
        matrix = Matrix.of([row for row in rows if row is not None]).scaled(self.frequency)
        products = np.concatenate([[0.0], np.cumsum(matrix.values * self.weights[matrix.places], dtype=np.float64)])
        scores = iter(_expected(np.diff(products[matrix.starts]), self.steps).tolist())
        return [0.0 if row is None else next(scores) for row in rows]

    def save(self, folder: Path) -> None:
        """Write `scorer.safetensors` and `scorer.json`."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / WEIGHTS_FILE) as path:
            save_file({"weights": self.weights, "frequency": self.frequency, "steps": self.steps}, path)
        facts = {"version": 1, "kind": "linear", **self.facts}
        atomic_write(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "LinearScorer":
        """What `save` wrote."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        facts = read_facts(folder)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
            scorer = cls(tensors["weights"], tensors["frequency"], tensors["steps"], facts)
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} cannot be read: {error}; train the scorer again."
            ) from error
        if len(scorer.weights) != 1 << scorer.bits or scorer.frequency.shape != scorer.weights.shape:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} is not of a scorer; train it again.")
        return scorer


def read_facts(folder: Path) -> dict[str, Any]:
    """What a trained scorer's folder says of itself: kind, training, figures."""
    try:
        return json.loads((folder / FACTS_FILE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no {FACTS_FILE}; give a folder that `alloy data train-scorer` wrote."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{folder / FACTS_FILE} is damaged ({error}); train the scorer again.") from error


def fit_linear(
    rows: Sequence[tuple[Ints, Floats]],
    grades: Sequence[float],
    bits: int = BITS,
    decay: float = 0.3,
    iterations: int = 40,
) -> LinearScorer:
    """The weights that minimise the sum over documents and steps of the logistic loss, plus decay / 2 |w|^2.

    Args:
        rows: `features` of each document
        grades: 0 to 5, fractions allowed: they become probabilities of the step they are in
        bits: of a place
        decay: weight of the squared length of `weights`; the steps are free
        iterations: at most, of L-BFGS
    """
    import torch
    from torch.nn import functional as F

    raw = Matrix.of(rows)
    seen = np.bincount(raw.places, minlength=1 << bits)
    # a place of one document says nothing of others
    kept = seen >= 2
    frequency = np.where(kept, 1 + np.log((1 + len(rows)) / (1 + seen)), 0).astype(np.float32)
    matrix = raw.scaled(frequency).without_zeros()
    del raw
    renumbered = (np.cumsum(kept) - 1)[matrix.places].astype(np.int32)
    places, values = torch.from_numpy(renumbered), torch.from_numpy(matrix.values)
    starts, lengths = torch.from_numpy(matrix.starts.astype(np.int32)), np.diff(matrix.starts)
    wanted = (torch.tensor(grades, dtype=torch.float32)[:, None] - torch.arange(HIGHEST)).clamp(0, 1)
    weights = torch.zeros(int(kept.sum()))
    # the steps of the grades' own shares, a little inside 0 and 1, are where w = 0 leaves them
    steps = torch.logit((wanted.sum(0) + 0.5) / (len(rows) + 1))

    def closure() -> float:
        product = F.embedding_bag(
            places, weights[:, None], starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        logits = product + steps
        slope = torch.sigmoid(logits) - wanted
        pull = torch.from_numpy(np.repeat(slope.sum(1).numpy(), lengths)) * values
        weights.grad = (decay * weights).index_add_(0, places, pull)
        steps.grad = slope.sum(0)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") + decay / 2 * weights.dot(weights)
        return float(loss)

    optimizer = torch.optim.LBFGS(
        [weights, steps],
        max_iter=iterations,
        tolerance_grad=1e-4,
        tolerance_change=1e-7,
        history_size=8,
        line_search_fn="strong_wolfe",
    )
    with torch.no_grad():
        optimizer.step(closure)
    everywhere = np.zeros(1 << bits, np.float32)
    everywhere[kept] = weights.numpy()
    return LinearScorer(everywhere, frequency, steps.numpy())


def _expected(products: NDArray[np.float64], steps: Floats) -> NDArray[np.float64]:
    """The expected grade: (documents,) from w x and the steps."""
    # the products of a trained model lie well within what exp takes
    return (1 / (1 + np.exp(-np.clip(products[:, None] + steps, -60, 60)))).sum(1)
