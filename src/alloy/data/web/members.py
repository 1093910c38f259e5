"""The bytes of a WARC file as members: where each record begins and ends, packed or not, however damaged the file is."""

import contextlib
import mmap
import re
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Literal

from alloy.core.device import require

Kind = Literal["gzip", "zstd", "lz4", "plain"]

MAGIC: dict[Kind, bytes] = {
    "gzip": b"\x1f\x8b\x08",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
    "plain": b"WARC/",
}
# longest header of a record, as in fastwarc, and what is inflated at a time
HEADER_BYTES = 32 << 10
PIECE_BYTES = 1 << 18
# largest block of LZ4, more than that of zstd
BLOCK_BYTES = (4 << 20) + 64
CUT = "the data ends within the record"

_RECORD = re.compile(rb"WARC/1\.\d+\r?\n(?:[^\r\n]+\r?\n)+\r?\n")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r?$", re.I | re.M)
_PLAIN_START = re.compile(rb"WARC/1\.\d+\r?\n[A-Za-z-]+[ \t]*:")


def kind_of(head: bytes) -> Kind:
    """How a file that begins so is packed."""
    for kind, magic in MAGIC.items():
        if head.startswith(magic):
            return kind
    return "plain"


def beginning(head: bytes, kind: Kind) -> bytes:
    """The first plain bytes; none of what is not packed so."""
    if kind == "plain":
        return head[:1024]
    if kind == "gzip":
        decoder, plain = zlib.decompressobj(31), b""
        with contextlib.suppress(zlib.error):
            plain = decoder.decompress(head, 16)
            # of a short member the damage may be in reach
            plain += decoder.decompress(decoder.unconsumed_tail, 1024)
        return plain
    with contextlib.suppress(OSError):
        return _expander(Stream(head, 0, len(head)), kind).read(1024)
    return b""


def stated_end(plain: bytes | mmap.mmap, place: int) -> int | None:
    """Where the record at `place` ends as its header says; None without a header or length."""
    header = _RECORD.match(plain, place, place + HEADER_BYTES)
    length = header and _LENGTH.search(header[0])
    return header.end() + int(length[1]) if header and length else None


class Stream:
    """Bytes from `place` to `stop` as a file; several may be read at once."""

    def __init__(self, data: mmap.mmap | bytes, place: int, stop: int) -> None:
        self.data, self.place, self.stop = data, place, stop

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes more."""
        piece = self.data[self.place : self.stop if size < 0 else min(self.place + size, self.stop)]
        self.place += len(piece)
        return piece

    def tell(self) -> int:
        """The offset in the data."""
        return self.place

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an offset in the data."""
        self.place = offset + (0, self.place, self.stop)[whence]
        return self.place

    def close(self) -> None:
        """Nothing: the data stays open."""


class Member:
    """One member: iterate over its plain pieces, then see where it ended and what was wrong with it ("" if nothing).

    Args:
        data: the file
        place: where it begins
        kind: how it is packed
        stop: where it ends at the latest; a gzip member knows its end itself
    """

    def __init__(self, data: mmap.mmap | bytes, place: int, kind: Kind, stop: int) -> None:
        self.data, self.place = data, place
        self.kind: Kind = kind
        self.end, self.fault = stop, ""

    def __iter__(self) -> Iterator[bytes]:
        if self.kind == "plain":
            for place in range(self.place, self.end, PIECE_BYTES):
                yield self.data[place : min(place + PIECE_BYTES, self.end)]
        elif self.kind == "gzip":
            yield from self._inflated()
        else:
            reader = _expander(Stream(self.data, self.place, self.end), self.kind)
            try:
                while piece := reader.read(PIECE_BYTES):
                    yield piece
            except (OSError, ValueError) as error:
                self.fault = str(error) or "the data cannot be expanded"

    def _inflated(self) -> Iterator[bytes]:
        decoder, stop = zlib.decompressobj(31), self.end
        self.end = self.place
        try:
            while not decoder.eof and self.end < stop:
                packed = self.data[self.end : min(self.end + PIECE_BYTES, stop)]
                piece = decoder.decompress(packed, PIECE_BYTES)
                self.end += len(packed) - len(decoder.unused_data if decoder.eof else decoder.unconsumed_tail)
                yield piece
        except zlib.error as error:
            self.fault = str(error)
        else:
            self.fault = "" if decoder.eof else CUT


