"""Pages out of WARC files, as fast as fastwarc reads them, and the damage found on the way; nothing is lost without a word.

A record is read twice only where something is wrong: fastwarc goes over the file, and a record counts as good when the next
one begins where it should. Else it is read again alone: its member is inflated to the end, its parts are named good or damaged,
and reading goes on at the next member that holds a record.

Formats: WARC 1.0 and 1.1 (ISO 28500), each record a gzip, zstd or LZ4 member of its own or none compressed. A .gz of one member
over many records is unpacked into a temporary file first; offsets are then those of the unpacked data.
"""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from alloy.core.device import require
from alloy.data.document import row_id
from alloy.data.web.http_body import Limits, TooLargeError, decode_body
from alloy.data.web.members import (
    BLOCK_BYTES,
    CUT,
    HEADER_BYTES,
    Members,
    Stream,
    beginning,
    kind_of,
    map_file,
    stated_end,
)
from alloy.errors import DataError

DamageKind = Literal[
    "arc", "bad_coding", "corrupt", "empty", "garbage", "no_http", "truncated", "wrong_digest", "wrong_length"
]

_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|!--|html|head|body|\?xml|meta|title|p|div|table)\b", re.I)
_ANY_LENGTH = re.compile(rb"^content-length[^\n]*\n", re.I | re.M)
# what fastwarc raises at damage
_DAMAGED = (OSError, ValueError, RuntimeError)
_MARKUP_TYPES = ("text/html", "application/xhtml+xml")
_CRAWL = re.compile(r"CC-MAIN-\d{4}-\d{2}")


@dataclass(slots=True)
class Page:
    """One page as an archive or a server gave it.

    `status` is `ok`, `too_large` (the body is left empty) or `decode_error` (its coding could not be undone at all);
    `error` says more. `offset` and `length` are those of the member in the file, to be fetched again by.
    """

    url: str
    warc_filename: str
    warc_record_offset: int
    warc_record_length: int
    fetch_time: str
    content_mime_type: str
    http_status: int | None
    content_type: str
    body: bytes
    status: Literal["ok", "too_large", "decode_error"] = "ok"
    error: str = ""

    @property
    def id(self) -> str:
        """The row's id, the same whoever reads the page, whenever."""
        return row_id(self.url, self.warc_filename, self.warc_record_offset)

    @property
    def crawl(self) -> str | None:
        """Name of the Common Crawl snapshot, if the file's name has it."""
        found = _CRAWL.search(self.warc_filename)
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Damage:
    """What could not be read: where in the file, of which kind, and what it looked like."""

    offset: int
    kind: DamageKind
    message: str


Item = Page | Damage


