"""Test questions in training text: runs of n words that a benchmark's item and a document share.

Words are those of `shingles.Words`: lower case, digits kept, no punctuation, LaTeX commands as words, spacing commands left out.

- An item of n words or more is met wherever n of its words follow each other in a document.
- A shorter one, from `LEAST_WORDS` on, is met where all its words follow each other and the document has a break (a line's end,
  or punctuation that ends a sentence) before and behind them. Still shorter ones are skipped, and listed.
- In fuzzy mode an item is also met by a run of as many words as it has, whose set of word trigrams has a Jaccard index of at
  least the threshold with the item's own: a rephrased leak. This is exact, without MinHash: a text that is so similar holds one of
  any floor((1 - threshold) * trigrams) + 1 of the item's trigrams, and the rarest ones are looked up.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from alloy.core.compose import compose
from alloy.core.device import require
from alloy.core.explain import explain
from alloy.core.recipe import Config
from alloy.data.io import ROW_SUFFIXES, json_rows
from alloy.data.parts import find_files
from alloy.data.shingles import Hashes, Words, jaccard, rolling
from alloy.errors import DataError, RecipeError

# an item of fewer words is met by chance too often
LEAST_WORDS = 5
FUZZY_WORDS = 3
# of an item that may be found fuzzily; fewer are too few to be similar by more than chance
FUZZY_LEAST = 10
# characters removed on each side of what was found, pieces above which a document is dropped, characters below which it is
# (Brown et al., 2020, appendix C; Megatron-LM)
MARGIN, MOST_PIECES, LEAST_CHARS = 200, 10, 200
# of the text around a short item that decide whether it stands alone
CONTEXT = 100
_BREAK_BEFORE = re.compile(r"(?:\A|[.!?:;|>)\]}\"'”»*#\n])[ \t\"'“«(\[{*$]*\Z")
_BREAK_BEHIND = re.compile(r"[ \t\"'”»)\]}*$]*(?:\Z|[.!?;:|<\n])")


class Benchmark(Config):
    """One set of test items."""

    name: Annotated[str, Field(min_length=1, description="In reports and in contaminated_with.")]
    path: Annotated[str, Field(description="JSONL or Parquet file or folder, or a data set of the hub: owner/name.")]
    split: Annotated[str, Field(description="Of a data set of the hub.")] = "test"
    fields: Annotated[list[str], Field(min_length=1, description="Joined, in this order, they are an item.")]
    prefix: Annotated[str, Field(description="What items begin with and is no part of them.")] = ""


class Benchmarks(Config):
    """A TOML file of [[benchmarks]] tables."""

    benchmarks: Annotated[list[Benchmark], Field(min_length=1, description="Sets of test items.")]


@dataclass(frozen=True)
class Item:
    """A test item: the number of its benchmark, its own number there, and its text."""

    benchmark: int
    number: int
    text: str


@dataclass(frozen=True)
class Hit:
    """An item met in a document, from the character `start` to `stop`."""

    item: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Grams:
    """Hashes of runs of `length` words, sorted, and the item of each; a table of their highest bits tells most others apart."""

    length: int
    hashes: Hashes
    items: NDArray[np.int64]
    bits: int
    table: NDArray[np.bool_]


def read_benchmarks(file: Path) -> list[Benchmark]:
    """The [[benchmarks]] of a TOML file; paths in it are relative to it."""
    composed = compose(file)
    try:
        found = Benchmarks.model_validate(composed.data).benchmarks
    except ValidationError as error:
        raise RecipeError(explain(error, Benchmarks, composed)) from error
    names = Counter(benchmark.name for benchmark in found)
    for name, count in names.items():
        if count > 1:
            raise RecipeError(f'{file}: {count} benchmarks are called "{name}"; give each its own name.')
    paths = [file.parent / benchmark.path for benchmark in found]
    return [b.model_copy(update={"path": str(p)}) if p.exists() else b for b, p in zip(found, paths, strict=True)]


def read_items(benchmarks: Sequence[Benchmark]) -> list[Item]:
    """The items of all benchmarks; a field that is missing is a DataError that names those that are there."""
    items: list[Item] = []
    for place, benchmark in enumerate(benchmarks):
        before = len(items)
        for number, row in enumerate(_rows(benchmark)):
            missing = [field for field in benchmark.fields if field not in row]
            if missing:
                raise DataError(
                    f'benchmark {benchmark.name}: row {number} of {benchmark.path} has no field "{missing[0]}" '
                    f"but {', '.join(row)}; name the fields that hold the item."
                )
            text = "\n".join(piece for field in benchmark.fields for piece in _strings(row[field]))
            items.append(Item(place, number, text.removeprefix(benchmark.prefix)))
        if len(items) == before:
            raise DataError(f"benchmark {benchmark.name}: {benchmark.path} holds no rows.")
    return items


class Finder:
    """Finds items in documents.

    Args:
        items: to look for
        n: words of a run that counts as found
        fuzzy: least Jaccard index of a rephrased item; None for exact runs alone
    """

    def __init__(self, items: Sequence[Item], n: int = 13, fuzzy: float | None = None) -> None:
        self.items, self.n, self.fuzzy = items, n, fuzzy
        self._words = Words()
        codes = [self._words.hashes(item.text) for item in items]
        self.skipped = [number for number, code in enumerate(codes) if len(code) < min(n, LEAST_WORDS)]
        lengths: dict[int, list[int]] = {}
        for number, code in enumerate(codes):
            if len(code) >= min(n, LEAST_WORDS):
                lengths.setdefault(min(n, len(code)), []).append(number)
        self._runs = [
            _grams(size, [(i, rolling(codes[i], size)) for i in numbers]) for size, numbers in lengths.items()
        ]
        self._lengths = [len(code) for code in codes]
        if fuzzy is not None:
            self._sets = [np.unique(rolling(code, FUZZY_WORDS)) for code in codes]
            self._rare = _grams(FUZZY_WORDS, list(_rarest(self._sets, fuzzy)))

    def find(self, texts: Sequence[str]) -> list[list[Hit]]:
        """The hits in each document, by place; a run of words that several items have is a hit of each."""
        codes = [self._words.hashes(text) for text in texts]
        together = np.concatenate([np.empty(0, dtype=np.uint64), *codes])
        starts = np.concatenate(([0], np.cumsum([len(code) for code in codes], dtype=np.int64)))
        hits: list[list[Hit]] = [[] for _ in texts]
        spans: dict[int, NDArray[np.int64]] = {}

        def hit(document: int, item: int, first: int, words: int, alone: bool) -> None:
            if document not in spans:
                spans[document] = self._words.spans(texts[document])
            start, stop = int(spans[document][first, 0]), int(spans[document][first + words - 1, 1])
            if not alone or _stands_alone(texts[document], start, stop):
                hits[document].append(Hit(item, start, stop))

        for grams in self._runs:
            for document, first, item in _lookup(grams, together, starts):
                hit(document, item, first, grams.length, alone=grams.length < self.n)
        if self.fuzzy is not None:
            near: dict[tuple[int, int], list[int]] = {}
            for document, first, item in _lookup(self._rare, together, starts):
                near.setdefault((document, item), []).append(first)
            for (document, item), firsts in near.items():
                found = self._similar(rolling(codes[document], FUZZY_WORDS), item, firsts)
                if found is not None:
                    hit(document, item, found[0], found[1] + FUZZY_WORDS - 1, alone=False)
        return [sorted(set(found), key=lambda hit: (hit.start, hit.stop, hit.item)) for found in hits]

    def _similar(self, document: Hashes, item: int, firsts: Sequence[int]) -> tuple[int, int] | None:
        """First trigram and number of trigrams of a run as long as the item and similar enough; `firsts` are shared trigrams."""
        assert self.fuzzy is not None, "fuzzy mode is on"
        own = self._sets[item]
        size = min(self._lengths[item] - FUZZY_WORDS + 1, len(document))
        shared = np.concatenate(([0], np.cumsum(np.isin(document, own))))
        # a run may begin up to its length before a shared trigram
        begins = np.unique(np.concatenate([np.arange(first - size + 1, first + 1) for first in firsts]))
        begins = begins[(begins >= 0) & (begins <= len(document) - size)]
        most = shared[begins + size] - shared[begins]
        # trigrams that occur twice are counted twice here, so this is never too few
        for begin in begins[np.argsort(-most, kind="stable")][: int((most >= self.fuzzy * len(own) - 1e-9).sum())]:
            if jaccard(document[begin : begin + size], own) >= self.fuzzy:
                return int(begin), size
        return None


def cut(text: str, hits: Iterable[Hit]) -> list[str]:
    """What remains of a document without what was found and `MARGIN` characters around it; nothing if too little or too torn."""
    pieces: list[str] = []
    end = 0
    for hit in sorted(hits, key=lambda hit: hit.start):
        pieces.append(text[end : max(end, hit.start - MARGIN)])
        end = max(end, hit.stop + MARGIN)
    pieces = [piece.strip() for piece in [*pieces, text[end:]] if piece.strip()]
    if len(pieces) > MOST_PIECES or sum(len(piece) for piece in pieces) < LEAST_CHARS:
        return []
    return pieces


def _grams(length: int, hashes: Sequence[tuple[int, Hashes]]) -> _Grams:
    own = np.concatenate([np.empty(0, dtype=np.uint64), *(np.unique(found) for _, found in hashes)])
    items = np.repeat([item for item, _ in hashes], [len(np.unique(found)) for _, found in hashes]).astype(np.int64)
    order = np.lexsort((items, own))
    bits = max(16, len(own).bit_length() + 3)
    table = np.zeros(1 << bits, dtype=bool)
    table[own >> np.uint64(64 - bits)] = True
    return _Grams(length, own[order], items[order], bits, table)


def _lookup(grams: _Grams, words: Hashes, starts: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(document, first word there, item) of each run that an item has.

    Args:
        grams: to look for
        words: of all documents
        starts: (documents + 1,): where those of each begin
    """
    hashes = rolling(words, grams.length)
    places = np.flatnonzero(grams.table[hashes >> np.uint64(64 - grams.bits)])
    low = np.searchsorted(grams.hashes, hashes[places], side="left")
    high = np.searchsorted(grams.hashes, hashes[places], side="right")
    documents = np.searchsorted(starts, places, side="right") - 1
    inside = (high > low) & (places + grams.length <= starts[documents + 1])
    found = zip(
        *(values[inside].tolist() for values in (places - starts[documents], documents, low, high)), strict=True
    )
    for first, document, begin, end in found:
        for item in grams.items[begin:end].tolist():
            yield document, first, item