def map_file(file: IO[bytes]) -> mmap.mmap:
    """The bytes of an open file, which is not empty."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Members:
    """The members of a file.

    Attributes:
        data: the file, or what was unpacked of it
        kind: how its members are packed
        unpacked: a .gz of one member over many records; `data` is its plain content once `unpack` was called
    """

    def __init__(self, data: mmap.mmap | bytes, kind: Kind) -> None:
        self.data = data
        self.kind: Kind = kind
        if kind == "plain" and not _PLAIN_START.match(self.data):
            self.kind = min(MAGIC, key=self._first_as)
        self.unpacked = self.kind == "gzip" and self._many_in_first()

    def close(self) -> None:
        """Release the bytes."""
        if isinstance(self.data, mmap.mmap):
            self.data.close()

    def unpack(self) -> str:
        """Go on with the plain content, as a temporary file; what was wrong with the packed one ("" if nothing)."""
        place, fault = 0, ""
        with tempfile.TemporaryFile() as file:
            while place < len(self.data):
                member = Member(self.data, place, "gzip", len(self.data))
                for piece in member:
                    file.write(piece)
                fault = fault or member.fault
                place = self.find(place + 1) if member.fault else member.end
            file.flush()
            self.close()
            self.data = map_file(file)
        self.kind = "plain"
        return fault

    def find(self, start: int) -> int:
        """Where the first record at or after `start` begins; the end of the file if there is none."""
        if self.kind == "plain":
            found = _PLAIN_START.search(self.data, start)
            return found.start() if found else len(self.data)
        # what is packed in blocks has to be seen to the end of the first one
        window = 4096 if self.kind == "gzip" else BLOCK_BYTES
        while (start := self.data.find(MAGIC[self.kind], start)) >= 0:
            if beginning(self.data[start : start + window], self.kind).startswith(b"WARC/"):
                return start
            start += 1
        return len(self.data)

    def fits(self, place: int, here: int, size: int) -> bool:
        """Whether a record of `size` bytes, header and line ends included, reaches from `place` to a member or the end at `here`.

        A gzip member ends with its plain size; what LZ4 and zstd hold is not looked into.
        """
        magic, data = MAGIC[self.kind], self.data
        if here <= place or (here < len(data) and data[here : here + len(magic)] != magic):
            return False
        if self.kind == "gzip":
            return int.from_bytes(data[here - 4 : here], "little") == size & 0xFFFFFFFF
        if self.kind == "plain":
            return here - place == size and data[here - 4 : here] == b"\r\n\r\n"
        return here < len(data)

    def member(self, place: int) -> Member:
        """The member at `place`."""
        if self.kind == "plain":
            stop = self.plain_end(place)
            member = Member(self.data, place, "plain", stop)
            stated = stated_end(self.data, place)
            member.fault = CUT if stop == len(self.data) and stated is not None and stated > stop else ""
            return member
        return Member(self.data, place, self.kind, len(self.data) if self.kind == "gzip" else self.find(place + 1))

    def plain_end(self, place: int) -> int:
        """Where the uncompressed record at `place` ends, the line ends after it included."""
        data = self.data
        end = stated_end(data, place)
        if end is not None and end <= len(data):
            gap = data[end : end + 4]
            end += len(gap) - len(gap.lstrip(b"\r\n"))
            # after the line ends of a record there may be bytes of none
            if gap == b"\r\n\r\n" or end == len(data) or _PLAIN_START.match(data, end):
                return end
        found = _PLAIN_START.search(data, place + 1)
        return found.start() if found else len(data)

    def _first_as(self, kind: Kind) -> int:
        """Where the first record would be if members were packed so: the beginning of the file is damaged."""
        self.kind = kind
        return self.find(0)

    def _many_in_first(self) -> bool:
        """Whether the first gzip member goes on with another record after its first one."""
        seen, total, stated = b"", 0, None
        for piece in Member(self.data, 0, "gzip", len(self.data)):
            # the last bytes are kept, for the second record may begin between pieces
            seen = (seen if stated is None else seen[-16:]) + piece
            total += len(piece)
            stated = stated_end(seen, 0) if stated is None else stated
            if stated is None and len(seen) > HEADER_BYTES:
                return False
            if stated is not None and total >= stated + 16:
                after = stated - (total - len(seen))
                return seen[after : after + 16].lstrip(b"\r\n").startswith(b"WARC/")
        return False


def _expander(stream: Stream, kind: Kind) -> Any:
    module = require("fastwarc.stream_io", extra="data", why="WARC files are read")
    return (module.ZstdReader if kind == "zstd" else module.Lz4Reader)(stream)
