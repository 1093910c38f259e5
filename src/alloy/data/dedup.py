"""Copies among documents: exact ones, near ones, and older copies of one page; in memory that is bounded for any number of them.

Each input part is signed once: a matrix of 64-bit keys (hash of the text, hash of the URL, one key a band) and a small table of
facts. They lie in an index, a folder that later parts can be added to; grouping sorts the keys, one row of the matrix and one
range of its values at a time, and joins the documents that share one.

What is kept of a group: the source named first, then the highest score, the longest, the smallest id. So neither the order of the
documents nor their distribution over parts matters, and an index that has grown gives what one made at once would give.

Older copies of a page (same canonical URL, earlier fetch) join the group of its newest one without being compared.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alloy.core.device import require
from alloy.core.runs import atomic_path, atomic_write
from alloy.data.minhash import MinHash, algorithm, band_keys, codes_of, signatures
from alloy.data.parts import Part, read_part
from alloy.data.shingles import Hashes, Words, jaccard, normalise, shingles
from alloy.errors import DataError, RecipeError

Numbers = NDArray[np.int64]

# rows of the matrix of keys
TEXT, URL, BANDS = slice(0, 2), slice(2, 4), 4
# documents signed together
SIGN_ROWS = 256
# parameters of URLs that say how a page was reached, not which one it is
TRACKING = re.compile(r"utm_\w+|fbclid|gclid|msclkid|mc_[ce]id|phpsessid|jsessionid|sid", re.IGNORECASE)


@dataclass(frozen=True)
class Signing:
    """What the index depends on.

    Args:
        column: the text
        minhash: None for exact copies alone
        by_url: whether older copies of a page are looked for
        score: column of the quality
        source: column of the source
        only: condition on the rows that are signed
    """

    column: str = "text"
    minhash: MinHash | None = None
    by_url: bool = True
    score: str | None = None
    source: str | None = None
    only: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As the index keeps them."""
        minhash = self.minhash.model_dump() | {"algorithm": algorithm()} if self.minhash else None
        return {**asdict(self), "minhash": minhash}


@dataclass(frozen=True)
class Entry:
    """A signed part, as its file in the index says."""

    folder: Path
    file: str
    start: int
    stop: int | None
    size: int
    mtime_ns: int
    rows: int

    @property
    def stem(self) -> str:
        """Of the files in the index."""
        return _stem(self.file, self.start, self.stop)

    @property
    def is_current(self) -> bool:
        """Whether the input is still what was signed."""
        return _identity(Path(self.file)) == (self.size, self.mtime_ns)

    def keys(self) -> Hashes:
        """(rows of the matrix, documents), on disk."""
        return np.load(self.folder / f"{self.stem}.npy", mmap_mode="r")

    def facts(self, columns: Sequence[str]) -> pa.Table:
        """Some of id, length, score, source, when."""
        return pq.read_table(self.folder / f"{self.stem}.parquet", columns=list(columns))

    def texts(self, rows: Numbers, signing: Signing) -> list[str]:
        """The texts of some documents, by their sorted numbers within the part."""
        if not self.is_current:
            raise DataError(f"{self.file} has changed or gone since it was signed; dedup.verify needs it as it was.")
        found: list[str] = []
        first = 0
        for table in read_part(Part(0, (self.file,), self.start, self.stop), SIGN_ROWS, signing.only):
            wanted = rows[(rows >= first) & (rows < first + table.num_rows)] - first
            found += [text or "" for text in table[signing.column].take(pa.array(wanted)).to_pylist()]
            first += table.num_rows
        return found


