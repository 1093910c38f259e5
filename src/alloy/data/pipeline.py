"""Stages: what turns rows into rows, part by part, and leaves a folder that says what was done.

A stage is a class with a pydantic table of settings. Two kinds:

Map stages (render, clean, score ...) override `run`: a table of at most `batch_rows` rows in, a table out, in the same order.
Extra columns pass through (`document.set_columns` adds or replaces some). What a worker needs once is loaded in `start`.

Whole-set stages (dedup ...) also override `prepare`, which runs once before all parts, in the main process. It may go over all
parts with `job.map(name, work)`, where `work` (an `executors.Work`) stores what it finds below `job.work / name` and whose
reports come back in the order of the parts, again resumable part by part. Such work reads its rows as the stage does:
`read_part(part, rows, config.only)`. What `prepare` finds out is stored below `job.work`,
too, and read in `run`, which knows its place: part, and row within the part.

A stage that writes no rows (tokenize) overrides `write` and says `writes_rows = False`, one that leaves more than parts overrides `finish`.

    folder/
      part-00000.parquet ...   rows (or .jsonl, .jsonl.gz, .jsonl.zst); a part appears whole or not at all
      _done/part-00000.json    marker, written after its part: key, rows in and out, counts, losses
      _work/                   what `prepare` keeps
      _manifest.json           stage, settings, versions, inputs, totals, status

A rerun skips parts whose marker has the same key (settings and the input's name, size and time); other settings or inputs are
refused. All randomness comes from (seed, id); nothing in rows depends on time, machine or executor.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

import alloy
from alloy.core.logging import get_logger
from alloy.core.recipe import Config
from alloy.core.registry import Registry
from alloy.core.runs import acquire_lock, atomic_write, release_lock
from alloy.data.document import require_columns
from alloy.data.executors import Executor, Report, Tick, Work, map_parts
from alloy.data.filter import Filter
from alloy.data.parts import MOST_LOSSES, Losses, Part, RowWriter, columns_of, find_files, list_parts, read_part
from alloy.errors import AlloyError, DataError, InterruptedRun, RecipeError

MANIFEST = "_manifest.json"

log = get_logger(__name__)

STAGES = Registry("stage")
STAGES.add("seed", "alloy.data.stages.seed:Seed")
STAGES.add("fetch", "alloy.data.stages.fetch:Fetch")
STAGES.add("render", "alloy.data.stages.render:Render")
STAGES.add("clean", "alloy.data.stages.clean:Clean")
STAGES.add("score", "alloy.data.stages.score:Score")
STAGES.add("dedup", "alloy.data.stages.dedup:Dedup")
STAGES.add("decontaminate", "alloy.data.stages.decontaminate:Decontaminate")
STAGES.add("mind", "alloy.data.stages.mind:Mind")
STAGES.add("rephrase", "alloy.data.stages.rephrase:Rephrase")
STAGES.add("remove", "alloy.data.stages.remove:Remove")
STAGES.add("longdoc", "alloy.data.stages.longdoc:Longdoc")
STAGES.add("tokenize", "alloy.data.stages.tokenize:Tokenize")


class StageConfig(Config):
    """What every stage's table has."""

    # settings on which no row depends: a run may go on with others
    FREE: ClassVar[tuple[str, ...]] = ("input",)

    stage: str
    input: Annotated[
        list[str] | str | None,
        Field(description="Files, folders or patterns; default in a chain: what the stage before made."),
    ] = None
    only: Annotated[str | None, Field(description="Take rows that meet a condition: 'band == \"4plus\"'.")] = None
    format: Annotated[
        Literal["parquet", "jsonl", "jsonl.gz", "jsonl.zst"], Field(description="Of the parts written.")
    ] = "parquet"
    part_mib: Annotated[int, Field(ge=1, description="Size of an input part, the unit of work and resuming.")] = 64
    seed: Annotated[int, Field(description="Of whatever is random.")] = 0


ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Place:
    """Where a table stands: its part, and the number of its first row in it."""

    part: int
    row: int


