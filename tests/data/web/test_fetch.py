"""Pages by pointer: from folders and from a real server that serves ranges, fails, cuts short and redirects."""

import email.utils
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from alloy.data.executors import Executor
from alloy.data.parts import Part, read_part
from alloy.data.pipeline import run_stage
from alloy.data.stages.fetch import FetchConfig
from alloy.data.web.fetch import GAP_BYTES, Fetched, Folder, Pointer, Server, coalesce, fetch_pages
from alloy.data.web.warc import Page, read_warc
from tests.data.web.archives import member

NAMES = ("crawl-data/CC-MAIN-2024-10/a.warc.gz", "crawl-data/CC-MAIN-2024-10/b.warc.gz")


class Site(ThreadingHTTPServer):
    """A server of one folder. `plan` gives, for each request in order, what is done in place of an honest answer."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.plan, self.log, self.lock = root, [], [], threading.Lock()
        self.base = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.server
        assert isinstance(site, Site)
        with site.lock:
            site.log.append((self.path, self.headers["Range"]))
            act = site.plan.pop(0) if site.plan else "serve"
        if isinstance(act, tuple):
            status, headers = act
            self.answer(status, b"", headers)
            return
        file = site.root / self.path.lstrip("/")
        if not file.is_file():
            self.answer(404, b"gone", {})
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found
        start, stop = int(found[1]), int(found[2]) + 1
        data = file.read_bytes()
        if act == "whole":
            self.answer(200, data, {})
        elif start >= len(data):
            self.answer(416, b"", {})
        else:
            body = data[start:stop]
            self.answer(
                206, body, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}"}, act == "short"
            )

    def answer(self, status: int, body: bytes, headers: dict[str, str], short: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if short else body)
        if short:
            self.close_connection = True


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, list[Page]]:
    """Two archives, and their pages as reading them whole gives them."""
    found = {}
    for n, name in enumerate(NAMES):
        file = tmp_path / "cc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"".join(member(b"<p>%d" % i * 50, f"https://h{n}.example/{i}") for i in range(9)))
        found[name] = [page for page in read_warc(file, name=name) if isinstance(page, Page)]
    return found


@pytest.fixture
def site(tmp_path: Path, archives: dict[str, list[Page]]) -> Iterator[Site]:
    server = Site(tmp_path / "cc")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pointer(page: Page) -> Pointer:
    return Pointer(page.url, page.warc_filename, page.warc_record_offset, page.warc_record_length)


def pages_of(fetched: list[Fetched]) -> list[Page | None]:
    return [one.page for one in fetched]


def test_pages_equal_those_of_the_whole_files(archives: dict[str, list[Page]], site: Site, tmp_path: Path) -> None:
    """In any order and from folder or server, pages are the same in every field; each file is asked once."""
    wanted = [page for pages in archives.values() for page in pages]
    random.Random(3).shuffle(wanted)
    server = Server(site.base)
    for files in (Folder(str(tmp_path / "cc")), server):
        fetched = fetch_pages([pointer(page) for page in wanted], files)
        assert pages_of(fetched) == wanted
        assert {one.status for one in fetched} == {"ok"}
    server.close()
    assert sorted(path for path, _ in site.log) == [f"/{name}" for name in NAMES]


def test_ranges_are_joined_where_they_are_close() -> None:
    """Against brute force: a request ends before the first gap of 1 MiB, of one file and below its largest size."""
    r = random.Random(1)
    for _ in range(50):
        pointers = [
            Pointer("", r.choice("ab"), r.randrange(30 << 20), r.randint(1, 200_000)) for _ in range(r.randint(1, 60))
        ]
        runs = list(coalesce(pointers))
        assert sorted(number for run in runs for number in run) == list(range(len(pointers)))
        covered = []
        for run in runs:
            chosen = [pointers[number] for number in run]
            assert len({p.file for p in chosen}) == 1
            start, stop = chosen[0].offset, chosen[0].offset
            for p in chosen:
                assert p.offset - stop < GAP_BYTES
                stop = max(stop, p.offset + p.length)
            covered.append((chosen[0].file, start, stop))
        for (file, _, stop), (other, start, _) in zip(sorted(covered), sorted(covered)[1:], strict=False):
            assert file != other or start - stop >= GAP_BYTES


def fetch_one(site: Site, page: Page, plan: list, retries: int = 3) -> tuple[Fetched, list[float]]:
    waits: list[float] = []
    server = Server(site.base, retries=retries, sleep=waits.append)
    site.plan, site.log = list(plan), []
    fetched = fetch_pages([pointer(page)], server)
    server.close()
    return fetched[0], waits


def test_passing_failures_are_tried_again(archives: dict[str, list[Page]], site: Site) -> None:
    """503, 429 and answers cut short are repeated, after the seconds or the date that the server names, else after growing waits."""
    page = archives[NAMES[0]][4]
    soon = email.utils.formatdate(time.time() + 40, usegmt=True)
    plan = [(503, {}), (429, {"Retry-After": "7"}), (503, {"Retry-After": soon}), "short", "serve"]
    fetched, waits = fetch_one(site, page, plan, retries=4)
    assert fetched == Fetched(page, "ok")
    assert len(site.log) == 5
    assert 0.5 <= waits[0] <= 1
    assert waits[1] == 7
    assert 30 <= waits[2] <= 40
    assert 4 <= waits[3] <= 8
    fetched, waits = fetch_one(site, page, [(503, {"Retry-After": "1e9"}), (503, {"Retry-After": "999999"})], retries=2)
    assert fetched.status == "ok"
    assert waits[0] <= 1
    assert waits[1] == 120


@pytest.mark.parametrize(
    ("plan", "status", "requests"),
    [
        ([(503, {})] * 9, "http_503", 4),
        (["short"] * 9, "unreachable", 4),
        ([(403, {})], "http_403", 1),
        ([(404, {})], "not_found", 1),
        ([(206, {"Content-Range": "bytes 0-9/10"})], "no_ranges", 1),
        (["whole"], "no_ranges", 1),
        ([(302, {"Location": "http://elsewhere.example/x"})], "redirect", 1),
        ([(302, {"Location": "https://127.0.0.1/x"})], "redirect", 1),
        ([(302, {"Location": "/" + NAMES[0]})] * 9, "redirect", 5),
        ([(206, {})] * 9, "short_read", 4),
    ],
)
def test_failures_have_a_status(
    plan: list, status: str, requests: int, archives: dict[str, list[Page]], site: Site
) -> None:
    """What does not pass is not tried again; other hosts are never asked."""
    fetched, _ = fetch_one(site, archives[NAMES[0]][4], plan)
    assert (fetched.page, fetched.status) == (None, status)
    assert fetched.error
    assert len(site.log) == requests


def test_redirect_on_the_host_is_followed(archives: dict[str, list[Page]], site: Site) -> None:
    """A file that moved within its server is read there."""
    page = archives[NAMES[1]][2]
    fetched, _ = fetch_one(site, page, [(301, {"Location": "/" + NAMES[1]})])
    assert fetched == Fetched(page, "ok")


def test_one_bad_pointer_costs_itself_alone(archives: dict[str, list[Page]], site: Site, tmp_path: Path) -> None:
    """Beyond the end of the file, amid a record, empty, or of a file that is not there."""
    good = archives[NAMES[0]]
    bad = {
        Pointer("u", NAMES[0], 10**6, 50): ("http_416", "short_read"),
        Pointer("u", NAMES[0], good[3].warc_record_offset + 5, 60): ("damaged", "damaged"),
        Pointer("u", NAMES[0], good[8].warc_record_offset, good[8].warc_record_length + 9): (
            "short_read",
            "short_read",
        ),
        Pointer("u", NAMES[0], good[3].warc_record_offset, good[3].warc_record_length - 30): ("damaged", "damaged"),
        Pointer("u", "none.warc.gz", 0, 50): ("not_found", "not_found"),
    }
    pointers = [pointer(page) for page in good] + list(bad)
    server = Server(site.base, retries=1, sleep=lambda _: None)
    for number, files in enumerate((server, Folder(str(tmp_path / "cc")))):
        fetched = fetch_pages(pointers, files)
        assert pages_of(fetched[: len(good)]) == good
        assert [one.status for one in fetched[len(good) :]] == [statuses[number] for statuses in bad.values()]
    server.close()


def test_unreachable_server() -> None:
    """A server that is not there is a status."""
    server = Server("http://127.0.0.1:9/", retries=1, sleep=lambda _: None)
    (fetched,) = fetch_pages([Pointer("u", "a", 0, 5)], server)
    server.close()
    assert (fetched.page, fetched.status) == (None, "unreachable")


def test_stage(archives: dict[str, list[Page]], tmp_path: Path) -> None:
    """Rows keep their order and columns, and get pages with the ids of the archives; rows without a pointer say so."""
    import json

    pages = [*reversed(archives[NAMES[0]]), *archives[NAMES[1]]]
    names = ("url", "warc_filename", "warc_record_offset", "warc_record_length")
    rows = [{**{name: getattr(page, name) for name in names}, "topic": n} for n, page in enumerate(pages)]
    rows.append({**dict.fromkeys(names), "url": "https://nowhere.example/", "topic": 99})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FetchConfig(base=str(tmp_path / "cc"))
    manifest = run_stage(config, [str(tmp_path / "in.jsonl")], tmp_path / "out", Executor(kind="serial"))
    assert manifest["counts"] == {"fetch_status=not_in_index": 1, "fetch_status=ok": len(pages)}
    (table,) = read_part(Part(0, (str(tmp_path / "out" / "part-00000.parquet"),)), 1000)
    found = table.to_pylist()
    assert [row["topic"] for row in found] == [*range(len(pages)), 99]
    for row, page in zip(found, pages, strict=False):
        assert (row["id"], row["binary_content"], row["fetch_status"]) == (page.id, page.body, "ok")
        assert (row["http_status"], row["content_type"], row["crawl"]) == (200, "text/html", "CC-MAIN-2024-10")
    assert (found[-1]["binary_content"], found[-1]["fetch_status"]) == (None, "not_in_index")
