"""What a language model has to beat: lzma and a Kneser-Ney n-gram, in bits per byte of the same held-out text.

lzma is FORMAT_RAW with the LZMA2 filter of preset 9 | EXTREME: the bits of `xz -9e` without its container (about 60 bytes),
so every byte counted carries text. Primed means compressed(train + held out) - compressed(train), the dictionary large
enough to hold both. Kneser-Ney works on the model's tokens and is charged as the model is: every token of the text and the
end of each document, given bos.

Paper: An Empirical Study of Smoothing Techniques for Language Modeling (Chen and Goodman, 1999), section 3: interpolated
modified Kneser-Ney. Counts of n-grams that begin a document are kept as they are, since nothing can precede them.
"""

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from alloy.data.tokens import TextEncoder

ORDER = 5
# Chen and Goodman's estimate needs n-grams seen once to four times; tiny corpora lack them
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def lzma_bits_per_byte(held_out: str, train: str = "") -> float:
    """Bits of lzma for each byte of `held_out`, after `train` if given."""
    data, prefix = held_out.encode(), train.encode()
    size = _lzma_bytes(prefix + data) - (_lzma_bytes(prefix) if prefix else 0)
    return 8 * size / len(data)


def kneser_ney_bits_per_byte(
    held_out: Sequence[str], train: Sequence[str], tokenizer: PreTrainedTokenizerFast, order: int = ORDER
) -> float:
    """Bits of an n-gram model of the training texts' tokens for each byte of the held-out texts."""
    encoder = TextEncoder(tokenizer)
    model = KneserNey(encoder.scored(train), encoder.vocab, order)
    nats = -sum(float(model.log_probs(ids).sum()) for ids in encoder.scored(held_out))
    return nats / math.log(2) / sum(len(text.encode()) for text in held_out)


@dataclass
class _Level:
    """The n-grams of one order n. A key is (number of its first n - 1 tokens) * vocab + last token; keys are sorted."""

    keys: Ints
    counts: Ints  # (keys,) occurrences at the highest order, different left neighbours below
    discounts: Floats  # (4,) for counts 0, 1, 2, 3 and more
    totals: Floats  # (contexts,) sum of counts
    backoff: Floats  # (contexts,) sum of discounts, the mass of the lower order


class KneserNey:
    """Interpolated modified Kneser-Ney over token ids, ending in a uniform distribution over the vocabulary."""

    def __init__(self, documents: Sequence[NDArray[np.integer]], vocab: int, order: int = ORDER) -> None:
        """documents: ids of each, the first one context only (bos)."""
        self.vocab = vocab
        tokens = np.concatenate(documents).astype(np.int64)
        # position in the document: an n-gram needs n of its tokens
        place = np.concatenate([np.arange(len(document)) for document in documents])
        keys: list[Ints] = [np.arange(vocab)]
        # number, at each position, of the n-gram that ends there
        numbers: list[Ints] = [tokens]
        # one position of each n-gram
        examples: list[Ints] = [np.arange(0)]
        for n in range(2, order + 1):
            whole = np.flatnonzero(place >= n - 1)
            extended = numbers[-1][whole - 1] * vocab + tokens[whole]
            unique, first, inverse = np.unique(extended, return_index=True, return_inverse=True)
            number = np.full(len(tokens), -1)
            number[whole] = inverse
            keys.append(unique)
            numbers.append(number)
            examples.append(whole[first])
        num_contexts = [1, vocab, *(len(unique) for unique in keys[1:])]
        self._levels: list[_Level] = []
        for n in range(1, order + 1):
            # the highest order counts occurrences, a lower one the different longer n-grams that end in it
            ending = numbers[n - 1][place >= n - 1] if n == order else numbers[n - 1][examples[n]]
            counts = np.bincount(ending, minlength=len(keys[n - 1]))
            if 1 < n < order:
                counts += np.bincount(numbers[n - 1][place == n - 1], minlength=len(counts))
            self._levels.append(_level(keys[n - 1], counts, vocab, num_contexts[n - 1]))

    def log_probs(self, ids: NDArray[np.integer]) -> Floats:
        """Natural log probability of each token but the first, given those before it. ids (tokens,) -> (tokens - 1,)"""
        tokens = np.asarray(ids, dtype=np.int64)
        probs = np.full(len(tokens) - 1, 1.0 / self.vocab)
        number = np.zeros(len(tokens), np.int64)
        for n, level in enumerate(self._levels, start=1):
            context = number[:-1]
            found = _find(level.keys, context * self.vocab + tokens[1:])
            count = np.where(found >= 0, level.counts[found], 0)
            total = np.where(context >= 0, level.totals[context], 0.0)
            kept = np.maximum(count - level.discounts[np.minimum(count, 3)], 0.0)
            mixed = (kept + level.backoff[context] * probs) / np.maximum(total, 1.0)
            probs = np.where(total > 0, mixed, probs)
            number = np.concatenate([tokens[:1] if n == 1 else [-1], found])
        return np.log(probs)


def _level(keys: Ints, counts: Ints, vocab: int, num_contexts: int) -> _Level:
    discounts = _discounts(counts)
    context = keys // vocab
    totals = np.bincount(context, weights=counts, minlength=num_contexts)
    backoff = np.bincount(context, weights=discounts[np.minimum(counts, 3)], minlength=num_contexts)
    return _Level(keys, counts, discounts, totals.astype(np.float64), backoff.astype(np.float64))


def _discounts(counts: Ints) -> Floats:
    """0, D1, D2, D3+ from the numbers of n-grams seen once to four times (Chen and Goodman, eq. 17)."""
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    values = FALLBACK_DISCOUNTS
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimate = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(value > 0 for value in estimate):
            values = estimate
    return np.array([0.0, *values])


def _find(keys: Ints, wanted: Ints) -> Ints:
    """Index of each wanted key, -1 where there is none (negative keys never are)."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, index, -1)


def _lzma_bytes(data: bytes) -> int:
    window = max(1 << 16, 1 << (len(data) - 1).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
