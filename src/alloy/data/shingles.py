"""Text as numbers that can be compared: a normal form, words, and hashes of the n-grams of either.

The hash of an n-gram is a polynomial in its members' codes, built by doubling for all positions of a text at once, then mixed;
64 bits, the same on every machine. Two different n-grams share a hash with a probability of about 2^-64.
"""

import re
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alloy.core.device import require

Hashes = NDArray[np.uint64]

# formulas as rows hold them: $...$ without a blank line inside, or $$...$$
MATH = re.compile(r"(\$(?<!\\\$)(?:\$.+?\$\$|(?:[^$\n]++|\n(?!\n))++\$))", re.DOTALL)
# a LaTeX command, a character of a script without spaces between words, or a run of letters and digits
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"\\[A-Za-z]+|[{_SINGLE}]|[^\W_{_SINGLE}]+")
# fmt: off
SPACING = frozenset((
    "\\quad", "\\qquad", "\\enspace", "\\enskip", "\\thinspace", "\\medspace", "\\thickspace", "\\hspace", "\\hskip",
    "\\hfill", "\\vspace", "\\kern", "\\left", "\\right", "\\displaystyle", "\\textstyle", "\\limits", "\\nolimits",
))
# fmt: on
# numpy passes of more than this leave the processor's cache
CHUNK = 1 << 16
# distinct words remembered; beyond, hashing starts anew
MOST_WORDS = 1 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)


def normalise(text: str) -> str:
    """NFKC, lower case, runs of white space as one space; formulas stay as they are."""
    if "$" not in text:
        return _plain(text).strip()
    pieces = MATH.split(text)
    pieces[::2] = [_plain(piece) for piece in pieces[::2]]
    return "".join(pieces).strip()


def _plain(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    collapsed = " ".join(text.lower().split())
    return f"{' ' if text[:1].isspace() else ''}{collapsed}{' ' if collapsed and text[-1].isspace() else ''}"


class Words:
    """Words of a text as hashes: lower case, without punctuation and spacing commands; LaTeX commands are words."""

    def __init__(self) -> None:
        self._known = _WordHashes()

    def hashes(self, text: str) -> Hashes:
        """(words,)"""
        found = self._all(text)
        return found[found != 0]

    def spans(self, text: str) -> NDArray[np.int64]:
        """(words, 2): where each word of `hashes` begins and ends."""
        spans = np.array([match.span() for match in WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)
        return spans[self._all(text) != 0]

    def _all(self, text: str) -> Hashes:
        if len(self._known) > MOST_WORDS:
            self._known.clear()
        words = WORD.findall(text)
        return np.fromiter(map(self._known.__getitem__, words), np.uint64, len(words))


class _WordHashes(dict[str, int]):
    """Hash of each word met; 0 for what is left out."""

    def __missing__(self, word: str) -> int:
        xxhash = require("xxhash", extra="data", why="deduplication and decontamination hash words")
        value = 0
        if word not in SPACING:
            form = unicodedata.normalize("NFKC", word).lower()
            value = xxhash.xxh3_64_intdigest(form.encode("utf-8", "surrogatepass")) or 1
        self[word] = value
        return value


def characters(text: str) -> Hashes:
    """(characters,): code points."""
    codes = text.encode("utf-32-le" if sys.byteorder == "little" else "utf-32-be", "surrogatepass")
    return np.frombuffer(codes, dtype=np.uint32).astype(np.uint64)


def rolling(codes: Hashes, n: int) -> Hashes:
    """Hashes of all runs of `n` codes, by the place of their first: (codes,) -> (codes - n + 1,)."""
    if len(codes) < n:
        return np.empty(0, dtype=np.uint64)
    # value[i] stands for the first `have` codes from i, power for the codes of a size that is a power of two
    value, have = codes[:0], 0
    power, size, factor = codes, 1, int(_ODD)
    rest = n
    while rest:
        if rest & 1:
            # what is there already is of smaller powers, and goes behind
            left = power[: len(power) - have] if have else power
            value = left * np.uint64(pow(int(_ODD), have, 1 << 64)) + value[size:] if have else left
            have += size
        rest >>= 1
        if rest:
            power = power[:-size] * np.uint64(factor) + power[size:]
            factor, size = factor * factor % (1 << 64), size * 2
    return mix(value)


def mix(values: Hashes) -> Hashes:
    """Each bit of the result depends on every bit (the finaliser of MurmurHash3, Appleby)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def shingles(codes: Sequence[Hashes], n: int) -> tuple[Hashes, NDArray[np.uint64]]:
    """Hashes of the n-grams of several texts; a text of fewer than `n` codes is one shingle, an empty one has none.

    Args:
        codes: of each text, `characters` or `Words.hashes`
        n: length of a shingle

    Returns:
        (shingles of all texts,) and (texts + 1,): where those of each begin
    """
    lengths = np.array([len(code) for code in codes], dtype=np.int64)
    counts = np.where(lengths >= n, lengths - n + 1, np.minimum(lengths, 1))
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
    found: list[Hashes] = []
    start = 0
    while start < len(codes):
        stop, size = start, 0
        while stop < len(codes) and (stop == start or size + lengths[stop] <= CHUNK):
            size += max(int(lengths[stop]), n)
            stop += 1
        padded = [np.pad(c, (0, n - len(c))) if 0 < len(c) < n else c for c in codes[start:stop]]
        hashes = rolling(np.concatenate(padded), n) if size else np.empty(0, dtype=np.uint64)
        place = 0
        for code, count in zip(padded, counts[start:stop], strict=True):
            found.append(hashes[place : place + int(count)])
            place += len(code)
        start = stop
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64), offsets


def jaccard(first: Hashes, second: Hashes) -> float:
    """Shared part of the union of two sets of hashes; 1 for two empty ones."""
    both = len(np.intersect1d(first, second))
    union = len(np.unique(first)) + len(np.unique(second)) - both
    return both / union if union else 1.0
