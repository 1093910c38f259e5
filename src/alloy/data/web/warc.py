"""Pages out of WARC files, as fast as fastwarc reads them, and the damage found on the way; nothing is lost without a word.

A record is read twice only where something is wrong: fastwarc goes over the file, and a record counts as good when the next
one begins where it should. Else it is read again alone: its member is inflated to the end, its parts are named good or damaged,
and reading goes on at the next member that holds a record.

Formats: WARC 1.0 and 1.1 (ISO 28500), each record a gzip, zstd or LZ4 member of its own or none compressed. A .gz of one member
over many records is unpacked into a temporary file first; offsets are then those of the unpacked data.
"""

import contextlib
import mmap
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from alloy.core.device import require
from alloy.data.document import row_id
from alloy.data.web.http_body import Limits, TooLargeError, decode_body
from alloy.errors import DataError

Kind = Literal["gzip", "zstd", "lz4", "plain"]
DamageKind = Literal[
    "arc", "bad_coding", "corrupt", "empty", "garbage", "no_http", "truncated", "wrong_digest", "wrong_length"
]

_MAGIC: dict[Kind, bytes] = {
    "gzip": b"\x1f\x8b\x08",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
    "plain": b"WARC/",
}
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|!--|html|head|body|\?xml|meta|title|p|div|table)\b", re.I)
_RECORD = re.compile(rb"WARC/1\.\d+\r?\n(?:[^\r\n]+\r?\n)+\r?\n")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r?$", re.I | re.M)
_ANY_LENGTH = re.compile(rb"^content-length[^\n]*\n", re.I | re.M)
_PLAIN_START = re.compile(rb"WARC/1\.\d+\r?\n[A-Za-z-]+[ \t]*:")
_CUT = "the data ends within the record"
# what fastwarc raises at damage
_DAMAGED = (OSError, ValueError, RuntimeError)
_MARKUP_TYPES = ("text/html", "application/xhtml+xml")
# longest header of a record, and what is inflated at a time
_HEADER_BYTES = 1 << 16
_PIECE_BYTES = 1 << 18
# largest block of LZ4, more than that of zstd
_BLOCK_BYTES = (4 << 20) + 64
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
        opened = _open(path, stack)
        if isinstance(opened, Damage):
            if start == 0:
                yield opened
            return
        data, kind, unpacked = opened
        if unpacked and start:
            return
        stop = len(data) if stop is None or unpacked else min(stop, len(data))
        reader = _Reader(
            data,
            kind,
            limits or Limits(),
            verify_digest,
            Counter() if skipped is None else skipped,
            path.name if name is None else name,
        )
        yield from reader.read(start, stop)


def split_warc(path: str | Path, part_bytes: int) -> list[tuple[int, int]]:
    """Byte ranges of about `part_bytes` that `read_warc` takes, covering the file; one if it cannot be cut."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        opened = _open(path, stack, unpack=False)
        size = path.stat().st_size
        if isinstance(opened, Damage) or opened[2]:
            return [(0, size)]
        data, kind, _ = opened
        if kind != "plain":
            return [(start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]
        starts, place = [0], 0
        while (place := _plain_end(data, place)) < size:
            if place - starts[-1] >= part_bytes:
                starts.append(place)
        return list(zip(starts, [*starts[1:], size], strict=True))


def is_warc(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a WARC, compressed or not."""
    kind = _kind(head)
    return _beginning(head, kind).startswith(b"WARC/")


def _kind(head: bytes) -> Kind:
    for kind, magic in _MAGIC.items():
        if head.startswith(magic):
            return kind
    return "plain"


