"""Where pages are in Common Crawl: URLs looked up in its columnar index, whose row groups are read one by one.

The index is sorted by reversed host names (SURT), and its Parquet statistics give the first and last one of a row group: those
that hold none of the hosts asked for are not read. Memory grows with the URLs asked for (8 bytes each, and the row of those
found), not with the index. URLs are equal where `dedup.canonical_url` says so; of several copies the newest is taken.

Columns: https://github.com/commoncrawl/cc-index-table
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alloy.core.device import require
from alloy.data.dedup import canonical_url
from alloy.data.document import COLUMNS
from alloy.errors import DataError

Keys = NDArray[np.uint64]

# what a row gets of the index
FOUND = ("crawl", "fetch_time", "warc_filename", "warc_record_offset", "warc_record_length", "content_mime_type")
_NEEDED = ("url", "warc_filename", "warc_record_offset", "warc_record_length")
_BATCH_ROWS = 1 << 16
# rows found that are held before older copies are dropped
_HELD_ROWS = 1 << 20
_ADDRESS = re.compile(r"\d+(?:,\d+){3}$")
_CRAWL = re.compile(r"CC-MAIN-\d{4}-\d{2}")


def url_keys(urls: Sequence[str | None]) -> Keys:
    """A number for each URL, equal for those of one page."""
    digest = require("xxhash", extra="data", why="URLs are compared").xxh3_64_intdigest
    pages = (canonical_url(url or "").encode("utf-8", "surrogatepass") for url in urls)
    return np.fromiter(map(digest, pages), np.uint64, len(urls))


def host_key(url: str) -> str:
    """The beginning of a URL's SURT: `https://www.a.example/x` -> `example,a)`; "" if it has no host."""
    try:
        pieces = urlsplit(url.strip().lower())
        host, port = pieces.hostname or "", pieces.port
    except ValueError:
        return ""
    if not host:
        return ""
    place = "" if port in (None, {"http": 80, "https": 443}.get(pieces.scheme)) else f":{port}"
    return ",".join(reversed(re.sub(r"^www\d*\.", "", host).split("."))) + place + ")"


def look_up(keys: Keys, hosts: Sequence[str], index: Sequence[str], least_status: int = 200) -> pa.Table:
    """The newest copy of each page in the index: columns `key`, sorted, and those of `FOUND`.

    Args:
        keys: of the pages asked for, sorted, each once
        hosts: their `host_key`s
        index: Parquet files or folders of the index, local or any fsspec URL
        least_status: copies that the crawler got with another `fetch_status` are left out, where the index has that column
    """
    held: list[pa.Table] = []
    # addresses stand in the index as they are, or reversed as names are
    forward = [
        ".".join(reversed(host.split(","))) for host in (h.partition(")")[0] for h in hosts) if _ADDRESS.match(host)
    ]
    hosts = sorted({*hosts, *(f"{host})" for host in forward)})
    for table in _matches(keys, hosts, index, least_status):
        held.append(table)
        if sum(map(len, held)) >= _HELD_ROWS:
            held = [_newest(pa.concat_tables(held))]
    names = {"key": pa.array([], pa.uint64()), **{name: pa.array([], COLUMNS[name][0]) for name in FOUND}}
    return _newest(pa.concat_tables([pa.table(names), *held]))


def _newest(table: pa.Table) -> pa.Table:
    """One row a key: the newest, then the first by file and offset."""
    order = [("key", "ascending"), ("fetch_time", "descending"), ("warc_filename", "ascending")]
    table = table.sort_by([*order, ("warc_record_offset", "ascending")])
    _, first = np.unique(table["key"].to_numpy(), return_index=True)
    return table.take(pa.array(first))


def _matches(keys: Keys, hosts: Sequence[str], index: Sequence[str], status: int) -> Iterator[pa.Table]:
    fsspec = require("fsspec", extra="data", why="the index is read")
    for place in index:
        files, root = fsspec.core.url_to_fs(place)
        paths = [root] if files.isfile(root) else sorted(files.find(root))
        paths = [path for path in paths if path.endswith(".parquet")]
        if not paths:
            raise DataError(f"index {place}: there is no .parquet file; name a file or folder of the columnar index.")
        for path in paths:
            with files.open(path, "rb") as file:
                yield from _matches_of_file(keys, hosts, path, file, status)


def _matches_of_file(keys: Keys, hosts: Sequence[str], path: str, file: Any, status: int) -> Iterator[pa.Table]:
    try:
        source = pq.ParquetFile(file)
        names = source.schema_arrow.names
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise DataError(
                f"index {path} has no column {missing[0]}; it has {', '.join(names)}. Name Common Crawl's own."
            )
        groups = [n for n in range(source.metadata.num_row_groups) if _may_hold(source.metadata.row_group(n), hosts)]
        wanted = [name for name in ("url", "fetch_status", *FOUND) if name in names]
        crawl = _CRAWL.search(path)
        if not groups:
            return
        for batch in source.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted):
            table = pa.Table.from_batches([batch])
            if "fetch_status" in wanted:
                table = table.filter(pa.array(table["fetch_status"].to_numpy() == status))
            own = url_keys(table["url"].to_pylist())
            at = np.minimum(np.searchsorted(keys, own), max(len(keys) - 1, 0))
            hit = keys[at] == own if len(keys) else np.zeros(len(own), bool)
            if hit.any():
                found = table.filter(pa.array(hit))
                columns = {name: _column(found, name, crawl[0] if crawl else None) for name in FOUND}
                yield pa.table({"key": pa.array(own[hit]), **columns})
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"index {path} cannot be read as Parquet ({error}); fetch it anew.") from error


def _may_hold(group: Any, hosts: Sequence[str]) -> bool:
    """Whether one of the hosts lies between the first and the last URL of a row group."""
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == "url_surtkey":
            stats = column.statistics
            if stats is None or not stats.has_min_max:
                return True
            # a closing bracket sorts before what continues a host's name
            first = bisect.bisect_left(hosts, stats.min.partition(")")[0] + ")")
            return first < len(hosts) and hosts[first] <= stats.max
    return True


def _column(table: pa.Table, name: str, crawl: str | None) -> pa.Array | pa.ChunkedArray:
    kind = COLUMNS[name][0]
    if name not in table.column_names:
        return pa.array([crawl if name == "crawl" else None] * len(table), kind)
    column = table[name]
    if pa.types.is_timestamp(column.type):
        times = np.datetime_as_string(column.to_numpy().astype("datetime64[s]"))
        return pa.array([None if time == "NaT" else f"{time}Z" for time in times], kind)
    return column.cast(kind)
