"""Damaged archives at random: reading ends, raises nothing, and gives every record that the damage did not touch."""

import gzip
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import brotli
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alloy.data.web.http_body import Limits
from alloy.data.web.warc import Page, read_warc, split_warc
from alloy.errors import DataError
from tests.data.web.archives import member, read, record

NUMBER = 7


def archive(packed: bool) -> list[bytes]:
    """Members with bodies that tell them apart, some of them coded or chunked."""
    r = random.Random(5)
    pieces = []
    for n in range(NUMBER):
        body = f"<p>page {n} {r.random()}".encode() * r.randint(1, 30)
        url = f"https://a.example/{n}"
        if n == 2:
            header = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
            coded = gzip.compress(body)
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(coded), coded)
            pieces.append(record(body, url, http=header))
        else:
            pieces.append(record(body, url))
    return [gzip.compress(p, mtime=0) for p in pieces] if packed else pieces


def mutate(pieces: list[bytes], r: random.Random) -> tuple[bytes, set[int]]:
    """A damaged copy, and the numbers of the members that are whole in it, between whole neighbours."""
    pieces = list(pieces)
    at = r.randrange(len(pieces))
    good = set(range(len(pieces)))
    piece, kind = pieces[at], r.choice(["cut", "flip", "double", "insert", "head", "zero", "splice", "length"])
    place = r.randrange(len(piece))
    if kind == "double":
        pieces.insert(at, piece)
        return b"".join(pieces), good
    good.discard(at)
    if kind == "cut":
        pieces[at] = piece[:place]
    elif kind == "head":
        pieces[at] = piece[place:]
        good -= set() if place else {at}
    elif kind == "flip":
        pieces[at] = piece[:place] + bytes([piece[place] ^ (1 << r.randrange(8))]) + piece[place + 1 :]
    elif kind == "insert":
        pieces[at] = piece[:place] + r.randbytes(r.randint(1, 50)) + piece[place:]
    elif kind == "zero":
        pieces[at] = piece[:place] + bytes(len(piece) - place)
    elif kind == "splice":
        other = r.choice(pieces)
        pieces[at] = piece[:place] + other[r.randrange(len(other)) :]
    else:
        pieces[at] = piece.replace(b"Content-Length: ", b"Content-Length: " + str(r.randint(0, 9)).encode(), 1)
    return b"".join(pieces), good


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), packed=st.booleans())
def test_records_beside_the_damage_are_given(seed: int, packed: bool, tmp_path: Path) -> None:
    """Of packed records all but the damaged one; without packing, where no member tells, all after it that begin as records."""
    pieces = archive(packed)
    data, good = mutate(pieces, random.Random(seed))
    pages, damage = read(tmp_path / "x.warc", data)
    if not packed:
        # a length that grew may take in the record after it, for nothing contradicts it
        good -= {max(set(range(NUMBER)) - good, default=-1) + 1}
    truth = {int(page.url[-1]): (page.url, page.body) for page in read(tmp_path / "whole.warc", b"".join(pieces))[0]}
    missing = {truth[n] for n in good} - {(page.url, page.body) for page in pages}
    assert missing == set(), damage


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400), cut=st.integers(0, 600), packed=st.booleans())
def test_any_bytes(data: bytes, cut: int, packed: bool, tmp_path: Path) -> None:
    """Bytes of no archive, alone or in the middle of one, raise nothing but the refusal of HTML, and parts agree."""
    whole = b"".join(archive(packed))
    for content in (data, whole[:cut] + data + whole[cut:]):
        try:
            pages, _ = read(tmp_path / "x.warc", content)
        except DataError:
            # refused as HTML
            assert b"<" in content
            continue
        if packed and content is not data:
            parts = [i for a, b in split_warc(tmp_path / "x.warc", 301) for i in read_warc(tmp_path / "x.warc", a, b)]
            assert [p for p in parts if isinstance(p, Page)] == pages


MEASURE = """
import json, resource, sys, time
from alloy.data.web.warc import Page, read_warc
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
list(read_warc(sys.argv[1]))
before, began = peak(), time.process_time()
rows = [(i.status, len(i.body)) if isinstance(i, Page) else (i.kind, 0) for i in read_warc(sys.argv[2])]
print(json.dumps([peak() - before, time.process_time() - began, rows]))
"""
MIB = 1 << 20


