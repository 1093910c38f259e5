"""lzma and Kneser-Ney against their definitions."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from alloy.data.tokens import TextEncoder, train_tokenizer
from alloy.eval.baselines import KneserNey, kneser_ney_bits_per_byte, lzma_bits_per_byte

VOCAB, BOS, EOS = 11, 1, 2


def random_documents(number: int, seed: int) -> list[np.ndarray]:
    """bos, skewed random ids, eos."""
    rng = np.random.default_rng(seed)
    bodies = [np.minimum(rng.geometric(0.35, rng.integers(1, 60)) + 2, VOCAB - 2) for _ in range(number)]
    return [np.concatenate([[BOS], body, [EOS]]) for body in bodies]


class Plain:
    """Interpolated modified Kneser-Ney from its definition, with dicts and recursion (Chen and Goodman, section 3)."""

    def __init__(self, documents: list[np.ndarray], order: int) -> None:
        self.order = order
        raw: dict[tuple, int] = Counter()
        for document in documents:
            ids = tuple(int(i) for i in document)
            for end in range(1, len(ids)):
                for n in range(1, order + 1):
                    if end - n + 1 >= 0:
                        raw[ids[end - n + 1 : end + 1]] += 1
        self.counts: dict[int, dict[tuple, int]] = {}
        for n in range(1, order + 1):
            grams = {gram: count for gram, count in raw.items() if len(gram) == n}
            if n < order:
                left = Counter(gram[1:] for gram in raw if len(gram) == n + 1)
                grams = {gram: count if gram[0] == BOS else left[gram] for gram, count in grams.items()}
            self.counts[n] = grams
        self.discounts = {n: self.estimate(grams) for n, grams in self.counts.items()}

    @staticmethod
    def estimate(grams: dict[tuple, int]) -> list[float]:
        n1, n2, n3, n4 = (sum(count == k for count in grams.values()) for k in (1, 2, 3, 4))
        if min(n1, n2, n3, n4) == 0:
            return [0.0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        found = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return found if min(found[1:]) > 0 else [0.0, 0.5, 1.0, 1.5]

    def prob(self, token: int, context: tuple) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        n = len(context) + 1
        lower = self.prob(token, context[1:]) if context else 1 / VOCAB
        followers = {gram[-1]: count for gram, count in self.counts[n].items() if gram[:-1] == context}
        total = sum(followers.values())
        if total == 0:
            return lower
        discount = self.discounts[n]
        mass = sum(discount[min(count, 3)] for count in followers.values())
        count = followers.get(token, 0)
        return (max(count - discount[min(count, 3)], 0) + mass * lower) / total


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("number", [3, 23])
def test_kneser_ney_equals_its_definition(order, number) -> None:
    """Array code against recursion over dicts, on text with and without known n-grams, with real and fall-back discounts."""
    train, test = random_documents(number, seed=0), random_documents(3, seed=9)
    model, plain = KneserNey(train, VOCAB, order), Plain(train, order)
    for document in [train[0], *test]:
        ids = tuple(int(i) for i in document)
        expected = [math.log(plain.prob(ids[i], ids[:i])) for i in range(1, len(ids))]
        np.testing.assert_allclose(model.log_probs(document), expected, rtol=1e-10)


def test_kneser_ney_probabilities_sum_to_one() -> None:
    """Over the vocabulary, after random contexts, seen and unseen, short and long."""
    model = KneserNey(random_documents(40, seed=1), VOCAB)
    rng = np.random.default_rng(2)
    for length in [0, 1, 2, 3, 4, 5, 9] * 4:
        context = np.concatenate([[BOS], rng.integers(3, VOCAB, length)])
        probs = [math.exp(model.log_probs(np.append(context, token))[-1]) for token in range(VOCAB)]
        assert sum(probs) == pytest.approx(1, abs=1e-12)
        assert min(probs) > 0


def test_kneser_ney_counts_neighbours_not_occurrences() -> None:
    """ "Francisco" often follows one word only, so alone it is less likely than a word with many left neighbours."""
    san, francisco, glass = 3, 4, 5
    train = [np.array([BOS, *[san, francisco] * 9, EOS])]
    train += [np.array([BOS, left, glass, EOS]) for left in (6, 7, 8, 9)]
    model = KneserNey(train, VOCAB, order=2)
    unseen = 10
    after_unseen = {token: model.log_probs(np.array([BOS, unseen, token]))[-1] for token in (francisco, glass)}
    assert after_unseen[glass] > after_unseen[francisco]


def test_kneser_ney_bits_are_charged_to_bytes() -> None:
    """Bits per byte is the sum over tokens and the documents' ends, over UTF-8 bytes."""
    train, held_out = ["the cat sat on the mat é"] * 5, ["the mat é", "cat"]
    tokenizer = train_tokenizer(train, vocab=280)
    encoder = TextEncoder(tokenizer)
    model = KneserNey(encoder.scored(train), encoder.vocab)
    nats = -sum(model.log_probs(ids).sum() for ids in encoder.scored(held_out))
    assert kneser_ney_bits_per_byte(held_out, train, tokenizer) == pytest.approx(nats / math.log(2) / 13)


def test_lzma_is_xz_without_its_container() -> None:
    """The raw stream is some 60 bytes shorter than an .xz file of the same preset."""
    text = "".join(f"line {i * i % 97} of the text é\n" for i in range(2000))
    xz = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    raw = lzma_bits_per_byte(text) * len(text.encode()) / 8
    assert 20 < xz - raw < 100


def test_primed_lzma_knows_the_training_text() -> None:
    """A held-out text that stands in the training text costs next to nothing, wherever in it."""
    rng = np.random.default_rng(0)
    train = "".join(chr(97 + c) for c in rng.integers(0, 26, 300_000))
    held_out = train[5_000:15_000]
    assert lzma_bits_per_byte(held_out) > 4.5
    assert lzma_bits_per_byte(held_out, train) < 0.05