def _rarest(sets: Sequence[Hashes], threshold: float) -> Iterator[tuple[int, Hashes]]:
    """Of each item so many of its trigrams, the rarest ones, that a text similar enough has one of them."""
    hashes, counts = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *sets]), return_counts=True)
    for item, own in enumerate(sets):
        if len(own) >= FUZZY_LEAST:
            rarity = counts[np.searchsorted(hashes, own)]
            # a hair more, so that rounding cannot take one away
            wanted = int((1 - threshold) * len(own) + 1e-9) + 1
            yield item, own[np.argsort(rarity, kind="stable")[:wanted]]


def _stands_alone(text: str, start: int, stop: int) -> bool:
    before, behind = text[max(0, start - CONTEXT) : start], text[stop : stop + CONTEXT]
    return bool(_BREAK_BEFORE.search(before)) and bool(_BREAK_BEHIND.match(behind))


def _rows(benchmark: Benchmark) -> Iterator[dict[str, Any]]:
    path = Path(benchmark.path)
    if path.exists() or benchmark.path.endswith(ROW_SUFFIXES):
        for file in find_files([benchmark.path], raw=False):
            if file.name.endswith(".parquet"):
                try:
                    for batch in pq.ParquetFile(file).iter_batches():
                        yield from batch.to_pylist()
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{file} cannot be read as Parquet ({error}); fetch it anew.") from error
            else:
                yield from (row for _, row, _ in json_rows(file))
        return
    datasets = require("datasets", extra="hub", why=f"benchmark {benchmark.name} is read from the hub")
    try:
        yield from datasets.load_dataset(benchmark.path, split=benchmark.split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"benchmark {benchmark.name}: {benchmark.path} is no file here, and as a data set cannot be loaded ({error})."
        ) from error


def _strings(value: Any) -> Iterator[str]:
    """The texts of a field: itself, or those of the list or table that it is."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)
    elif value is not None:
        yield str(value)
