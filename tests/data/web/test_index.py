"""URLs looked up in a columnar index: against a plain loop over its rows."""

import datetime as dt
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alloy.data.dedup import canonical_url
from alloy.data.executors import Executor
from alloy.data.parts import Part, read_part
from alloy.data.pipeline import run_stage
from alloy.data.stages.seed import SeedConfig
from alloy.data.web.index import host_key, look_up, url_keys
from alloy.errors import DataError, RecipeError

SERIAL = Executor(kind="serial")


def surt(url: str) -> str:
    host, _, path = url.split("//")[1].removeprefix("www.").partition("/")
    return ",".join(reversed(host.split("."))) + ")/" + path


def write_index(folder: Path, urls: list[str], seed: int) -> list[dict]:
    """An index of two snapshots with several copies of each URL, sorted and in small row groups as the real one is."""
    r = random.Random(seed)
    rows = []
    for crawl in ("CC-MAIN-2023-50", "CC-MAIN-2024-10"):
        own = []
        for url in urls:
            for _ in range(r.choice([0, 1, 1, 2])):
                year = int(crawl[8:12])
                own.append(
                    {
                        "url_surtkey": surt(url),
                        "url": url,
                        "fetch_time": dt.datetime(year, r.randint(1, 12), r.randint(1, 28), r.randint(0, 23)),
                        "fetch_status": r.choice([200, 200, 200, 404]),
                        "content_mime_type": "text/html",
                        "warc_filename": f"crawl-data/{crawl}/{r.randint(0, 3)}.warc.gz",
                        "warc_record_offset": r.randrange(10**9),
                        "warc_record_length": r.randint(300, 9000),
                    }
                )
        own.sort(key=lambda row: row["url_surtkey"])
        path = folder / f"crawl={crawl}" / "subset=warc" / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(own), path, row_group_size=7)
        rows += [{**row, "crawl": crawl} for row in own]
    return rows


URLS = [
    f"https://{h}.example/{p}"
    for h in ("a", "www.b", "c.d", "zz")
    for p in ("", "x", "X?b=2&a=1", "y/z", "q?utm_source=t")
]


def test_the_newest_copy_is_found(tmp_path: Path) -> None:
    """Of every URL asked for, also where it is written in another way, and of no other."""
    rows = write_index(tmp_path / "cc", URLS, 1)
    asked = [url.replace("https", "http") for url in URLS[::2]] + ["https://none.example/"]
    keys = sorted(set(url_keys(asked).tolist()))
    found = look_up(pa.array(keys, pa.uint64()).to_numpy(), sorted(map(host_key, asked)), [str(tmp_path / "cc")])
    newest: dict[str, dict] = {}
    for row in rows:
        name = canonical_url(row["url"])
        old = newest.get(name)
        if row["fetch_status"] == 200 and (old is None or row["fetch_time"] > old["fetch_time"]):
            newest[name] = row
    truth = {int(url_keys([url])[0]): newest[canonical_url(url)] for url in asked if canonical_url(url) in newest}
    assert len(truth) > 5
    assert [row["key"] for row in found.to_pylist()] == sorted(truth)
    for row in found.to_pylist():
        true = truth[row["key"]]
        assert row["fetch_time"] == true["fetch_time"].strftime("%Y-%m-%dT%H:%M:%SZ")
        for name in ("crawl", "warc_filename", "warc_record_offset", "warc_record_length", "content_mime_type"):
            assert row[name] == true[name]


@pytest.mark.parametrize(
    "host", ["https://a.example/", "https://www.b.example/", "https://c.d.example/", "https://zz.example/"]
)
def test_row_groups_of_other_hosts_are_not_read(host: str, tmp_path: Path) -> None:
    """With the row groups that hold no page of the host made unreadable, its pages are found all the same."""
    write_index(tmp_path / "cc", URLS, 2)
    keys = pa.array(
        sorted({*url_keys([u for u in URLS if host_key(u) == host_key(host)]).tolist()}), pa.uint64()
    ).to_numpy()
    whole = look_up(keys, sorted(set(map(host_key, URLS))), [str(tmp_path / "cc")])
    assert len(whole) > 0
    broken = 0
    for path in (tmp_path / "cc").rglob("*.parquet"):
        with pq.ParquetFile(path) as file:
            facts, data = file.metadata, bytearray(path.read_bytes())
            for n in range(facts.num_row_groups):
                group = facts.row_group(n)
                if not any(u.startswith(host_key(host)) for u in file.read_row_group(n)["url_surtkey"].to_pylist()):
                    columns = [group.column(i) for i in range(group.num_columns)]
                    for column in columns:
                        start, size = (
                            column.dictionary_page_offset or column.data_page_offset,
                            column.total_compressed_size,
                        )
                        data[start : start + size] = b"\xff" * size
                    broken += 1
        path.write_bytes(data)
    assert broken >= 2
    assert look_up(keys, [host_key(host)], [str(tmp_path / "cc")]).equals(whole)
    with pytest.raises(DataError, match="cannot be read"):
        look_up(keys, sorted(set(map(host_key, URLS))), [str(tmp_path / "cc")])


