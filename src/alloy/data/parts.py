"""Rows in files: inputs cut into parts, the unit of work and of resuming, and read and written a table at a time.

A part is a run of row groups of a Parquet file, a .jsonl[.gz|.zst] file, a byte range of a WARC file, or some HTML files.
Which parts there are depends on the inputs alone, never on who works on them.
"""

import base64
import glob
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from alloy.core.hub import text_path
from alloy.core.runs import atomic_path
from alloy.data.document import COLUMNS, row_id
from alloy.data.filter import Filter
from alloy.data.io import ROW_SUFFIXES, json_rows, text_lines
from alloy.errors import DataError

WARC_SUFFIXES = (".warc", ".warc.gz", ".arc", ".arc.gz", ".warc.lz4")
# lists of URLs, one a line
LIST_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
HTML_SUFFIXES = (".html", ".htm", ".xhtml", ".ipynb", ".xml")
FORMATS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst")
ROW_GROUP_BYTES = 32 << 20
# rows of a JSONL file whose types are inferred together
JSON_ROWS = 8192
# losses of a part that are named one by one; all are counted
MOST_LOSSES = 1000


@dataclass(frozen=True)
class Part:
    """A piece of the input: one file from `start` to `stop` (bytes of a WARC, row groups of Parquet), or several whole files."""

    index: int
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    bytes: int = 0

    @property
    def name(self) -> str:
        """The stem of what is made of it."""
        return f"part-{self.index:05d}"