def coded(name: bytes, body: bytes) -> bytes:
    return record(body, http=b"HTTP/1.1 200 OK\r\nContent-Encoding: " + name + b"\r\n")


def gzip_of_zeros(size: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


def brotli_of_zeros(size: int) -> bytes:
    packer = brotli.Compressor(quality=4)
    return b"".join(packer.process(bytes(MIB)) for _ in range(size // MIB)) + packer.finish()


def zstd_of_zeros(size: int) -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


def large_member(body: int) -> bytes:
    """A member of a body of zeros, packed without holding it."""
    head, packer = record(b"", length=body + 45).removesuffix(b"\r\n\r\n"), zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [packer.compress(head), *(packer.compress(bytes(MIB)) for _ in range(body // MIB))]
    return b"".join(pieces) + packer.compress(b"\r\n\r\n") + packer.flush()


HUGE = 300 * MIB
EXPENSIVE = {
    "gzip": (lambda: gzip.compress(coded(b"gzip", gzip_of_zeros(HUGE))), "too_large", 0),
    "deflate": (lambda: gzip.compress(coded(b"deflate", gzip_of_zeros(HUGE)[10:-8])), "too_large", 0),
    "brotli": (lambda: gzip.compress(coded(b"br", brotli_of_zeros(HUGE))), "too_large", 0),
    "zstd": (lambda: gzip.compress(coded(b"zstd", zstd_of_zeros(HUGE))), "too_large", 0),
    "gzip twice": (lambda: gzip.compress(coded(b"gzip, gzip", gzip.compress(gzip_of_zeros(HUGE)))), "too_large", 0),
    "20 MiB": (lambda: member(bytes(20 * MIB)), "ok", 20 * MIB),
    "20 MiB and a byte": (lambda: member(bytes(20 * MIB + 1)), "too_large", 0),
    "member": (lambda: large_member(HUGE), "too_large", 0),
    "chunks": (
        lambda: member(b"1\r\nx\r\n" * 1_000_000, http=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"),
        "ok",
        1_000_000,
    ),
    "one endless chunk": (
        lambda: member(b"fffffffff\r\n" + bytes(9 * MIB), http=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"),
        "ok",
        9 * MIB,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_pages_stay_in_bounds(name: str, tmp_path: Path) -> None:
    """Bombs of 300 MiB and bodies at the limit cost at most 5 s and 180 MiB (a body is held up to four times while decoded),
    and neither the page before nor the one after."""
    make, status, size = EXPENSIVE[name]
    (tmp_path / "small.warc.gz").write_bytes(member(b"x") + coded(b"br", brotli.compress(b"x")))
    (tmp_path / "x.warc.gz").write_bytes(member(b"before") + make() + member(b"after!!"))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small.warc.gz"), str(tmp_path / "x.warc.gz")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    mib, seconds, rows = json.loads(run.stdout)
    pages = [tuple(row) for row in rows if row[0] in ("ok", "too_large", "decode_error")]
    assert pages == [("ok", 6), (status, size), ("ok", 7)]
    assert mib <= 180
    assert seconds <= 5


@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("ALLOY_TEST_DATA"), reason="ALLOY_TEST_DATA is not set")
def test_soak_of_real_records(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """Real records, ten times damaged a trial: nothing raised, the others given byte for byte, parts give the whole."""
    whole = Path(os.environ["ALLOY_TEST_DATA"]) / "math-pages" / "pages.warc.gz"
    data = whole.read_bytes()
    truth = {p.url: p for p in read_warc(whole) if isinstance(p, Page)}
    pieces = [data[p.warc_record_offset : p.warc_record_offset + p.warc_record_length] for p in truth.values()]
    for seed in range(soak_seed, soak_seed + soak_count * 10):
        r = random.Random(seed)
        chosen = r.sample(range(len(pieces)), 8)
        mutated, good = mutate([pieces[n] for n in chosen], r)
        pages, damage = read(tmp_path / "x.warc.gz", mutated, limits=Limits())
        names = [list(truth)[n] for n in chosen]
        found = {p.url: p.body for p in pages}
        for n in good:
            assert found.get(names[n]) == truth[names[n]].body, (seed, names[n], damage)
        start = r.randrange(len(mutated))
        parts = [i for a, b in ((0, start), (start, None)) for i in read_warc(tmp_path / "x.warc.gz", a, b)]
        assert [p for p in parts if isinstance(p, Page)] == pages, (seed, start)
