"""Documents from files, and what is said of files that cannot be read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alloy.data.io import Document, read_documents, write_jsonl
from alloy.errors import DataError

TEXTS = ["first\r\ntext é ", "second\u2028with a line separator", "third \U0001f600"]


def read(path, **options) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


def test_text_is_kept_byte_for_byte(tmp_path) -> None:
    """No newline translation and no trimming; the suffix of a named file does not matter."""
    file = tmp_path / "notes.unknown"
    file.write_bytes(b" a\r\nb\n\n")
    assert list(read_documents(file)) == [Document(" a\r\nb\n\n", str(file))]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_plain_and_compressed(tmp_path, suffix, ascii_only) -> None:
    """One document a line, blank lines skipped; names carry the line number."""
    data = "\n\n".join(json.dumps({"id": 1, "body": text}, ensure_ascii=ascii_only) for text in TEXTS).encode()
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl.gz":
        data = gzip.compress(data)
    if suffix == ".jsonl.zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    file.write_bytes(data)
    documents = list(read_documents(file, column="body"))
    assert [document.text for document in documents] == TEXTS
    assert documents[1].name == f"{file}:3"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path, kind) -> None:
    """Rows in order over several row groups, null and empty rows left out."""
    column = pa.array([TEXTS[0], None, "", *TEXTS[1:]], kind)
    pq.write_table(pa.table({"id": range(5), "text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == TEXTS


def test_folder_is_read_in_order(tmp_path) -> None:
    """Sorted by path, text and rows together; hidden and binary files are left out."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("z")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n{"text": "c2"}\n')
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert read(tmp_path) == ["a", "z", "c1", "c2"]


def test_written_jsonl_is_read_back(tmp_path) -> None:
    """Text by text, any character included."""
    documents = [Document(text, f"n{i}") for i, text in enumerate([*TEXTS, 'quote " back \\ null \0 nl \n'])]
    write_jsonl(tmp_path / "a.jsonl", documents)
    assert read(tmp_path / "a.jsonl") == [document.text for document in documents]


def test_missing_and_empty(tmp_path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no text, \.jsonl or .parquet file, no files"):
        read(tmp_path)
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"only \.png"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no text: every document in it is empty"):
        read(tmp_path)


def test_not_utf8_names_file_and_offset(tmp_path) -> None:
    """The offset counts bytes of the (decompressed) file, also in a later line of JSONL."""
    (tmp_path / "a.txt").write_bytes("é".encode() + b"ab\xe9cd")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 4"):
        read(tmp_path / "a.txt")
    data = b'{"text": "ok"}\n{"text": "\xff"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=rf"byte 0xff at offset {data.index(0xFF)}"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match="offset 0"):
        read(tmp_path / "utf16.txt")


def test_truncated_compression(tmp_path) -> None:
    whole = "".join(json.dumps({"text": f"{i * i} {i % 7}"}) + "\n" for i in range(5000)).encode()
    data = gzip.compress(whole)
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is cut short"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz cannot be read"):
        read(tmp_path / "b.jsonl.gz")
    data = pa.compress(whole, codec="zstd", asbytes=True)
    (tmp_path / "c.jsonl.zst").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"c\.jsonl\.zst"):
        read(tmp_path / "c.jsonl.zst")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:2: not JSON"),
        ('["text"]', r"a\.jsonl:2: a JSON list where an object is wanted"),
        ('{"body": "a", "id": 1}', r'a\.jsonl:2: no key "text" but "body", "id"'),
        ('{"text": 3}', r'a\.jsonl:2: "text" is int, not a string'),
        ('{"text": "\\ud83d"}', r"a\.jsonl:2: .* half of a surrogate pair"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_bad_parquet(tmp_path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='no column "text" but "body", "n"'):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match='column "n" is int64, not string'):
        read(tmp_path / "a.parquet", column="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "b.parquet")
