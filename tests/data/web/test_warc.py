"""Pages out of WARC files: every oddity by hand, the test set against its truth, parts against the whole."""

import base64
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections import Counter
from pathlib import Path

import brotli
import lz4.frame
import pytest
import zstandard

from alloy.data.document import row_id
from alloy.data.web.http_body import Limits
from alloy.data.web.warc import Damage, Page, is_warc, read_warc, split_warc
from alloy.errors import DataError
from tests.data.web.archives import member, read, record

ONE, TWO, THREE = (f"<p>page {n} ".encode() * (40 + n) for n in (1, 2, 3))
PACKED = [member(ONE, "https://a.example/1"), member(TWO, "https://a.example/2"), member(THREE, "https://a.example/3")]
PLAIN = [gzip.decompress(m) for m in PACKED]
needs_data = pytest.mark.skipif(not os.environ.get("ALLOY_TEST_DATA"), reason="ALLOY_TEST_DATA is not set")


def bodies(pages: list[Page]) -> list[bytes]:
    return [page.body for page in pages]


def test_fields_of_a_page(tmp_path: Path) -> None:
    """All of them, and an id that is BLAKE2b of URL, file and offset."""
    pages, damage = read(tmp_path / "CC-MAIN-2024-10-x.warc.gz", b"".join(PACKED))
    assert damage == []
    assert bodies(pages) == [ONE, TWO, THREE]
    page = pages[1]
    assert (page.url, page.warc_filename) == ("https://a.example/2", "CC-MAIN-2024-10-x.warc.gz")
    assert (page.warc_record_offset, page.warc_record_length) == (len(PACKED[0]), len(PACKED[1]))
    assert (page.fetch_time, page.content_mime_type, page.content_type) == (
        "2020-01-02T03:04:05Z",
        "text/html",
        "text/html",
    )
    assert (page.http_status, page.status, page.crawl) == (200, "ok", "CC-MAIN-2024-10")
    text = f"https://a.example/2\0CC-MAIN-2024-10-x.warc.gz\0{len(PACKED[0])}".encode()
    assert (
        page.id
        == hashlib.blake2b(text, digest_size=16).hexdigest()
        == row_id(page.url, page.warc_filename, len(PACKED[0]))
    )


@pytest.mark.parametrize("pack", [lambda r: r, gzip.compress, zstandard.compress, lz4.frame.compress])
def test_compressions(pack, tmp_path: Path) -> None:
    """Plain, gzip, zstd and LZ4 files give the same pages, and offsets at which a member begins."""
    packed = [pack(r) for r in PLAIN]
    pages, damage = read(tmp_path / "x.warc", b"".join(packed))
    assert damage == []
    assert bodies(pages) == [ONE, TWO, THREE]
    assert [(p.warc_record_offset, p.warc_record_length) for p in pages] == [
        (sum(map(len, packed[:n])), len(packed[n])) for n in range(3)
    ]
    assert is_warc(packed[0])


def test_one_member_over_all_records(tmp_path: Path) -> None:
    """`gzip x.warc` is read as the file it was made from; one that is cut says so."""
    whole = gzip.compress(b"".join(PLAIN))
    pages, damage = read(tmp_path / "x.warc.gz", whole)
    assert bodies(pages) == [ONE, TWO, THREE]
    assert damage == []
    assert split_warc(tmp_path / "x.warc.gz", 10) == [(0, len(whole))]
    assert list(read_warc(tmp_path / "x.warc.gz", start=5)) == []
    pages, damage = read(tmp_path / "x.warc.gz", whole[:-9])
    assert bodies(pages)[:2] == [ONE, TWO]
    assert {d.kind for d in damage} == {"truncated"}


def test_two_records_in_one_member(tmp_path: Path) -> None:
    """Both are given, with the member's place, by which they can be fetched."""
    middle = gzip.compress(PLAIN[1] + PLAIN[2])
    pages, damage = read(tmp_path / "x.warc.gz", PACKED[0] + middle + PACKED[0])
    assert damage == []
    assert bodies(pages) == [ONE, TWO, THREE, ONE]
    assert {(p.warc_record_offset, p.warc_record_length) for p in pages[1:3]} == {(len(PACKED[0]), len(middle))}


