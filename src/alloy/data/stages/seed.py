"""`alloy data seed`: URLs -> pointers into the archives of Common Crawl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from alloy.core.runs import atomic_path, atomic_write
from alloy.data.document import COLUMNS, set_columns
from alloy.data.executors import Report, Tick
from alloy.data.parts import Part, columns_of, read_part
from alloy.data.pipeline import Job, Place, Stage, StageConfig
from alloy.data.web.index import FOUND, host_key, look_up, url_keys
from alloy.errors import RecipeError


class SeedConfig(StageConfig):
    """Where URLs are looked up."""

    stage: Literal["seed"] = "seed"
    index: Annotated[
        tuple[str, ...], Field(description="Parquet files or folders of Common Crawl's columnar index, or their URLs.")
    ] = ()


class Seed(Stage[SeedConfig]):
    """One row a page, with its newest copy in the archives; rows that point at one keep it, the others are looked up."""

    Config = SeedConfig
    needs = ("url",)
    statuses = ("fetch_status",)
    batch_rows = 4096

    def prepare(self, job: Job) -> None:
        """Number the pages of all parts, choose the row of each, and look up those without a pointer."""
        done = job.work / "done.json"
        if done.exists() and json.loads(done.read_text())["key"] == job.key:
            return
        asks = [part for part in job.parts if "warc_filename" not in columns_of(part)]
        if asks and not self.config.index:
            raise RecipeError(
                f"{asks[0].files[0]} has no column warc_filename, so that its URLs must be looked up: give --index, "
                "a folder or URL of Common Crawl's columnar index."
            )
        job.map("keys", _Keys(job.work / "rows", self.config.only))
        tables = [pq.read_table(job.work / "rows" / f"{part.name}.parquet") for part in job.parts]
        keys = np.concatenate([table["key"].to_numpy() for table in tables])
        times = np.concatenate([table["time"].to_numpy() for table in tables])
        # of the rows of a page the newest, then the first
        order = np.lexsort((np.arange(len(keys)), -times, keys))
        first = np.ones(len(keys), bool)
        first[1:] = keys[order][1:] != keys[order][:-1]
        chosen = np.zeros(len(keys), bool)
        chosen[order[first]] = True
        start = 0
        for part, table in zip(job.parts, tables, strict=True):
            with atomic_path(job.work / "chosen" / f"{part.name}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, chosen[start : start + table.num_rows])
            start += table.num_rows
        hosts = sorted({host for table in tables for host in table["host"].unique().to_pylist() if host})
        asked = np.unique(keys[chosen & (times < 0)])
        found = look_up(asked, hosts, self.config.index)
        with atomic_path(job.work / "found.parquet") as temporary:
            pq.write_table(found, temporary, compression="zstd")
        facts = {"pages": int(chosen.sum()), "copies": int((~chosen).sum()), "asked": len(asked), "found": len(found)}
        atomic_write(done, json.dumps({"key": job.key, "facts": facts}) + "\n")

    def start(self, out: Path) -> None:
        """Read what was found."""
        self.work, self.part = out / "_work", -1
        self.found = pq.read_table(self.work / "found.parquet")
        self.keys = self.found["key"].to_numpy()

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The chosen rows, with pointers."""
        if place.part != self.part:
            self.part, self.chosen = place.part, np.load(self.work / "chosen" / f"part-{place.part:05d}.npy")
        table = table.filter(pa.array(self.chosen[place.row : place.row + table.num_rows]))
        own = url_keys(table["url"].to_pylist())
        at = np.searchsorted(self.keys, own)
        hit = np.zeros(len(own), bool)
        inside = at < len(self.keys)
        hit[inside] = self.keys[at[inside]] == own[inside]
        rows = self.found.take(pa.array(np.where(hit, at, 0), mask=~hit))
        has = _column(table, "warc_filename")
        columns = {
            name: [
                new if file is None else old for file, old, new in zip(has, _column(table, name), given, strict=True)
            ]
            for name, given in ((name, rows[name].to_pylist()) for name in FOUND)
        }
        status = ["pending" if file is not None else "not_in_index" for file in columns["warc_filename"]]
        return set_columns(table, **columns, fetch_status=status)

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """How many pages were asked for and found."""
        return {"seed": json.loads((job.work / "done.json").read_text())["facts"]}


class _Keys:
    """Stores the key, host and time of each row of a part; time -1: no pointer."""

    def __init__(self, folder: Path, only: str | None) -> None:
        self.folder, self.only = folder, only

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def run(self, part: Part, tick: Tick) -> Report:
        keys, hosts, times = [np.empty(0, np.uint64)], [], []
        for table in read_part(part, 4096, self.only):
            urls = table["url"].to_pylist()
            keys.append(url_keys(urls))
            hosts += [host_key(url or "") for url in urls]
            rows = zip(_column(table, "warc_filename"), _column(table, "fetch_time"), strict=True)
            times += [-1 if file is None else _number(time) for file, time in rows]
        whole = pa.table(
            {
                "key": pa.array(np.concatenate(keys)),
                "host": pa.array(hosts, pa.string()).dictionary_encode(),
                "time": pa.array(times, pa.int64()),
            }
        )
        with atomic_path(self.folder / f"{part.name}.parquet") as temporary:
            pq.write_table(whole, temporary, compression="zstd")
        tick(whole.num_rows, part.bytes)
        return {"rows_in": whole.num_rows}


def _column(table: pa.Table, name: str) -> list[Any]:
    if name not in table.column_names:
        return [None] * table.num_rows
    return table[name].cast(COLUMNS[name][0]).to_pylist()


def _number(time: str | None) -> int:
    """The digits of a time, which sort as the times do; 0 for none."""
    digits = "".join(c for c in time or "" if c.isdigit())[:14]
    return int(digits.ljust(14, "0")) if digits else 0