def read_warc(
    path: str | Path,
    start: int = 0,
    stop: int | None = None,
    limits: Limits | None = None,
    verify_digest: bool = False,
    skipped: Counter[str] | None = None,
    name: str | None = None,
) -> Iterator[Item]:
    """The pages of a WARC file and its damage, in the order of the file. Only a file that is no WARC at all is an error.

    Pages are the HTTP responses, of any type and status, and resource records with HTML.

    Args:
        path: .warc, .warc.gz, .warc.zst, .warc.lz4
        start: records whose member begins in [start, stop) are read, so that parts give together what the whole gives; in a
            file without compression it should be of `split_warc`, for pages may quote records
        stop: None: to the end
        limits: of a page; default 20 MiB, 200 times its compressed size
        verify_digest: compare each record with the digest that it carries
        skipped: takes the number of the other records, by kind
        name: stored as `warc_filename`; default: the file's name
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        members = _open(path, stack)
        if isinstance(members, Damage):
            if start == 0:
                yield members
            return
        fault = ""
        if members.unpacked:
            if start:
                return
            fault, stop = members.unpack(), None
        size = len(members.data)
        reader = _Reader(
            members,
            limits or Limits(),
            verify_digest,
            Counter() if skipped is None else skipped,
            path.name if name is None else name,
        )
        yield from reader.read(start, size if stop is None else min(stop, size))
        if fault:
            yield Damage(size, "truncated" if fault == CUT else "corrupt", fault)


def read_member(data: bytes, limits: Limits | None = None, name: str = "", offset: int = 0) -> list[Item]:
    """What the bytes of one member hold, fetched from `offset` of the file `name`."""
    if not data:
        return [Damage(offset, "empty", "the range is empty")]
    reader = _Reader(Members(data, kind_of(data)), limits or Limits(), False, Counter(), name)
    items, _ = reader.alone(0)
    for number, item in enumerate(items):
        if isinstance(item, Page):
            item.warc_record_offset = offset
        else:
            items[number] = replace(item, offset=item.offset + offset)
    return items


def split_warc(path: str | Path, part_bytes: int) -> list[tuple[int, int]]:
    """Byte ranges of about `part_bytes` that `read_warc` takes, covering the file; one if it cannot be cut."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        members = _open(path, stack)
        size = path.stat().st_size
        if isinstance(members, Damage) or members.unpacked:
            return [(0, size)]
        if members.kind != "plain":
            return [(start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]
        starts, place = [0], 0
        while (place := members.plain_end(place)) < size:
            if place - starts[-1] >= part_bytes:
                starts.append(place)
        return list(zip(starts, [*starts[1:], size], strict=True))


def is_warc(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a WARC, compressed or not."""
    return beginning(head, kind_of(head)).startswith(b"WARC/")


def _open(path: Path, stack: contextlib.ExitStack) -> Members | Damage:
    file = stack.enter_context(path.open("rb"))
    head = file.read(HEADER_BYTES)
    if not head:
        return Damage(0, "empty", "the file is empty")
    kind = kind_of(head)
    if kind in ("zstd", "lz4"):
        head += file.read(BLOCK_BYTES)
    plain = beginning(head, kind)
    if _HTML.match(plain):
        raise DataError(f"{path} is HTML, not WARC; rename it to .html, or name the WARC file.")
    if plain.startswith(b"filedesc:"):
        return Damage(
            0, "arc", "an ARC file, which is not read; convert it to WARC, for example with warcio recompress"
        )
    return stack.enter_context(contextlib.closing(Members(map_file(file), kind)))


class _Reader:
    """Goes over the records of mapped bytes."""

    def __init__(self, members: Members, limits: Limits, verify: bool, skipped: Counter[str], name: str) -> None:
        self.members, self.limits, self.verify, self.skipped, self.name = members, limits, verify, skipped, name
        self.fastwarc = require("fastwarc.warc", extra="data", why="WARC files are read")
        self.response = self.fastwarc.WarcRecordType.response
        self.resource = self.fastwarc.WarcRecordType.resource

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """All of the records whose members begin in [start, stop)."""
        place = self.members.find(start)
        if start == 0 and place > 0:
            yield Damage(0, "garbage", f"{place:,} bytes before the first record")
        while place < stop:
            doubtful = yield from self._run(place, stop)
            if doubtful is None:
                return
            items, place = self.alone(doubtful)
            yield from items

    def _run(self, first: int, stop: int) -> Generator[Item, None, int | None]:
        """Records from `first` on, until one is not followed by another as it should; the offset of that one is returned."""
        members = self.members
        records = iter(self._records(Stream(members.data, first, len(members.data))))
        place, size, held, other = first, -1, [], ""
        while True:
            try:
                record = next(records, None)
                here = len(members.data) if record is None else record.stream_pos
                if not (here == first if size < 0 else members.fits(place, here, size)):
                    return place
                done, done_other = held, other
                if record is not None and here < stop:
                    # two line ends follow
                    size = record.headers.write(io.BytesIO()) + int(record.headers.get("Content-Length") or 0) + 4
                    held, other = self._items(record, here)
            except _DAMAGED:
                return place
            if done_other:
                self.skipped[done_other] += 1
            for item in done:
                if isinstance(item, Page):
                    item.warc_record_length = here - place
                yield item
            if here >= stop:
                return None
            place = here

    def _records(self, stream: Stream) -> Iterator[Any]:
        return self.fastwarc.ArchiveIterator(stream, parse_http=not self.verify)

    def alone(self, place: int) -> tuple[list[Item], int]:
        """What the member at `place` holds, judged by itself, and where the next record is."""
        keep = self.limits.body_bytes + HEADER_BYTES
        member = self.members.member(place)
        pieces, total = [], 0
        for piece in member:
            if total < keep:
                pieces.append(piece)
            total += len(piece)
        if member.fault:
            damage = Damage(place, "truncated" if member.fault == CUT else "corrupt", member.fault)
            return [damage], self.members.find(place + 1)
        plain, end = b"".join(pieces), member.end
        following = self.members.find(end)
        items: list[Item] = []
        at = 0
        while at < len(plain):
            stated = stated_end(plain, at)
            rest = b"?" if stated is None or stated > total else plain[stated : stated + 16]
            rest = rest.removeprefix(b"\r\n\r\n" if rest.startswith(b"\r") else b"\n\n")
            if rest and not rest.startswith(b"WARC/"):
                held = total - at
                items.append(
                    Damage(place, "wrong_length", f"the length stated is not that of the {held:,} bytes there")
                )
                record, at = _with_length(plain[at:]), total
            else:
                assert stated is not None, "a record without a length has a rest"
                record = plain[at:stated]
                at = total if not rest else plain.index(b"WARC/", stated)
            items += self._judge(record, place)
        if at < total:
            items.append(Damage(place, "corrupt", f"a member of {total:,} bytes, of which the rest is not read"))
        if following > end:
            items.append(Damage(end, "garbage", f"{following - end:,} bytes that belong to no record"))
        for item in items:
            if isinstance(item, Page):
                item.warc_record_length = end - place
        return items, following

    def _judge(self, plain: bytes, place: int) -> list[Item]:
        """The items of one record's bytes."""
        items: list[Item] = []
        other = ""
        try:
            record = next(iter(self._records(Stream(plain, 0, len(plain)))), None)
            if record is not None:
                items, other = self._items(record, place)
        except _DAMAGED as error:
            return [Damage(place, "corrupt", str(error))]
        if other:
            self.skipped[other] += 1
        elif not items:
            items = [Damage(place, "corrupt", "no WARC header")]
        return items

    def _items(self, record: Any, place: int) -> tuple[list[Item], str]:
        """What a record gives: pages and damage, or the kind of record that is skipped."""
        kind = record.record_type
        if kind == self.response:
            return self._response(record, place)
        if kind == self.resource:
            content_type = record.headers.get("Content-Type") or ""
            if _mime(content_type) in _MARKUP_TYPES:
                return self._page(record, place, content_type, None, "", "")
        return [], str(kind)

    def _response(self, record: Any, place: int) -> tuple[list[Item], str]:
        wrong = self.verify and self._wrong_digest(record)
        http = record.http_headers
        if http is None or not http.status_code:
            if (record.headers.get("WARC-Target-URI") or "").startswith("dns:"):
                return [], "dns"
            return [Damage(place, "no_http", "a response record without an HTTP header")], ""
        content_type = http.get("Content-Type") or ""
        items, other = self._page(
            record,
            place,
            content_type,
            http.status_code,
            http.get("Transfer-Encoding") or "",
            http.get("Content-Encoding") or "",
        )
        if wrong:
            items.insert(0, Damage(place, "wrong_digest", "the record does not have the digest it states"))
        return items, other

    def _wrong_digest(self, record: Any) -> bool:
        """Whether a record has another digest than it states; its HTTP header is parsed afterwards."""
        headers, small = record.headers, record.content_length <= self.limits.body_bytes
        wrong = small and bool(headers.get("WARC-Block-Digest")) and not record.verify_block_digest()
        record.parse_http()
        if not small or headers.get("WARC-Block-Digest") or not headers.get("WARC-Payload-Digest"):
            return wrong
        return not record.verify_payload_digest()

    def _page(
        self, record: Any, place: int, content_type: str, http_status: int | None, transfer: str, coding: str
    ) -> tuple[list[Item], str]:
        headers = record.headers
        mime = _mime(content_type) or headers.get("WARC-Identified-Payload-Type") or ""
        url, time = headers.get("WARC-Target-URI") or "", headers.get("WARC-Date") or ""
        page = Page(url.strip("<>"), self.name, place, 0, time, mime, http_status, content_type, b"")
        items: list[Item] = [page]
        if record.content_length > self.limits.body_bytes:
            page.status, page.error = "too_large", f"the body has {record.content_length:,} bytes"
            return items, ""
        body = record.reader.read()
        if len(body) < record.content_length:
            raise OSError(CUT)
        if transfer or coding:
            try:
                body, problem = decode_body(body, transfer, coding, self.limits)
            except TooLargeError as error:
                body, problem = b"", ""
                page.status, page.error = "too_large", str(error)
            if problem and not body:
                page.status, page.error = "decode_error", problem
            elif problem:
                items.insert(0, Damage(place, "bad_coding", problem))
        page.body = body
        if not mime and body:
            detect = require("resiliparse.parse.encoding", extra="data", why="pages without a type are read")
            page.content_mime_type = detect.detect_mime(body[:HEADER_BYTES])
        return items, ""


def _mime(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()


def _with_length(plain: bytes) -> bytes:
    """A record with the length of the bytes there in place of the one stated."""
    head, _, block = plain.partition(b"\r\n\r\n")
    head = _ANY_LENGTH.sub(b"X-Stated-Length: 0\r\n", head + b"\r\n")
    block = block.removesuffix(b"\r\n\r\n")
    return head + b"Content-Length: %d\r\n\r\n" % len(block) + block