@dataclass(frozen=True)
class Job:
    """One run of a stage over its parts."""

    out: Path
    parts: Sequence[Part]
    executor: Executor
    key: str
    tick: Tick

    @property
    def work(self) -> Path:
        """A folder of the stage's own."""
        return self.out / "_work"

    def map(self, name: str, work: Work) -> list[Report]:
        """Do `work` to every part, unless a marker says that it is done; reports in the order of the parts.

        Args:
            name: folder of the markers below `_work`; part of their identity
            work: what to do
        """
        return [report for report in self._mapped(name, work, self.work / name) if report is not None]

    def _mapped(self, name: str, work: Work, folder: Path) -> list[Report]:
        marked = _Marked(work, folder, f"{self.key}:{name}")
        done = {part.index: report for part in self.parts if (report := marked.report(part)) is not None}
        todo = [part for part in self.parts if part.index not in done]
        for part in self.parts:
            if part.index in done:
                self.tick(done[part.index].get("rows_in", 0), part.bytes)
        for part, report in map_parts(marked, todo, self.executor, self.tick):
            done[part.index] = report
        if self.executor.kind == "array":
            done |= {part.index: report for part in self.parts if (report := marked.report(part)) is not None}
        if len(done) < len(self.parts):
            raise Waiting(f"{len(self.parts) - len(done)} of {len(self.parts)} parts of {name} are other tasks' work")
        return [done[part.index] for part in self.parts]


class Waiting(AlloyError):  # noqa: N818  nothing is wrong
    """Other tasks of a job array have parts to do before this one can go on."""

    exit_code = 0