@dataclass
class Losses:
    """What a reader could not give: counts by kind, and the places of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    places: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, file: str, offset: int, message: str) -> None:
        """Note one loss."""
        self.counts[kind] += 1
        if len(self.places) < MOST_LOSSES:
            self.places.append({"kind": kind, "file": file, "offset": offset, "message": message})


def find_files(inputs: Sequence[str], raw: bool) -> list[Path]:
    """The files that paths, folders and patterns name, in a fixed order.

    Args:
        inputs: files, folders (searched without hidden files), or glob patterns
        raw: also WARC and HTML files, not rows alone
    """
    suffixes = (*ROW_SUFFIXES, *WARC_SUFFIXES, *HTML_SUFFIXES) if raw else ROW_SUFFIXES
    found: dict[Path, None] = {}
    for name in inputs:
        path = text_path(name)
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name.endswith(suffixes)]
            files = [f for f in files if not any(part.startswith((".", "_")) for part in f.relative_to(path).parts)]
        elif path.exists():
            files = [path]
        else:
            files = [Path(f) for f in sorted(glob.glob(name, recursive=True)) if Path(f).is_file()]
        if not files:
            what = f"no file ends in {', '.join(suffixes)}" if path.is_dir() else "there is no such file"
            raise DataError(f"input {name}: {what}; name a file, a folder or a pattern.")
        found.update(dict.fromkeys(files))
    if not found:
        raise DataError("no input; name a file, a folder or a pattern.")
    return list(found)


def list_parts(files: Sequence[Path], part_bytes: int) -> list[Part]:
    """The parts of files, each of about `part_bytes` on disk; small HTML files go together."""
    pieces: list[tuple[tuple[str, ...], int, int | None, int]] = []
    pages: list[str] = []
    size = 0
    for file in files:
        if file.name.endswith(HTML_SUFFIXES):
            pages.append(str(file))
            size += file.stat().st_size
            if size >= part_bytes:
                pieces.append((tuple(pages), 0, None, size))
                pages, size = [], 0
        else:
            pieces += [((str(file),), *piece) for piece in _pieces(file, part_bytes)]
    if pages:
        pieces.append((tuple(pages), 0, None, size))
    return [Part(index, *piece) for index, piece in enumerate(pieces)]


def _pieces(file: Path, part_bytes: int) -> Iterator[tuple[int, int | None, int]]:
    """(start, stop, bytes) of the parts of one file."""
    size = file.stat().st_size
    if file.name.endswith(WARC_SUFFIXES):
        from alloy.data.web.warc import split_warc

        for start, stop in split_warc(file, part_bytes):
            yield start, stop, min(stop, size) - start
    elif file.name.endswith(".parquet"):
        facts = _parquet(file).metadata
        start = held = 0
        for group in range(facts.num_row_groups):
            held += facts.row_group(group).total_byte_size
            if held >= part_bytes or group + 1 == facts.num_row_groups:
                yield start, group + 1, held
                start, held = group + 1, 0
        if not facts.num_row_groups:
            yield 0, 0, 0
    elif file.name.endswith((*ROW_SUFFIXES, *LIST_SUFFIXES)):
        yield 0, None, size
    else:
        raise DataError(f"{file} is none of {', '.join((*ROW_SUFFIXES, *WARC_SUFFIXES, *HTML_SUFFIXES))}; rename it.")


def read_part(part: Part, rows: int, only: str | None = None, losses: Losses | None = None) -> Iterator[pa.Table]:
    """The rows of a part, in order, at most `rows` a table; every row has an `id`.

    Args:
        part: what to read
        rows: of a table
        only: condition that rows must meet (filter.py)
        losses: takes what could not be read of a WARC, and counts rows that do not meet the condition; other damage is
            a DataError
    """
    losses = Losses() if losses is None else losses
    meets = Filter(only) if only else None
    for table in _tables(part, rows, losses):
        kept = meets(table) if meets else table
        if kept.num_rows < table.num_rows:
            losses.counts["not asked for"] += table.num_rows - kept.num_rows
        yield kept


def _tables(part: Part, rows: int, losses: Losses) -> Iterator[pa.Table]:
    file = Path(part.files[0])
    if file.name.endswith(".parquet"):
        yield from _parquet_tables(file, part, rows)
    elif file.name.endswith(ROW_SUFFIXES):
        yield from _json_tables(file, rows)
    elif file.name.endswith(LIST_SUFFIXES):
        yield from _url_tables(file, rows)
    else:
        from alloy.data.web.pages import page_tables

        yield from page_tables(part, rows, losses)


def columns_of(part: Part) -> list[str]:
    """The columns that reading the part will give."""
    file = Path(part.files[0])
    names: list[str]
    if file.name.endswith(".parquet"):
        names = _parquet(file).schema_arrow.names
    elif file.name.endswith(ROW_SUFFIXES):
        names = list(next(json_rows(file), (0, {}, ""))[1])
    elif file.name.endswith(LIST_SUFFIXES):
        names = ["url"]
    else:
        from alloy.data.web.pages import PAGE_COLUMNS

        names = list(PAGE_COLUMNS)
    return names if "id" in names else ["id", *names]


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}); write or fetch it anew.") from error


def _parquet_tables(file: Path, part: Part, rows: int) -> Iterator[pa.Table]:
    row = 0
    with _parquet(file) as source:
        facts = source.metadata
        row = sum(facts.row_group(group).num_rows for group in range(part.start))
        stop = facts.num_row_groups if part.stop is None else part.stop
        groups = list(range(part.start, stop))
        try:
            if not sum(facts.row_group(group).num_rows for group in groups):
                yield _with_ids(_typed(source.schema_arrow.empty_table()), file, row)
            for batch in source.iter_batches(batch_size=rows, row_groups=groups):
                table = _typed(pa.Table.from_batches([batch]))
                yield _with_ids(table, file, row)
                row += table.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read after row {row} ({error}); write or fetch it anew.") from error


def _json_tables(file: Path, rows: int) -> Iterator[pa.Table]:
    schema: pa.Schema | None = None
    held: list[dict[str, Any]] = []
    first = last = 1
    start = 0

    def table() -> pa.Table:
        nonlocal schema
        try:
            names = list(dict.fromkeys(name for row in held for name in row)) if schema is None else schema.names
            made = pa.table({name: _json_column(name, [row.get(name) for row in held]) for name in names})
            made = _typed(made) if schema is None else made.cast(schema)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise DataError(f"{file}:{first}-{last}: {error}; give every value of a key one type.") from error
        schema = schema or made.schema
        return made

    for last, row, _ in json_rows(file):
        if schema is not None and not row.keys() <= set(schema.names):
            new = ", ".join(sorted(row.keys() - set(schema.names)))
            raise DataError(
                f"{file}:{last}: new key {new} after {JSON_ROWS} rows without it; set it to null in the first."
            )
        held.append(row)
        if len(held) == JSON_ROWS:
            yield from _sliced(_with_ids(table(), file, start), rows)
            start += len(held)
            held, first = [], last + 1
    if held:
        yield from _sliced(_with_ids(table(), file, start), rows)


def _url_tables(file: Path, rows: int) -> Iterator[pa.Table]:
    """One row a line of a list of URLs; lines that begin with # are none."""
    row = 0
    held: list[str] = []
    for line in text_lines(file):
        if url := line.strip():
            held += [url] if not url.startswith("#") else []
        if len(held) == rows:
            yield _with_ids(pa.table({"url": held}), file, row)
            row, held = row + len(held), []
    if held:
        yield _with_ids(pa.table({"url": held}), file, row)


