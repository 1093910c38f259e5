"""WARC files made by hand, for tests."""

import gzip
from pathlib import Path

from alloy.data.web.warc import Damage, Page, read_warc


def record(
    body: bytes,
    url: str = "https://a.example/",
    kind: str = "response",
    http: bytes | None = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n",
    extra: str = "",
    length: int | None = None,
) -> bytes:
    """One record without compression; `length` states another one than that of the block."""
    block = body if http is None else http + b"\r\n" + body
    kind_of_block = "text/html" if http is None else "application/http"
    stated = len(block) if length is None else length
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2020-01-02T03:04:05Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n{extra}"
        f"Content-Type: {kind_of_block}\r\nContent-Length: {stated}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def member(*args, **kwargs) -> bytes:
    """The same as a gzip member."""
    return gzip.compress(record(*args, **kwargs), mtime=0)


def read(path: Path, data: bytes, **kwargs) -> tuple[list[Page], list[Damage]]:
    """Pages and damage of these bytes."""
    path.write_bytes(data)
    items = list(read_warc(path, **kwargs))
    return [i for i in items if isinstance(i, Page)], [i for i in items if isinstance(i, Damage)]