def test_other_records_are_counted(tmp_path: Path) -> None:
    """Requests, metadata, DNS answers and resources that are no HTML are no pages, and none is damage."""
    others = [
        member(b"x", kind="request"),
        member(b"x", kind="metadata", http=None),
        member(b"1.2.3.4", "dns:a.example", http=None),
        member(b"x", kind="warcinfo", http=None),
        gzip.compress(record(b"{}", kind="resource", http=None).replace(b"text/html", b"text/json")),
    ]
    html = member(ONE, kind="resource", http=None)
    skipped: Counter[str] = Counter()
    pages, damage = read(tmp_path / "x.warc.gz", b"".join([*others, html, *others]), skipped=skipped)
    assert damage == []
    assert [(p.body, p.http_status, p.content_type) for p in pages] == [(ONE, None, "text/html")]
    assert skipped == dict.fromkeys(("request", "metadata", "dns", "warcinfo", "resource"), 2)


DAMAGED = {
    "garbage": (b"x" * 555, "garbage"),
    "zeros": (bytes(555), "garbage"),
    "cut": (PACKED[1][:-60], "corrupt|truncated"),
    "checksum": (PACKED[1][:-6] + bytes([PACKED[1][-6] ^ 1]) + PACKED[1][-5:], "corrupt"),
    "no record": (gzip.compress(b"hello " * 99), "garbage"),
    "other magic": (gzip.compress(PLAIN[1].replace(b"WARC/1.0", b"WBRC/1.0", 1)), "garbage"),
    "no http": (member(TWO, http=None), "no_http"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_between_good_records(name: str, tmp_path: Path) -> None:
    """The records before and after are given, and the damage is named with its offset, once."""
    bad, kinds = DAMAGED[name]
    pages, damage = read(tmp_path / "x.warc.gz", PACKED[0] + bad + PACKED[2])
    assert bodies(pages) == [ONE, THREE]
    assert pages[0].warc_record_length == len(PACKED[0])
    assert len(damage) == 1
    assert damage[0].offset == len(PACKED[0])
    assert damage[0].kind in kinds.split("|")


@pytest.mark.parametrize("pack", [lambda r: r, gzip.compress])
@pytest.mark.parametrize("delta", [-17, -1, 1, 3, 9, 99_999, len(PLAIN[2])])
def test_wrong_length(pack, delta: int, tmp_path: Path) -> None:
    """A record whose length is wrong is given whole, as its member has it, and named; its neighbours are unharmed."""
    block = len(TWO) + len(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
    bad = pack(record(TWO, length=block + delta))
    pages, damage = read(tmp_path / "x.warc.gz", pack(PLAIN[0]) + bad + pack(PLAIN[2]) + pack(PLAIN[0]))
    if bad.startswith(b"WARC") and delta == len(PLAIN[2]):
        # without members there is nothing that contradicts the length
        assert damage == []
        assert len(pages) == 3
    else:
        assert bodies(pages) == [ONE, TWO, THREE, ONE]
        assert [(d.kind, d.offset) for d in damage] == [("wrong_length", len(pack(PLAIN[0])))]


@pytest.mark.parametrize("length", [b"-5", b"x", b"", b"99999999999999999999"])
def test_no_usable_length(length: bytes, tmp_path: Path) -> None:
    """Neither does a length that is none cost the page."""
    bad = gzip.compress(PLAIN[1].replace(b"Content-Length: ", b"Content-Length: " + length + b"\r\nX-Old: ", 1))
    pages, damage = read(tmp_path / "x.warc.gz", PACKED[0] + bad + PACKED[2])
    assert bodies(pages) == [ONE, TWO, THREE]
    assert [d.kind for d in damage] == ["wrong_length"]


def test_end_of_file(tmp_path: Path) -> None:
    """A last record that is cut is damage; garbage after the last one, too; an empty file and ARC are named."""
    for cut in (1, 9, 70, len(PACKED[2]) - 30):
        pages, damage = read(tmp_path / "x.warc.gz", PACKED[0] + PACKED[1] + PACKED[2][:-cut])
        # the checksum alone may be cut without loss
        assert bodies(pages)[:2] == [ONE, TWO]
        assert len(pages) + len(damage) == 3
        pages, damage = read(tmp_path / "x.warc", PLAIN[0] + PLAIN[1] + PLAIN[2][: -cut - 4])
        assert bodies(pages) == [ONE, TWO]
        assert [(d.kind, d.offset) for d in damage] == [("truncated", len(PLAIN[0] + PLAIN[1]))]
    pages, damage = read(tmp_path / "x.warc.gz", PACKED[0] + b"tail")
    assert (bodies(pages), [(d.kind, d.offset) for d in damage]) == ([ONE], [("garbage", len(PACKED[0]))])
    assert [d.kind for d in read(tmp_path / "x.warc.gz", b"")[1]] == ["empty"]
    arc = b"filedesc://x.arc 0.0.0.0 20000101000000 text/plain 3\n1 0 a\n"
    assert [d.kind for d in read(tmp_path / "x.arc", arc)[1]] == ["arc"]
    assert [d.kind for d in read(tmp_path / "x.arc.gz", gzip.compress(arc))[1]] == ["arc"]


def test_large_record_read_alone(tmp_path: Path) -> None:
    """A large page beside damage ends where its member ends, in pieces or not."""
    body = os.urandom(700_001)
    big = member(body)
    pages, damage = read(tmp_path / "x.warc.gz", PACKED[0] + big + b"xyz" + PACKED[1])
    assert bodies(pages) == [ONE, body, TWO]
    assert [(d.kind, d.offset) for d in damage] == [("garbage", len(PACKED[0] + big))]


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_html_is_refused(name: str, tmp_path: Path) -> None:
    """A file of HTML is no WARC, packed or not, and the message says what to do."""
    for html in (
        b"<!DOCTYPE html><p>x",
        b"\xef\xbb\xbf \n<html>",
        b"<?xml version='1.0'?><html>",
        gzip.compress(b"<html>"),
    ):
        with pytest.raises(DataError, match=r"is HTML, not WARC; rename it"):
            read(tmp_path / name, html)
        assert not is_warc(html)


def http(*lines: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n" + b"".join(line + b"\r\n" for line in lines)


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x;a=b\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\nX-Trailer: 1\r\n\r\n"


RAW_DEFLATE = zlib.compressobj(9, zlib.DEFLATED, -15)
CODED = {
    "gzip": gzip.compress(ONE),
    "x-gzip": gzip.compress(ONE),
    "deflate": zlib.compress(ONE),
    "raw": RAW_DEFLATE.compress(ONE) + RAW_DEFLATE.flush(),
    "br": brotli.compress(ONE),
    "zstd": zstandard.compress(ONE),
}


@pytest.mark.parametrize("name", CODED)
def test_codings(name: str, tmp_path: Path) -> None:
    """Each coding is undone, with and without chunks, and left alone where the body was decoded before."""
    header = b"Content-Encoding: " + (b"deflate" if name == "raw" else name.encode())
    bodies_there = [CODED[name], ONE]
    data = b"".join(member(body, http=http(header)) for body in bodies_there)
    data += member(chunked(CODED[name], 7), http=http(header, b"Transfer-Encoding: chunked"))
    data += member(CODED[name], http=http(header, b"Transfer-Encoding: chunked"))
    data += member(gzip.compress(CODED[name]), http=http(header + b", gzip"))
    pages, damage = read(tmp_path / "x.warc.gz", data)
    assert damage == []
    assert [(p.body, p.status) for p in pages] == [(ONE, "ok")] * 5


@pytest.mark.parametrize("name", [n for n in CODED if n != "raw"])
def test_damaged_codings(name: str, tmp_path: Path) -> None:
    """A coded body that cannot be undone at all has its own status; one that begins well is given up to the damage."""
    header = b"Content-Encoding: " + name.encode()
    junk = b"\x1f\x8b\xff\xfe" * 30 if "gzip" in name else b"\xff\xfe\xfd" * 30
    pages, damage = read(tmp_path / "x.warc.gz", member(junk, http=http(header)) + member(ONE))
    assert [(p.body, p.status) for p in pages] == [(b"", "decode_error"), (ONE, "ok")]
    assert pages[0].error.startswith(name.removeprefix("x-"))
    assert damage == []


def test_cut_gzip_body_gives_its_beginning(tmp_path: Path) -> None:
    """As browsers show it; the loss is named."""
    body = os.urandom(5_000).hex().encode()
    pages, damage = read(
        tmp_path / "x.warc.gz", member(gzip.compress(body)[:-900], http=http(b"Content-Encoding: gzip"))
    )
    assert pages[0].status == "ok"
    assert 4_000 < len(pages[0].body) < len(body)
    assert body.startswith(pages[0].body)
    assert [d.kind for d in damage] == ["bad_coding"]


@pytest.mark.parametrize(
    ("wire", "body", "is_damage"),
    [
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello", False),
        (b"5\nhello\n0\n\n", b"hello", False),
        (b"A ; x\r\n0123456789\r\n00\r\nT: x\r\n\r\nrest", b"0123456789", False),
        (b"<html>never chunked", b"<html>never chunked", False),
        (b"5\r\nhello\r\n9\r\nwor", b"hellowor", True),
        (b"5\r\nhello\r\n-1\r\n", b"hello", True),
        (b"5\r\nhello\r\n", b"hello", True),
        (b"ffffffffff\r\nhello", b"hello", True),
    ],
)
def test_chunks(wire: bytes, body: bytes, is_damage: bool, tmp_path: Path) -> None:
    """Chunks are joined; what comes before bad ones is kept and the loss named."""
    pages, damage = read(tmp_path / "x.warc.gz", member(wire, http=http(b"Transfer-Encoding: chunked")) + PACKED[0])
    assert bodies(pages) == [body, ONE]
    assert [d.kind for d in damage] == ["bad_coding"] * is_damage


def test_limits(tmp_path: Path) -> None:
    """A page beyond a limit keeps its row, without a body, and says which limit it was."""
    limits = Limits(body_bytes=1_000, ratio=50)
    small = b"ab" * 480
    coded = [
        member(gzip.compress(b), http=http(b"Content-Encoding: gzip")) for b in (small, small + b"x" * 41, b"x" * 999)
    ]
    data = b"".join([member(b"x" * 1_000), member(b"x" * 1_001), *coded, PACKED[0][:0], member(b"end")])
    pages, damage = read(tmp_path / "x.warc.gz", data, limits=limits)
    assert damage == []
    assert [p.status for p in pages] == ["ok", "too_large", "ok", "too_large", "ok", "ok"]
    assert [len(p.body) for p in pages] == [1_000, 0, 960, 0, 999, 3]
    assert "1,001 bytes" in pages[1].error
    pages, _ = read(tmp_path / "x.warc.gz", data, limits=Limits(body_bytes=1_000, ratio=20))
    assert [p.status for p in pages] == ["ok", "too_large", "too_large", "too_large", "too_large", "ok"]
    assert "20 times" in pages[2].error


def test_digests(tmp_path: Path) -> None:
    """Digests are compared on request: the block's if there is one, else the payload's."""

    def digest(data: bytes) -> str:
        return "sha1:" + base64.b32encode(hashlib.sha1(data).digest()).decode()

    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    good = [f"WARC-Block-Digest: {digest(head + ONE)}\r\n", f"WARC-Payload-Digest: {digest(ONE)}\r\n"]
    data = b"".join(member(body, extra=line) for line in good for body in (ONE, TWO)) + PACKED[2]
    pages, damage = read(tmp_path / "x.warc.gz", data, verify_digest=True)
    assert bodies(pages) == [ONE, TWO, ONE, TWO, THREE]
    assert [(d.kind, d.offset) for d in damage] == [
        ("wrong_digest", p.warc_record_offset) for p in (pages[1], pages[3])
    ]
    assert read(tmp_path / "x.warc.gz", data)[1] == []


@pytest.mark.parametrize("pack", [lambda r: r, gzip.compress, zstandard.compress, lz4.frame.compress])
def test_parts_give_the_whole(pack, tmp_path: Path) -> None:
    """Cut anywhere, the parts give the pages of the whole file in order, damage included, each once."""
    packed = [pack(record(b"<p>%d" % n * (n % 13 + 1), f"https://a.example/{n}")) for n in range(23)]
    path = tmp_path / "x.warc.gz"
    path.write_bytes(b"".join(packed))
    whole = [i.id for i in read_warc(path) if isinstance(i, Page)]
    assert len(whole) == 23
    size = path.stat().st_size
    for part in (1, 97, 500, size // 3, size, size + 1):
        ranges = split_warc(path, part)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        items = [i for start, stop in ranges for i in read_warc(path, start, stop)]
        assert [i.id if isinstance(i, Page) else i for i in items] == whole


@needs_data
def test_the_test_set(tmp_path: Path) -> None:
    """Offsets, lengths, types and bytes of all pages of the shared set are those of its lists; parts agree."""
    folder = Path(os.environ["ALLOY_TEST_DATA"]) / "math-pages"
    truth = [json.loads(line) for line in (folder / "expected.jsonl").read_text().splitlines()]
    skipped: Counter[str] = Counter()
    items = list(read_warc(folder / "pages.warc.gz", verify_digest=True, skipped=skipped))
    assert [i for i in items if isinstance(i, Damage)] == []
    assert skipped == {"warcinfo": 1}
    for page, row in zip(items, truth, strict=True):
        assert isinstance(page, Page)
        assert page.body == (folder / "pages" / row["page"]).read_bytes()
        assert page.content_type == row["content_type"]
        for key in ("url", "warc_record_offset", "warc_record_length"):
            assert getattr(page, key) == row[key]
    parts = [
        i
        for start, stop in split_warc(folder / "pages.warc.gz", 33_333)
        for i in read_warc(folder / "pages.warc.gz", start, stop)
    ]
    assert parts == items