class Index:
    """A folder of signed parts.

    Args:
        folder: is made where it is missing
        signing: an index of other settings is refused
    """

    def __init__(self, folder: Path, signing: Signing) -> None:
        self.folder, self.signing = folder, signing
        settings = signing.settings
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if not path.exists():
            atomic_write(path, json.dumps(settings, indent=2) + "\n")
        there = json.loads(path.read_text())
        for name, value in settings.items():
            if there.get(name) != value:
                raise RecipeError(
                    f"index {folder} was made with {name} = {there.get(name)}, not {value}; choose another."
                )

    def entries(self) -> list[Entry]:
        """The signed parts, by file and place in it."""
        found = [Entry(self.folder, **json.loads(file.read_text())) for file in self.folder.glob("*.entry")]
        return sorted(found, key=lambda entry: (entry.file, entry.start))

    def entry(self, part: Part) -> Entry | None:
        """What was signed of this part, if it has not changed since."""
        try:
            facts = json.loads(self._path(part).read_text())
        except FileNotFoundError:
            return None
        entry = Entry(self.folder, **facts)
        return entry if entry.is_current else None

    def forget_changed(self, files: Iterable[str]) -> None:
        """Leave out what was signed of files that are others by now."""
        wanted = {os.path.abspath(file) for file in files}
        for entry in self.entries():
            if entry.file in wanted and not entry.is_current:
                (self.folder / f"{entry.stem}.entry").unlink(missing_ok=True)

    def sign(self, part: Part, tables: Iterable[pa.Table]) -> Entry:
        """Add a part, or what is there of it already is taken. The entry appears after all that it stands for.

        Args:
            part: where the tables come from
            tables: its rows, in order
        """
        there = self.entry(part)
        if there is not None:
            return there
        file = os.path.abspath(part.files[0])
        size, mtime_ns = _identity(Path(file))
        words = Words()
        nothing = pa.table({name: pa.array([], pa.string()) for name in ("id", self.signing.column)})
        signed = [sign(table, self.signing, words) for table in itertools.chain([nothing], tables)]
        keys = np.concatenate([keys for keys, _ in signed], axis=1)
        facts = pa.concat_tables([facts for _, facts in signed])
        path = self._path(part)
        for leftover in self.folder.glob(f".{path.stem}.*.tmp"):
            leftover.unlink()
        with atomic_path(path.with_suffix(".npy")) as temporary, temporary.open("wb") as stream:
            np.save(stream, keys)
        with atomic_path(path.with_suffix(".parquet")) as temporary:
            pq.write_table(facts, temporary, compression="zstd")
        entry = Entry(self.folder, file, part.start, part.stop, size, mtime_ns, len(facts))
        atomic_write(path, json.dumps({k: v for k, v in asdict(entry).items() if k != "folder"}) + "\n")
        return entry

    def _path(self, part: Part) -> Path:
        return self.folder / f"{_stem(os.path.abspath(part.files[0]), part.start, part.stop)}.entry"


def sign(table: pa.Table, signing: Signing, words: Words) -> tuple[Hashes, pa.Table]:
    """Keys (rows of the matrix, documents) and facts of documents.

    Args:
        table: with an id and the columns that `signing` names; score, source, url, fetch_time and crawl may be missing
        signing: what to look at
        words: remembers hashes of words
    """
    texts = [normalise(text or "") for text in table[signing.column].to_pylist()]
    keys = np.zeros((BANDS + (signing.minhash.bands if signing.minhash else 0), len(texts)), dtype=np.uint64)
    keys[TEXT] = _digests(texts)
    if signing.by_url and "url" in table.column_names:
        keys[URL] = _digests([canonical_url(url or "") for url in table["url"].to_pylist()])
    if signing.minhash:
        codes = [codes_of(text, signing.minhash.unit, words) for text in texts]
        keys[BANDS:] = band_keys(signatures(codes, signing.minhash), signing.minhash)
    when = [_column(table, name, pa.string()).to_pylist() for name in ("fetch_time", "crawl")]
    facts = {
        "id": table["id"].cast(pa.string()),
        "length": pa.array([len(text) for text in texts], type=pa.int64()),
        "score": _column(table, signing.score, pa.float64()),
        "source": _column(table, signing.source, pa.string()),
        "when": pa.array([time or crawl for time, crawl in zip(*when, strict=True)], type=pa.string()),
    }
    return keys, pa.table(facts)


def canonical_url(url: str) -> str:
    """What distinguishes a page: host without www, path, sorted query without what tracks; no scheme, no fragment."""
    try:
        pieces = urlsplit(url.strip())
        host, port = pieces.hostname or "", pieces.port
    except ValueError:
        return url.strip()
    place = f":{port}" if port not in (None, 80, 443) else ""
    query = sorted(pair for pair in parse_qsl(pieces.query, keep_blank_values=True) if not TRACKING.fullmatch(pair[0]))
    return f"{host.removeprefix('www.')}{place}{pieces.path.rstrip('/')}{'?' if query else ''}{urlencode(query)}"