def _open(path: Path, stack: contextlib.ExitStack, unpack: bool = True) -> tuple[mmap.mmap, Kind, bool] | Damage:
    """The bytes of a file, how its records are packed, and whether it is (to be) unpacked; or why it is no WARC."""
    file: IO[bytes] = stack.enter_context(path.open("rb"))
    head = file.read(_HEADER_BYTES)
    if not head:
        return Damage(0, "empty", "the file is empty")
    kind = _kind(head)
    if kind in ("zstd", "lz4"):
        head += file.read(_BLOCK_BYTES)
    plain = _beginning(head, kind)
    if _HTML.match(plain):
        raise DataError(f"{path} is HTML, not WARC; rename it to .html, or name the WARC file.")
    if plain.startswith(b"filedesc:"):
        return Damage(
            0, "arc", "an ARC file, which is not read; convert it to WARC, for example with warcio recompress"
        )
    unpacked = kind == "gzip" and _many_in_first(file)
    if unpacked and unpack:
        file, kind = stack.enter_context(_unpack(path)), "plain"
    data = stack.enter_context(contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return data, kind, unpacked


def _many_in_first(file: IO[bytes]) -> bool:
    """Whether the first gzip member goes on after its first record."""
    decoder, total, need, piece = zlib.decompressobj(31), 0, 0, b""
    seen = b""
    file.seek(0)
    with contextlib.suppress(zlib.error):
        while not decoder.eof and (piece := decoder.unconsumed_tail or file.read(_PIECE_BYTES)):
            plain = decoder.decompress(piece, _PIECE_BYTES)
            total += len(plain)
            if not need:
                seen += plain
                stated = _stated(seen, 0)
                if stated is None and len(seen) > _HEADER_BYTES:
                    return False
                # two line ends, and the beginning of another record
                need = stated + 16 if stated is not None else 0
            if need and total >= need:
                return True
    return False


def _unpack(path: Path) -> IO[bytes]:
    """The inflated file, up to where it is damaged."""
    stream = require("fastwarc.stream_io", extra="data", why="WARC files are read")
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    with contextlib.suppress(OSError), path.open("rb") as packed:
        reader = stream.GzipReader(packed)
        while piece := reader.read(_PIECE_BYTES):
            file.write(piece)
    file.flush()
    return file


class _Stream:
    """Mapped bytes from `place` to `stop` as a file; several may be read at once."""

    def __init__(self, data: mmap.mmap | bytes, place: int, stop: int) -> None:
        self.data, self.place, self.stop = data, place, stop

    def read(self, size: int = -1) -> bytes:
        piece = self.data[self.place : self.stop if size < 0 else min(self.place + size, self.stop)]
        self.place += len(piece)
        return piece

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.stop)[whence]
        return self.place

    def close(self) -> None:
        pass


def _stated(plain: bytes | mmap.mmap, place: int) -> int | None:
    """Where the record at `place` ends as its header says; None without a header or length."""
    header = _RECORD.match(plain, place)
    length = header and _LENGTH.search(header[0])
    return header.end() + int(length[1]) if header and length else None


def _plain_end(data: mmap.mmap, place: int) -> int:
    """Where the uncompressed record at `place` ends, the line ends after it included."""
    stated = _stated(data, place)
    if stated is not None and stated <= len(data):
        end = stated
        while end < min(stated + 4, len(data)) and data[end] in b"\r\n":
            end += 1
        if end == len(data) or _PLAIN_START.match(data, end):
            return end
    found = _PLAIN_START.search(data, place + 1)
    return found.start() if found else len(data)


def _beginning(head: bytes, kind: Kind) -> bytes:
    """The first plain bytes; none of what is not in that compression."""
    if kind == "plain":
        return head[:1024]
    if kind == "gzip":
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(31).decompress(head, 1024)
        return b""
    with contextlib.suppress(OSError):
        return _expander(_Stream(head, 0, len(head)), kind).read(1024)
    return b""


def _expander(stream: _Stream, kind: Kind) -> Any:
    module = require("fastwarc.stream_io", extra="data", why="WARC files are read")
    return (module.ZstdReader if kind == "zstd" else module.Lz4Reader)(stream)


