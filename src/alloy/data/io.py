"""Documents from files: plain text, JSONL (.gz, .zst), Parquet, or a folder of them.

A document is its text exactly as stored: no newline translation, no trimming, so that a tokenizer's round trip can be
checked against the file. What cannot be read is an error that names the file and the place; nothing is dropped silently.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from alloy.core.runs import atomic_write
from alloy.errors import DataError

# what a folder is searched for; a file named by the user is read whatever its suffix
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".css", ".csv", ".tsv", ".json", ".toml", ".yaml", ".yml",
    ".ini", ".cfg", ".log", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".js",
    ".ts", ".rb", ".pl", ".sh", ".sql", ".lua", ".r", ".jl", ".hs", ".ml", ".scala", ".swift", ".php",
))
# fmt: on
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COMPRESSED_TEXT = (".txt.gz", ".txt.zst")
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One text and where it came from: a path, with `:line` or `:row` for a file of many documents."""

    text: str
    name: str


def read_documents(path: str | Path, column: str = "text") -> Iterator[Document]:
    """All documents of a file or folder, in a fixed order (folders sorted by relative path).

    Empty documents are left out; a path without a single non-empty one is a DataError.

    Args:
        path: text file (one document), .jsonl[.gz|.zst] (one object a line), .parquet (one a row), or a folder of these
        column: the key or column that holds the text
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; name a text, .jsonl or .parquet file, or a folder of them.")
    found = False
    for file in list_files(path) if path.is_dir() else [path]:
        for document in _read_file(file, column):
            if document.text:
                found = True
                yield document
    if not found:
        raise DataError(f"{path} holds no text: every document in it is empty. Point at a file or folder with text.")


def list_files(folder: Path) -> list[Path]:
    """Readable files below `folder`, sorted; hidden files and folders are left out."""
    files, others = [], set()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.name.endswith((*ROW_SUFFIXES, *COMPRESSED_TEXT)) or file.suffix.lower() in TEXT_SUFFIXES:
            files.append(file)
        else:
            others.add(file.suffix or file.name)
    if not files:
        seen = f"only {', '.join(sorted(others)[:8])}" if others else "no files"
        raise DataError(
            f"{folder} holds no text, .jsonl or .parquet file, {seen}; name the file itself to read it as text."
        )
    return files


def write_jsonl(path: str | Path, documents: Iterable[Document]) -> None:
    """Documents as JSONL, which `read_documents` gives back text by text; replaces the file in one step."""
    rows = [json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) for document in documents]
    atomic_write(Path(path), "".join(row + "\n" for row in rows))


def texts(documents: Iterable[Document]) -> Iterator[str]:
    """The texts alone, for tokenizer training."""
    return (document.text for document in documents)


def _read_file(file: Path, column: str) -> Iterator[Document]:
    if file.name.endswith(".parquet"):
        return _read_parquet(file, column)
    if file.name.endswith(ROW_SUFFIXES):
        return _read_jsonl(file, column)
    return _read_text(file)


def _read_text(file: Path) -> Iterator[Document]:
    chunks = list(_chunks(file))
    yield Document(_decode(b"".join(chunks), file, 0), str(file))


def _read_jsonl(file: Path, column: str) -> Iterator[Document]:
    for number, row, text in json_rows(file):
        if column not in row:
            raise DataError(f'{file}:{number}: no key "{column}" but {_names(row)}; name the one that holds the text.')
        value = row[column]
        if not isinstance(value, str):
            raise DataError(f'{file}:{number}: "{column}" is {type(value).__name__}, not a string.')
        if "\\ud" in text.lower() and not _encodable(value):
            raise DataError(
                f'{file}:{number}: "{column}" holds half of a surrogate pair, which is no character; mend or remove this line.'
            )
        yield Document(value, f"{file}:{number}")


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line number, object and line of each row of a .jsonl[.gz|.zst] file; blank lines are left out."""
    offset = 0
    for number, line in enumerate(_lines(file), start=1):
        text = _decode(line, file, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}:{number}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno}); mend or remove this line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: a JSON {type(row).__name__} where an object is wanted, one per line.")
        yield number, row, text


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a text file, .gz and .zst too."""
    offset = 0
    for line in _lines(file):
        yield _decode(line, file, offset)
        offset += len(line)


def _read_parquet(file: Path, column: str) -> Iterator[Document]:
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise DataError(
                    f'{file}: no column "{column}" but {_names(schema.names)}; name the one that holds the text.'
                )
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f'{file}: column "{column}" is {kind}, not string.')
            row = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield Document(value or "", f"{file}:{row}")
                    row += 1
    except UnicodeDecodeError as error:
        raise DataError(
            f'{file}: column "{column}" holds text that is not UTF-8 ({error.reason}); write the file anew.'
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _chunks(file: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """Decompressed content; damage to the compression becomes a DataError."""
    position = 0
    try:
        with _open(file) as stream:
            while chunk := stream.read(size):
                position += len(chunk)
                yield chunk
    except EOFError as error:
        raise DataError(
            f"{file} is cut short: its compressed data, {file.stat().st_size:,} bytes, has no end. Fetch the file again."
        ) from error
    except (gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read after {position} bytes: {error}") from error


def _lines(file: Path) -> Iterator[bytes]:
    """Lines with their newline, cut at b"\\n" alone: JSON may hold other Unicode line ends."""
    rest = b""
    for chunk in _chunks(file):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.endswith(".zst"):
        return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")
    return file.open("rb")


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise DataError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {where} ({error.reason}). "
            f"Convert it first, for example with iconv -f latin1 -t utf-8."
        ) from error


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _names(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "nothing"