def group(
    index: Index, sources: Sequence[str] = (), verify: float | None = None, memory_bytes: int = 1 << 30
) -> tuple[list[Entry], Numbers]:
    """The signed parts, and for each of their documents the number of the one that is kept in its place: its own if it stays.

    Args:
        index: what to group
        sources: those named are kept in this order, before all others
        verify: least Jaccard index of a document and the one kept in its place; None takes a shared band as proof
        memory_bytes: for sorting; besides, about 30 bytes a document
    """
    entries = index.entries()
    starts = np.concatenate(([0], np.cumsum([entry.rows for entry in entries], dtype=np.int64)))
    lengths = [entry.facts(["length"])["length"].to_numpy() for entry in entries]
    used = np.concatenate([np.empty(0, dtype=bool), *(length > 0 for length in lengths)])
    newest = _newest(entries, starts, used, memory_bytes) if index.signing.by_url else np.arange(starts[-1])
    active = used & (newest == np.arange(starts[-1]))
    parent = np.arange(starts[-1])
    rows = [TEXT, *(slice(BANDS + i, BANDS + i + 1) for i in range(_bands(index.signing)))]
    for row in rows:
        for first, second in equal_keys(entries, starts, row, active, memory_bytes):
            union(parent, first, second)
        parent = roots(parent)
    members = _members(entries, starts, parent, ["priority", "score", "length", "id"], sources)
    if verify is not None and index.signing.minhash:
        leaders = _verified(entries, starts, members, index.signing, verify, memory_bytes)
    else:
        set_of = members["set"].to_numpy()
        first_of = np.flatnonzero(np.concatenate(([True], set_of[1:] != set_of[:-1]))[: len(set_of)])
        counts = np.diff(np.append(first_of, len(set_of)))
        leaders = members["document"].to_numpy()[np.repeat(first_of, counts)]
    kept = np.arange(starts[-1])
    kept[members["document"].to_numpy()] = leaders
    return entries, kept[newest]