class _Reader:
    """Goes over the records of mapped bytes."""

    def __init__(
        self, data: mmap.mmap, kind: Kind, limits: Limits, verify: bool, skipped: Counter[str], name: str
    ) -> None:
        self.data, self.kind = data, kind
        self.limits, self.verify, self.skipped, self.name = limits, verify, skipped, name
        self.magic = _MAGIC[kind]
        self.fastwarc = require("fastwarc.warc", extra="data", why="WARC files are read")
        self.streams = require("fastwarc.stream_io", extra="data", why="WARC files are read")
        self.response = self.fastwarc.WarcRecordType.response
        self.resource = self.fastwarc.WarcRecordType.resource

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """All of the records whose members begin in [start, stop)."""
        place = self._find(start)
        if start == 0 and place > 0:
            yield Damage(0, "garbage", f"{place:,} bytes before the first record")
        while place < stop:
            doubtful = yield from self._run(place, stop)
            if doubtful is None:
                return
            items, place = self._alone(doubtful)
            yield from items

    def _run(self, first: int, stop: int) -> Generator[Item, None, int | None]:
        """Records from `first` on, until one is not followed by another as it should; the offset of that one is returned."""
        stream: Any = _Stream(self.data, first, len(self.data))
        if self.kind == "gzip":
            stream = self.streams.GzipReader(stream)
        records = iter(self._records(stream))
        place, held, other = first, [], ""
        begun = crossed = False
        while not crossed:
            try:
                record = next(records, None)
                here = len(self.data) if record is None else record.stream_pos
                if record is not None and not (self._follows(place, here) if begun else here == first):
                    return place
                done, done_other = held, other
                if record is not None and here < stop:
                    held, other = self._items(record, here)
                    record.reader.consume()
                    # fastwarc reads on into the next member where a length is too large
                    crossed = self.kind == "gzip" and stream.frame_start_position() != here
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
            place, begun = here, True
        return place

    def _records(self, stream: Any) -> Iterator[Any]:
        packed = self.kind in ("zstd", "lz4")
        return self.fastwarc.ArchiveIterator(stream, parse_http=not self.verify, stream_detect=packed)

    def _follows(self, place: int, here: int) -> bool:
        """Whether a record may begin at `here`, after that of `place`."""
        return here > place and self.data[here : here + len(self.magic)] == self.magic

    def _begins(self, place: int) -> bool:
        # what is packed in blocks has to be seen to the end of the first one
        window = 4096 if self.kind == "gzip" else _BLOCK_BYTES
        return _beginning(self.data[place : place + window], self.kind).startswith(b"WARC/")

    def _find(self, start: int) -> int:
        """Where the first record at or after `start` begins; the end of the file if there is none."""
        if self.kind == "plain":
            found = _PLAIN_START.search(self.data, start)
            return found.start() if found else len(self.data)
        while (start := self.data.find(self.magic, start)) >= 0:
            if self._begins(start):
                return start
            start += 1
        return len(self.data)

    def _alone(self, place: int) -> tuple[list[Item], int]:
        """What the member at `place` holds, judged by itself, and where the next record is."""
        keep = self.limits.body_bytes + _HEADER_BYTES
        plain, total, end, fault = self._member(place, keep)
        following = self._find(end if not fault else place + 1)
        if fault:
            return [Damage(place, "truncated" if fault == _CUT else "corrupt", fault)], following
        items: list[Item] = []
        at = 0
        while at < len(plain):
            stated = _stated(plain, at)
            rest = b"?" if stated is None or stated > total else plain[stated : stated + 64].lstrip(b"\r\n")
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
            record = next(iter(self._records(_Stream(plain, 0, len(plain)))), None)
            if record is not None:
                items, other = self._items(record, place)
        except _DAMAGED as error:
            return [Damage(place, "corrupt", str(error))]
        if other:
            self.skipped[other] += 1
        elif not items:
            items = [Damage(place, "corrupt", "no WARC header")]
        return items

    def _member(self, place: int, keep: int) -> tuple[bytes, int, int, str]:
        """A member's first `keep` bytes, their number in all, its end in the file, and what is wrong with it."""
        if self.kind == "plain":
            end = _plain_end(self.data, place)
            stated = _stated(self.data, place)
            cut = end == len(self.data) and stated is not None and stated > end
            return self.data[place : min(end, place + keep)], end - place, end, _CUT if cut else ""
        if self.kind == "gzip":
            return self._gzip_member(place, keep)
        end = self._find(place + 1)
        pieces, total = [], 0
        try:
            reader = _expander(_Stream(self.data, place, end), self.kind)
            while piece := reader.read(_PIECE_BYTES):
                if total < keep:
                    pieces.append(piece)
                total += len(piece)
        except _DAMAGED as error:
            return b"", 0, end, str(error) or "the data cannot be expanded"
        return b"".join(pieces), total, end, ""

    def _gzip_member(self, place: int, keep: int) -> tuple[bytes, int, int, str]:
        decoder, pieces, total = zlib.decompressobj(31), [], 0
        try:
            while not decoder.eof and place < len(self.data):
                packed = self.data[place : place + _PIECE_BYTES]
                piece = decoder.decompress(packed, _PIECE_BYTES)
                place += len(packed) - len(decoder.unused_data if decoder.eof else decoder.unconsumed_tail)
                if total < keep:
                    pieces.append(piece)
                total += len(piece)
        except zlib.error as error:
            return b"", 0, place, str(error)
        return b"".join(pieces), total, place, "" if decoder.eof else _CUT

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
        if self.verify:
            record.parse_http()
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
        if record.content_length > self.limits.body_bytes:
            return False
        if record.headers.get("WARC-Block-Digest"):
            return not record.verify_block_digest()
        return bool(record.headers.get("WARC-Payload-Digest")) and not record.verify_payload_digest()

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
            raise OSError(_CUT)
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
            page.content_mime_type = detect.detect_mime(body[:_HEADER_BYTES])
        return items, ""


def _mime(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()


def _with_length(plain: bytes) -> bytes:
    """A record with the length of the bytes there in place of the one stated."""
    head, _, block = plain.partition(b"\r\n\r\n")
    head = _ANY_LENGTH.sub(b"X-Stated-Length: 0\r\n", head + b"\r\n")
    block = block.removesuffix(b"\r\n\r\n")
    return head + b"Content-Length: %d\r\n\r\n" % len(block) + block
