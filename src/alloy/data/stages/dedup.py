"""`alloy data dedup`: marks copies of documents, exact and near, with `dup_group` and `dup_keep`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from alloy.core.logging import get_logger
from alloy.core.runs import atomic_path, atomic_write
from alloy.data.dedup import SIGN_ROWS, Entry, Index, Numbers, Signing, group
from alloy.data.document import require_columns, set_columns, text_column
from alloy.data.executors import Report, Tick
from alloy.data.minhash import PRESETS, MinHash, collision_probability
from alloy.data.parts import Part, columns_of, read_part
from alloy.data.pipeline import Job, Place, Stage, StageConfig
from alloy.errors import DataError

# Jaccard indexes at which the curve is told
CURVE = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

log = get_logger(__name__)


class DedupConfig(StageConfig):
    """Which documents are copies, and which copy is kept."""

    stage: Literal["dedup"] = "dedup"
    column: Annotated[str | None, Field(description="Text; default: cleaned_text where it is there, else text.")] = None
    preset: Annotated[
        Literal["ncm", "fineweb", "megamath", "owm"], Field(description="Of unit, n, bands and rows.")
    ] = "ncm"
    unit: Annotated[Literal["char", "word"] | None, Field(description="Of which shingles are made.")] = None
    n: Annotated[int | None, Field(ge=1, description="Units of a shingle.")] = None
    bands: Annotated[int | None, Field(ge=1, description="Bands of a signature.")] = None
    rows: Annotated[int | None, Field(ge=1, description="Values of a band.")] = None
    seed: Annotated[int, Field(ge=0, description="Of the hashes.")] = 42
    fuzzy: Annotated[bool, Field(description="Near copies too, not exact ones alone.")] = True
    by_url: Annotated[bool, Field(description="Of copies of one page, the newest alone.")] = True
    verify: Annotated[
        float | None, Field(gt=0, le=1, description="Least true Jaccard index of a copy and what is kept for it.")
    ] = None
    score: Annotated[str, Field(description="Column of the quality, where it is there.")] = "finemath_score"
    source: Annotated[str, Field(description="Column of the source.")] = "source"
    priority: Annotated[tuple[str, ...], Field(description="Sources whose copies are kept first, best first.")] = ()
    index: Annotated[Path | None, Field(description="Folder of signed parts to extend; default: a new one.")] = None
    drop: Annotated[bool, Field(description="Leave copies out, instead of marking them.")] = False
    memory_mib: Annotated[int, Field(ge=16, description="For sorting.")] = 1024

    @model_validator(mode="after")
    def check(self) -> Self:
        """Verification needs bands."""
        if self.verify is not None and not self.fuzzy:
            raise ValueError("verify is for near copies; leave it out, or set fuzzy = true")
        return self

    @property
    def minhash(self) -> MinHash:
        """The preset with what is set besides."""
        own = {name: getattr(self, name) for name in ("unit", "n", "bands", "rows")}
        own = {name: value for name, value in own.items() if value is not None}
        return PRESETS[self.preset].model_copy(update={**own, "seed": self.seed})


class Dedup(Stage[DedupConfig]):
    """Signs all parts, groups their documents, then writes them."""

    Config = DedupConfig
    batch_rows = 1024
    statuses = ("dup_keep",)

    def prepare(self, job: Job) -> None:
        """Sign and group, once; what was found stays the same when a run goes on."""
        folder = job.work / "groups"
        done = folder / "done.json"
        if done.exists() and json.loads(done.read_text())["key"] == job.key:
            return
        signing = self._signing(job.parts)
        if self.config.fuzzy:
            curve = ", ".join(f"{similarity}: {probability:.2g}" for similarity, probability in self._curve())
            log.info("dedup: how likely two texts are to meet, by Jaccard index: %s", curve)
        index = Index(self.config.index or job.work / "index", signing)
        index.forget_changed(part.files[0] for part in job.parts)
        job.map("sign", _Sign(index.folder, signing))
        entries, kept = group(index, self.config.priority, self.config.verify, self.config.memory_mib << 20)
        sizes = np.bincount(kept, minlength=len(kept))
        names = _ids(entries, np.flatnonzero(sizes > 1))
        starts = dict(zip((entry.stem for entry in entries), np.cumsum([0, *(e.rows for e in entries)]), strict=False))
        for part in job.parts:
            entry = index.entry(part)
            if entry is None:
                raise DataError(
                    f"{part.files[0]}: the index {index.folder} does not have it as it is now; it changed while it was read, "
                    "or the index was emptied. Run again with --overwrite."
                )
            first = int(starts[entry.stem])
            own = kept[first : first + entry.rows]
            groups = [names.get(int(number)) for number in own]
            table = pa.table(
                {
                    "dup_group": pa.array(groups, pa.string()),
                    "dup_keep": pa.array(own == np.arange(first, first + entry.rows)),
                }
            )
            with atomic_path(folder / f"{part.name}.parquet") as temporary:
                pq.write_table(table, temporary, compression="zstd")
        facts = {"indexed": len(kept), "copies": int((kept != np.arange(len(kept))).sum()), "groups": len(names)}
        atomic_write(done, json.dumps({"key": job.key, "facts": facts}) + "\n")

    def start(self, out: Path) -> None:
        """Know where the groups are."""
        self._groups, self._part, self._found = out / "_work" / "groups", -1, pa.table({})

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The rows with the number of their group."""
        if place.part != self._part:
            self._part, self._found = place.part, pq.read_table(self._groups / f"part-{place.part:05d}.parquet")
        found = self._found.slice(place.row, table.num_rows)
        table = set_columns(table, dup_group=found["dup_group"], dup_keep=found["dup_keep"])
        return table.filter(table["dup_keep"]) if self.config.drop else table

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """Counts, and how likely the bands were to meet."""
        facts = json.loads((job.work / "groups" / "done.json").read_text())["facts"]
        return {"dedup": {**facts, "curve": self._curve() if self.config.fuzzy else []}}

    def _curve(self) -> list[tuple[float, float]]:
        minhash = self.config.minhash
        return [(s, round(collision_probability(s, minhash.bands, minhash.rows), 4)) for s in CURVE]

    def _signing(self, parts: Sequence[Part]) -> Signing:
        config = self.config
        columns = columns_of(parts[0])
        column = config.column or text_column(columns)
        wanted = [column, *([config.source] if config.priority else [])]
        for part in parts:
            require_columns(columns_of(part), wanted, config.stage, part.files[0])
        return Signing(
            column=column,
            minhash=config.minhash if config.fuzzy else None,
            by_url=config.by_url,
            score=config.score,
            source=config.source,
            only=config.only,
        )


class _Sign:
    """Signs a part, unless the index has it."""

    def __init__(self, folder: Path, signing: Signing) -> None:
        self.folder, self.signing = folder, signing

    def start(self) -> None:
        self.index = Index(self.folder, self.signing)

    def run(self, part: Part, tick: Tick) -> Report:
        entry = self.index.sign(part, read_part(part, SIGN_ROWS, self.signing.only))
        tick(entry.rows, part.bytes)
        return {"rows_in": entry.rows}

    def close(self) -> None:
        pass


def _ids(entries: Sequence[Entry], documents: Numbers) -> dict[int, str]:
    """The ids of some documents, by their number."""
    names: dict[int, str] = {}
    start = 0
    for entry in entries:
        rows = documents[(documents >= start) & (documents < start + entry.rows)]
        ids = entry.facts(["id"])["id"].take(pa.array(rows - start)).to_pylist()
        names |= zip(rows.tolist(), ids, strict=True)
        start += entry.rows
    return names