def equal_keys(
    entries: Sequence[Entry], starts: Numbers, row: slice, active: NDArray[np.bool_], memory_bytes: int
) -> Iterator[tuple[Numbers, Numbers]]:
    """Neighbours among the documents of equal keys, once all that have a key in some range are sorted.

    Args:
        entries: signed parts
        starts: number of the first document of each
        row: of the matrix of keys; all of them are to be equal
        active: (documents,): which to look at
        memory_bytes: decides how many ranges the keys are cut into
    """
    # key, number, order and sorted copy of each
    words = row.stop - row.start
    passes = max(1, -(-int(active.sum()) * 8 * (2 * words + 3) // memory_bytes))
    for step in range(passes):
        keys: list[Hashes] = [np.empty((words, 0), dtype=np.uint64)]
        numbers: list[Numbers] = [np.empty(0, dtype=np.int64)]
        for entry, start in zip(entries, starts, strict=False):
            part = entry.keys()[row]
            chosen = active[start : start + entry.rows]
            if passes > 1:
                chosen = chosen & (((part[0] >> np.uint64(32)) * np.uint64(passes)) >> np.uint64(32) == step)
            keys.append(part[:, chosen])
            numbers.append(np.flatnonzero(chosen) + start)
        together = np.concatenate(keys, axis=1)
        order = np.argsort(together[0], kind="stable") if words == 1 else np.lexsort(together[::-1])
        together = together[:, order]
        same = (together[:, 1:] == together[:, :-1]).all(axis=0)
        number = np.concatenate(numbers)[order]
        yield number[:-1][same], number[1:][same]


def union(parent: Numbers, first: Numbers, second: Numbers) -> None:
    """Join the sets of `first[i]` and `second[i]`, in place; the root of a set is its smallest member.

    Args:
        parent: (documents,): a member of the same set that is not larger; a root's is itself
        first: (pairs,)
        second: (pairs,)
    """
    while len(first):
        first, second = roots(parent, first), roots(parent, second)
        low, high = np.minimum(first, second), np.maximum(first, second)
        apart = low != high
        low, high = low[apart], high[apart]
        np.minimum.at(parent, high, low)
        # what hangs on each other in a long chain is halved until it is flat
        while not np.array_equal(up := parent[parent[high]], parent[high]):
            parent[high] = up
        first, second = low, high


def roots(parent: Numbers, of: Numbers | None = None) -> Numbers:
    """The roots of some documents, or of all."""
    up = parent if of is None else parent[of]
    while not np.array_equal(upper := parent[up], up):
        up = upper
    return up


def _newest(entries: Sequence[Entry], starts: Numbers, used: NDArray[np.bool_], memory_bytes: int) -> Numbers:
    """(documents,): the first of the newest copies of the same page, for those that are older; else their own number."""
    newest = np.arange(starts[-1])
    has_url = np.concatenate([np.empty(0, dtype=bool), *(entry.keys()[URL].any(axis=0) for entry in entries)])
    parent = np.arange(starts[-1])
    for first, second in equal_keys(entries, starts, URL, used & has_url, memory_bytes):
        union(parent, first, second)
    members = _members(entries, starts, roots(parent), ["when"])
    latest: dict[int, tuple[str, int]] = {}
    copies = list(zip(*(members[name].to_pylist() for name in ("set", "when", "document")), strict=True))
    for page, when, document in copies:
        if when and when > latest.get(page, ("", 0))[0]:
            latest[page] = when, document
    for page, when, document in copies:
        if page in latest and when != latest[page][0]:
            newest[document] = latest[page][1]
    return newest


def _members(
    entries: Sequence[Entry], starts: Numbers, root: Numbers, by: Sequence[str], sources: Sequence[str] = ()
) -> pa.Table:
    """Set and number of the documents that are not alone, with the facts `by`; best first within each set."""
    counts = np.bincount(root, minlength=len(root))
    place = {name: number for number, name in enumerate(sources)}
    tables = []
    columns = ["source" if name == "priority" else name for name in by]
    for entry, start in zip(entries, starts, strict=False):
        own = root[start : start + entry.rows]
        rows = np.flatnonzero(counts[own] > 1)
        facts = entry.facts(columns).take(pa.array(rows))
        if "priority" in by:
            places = [place.get(name, len(sources)) for name in facts["source"].to_pylist()]
            facts = facts.append_column("priority", pa.array(places, pa.int64()))
        tables.append(facts.append_column("set", pa.array(own[rows])).append_column("document", pa.array(rows + start)))
    if not tables:
        return pa.table({name: pa.array([], pa.int64()) for name in ("set", "document", *by)})
    order = [("set", "ascending")]
    order += [(name, "descending" if name in ("score", "length") else "ascending") for name in by]
    return pa.concat_tables(tables).sort_by([*order, ("document", "ascending")])


def _verified(
    entries: Sequence[Entry], starts: Numbers, members: pa.Table, signing: Signing, least: float, memory_bytes: int
) -> Numbers:
    """(members,): for each the first better one that shares a band and is at least so similar, if that is kept; else itself."""
    assert signing.minhash, "there are bands"
    documents, sets = members["document"].to_numpy(), members["set"].to_numpy()
    leaders = documents.copy()
    # whole sets, as many texts as fit, at four bytes a character
    ends = np.flatnonzero(np.append(sets[1:] != sets[:-1], len(sets) > 0)) + 1
    sizes = np.cumsum(members["length"].to_numpy())[ends - 1]
    words = Words()
    start = done = 0
    while start < len(documents):
        held = sizes[done - 1] if done else 0
        done = max(done + 1, int(np.searchsorted(sizes, held + memory_bytes // 4, side="right")))
        stop = int(ends[done - 1])
        texts = _texts(entries, starts, documents[start:stop], signing)
        seen: dict[tuple[int, int], list[int]] = {}
        kept: dict[int, Hashes] = {}
        for place in range(start, stop):
            if place == start or sets[place] != sets[place - 1]:
                seen, kept = {}, {}
            text, bands = texts[documents[place]]
            code = codes_of(normalise(text), signing.minhash.unit, words)
            own = np.unique(shingles([code], signing.minhash.n)[0])
            near = {leader: None for band in enumerate(bands) for leader in seen.get(band, ())}
            match = next((leader for leader in sorted(near) if jaccard(own, kept[leader]) >= least), None)
            if match is not None:
                leaders[place] = documents[match]
                continue
            kept[place] = own
            for band in enumerate(bands):
                seen.setdefault(band, []).append(place)
        start = stop
    return leaders


def _texts(
    entries: Sequence[Entry], starts: Numbers, documents: Numbers, signing: Signing
) -> dict[int, tuple[str, list[int]]]:
    """By number: text and keys of the bands."""
    found: dict[int, tuple[str, list[int]]] = {}
    for entry, start in zip(entries, starts, strict=False):
        rows = np.sort(documents[(documents >= start) & (documents < start + entry.rows)]) - start
        if len(rows):
            keys = entry.keys()[BANDS:, rows].T.tolist()
            found |= zip((rows + start).tolist(), zip(entry.texts(rows, signing), keys, strict=True), strict=True)
    return found


def _digests(texts: Sequence[str]) -> Hashes:
    """(2, texts): the halves of the 128-bit hash of each; 0 for an empty one."""
    xxhash = require("xxhash", extra="data", why="deduplication hashes texts")
    digests = [xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) if text else bytes(16) for text in texts]
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).T.astype(np.uint64)


def _column(table: pa.Table, name: str | None, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    if name is None or name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    return table[name].cast(kind)


def _bands(signing: Signing) -> int:
    return signing.minhash.bands if signing.minhash else 0


def _identity(file: Path) -> tuple[int, int]:
    try:
        facts = file.stat()
    except FileNotFoundError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


def _stem(file: str, start: int, stop: int | None) -> str:
    return hashlib.sha256(f"{file}\0{start}\0{stop}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
