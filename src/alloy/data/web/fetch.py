"""Pages by their place in archives: ranges of WARC files from a folder, any fsspec URL, or a web server.

Pointers to one file are read together where less than 1 MiB lies between them. A server is asked again after 429, 5xx, broken
connections and answers that are too short, after the time that it names or a growing random one; a page that stays out of reach
gets a status, and stops nothing. A redirect is followed only on the host itself.
"""

import email.utils
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

from alloy.core.device import require
from alloy.data.web.http_body import Limits
from alloy.data.web.warc import Page, read_member

GAP_BYTES = 1 << 20
# of one request
MOST_BYTES = 32 << 20
LONGEST_WAIT_S = 120.0
_RETRIED = (408, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where a page is."""

    url: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """A page, or why there is none: `not_found`, `http_404`, `redirect`, `no_ranges`, `short_read`, `unreachable`, `damaged`."""

    page: Page | None
    status: str
    error: str = ""


class FetchError(Exception):
    """A range that could not be read, with the status of its rows."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Files(Protocol):
    """Where ranges of files come from."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file; FetchError if they cannot be had."""
        ...


class Folder:
    """Files below a folder or any URL that fsspec knows."""

    def __init__(self, base: str) -> None:
        fsspec = require("fsspec", extra="data", why="archives are read")
        self.files, self.root = fsspec.core.url_to_fs(base)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """As `Files` says."""
        try:
            data = self.files.cat_file(f"{self.root.rstrip('/')}/{name}", start=start, end=stop)
        except FileNotFoundError as error:
            raise FetchError("not_found", f"{name}: there is no such file") from error
        except (OSError, ValueError) as error:
            raise FetchError("unreachable", f"{name}: {error}") from error
        if len(data) < stop - start:
            raise FetchError("short_read", f"{name} ends at byte {start + len(data):,}, before {stop:,}")
        return data


class Server:
    """Files below a URL of a web server that serves ranges.

    Args:
        base: such as https://data.commoncrawl.org/
        connections: at the same time
        retries: after a failure that may pass
        timeout_s: of a connection, and between the pieces of an answer
        seed: of the waiting times
        sleep: waits; tests do not
    """

    def __init__(
        self,
        base: str,
        connections: int = 4,
        retries: int = 6,
        timeout_s: float = 60.0,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.httpx = require("httpx", extra="data", why="pages are fetched")
        self.base = base if base.endswith("/") else f"{base}/"
        self.retries, self.sleep = retries, sleep
        self.random = random.Random(seed)
        limits = self.httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # a compressed answer to a range would not be the range
        headers = {"Accept-Encoding": "identity", "User-Agent": "alloy"}
        self.client = self.httpx.Client(limits=limits, timeout=timeout_s, follow_redirects=False, headers=headers)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """As `Files` says."""
        for attempt in range(self.retries + 1):
            try:
                return self._ask(urljoin(self.base, name), start, stop)
            except _PassingError as error:
                if attempt == self.retries:
                    raise FetchError(error.status, f"{name}: {error}, {attempt + 1} times") from error
                backoff = min(2.0**attempt, LONGEST_WAIT_S) * self.random.uniform(0.5, 1.0)
                self.sleep(min(error.wait_s, LONGEST_WAIT_S) if error.wait_s is not None else backoff)
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, url: str, start: int, stop: int) -> bytes:
        for _ in range(5):
            try:
                with self.client.stream("GET", url, headers={"Range": f"bytes={start}-{stop - 1}"}) as answer:
                    if answer.status_code not in _REDIRECTS:
                        return self._body(answer, start, stop)
                    target = urljoin(url, answer.headers.get("Location", ""))
            except self.httpx.HTTPError as error:
                raise _PassingError("unreachable", str(error) or type(error).__name__) from error
            if urlsplit(target)[:2] != urlsplit(url)[:2]:
                raise FetchError("redirect", f"{url} redirects to another host, {target}")
            url = target
        raise FetchError("redirect", f"{url} redirects without end")

    def _body(self, answer: Any, start: int, stop: int) -> bytes:
        status = answer.status_code
        if status in _RETRIED:
            raise _PassingError(f"http_{status}", f"HTTP status {status}", _seconds(answer.headers.get("Retry-After")))
        if status == 200:
            raise FetchError("no_ranges", f"{answer.url} is served whole, not in ranges")
        if status != 206:
            raise FetchError("not_found" if status == 404 else f"http_{status}", f"{answer.url}: HTTP status {status}")
        given = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if given and int(given[1]) != start:
            raise FetchError("no_ranges", f"{answer.url} gives bytes from {given[1]}, not from {start}")
        pieces, size = [], 0
        for piece in answer.iter_raw():
            pieces.append(piece)
            size += len(piece)
            if size >= stop - start:
                break
        if size < stop - start:
            raise _PassingError("short_read", f"{size:,} of {stop - start:,} bytes came")
        return b"".join(pieces)[: stop - start]


class _PassingError(Exception):
    """A failure that may pass, and how long the server asks to wait."""

    def __init__(self, status: str, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait_s = status, wait_s


def open_files(base: str, connections: int = 4, retries: int = 6, timeout_s: float = 60.0, seed: int = 0) -> Files:
    """The files below a web server's URL, a folder, or another URL."""
    if base.startswith(("http://", "https://")):
        return Server(base, connections, retries, timeout_s, seed)
    return Folder(base)


def fetch_pages(
    pointers: Sequence[Pointer], files: Files, connections: int = 4, limits: Limits | None = None
) -> list[Fetched]:
    """The pages of pointers, in their order.

    Args:
        pointers: in any order
        files: where to read
        connections: ranges that are read at the same time
        limits: of a page
    """
    found: list[Fetched | None] = [None] * len(pointers)
    with ThreadPoolExecutor(connections) as pool:
        runs = list(coalesce(pointers))
        for run, fetched in zip(
            runs, pool.map(lambda run: _fetch_run(pointers, run, files, limits), runs), strict=True
        ):
            for number, one in zip(run, fetched, strict=True):
                found[number] = one
    return [one for one in found if one is not None]


def coalesce(pointers: Sequence[Pointer], gap_bytes: int = GAP_BYTES) -> Iterator[list[int]]:
    """Numbers of the pointers that are read by one request each: of one file, near each other, in order of their offsets."""
    order = sorted(range(len(pointers)), key=lambda n: (pointers[n].file, pointers[n].offset, pointers[n].length))
    for _, numbers in groupby(order, key=lambda n: pointers[n].file):
        run: list[int] = []
        start = stop = 0
        for number in numbers:
            pointer = pointers[number]
            end = pointer.offset + pointer.length
            if run and (pointer.offset - stop >= gap_bytes or max(stop, end) - start > MOST_BYTES):
                yield run
                run = []
            if not run:
                start = stop = pointer.offset
            run.append(number)
            stop = max(stop, end)
        yield run


def _fetch_run(pointers: Sequence[Pointer], run: Sequence[int], files: Files, limits: Limits | None) -> list[Fetched]:
    chosen = [pointers[number] for number in run]
    start, stop = chosen[0].offset, max(p.offset + p.length for p in chosen)
    try:
        data = files.read(chosen[0].file, start, stop)
    except FetchError as error:
        if len(run) == 1:
            return [Fetched(None, error.status, str(error))]
        if error.status in ("not_found", "redirect", "no_ranges"):
            return [Fetched(None, error.status, str(error))] * len(run)
        # one bad pointer shall not cost its neighbours
        return [one for number in run for one in _fetch_run(pointers, [number], files, limits)]
    return [_page(p, data[p.offset - start : p.offset - start + p.length], limits) for p in chosen]


def _page(pointer: Pointer, data: bytes, limits: Limits | None) -> Fetched:
    items = read_member(data, limits, pointer.file, pointer.offset)
    pages = [item for item in items if isinstance(item, Page)]
    if not pages:
        faults = [f"{item.kind}: {item.message}" for item in items if not isinstance(item, Page)]
        return Fetched(None, "damaged", "; ".join(faults) or "the record holds no page")
    page = next((page for page in pages if page.url == pointer.url), pages[0])
    page.warc_record_length = pointer.length
    return Fetched(page, page.status, page.error)


def _seconds(text: str | None) -> float | None:
    """What Retry-After asks for: seconds, or a date."""
    if not text:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
