"""The body of an HTTP message as a browser would see it: chunks joined, content codings undone, within limits.

RFC 9112 section 7.1 (chunks), RFC 9110 section 8.4 (gzip, deflate, br, zstd). Archives often keep the headers of the wire over
bodies that were decoded before: a body that does not look as its header says is taken as it is.
"""

import io
import re
import zlib
from dataclasses import dataclass

from alloy.core.device import require

_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\n]{0,4096})?\r?\n")
_GZIP = b"\x1f\x8b"
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a page may cost: bytes after decoding, and how many times the bytes before."""

    body_bytes: int = 20 << 20
    ratio: int = 200


class TooLargeError(Exception):
    """A body passes the limits; the text says which one."""


def decode_body(body: bytes, transfer: str, coding: str, limits: Limits) -> tuple[bytes, str]:
    """The decoded body, and what was wrong with it ("" if nothing); of a damaged one, what comes before the damage.

    Args:
        body: as on the wire
        transfer: value of the header Transfer-Encoding
        coding: value of the header Content-Encoding; several are undone from the last to the first
        limits: beyond them TooLargeError
    """
    problem = ""
    if "chunked" in transfer.lower():
        body, problem = _join_chunks(body)
    for name in reversed(coding.lower().split(",")):
        body, fault = _undo(body, name.strip(), limits)
        problem = problem or fault
    return body, problem


def _join_chunks(body: bytes) -> tuple[bytes, str]:
    match = _SIZE.match(body)
    if match is None:
        return body, ""
    chunks = []
    while match:
        size = int(match[1], 16)
        if size == 0:
            return b"".join(chunks), ""
        place = match.end()
        chunks.append(body[place : place + size])
        place += size
        if place > len(body):
            return b"".join(chunks), "the last chunk is cut short"
        # the line end after the chunk, which careless servers leave out
        place += 2 if body.startswith(b"\r\n", place) else body.startswith(b"\n", place)
        match = _SIZE.match(body, place)
    return b"".join(chunks), f"no size of a chunk at byte {place}"  # pyright: ignore[reportPossiblyUnboundVariable]


def _undo(body: bytes, coding: str, limits: Limits) -> tuple[bytes, str]:
    coding = coding.removeprefix("x-")
    if coding not in ("gzip", "deflate", "br", "zstd") or not body:
        return body, ""
    most = min(limits.body_bytes, limits.ratio * len(body))
    if coding == "gzip":
        if not body.startswith(_GZIP):
            return body, ""
        plain, fault = _inflate(body, 31, most)
    elif coding == "deflate":
        # the coding is defined with zlib's wrapper, and often sent without
        plain, fault = _inflate(body, 15, most)
        if fault and not plain:
            plain, fault = _inflate(body, -15, most)
    else:
        stream = require("fastwarc.stream_io", extra="data", why="compressed pages are read")
        kind = stream.BrotliReader if coding == "br" else stream.ZstdReader
        plain, fault = _read(kind(io.BytesIO(body)), most)
    if len(plain) > most:
        by = f"{limits.ratio} times its {len(body):,}" if most < limits.body_bytes else f"{most:,}"
        raise TooLargeError(f"the body has more than {by} bytes after undoing {coding}")
    if fault and not plain and body.lstrip()[:1] == b"<":
        return body, ""
    return plain, fault and f"{coding}: {fault}"


def _inflate(body: bytes, window: int, most: int) -> tuple[bytes, str]:
    """At most one byte more than `most`."""
    decoder, pieces, size, place = zlib.decompressobj(window), [], 0, 0
    try:
        while size <= most and not decoder.eof and place < len(body):
            piece = decoder.decompress(body[place : place + _READ_BYTES], most + 1 - size)
            place += min(_READ_BYTES, len(body) - place) - len(decoder.unconsumed_tail)
            pieces.append(piece)
            size += len(piece)
    except zlib.error as error:
        return b"".join(pieces), str(error)
    return b"".join(pieces), "" if decoder.eof or size > most else "the data has no end"


def _read(reader: io.RawIOBase, most: int) -> tuple[bytes, str]:
    pieces, size = [], 0
    try:
        while size <= most and (piece := reader.read(_READ_BYTES)):
            pieces.append(piece)
            size += len(piece)
    except OSError as error:
        return b"".join(pieces), str(error)
    return b"".join(pieces), ""