def _json_column(name: str, values: list[Any]) -> pa.Array:
    known = COLUMNS.get(name)
    if known and pa.types.is_large_binary(known[0]):
        values = [None if value is None else base64.b64decode(value, validate=True) for value in values]
    return pa.array(values, type=known[0]) if known else pa.array(values)


def _sliced(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def _typed(table: pa.Table) -> pa.Table:
    """Known columns in the types of the schema; columns of nulls alone as strings, so that all parts agree."""
    fields = []
    for column in table.schema:
        kind = COLUMNS[column.name][0] if column.name in COLUMNS else column.type
        fields.append(pa.field(column.name, pa.string() if pa.types.is_null(kind) else kind))
    schema = pa.schema(fields)
    return table.replace_schema_metadata(None) if table.schema.equals(schema) else table.cast(schema)


def _with_ids(table: pa.Table, file: Path, row: int) -> pa.Table:
    if "id" in table.column_names:
        return table
    ids = [row_id("", file.name, row + i) for i in range(table.num_rows)]
    return table.add_column(0, "id", pa.array(ids, type=pa.string()))


class RowWriter:
    """Writes tables of one schema to a file that appears whole or not at all, when the `with` block ends well.

    Args:
        path: ends in .parquet, .jsonl, .jsonl.gz or .jsonl.zst
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._schema: pa.Schema | None = None
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> "RowWriter":
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(atomic_path(self.path))
        self._file = None if self.path.name.endswith(".parquet") else self._open()
        return self

    def _open(self) -> IO[bytes]:
        if self.path.name.endswith(".zst"):
            return self._stack.enter_context(pa.CompressedOutputStream(pa.OSFile(str(self._temporary), "wb"), "zstd"))
        file = self._stack.enter_context(self._temporary.open("wb"))
        if self.path.name.endswith(".gz"):
            # no name and time inside: equal rows are equal bytes
            zipped = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0)
            return self._stack.enter_context(zipped)  # type: ignore[return-value]
        return file

    def add(self, table: pa.Table) -> None:
        """Write the rows of one more table."""
        if self._schema is None:
            self._schema = table.schema
        elif not table.schema.equals(self._schema):
            table = table.select(self._schema.names).cast(self._schema)
        self.rows += table.num_rows
        if self._file is not None:
            _write_json(self._file, table)
            return
        self._held.append(table)
        self._held_bytes += table.nbytes
        if self._held_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        schema = self._schema or pa.schema([])
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._temporary, schema, compression="zstd")
        table = pa.concat_tables(self._held) if self._held else schema.empty_table()
        if table.num_rows or not self.rows:
            self._parquet.write_table(table, row_group_size=max(table.num_rows, 1))
        self._held, self._held_bytes = [], 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None and self._file is None:
                self._flush()
            if self._parquet is not None:
                self._parquet.close()
        finally:
            self._stack.__exit__(kind, error, trace)


def _write_json(file: IO[bytes], table: pa.Table) -> None:
    binary = [f.name for f in table.schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    for row in table.to_pylist():
        for name in binary:
            row[name] = None if row[name] is None else base64.b64encode(row[name]).decode()
        file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