class Stage(Generic[ConfigT]):
    """Rows to rows. Subclasses set `Config` and what follows, and override `run`."""

    Config: ClassVar[type[StageConfig]]
    # columns without which nothing can be done
    needs: ClassVar[tuple[str, ...]] = ()
    # columns whose values are counted in the manifest
    statuses: ClassVar[tuple[str, ...]] = ()
    # rows of a table given to `run`
    batch_rows: ClassVar[int] = 256
    # whether what it leaves is rows, which a later stage can read
    writes_rows: ClassVar[bool] = True
    # whether WARC and HTML files can be read
    reads_pages: ClassVar[bool] = False

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        # what else is counted in the manifest, such as losses and tokens
        self.counts: Counter[str] = Counter()

    def reads(self) -> list[Path]:
        """Files besides the input on which rows depend; when they change, what was made of them is not taken as done."""
        return []

    def prepare(self, job: Job) -> None:
        """Once, before the parts."""

    def start(self, out: Path) -> None:
        """Once in each worker; `out` is the folder of the stage."""

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The rows of the output for these rows, in order."""
        raise NotImplementedError(f"{type(self).__name__} does not define run")

    def write(self, tables: Iterator[pa.Table], path: Path) -> Report:
        """Store the output of a part.

        Args:
            tables: what `run` gave
            path: the part's file, ending in the format asked for
        """
        with RowWriter(path) as writer:
            for table in tables:
                writer.add(table)
        return {"rows_out": writer.rows}

    def close(self) -> None:
        """Give back what `start` took."""

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """Once, after all parts; what it returns goes into the manifest."""
        return {}


def run_stage(
    config: StageConfig,
    inputs: Sequence[str],
    out: Path,
    executor: Executor | None = None,
    overwrite: bool = False,
    progress: Callable[["Totals"], None] | None = None,
) -> dict[str, Any]:
    """Run one stage over files into a folder, or go on where an earlier run stopped; the manifest is returned.

    Args:
        config: the stage's table; `config.stage` names it
        inputs: files, folders or patterns
        out: folder to write
        executor: who works; default: one process a core
        overwrite: replace what other settings or inputs made there
        progress: hears of rows and bytes done
    """
    stage = new_stage(config)
    if config.only:
        Filter(config.only)
    executor = executor or Executor()
    files = [file for file in find_files(inputs, stage.reads_pages) if out.resolve() not in file.resolve().parents]
    if not files:
        raise DataError(f"input {', '.join(inputs)} is the output folder {out} itself; choose another --out.")
    parts = list_parts(files, config.part_mib << 20)
    for file, part in {part.files[0]: part for part in reversed(parts)}.items():
        require_columns(columns_of(part), stage.needs, config.stage, file)
    identity = [_identity(file) for file in [*files, *stage.reads()]]
    settings = config.model_dump(mode="json", exclude=set(config.FREE))
    key = hashlib.sha256(json.dumps([settings, identity], sort_keys=True).encode()).hexdigest()[:32]
    out.mkdir(parents=True, exist_ok=True)
    with _writer(out, shared=executor.kind == "array"):
        manifest = _begin(out, key, settings, identity, parts, overwrite)
        if manifest["status"] == "done":
            return manifest
        started = time.monotonic()
        totals = Totals(0, sum(part.bytes for part in parts), 0)

        def tick(rows: int, size: int) -> None:
            nonlocal totals
            totals = replace(totals, rows=totals.rows + rows, bytes_done=totals.bytes_done + size)
            if progress:
                progress(totals)

        job = Job(out, parts, executor, key, tick)
        try:
            stage.prepare(replace(job, tick=lambda rows, size: None))
            reports = job._mapped(config.stage, _StageWork(config, out), out / "_done")
            facts = stage.finish(job, reports)
        except Waiting:
            _update(out, status="waiting")
            raise
        except BaseException as error:
            stopped = isinstance(error, InterruptedRun | KeyboardInterrupt)
            _update(out, status="interrupted" if stopped else "failed")
            if isinstance(error, KeyboardInterrupt):
                raise InterruptedRun(f"interrupted; the same command goes on in {out}", 130) from error
            raise
        return _update(out, status="done", wall_s=round(time.monotonic() - started, 3), **_totals(reports), **facts)


@dataclass(frozen=True)
class Totals:
    """Progress of a stage."""

    rows: int
    bytes_all: int
    bytes_done: int


def new_stage(config: StageConfig) -> Stage[Any]:
    """The stage that `config.stage` names."""
    kind = STAGES.get(config.stage)
    assert isinstance(kind, type), f"{config.stage} is not registered with a class"
    assert issubclass(kind, Stage), f"{config.stage} is not registered with a Stage"
    return kind(config)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a stage's folder says of itself; empty where no stage has run."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}); run the stage again with --overwrite.") from error


class _StageWork:
    """A stage, as workers get it."""

    def __init__(self, config: StageConfig, out: Path) -> None:
        self.config, self.out = config, out
        self._stage: Stage[Any] | None = None

    def start(self) -> None:
        self._stage = new_stage(self.config)
        self._stage.start(self.out)

    def close(self) -> None:
        if self._stage is not None:
            self._stage.close()

    def run(self, part: Part, tick: Tick) -> Report:
        stage = self._stage
        assert stage is not None, "workers are started"
        started = time.monotonic()
        losses, counts = Losses(), Counter[str]()
        stage.counts = Counter()
        rows_in = 0

        def outputs() -> Iterator[pa.Table]:
            nonlocal rows_in
            told = 0
            for table in read_part(part, stage.batch_rows, self.config.only, losses):
                result = stage.run(table, Place(part.index, rows_in))
                for name in stage.statuses:
                    for entry in result[name].combine_chunks().value_counts().to_pylist():
                        counts[f"{name}={entry['values']}"] += entry["counts"]
                rows_in += table.num_rows
                # bytes on disk are not known by row; the rest of the part is told at its end
                share = min(part.bytes - told, table.nbytes // 4)
                told += share
                tick(table.num_rows, share)
                yield result
            tick(0, part.bytes - told)

        path = self.out / f"{part.name}.{self.config.format}"
        for leftover in self.out.glob(f".{path.name}.*.tmp"):
            leftover.unlink()
        report = stage.write(outputs(), path)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "file": path.name,
            "input": list(part.files[:1]),
            "rows_in": rows_in,
            **report,
            "counts": dict(sorted((counts + stage.counts).items())),
            "losses": dict(sorted(losses.counts.items())),
            "loss_places": losses.places,
            "wall_s": round(time.monotonic() - started, 3),
            "peak_bytes": peak << 10,
        }


class _Marked:
    """Work that leaves a marker behind each part."""

    def __init__(self, work: Work, folder: Path, key: str) -> None:
        self.work, self.folder, self.key = work, folder, key

    def start(self) -> None:
        self.work.start()

    def close(self) -> None:
        self.work.close()

    def run(self, part: Part, tick: Tick) -> Report:
        report = self.work.run(part, tick)
        marker = {"key": self._key(part), "report": report}
        atomic_write(self._path(part), json.dumps(marker) + "\n")
        return report

    def report(self, part: Part) -> Report | None:
        """What the marker of a part says; None without one, or if it is of other settings."""
        try:
            marker = json.loads(self._path(part).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return marker["report"] if marker.get("key") == self._key(part) else None

    def _key(self, part: Part) -> str:
        text = f"{self.key}\0{part.files}\0{part.start}\0{part.stop}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def _path(self, part: Part) -> Path:
        return self.folder / f"{part.name}.json"


def _identity(file: Path) -> list[Any]:
    facts = file.stat()
    return [str(file), facts.st_size, facts.st_mtime_ns]


@contextlib.contextmanager
def _writer(out: Path, shared: bool) -> Iterator[None]:
    """Keep other processes out, but for the tasks of a job array, which have parts of their own."""
    if shared:
        yield
        return
    acquire_lock(out)
    try:
        yield
    finally:
        release_lock(out)


def _begin(
    out: Path, key: str, settings: dict[str, Any], identity: list[Any], parts: Sequence[Part], overwrite: bool
) -> dict[str, Any]:
    """The manifest of a run that begins or goes on; refuses a folder of another run."""
    before = read_manifest(out)
    if before and before.get("key") != key:
        if not overwrite:
            raise RecipeError(f"{out}: {_difference(before, settings)}; choose another --out, or --overwrite it.")
        _clear(out)
        before = {}
    strangers = [f.name for f in out.iterdir() if not before and f.name.startswith("part-")]
    if strangers:
        raise RecipeError(f"{out} holds {strangers[0]}, which no stage's manifest knows; choose another --out.")
    if before.get("status") == "done":
        return before
    facts: dict[str, Any] = {
        "version": 1,
        "stage": settings["stage"],
        "alloy": alloy.__version__,
        "key": key,
        "settings": settings,
        "inputs": [{"file": file, "bytes": size, "mtime_ns": mtime} for file, size, mtime in identity],
        "num_parts": len(parts),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    facts = {**facts, **before, "status": "running", "pid": os.getpid()}
    atomic_write(out / MANIFEST, json.dumps(facts, indent=2) + "\n")
    return facts


def _difference(before: dict[str, Any], settings: dict[str, Any]) -> str:
    """What distinguishes the run that is there from the one that is wanted."""
    if before.get("stage") != settings["stage"]:
        return f"the stage {before.get('stage')} wrote here"
    there = before.get("settings", {})
    for name in {**there, **settings}:
        if there.get(name) != settings.get(name):
            return f"it was made with {name} = {there.get(name)}, not {settings.get(name)}"
    return "it was made from other inputs, or they have changed since"


def _clear(out: Path) -> None:
    """Remove what a stage left, and nothing else; the manifest goes last, so that this can be repeated."""
    for folder in ("_done", "_work"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in sorted([*out.glob("part-*"), *out.glob(".part-*.tmp")]):
        file.unlink()
    (out / MANIFEST).unlink(missing_ok=True)


def _update(out: Path, **facts: Any) -> dict[str, Any]:
    manifest = {**read_manifest(out), **facts}
    atomic_write(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _totals(reports: Sequence[Report]) -> dict[str, Any]:
    counts, losses = Counter[str](), Counter[str]()
    for report in reports:
        counts.update(report.get("counts", {}))
        losses.update(report.get("losses", {}))
    places = [place for report in reports for place in report.get("loss_places", [])]
    return {
        "rows_in": sum(report["rows_in"] for report in reports),
        "rows_out": sum(report.get("rows_out", 0) for report in reports),
        "counts": dict(sorted(counts.items())),
        "losses": dict(sorted(losses.items())),
        "loss_places": places[:MOST_LOSSES],
        "peak_bytes": max((report.get("peak_bytes", 0) for report in reports), default=0),
        "work_s": round(sum(report.get("wall_s", 0.0) for report in reports), 3),
        "parts": [{key: report.get(key) for key in ("file", "rows_in", "rows_out")} for report in reports],
    }