@pytest.mark.parametrize("key", ["192.0.2.7)/x", "7,2,0,192)/x"])
def test_addresses_are_found_either_way(key: str, tmp_path: Path) -> None:
    """The index may keep an IP address as it is, or reverse it."""
    url = "http://192.0.2.7/x"
    row = {"url_surtkey": key, "url": url, "warc_filename": "f", "warc_record_offset": 1, "warc_record_length": 2}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    found = look_up(url_keys([url]), [host_key(url)], [str(tmp_path / "x.parquet")])
    assert found["warc_filename"].to_pylist() == ["f"]


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://www.Example.co.uk/a", "uk,co,example)"),
        ("http://example.com:80/", "com,example)"),
        ("https://example.com:443/", "com,example)"),
        ("http://example.com:443/", "com,example:443)"),
        ("http://example.com:8080/", "com,example:8080)"),
        ("http://192.168.1.254/info/", "254,1,168,192)"),
        ("no url", ""),
        ("http://[bad/", ""),
    ],
)
def test_host_keys(url: str, key: str) -> None:
    """As the keys of the index begin, by cases of the surt package's own tests."""
    assert host_key(url) == key


def seed_rows(tmp_path: Path, rows: list[dict], index: tuple[str, ...]) -> tuple[dict, list[dict]]:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=4)
    config = SeedConfig(index=index, part_mib=1)
    manifest = run_stage(config, [str(tmp_path / "in.parquet")], tmp_path / "out", SERIAL)
    (table,) = read_part(Part(0, (str(tmp_path / "out" / "part-00000.parquet"),)), 1000)
    return manifest, table.to_pylist()


def test_stage_of_urls(tmp_path: Path) -> None:
    """One row a page in the order of the input; what is not found stays, is counted and says so."""
    write_index(tmp_path / "cc", URLS, 3)
    urls = [*URLS[:6], URLS[2].replace("https", "http"), "https://none.example/", URLS[0]]
    manifest, rows = seed_rows(tmp_path, [{"url": url, "n": n} for n, url in enumerate(urls)], (str(tmp_path / "cc"),))
    assert [row["n"] for row in rows] == [0, 1, 2, 3, 4, 5, 7]
    facts = manifest["seed"]
    assert (facts["pages"], facts["copies"], facts["asked"]) == (7, 2, 7)
    assert facts["found"] == sum(row["warc_filename"] is not None for row in rows) >= 3
    for row in rows:
        assert row["fetch_status"] == ("not_in_index" if row["warc_filename"] is None else "pending")
        assert (row["crawl"] is None) == (row["warc_filename"] is None)
    assert rows[-1]["fetch_status"] == "not_in_index"


def test_stage_of_rows_with_pointers(tmp_path: Path) -> None:
    """Rows that know their place need no index; the newest copy of a page stays."""
    base = {"warc_record_offset": 5, "warc_record_length": 6, "score": 1.5}
    rows = [
        {**base, "url": "https://a.example/x", "warc_filename": "old", "fetch_time": "2019-01-01T00:00:00Z"},
        {**base, "url": "https://b.example/", "warc_filename": "only", "fetch_time": None},
        {**base, "url": "http://www.a.example/x#y", "warc_filename": "new", "fetch_time": "2024-01-01T00:00:00Z"},
    ]
    manifest, found = seed_rows(tmp_path, rows, ())
    assert [(row["warc_filename"], row["fetch_status"], row["score"]) for row in found] == [
        ("only", "pending", 1.5),
        ("new", "pending", 1.5),
    ]
    assert manifest["seed"] == {"pages": 2, "copies": 1, "asked": 0, "found": 0}


def test_rows_left_out(tmp_path: Path) -> None:
    """A condition leaves out rows before the newest copy is chosen."""
    base = {"warc_record_offset": 5, "warc_record_length": 6}
    rows = [
        {**base, "url": "https://a.example/x", "warc_filename": f, "fetch_time": t, "n": n}
        for n, (f, t) in enumerate([("b", "2020"), ("c", "2024"), ("a", "2019")])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    run_stage(SeedConfig(only="n != 1"), [str(tmp_path / "in.parquet")], tmp_path / "out", SERIAL)
    (table,) = read_part(Part(0, (str(tmp_path / "out" / "part-00000.parquet"),)), 1000)
    assert table["warc_filename"].to_pylist() == ["b"]


def test_refusals(tmp_path: Path) -> None:
    """URLs without an index, and an index that is none, are named."""
    with pytest.raises(RecipeError, match=r"no column warc_filename.*give --index"):
        seed_rows(tmp_path, [{"url": "https://a.example/"}], ())
    with pytest.raises(DataError, match=r"no \.parquet file"):
        look_up(url_keys(["x"]), [], [str(tmp_path / "out")])
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"no column warc_filename; it has url"):
        look_up(url_keys(["x"]), [], [str(tmp_path / "bad.parquet")])
