import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.data.minhash import PRESETS, MinHash, band_keys, codes_of, collision_probability, signatures
from alloy.data.shingles import Words, characters, jaccard, normalise, rolling, shingles

HOSTILE = ["", "a", "\0", "\ud800", "a\udfff\ud83d b", "x" * 1_000_000, " \n\t", "$", "$$", "\\", "\u0130\ufb01½"]


def related(count: int, size: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
    """Pairs of sets of `size` random codes, and their Jaccard indexes, from 0.3 to 1."""
    rng = np.random.default_rng(seed)
    first, second, truth = [], [], []
    for shared in np.linspace(0.3, 1, count):
        both = round(size * 2 * shared / (1 + shared))
        codes = rng.integers(0, 1 << 63, size=2 * size - both, dtype=np.uint64)
        first.append(codes[:size])
        second.append(np.concatenate([codes[:both], codes[size:]]))
        truth.append(both / (2 * size - both))
    return first, second, truth


@given(st.text("abc", max_size=40), st.integers(1, 33))
@settings(max_examples=100, deadline=None)
def test_equal_ngrams_and_no_others_have_equal_hashes(text: str, n: int) -> None:
    """Hashes tell n-grams apart exactly as strings do."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    hashes = rolling(characters(text), n).tolist()
    assert len(hashes) == len(grams)
    assert len(set(hashes)) == len(set(grams)) == len(set(zip(hashes, grams, strict=True)))


def test_permuted_ngrams_have_other_hashes() -> None:
    """All orders of seven characters are told apart."""
    texts = ["".join(order) for order in itertools.permutations("aabcdef")]
    hashes = {int(rolling(characters(text), 7)[0]) for text in texts}
    assert len(hashes) == len(set(texts))


def test_texts_hashed_together_are_as_if_alone() -> None:
    """No shingle reaches into the next text; a short text is one shingle, an empty one none."""
    texts = ["", "abc", "a", "the quick brown fox", "", "x" * 70_000, "ab", "\0"]
    together, offsets = shingles([characters(text) for text in texts], 5)
    assert np.diff(offsets).tolist() == [0, 1, 1, 15, 0, 69_996, 1, 1]
    for text, start, stop in zip(texts, offsets, offsets[1:], strict=False):
        assert together[int(start) : int(stop)].tolist() == shingles([characters(text)], 5)[0].tolist()


@given(st.text("ab $", min_size=4), st.text("ab $", min_size=4))
@settings(max_examples=50, deadline=None)
def test_jaccard_is_that_of_sets_of_strings(first: str, second: str) -> None:
    """However often an n-gram occurs."""
    one, two = ({text[i : i + 4] for i in range(len(text) - 3)} for text in (first, second))
    hashes = [shingles([characters(text)], 4)[0] for text in (first, second)]
    assert jaccard(*hashes) == len(one & two) / len(one | two)


@pytest.mark.parametrize("size", [37, 1_009, 4_001])
def test_estimates_have_the_error_of_the_binomial(size: int) -> None:
    """Over 700 pairs the mean of the normalised errors is 0, their spread at most 1."""
    one, two, truth = related(700, size, seed=size)
    minhash = MinHash(n=1)
    agree = signatures(one, minhash) == signatures(two, minhash)
    inner = [i for i, s in enumerate(truth) if s < 1]
    errors = [(agree[i].mean() - truth[i]) / math.sqrt(truth[i] * (1 - truth[i]) / 260) for i in inner]
    assert abs(np.mean(errors)) < 4 / math.sqrt(len(inner))
    assert np.std(errors) < 1 + 4 / math.sqrt(2 * len(inner))
    assert all(agree[i].all() for i, s in enumerate(truth) if s == 1)


@pytest.mark.parametrize("name", PRESETS)
def test_bands_meet_as_the_curve_says(name: str) -> None:
    """As many pairs share a band as their Jaccard indexes let expect, above and below the threshold."""
    minhash = PRESETS[name].model_copy(update={"n": 1})
    one, two, truth = related(1_500, 301, seed=5)
    keys = [band_keys(signatures(codes, minhash), minhash) for codes in (one, two)]
    met = (keys[0] == keys[1]).any(axis=0)
    expected = np.array([collision_probability(s, minhash.bands, minhash.rows) for s in truth])
    for half in (np.array(truth) < minhash.threshold, np.array(truth) >= minhash.threshold):
        spread = math.sqrt((expected * (1 - expected))[half].sum())
        assert abs(met[half].sum() - expected[half].sum()) < 4 * spread


def test_pairs_are_those_of_datasketch_up_to_chance() -> None:
    """Another library's LSH of the same bands and rows finds as many pairs, of the same similarities."""
    datasketch = pytest.importorskip("datasketch")
    one, two, truth = related(240, 150, seed=3)
    minhash = MinHash(n=1, bands=9, rows=5)
    expected = np.array([collision_probability(s, 9, 5) for s in truth])
    keys = [band_keys(signatures(codes, minhash), minhash) for codes in (one, two)]
    lsh, theirs = datasketch.MinHashLSH(num_perm=45, params=(9, 5)), []
    for i, codes in enumerate(one + two):
        sketch = datasketch.MinHash(num_perm=45, seed=11)
        sketch.update_batch([code.tobytes() for code in codes])
        if i < len(one):
            lsh.insert(i, sketch)
        else:
            theirs.append(i - len(one) in lsh.query(sketch))
    spread = math.sqrt((expected * (1 - expected)).sum())
    for met in ((keys[0] == keys[1]).any(axis=0), np.array(theirs)):
        assert abs(met.sum() - expected.sum()) < 4 * spread


def test_signatures_are_of_sets_and_do_not_depend_on_the_batch() -> None:
    """Repeated and reordered shingles change nothing, nor do the other texts of a call."""
    rng = np.random.default_rng(1)
    codes = [rng.integers(0, 1 << 63, size=int(n), dtype=np.uint64) for n in rng.integers(1, 5_000, size=60)]
    minhash = MinHash(n=1)
    together = signatures(codes, minhash)
    repeated = [rng.permutation(np.concatenate([code, code[:7], code])) for code in codes]
    assert (signatures(repeated, minhash) == together).all()
    assert all((signatures([code], minhash)[0] == row).all() for code, row in zip(codes, together, strict=True))


def test_keys_are_the_same_everywhere() -> None:
    """Values computed on Linux x86-64 with rensa 0.5.0, numpy 2.4, xxhash 4.1."""
    text = normalise("Let $x_1 \\in \\mathbb{R}$; then  f(x) = 3 é. " * 3)
    for name, expected in KEYS.items():
        codes = [codes_of(text, PRESETS[name].unit, Words())]
        assert int(band_keys(signatures(codes, PRESETS[name]), PRESETS[name])[0, 0]) == expected


KEYS = {"ncm": 15594153300279507979, "fineweb": 17078434594995824885}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  \uff28\uff45\uff4c\uff4c\uff4f \n\t WORLD ", "hello world"),
        ("Let  $X_A  = \u211d$  Be", "let $X_A  = \u211d$ be"),
        ("A $$X\n\nY$$ B", "a $$X\n\nY$$ b"),
        ("Costs \\$5  AND \\$6", "costs \\$5 and \\$6"),
        ("Only $5\n\nAND $6", "only $5 and $6"),
        ("x²", "x2"),
        ("", ""),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    """Case, width and spaces go; formulas stay."""
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The \\Alpha\\, 3.14, x_1!", ["The", "\\Alpha", "3", "14", "x", "1"]),
        ("\\frac12\\quad y\\left(z\\right)", ["\\frac", "12", "y", "z"]),
        ("don't stop—now", ["don", "t", "stop", "now"]),
        ("数学 ab", ["数", "学", "ab"]),
        ("...", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    """Punctuation and spacing commands are left out, commands are words; each word is where its span says."""
    hashes, spans = Words().hashes(text), Words().spans(text)
    assert [text[start:stop] for start, stop in spans] == words
    assert hashes.tolist() == [int(Words().hashes(word)[0]) for word in words]
    assert hashes.tolist() == Words().hashes(text.upper() if "\\" not in text else text).tolist()


@pytest.mark.parametrize("unit", ["char", "word"])
def test_hostile_texts_are_signed(unit: str) -> None:
    """Empty, of one letter, a million letters, halves of surrogates, NUL: all have a signature, unlike ones differ."""
    minhash = MinHash(unit=unit, n=3)  # type: ignore[arg-type]
    codes = [codes_of(normalise(text), minhash.unit, Words()) for text in HOSTILE]
    made = signatures(codes, minhash)
    assert made.shape == (len(HOSTILE), 260)
    distinct = {code.tobytes() for code in codes}
    # a million equal letters are one shingle, three of them
    assert len({row.tobytes() for row in made}) == len(distinct)
