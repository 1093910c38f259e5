"""`alloy data decontaminate`: marks or removes documents that hold test items of benchmarks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from alloy.core.logging import get_logger
from alloy.data.decontaminate import Benchmark, Finder, Hit, Item, cut, read_benchmarks, read_items
from alloy.data.document import require_columns, set_columns, text_column
from alloy.data.executors import Report
from alloy.data.parts import columns_of, find_files
from alloy.data.pipeline import Job, Place, Stage, StageConfig

# characters of an example on each side of what was found
EXAMPLE_CHARS = 40

log = get_logger(__name__)


class DecontaminateConfig(StageConfig):
    """Which test items are looked for, and what becomes of documents that hold them."""

    stage: Literal["decontaminate"] = "decontaminate"
    benchmarks: Annotated[
        Path, Field(description="TOML file of tables named benchmarks: name, path, split, fields, prefix.")
    ]
    column: Annotated[str | None, Field(description="Text; default: cleaned_text where it is there, else text.")] = None
    n: Annotated[int, Field(ge=2, description="Words of a run that counts as found; 10 is stricter.")] = 13
    fuzzy: Annotated[float | None, Field(gt=0, le=1, description="Least Jaccard index of a rephrased item: 0.7.")] = (
        None
    )
    action: Annotated[
        Literal["mark", "drop-doc", "drop-window"],
        Field(description="Mark documents, drop them, or cut what was found out of them."),
    ] = "mark"
    examples: Annotated[int, Field(ge=0, description="Found places shown in the report, per benchmark.")] = 3


class Decontaminate(Stage[DecontaminateConfig]):
    """Adds contaminated_with and contamination_hits."""

    Config = DecontaminateConfig

    def reads(self) -> list[Path]:
        """The benchmarks: rows depend on them."""
        local = [Path(benchmark.path) for benchmark in read_benchmarks(self.config.benchmarks)]
        return [
            self.config.benchmarks,
            *(file for path in local if path.exists() for file in find_files([str(path)], False)),
        ]

    def prepare(self, job: Job) -> None:
        """Refuse missing columns."""
        for part in job.parts:
            columns = columns_of(part)
            require_columns(columns, [self.config.column or text_column(columns)], self.config.stage, part.files[0])

    def start(self, out: Path) -> None:
        """Load the items."""
        self._benchmarks, self._items, self._finder = load(self.config)
        self._found: dict[str, dict[str, Any]] = {}

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The rows with what was found, without those that are dropped."""
        column = self.config.column or text_column(table.column_names)
        texts = [text or "" for text in table[column].to_pylist()]
        hits = self._finder.find(texts)
        names = [self._note(found, text) for found, text in zip(hits, texts, strict=True)]
        counts = [len({(hit.start, hit.stop) for hit in found}) for found in hits]
        table = set_columns(table, contaminated_with=names, contamination_hits=counts)
        clean = pa.array([not found for found in hits])
        self.counts["contaminated"] += sum(1 for found in hits if found)
        if self.config.action == "drop-doc":
            return table.filter(clean)
        if self.config.action == "drop-window" and not all(clean.to_pylist()):
            return self._without(table, column, texts, hits)
        return table

    def write(self, tables: Iterator[pa.Table], path: Path) -> Report:
        """The part, and by benchmark what was found in it."""
        self._found = {}
        report = super().write(tables, path)
        found = {name: {**facts, "items": list(facts["items"])} for name, facts in self._found.items()}
        return {**report, "found": found}

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """The table of benchmarks."""
        benchmarks, items, finder = load(self.config)
        rows = sum(report["rows_in"] for report in reports)
        table = [
            _summary(place, benchmark, items, finder.skipped, reports, rows, self.config.examples)
            for place, benchmark in enumerate(benchmarks)
        ]
        for row in table:
            log.info(
                "%s: %d of %d items in %d documents (%.3g %%), %d too short to look for",
                *(row["name"], row["items_hit"], row["items"], row["documents_hit"], 100 * row["share"]),
                len(row["items_skipped"]),
            )
        return {"benchmarks": table}

    def _note(self, hits: Sequence[Hit], text: str) -> list[str]:
        """Names of the benchmarks found in a document; what was found is added up for the report."""
        names: dict[str, None] = {}
        for hit in hits:
            item = self._items[hit.item]
            name = self._benchmarks[item.benchmark].name
            found = self._found.setdefault(name, {"documents": 0, "items": {}, "examples": []})
            found["documents"] += name not in names
            names[name] = None
            if item.number not in found["items"]:
                found["items"][item.number] = None
                if len(found["examples"]) < self.config.examples:
                    around = text[max(0, hit.start - EXAMPLE_CHARS) : hit.stop + EXAMPLE_CHARS]
                    found["examples"].append({"item": item.number, "text": around})
        return sorted(names)

    def _without(self, table: pa.Table, column: str, texts: Sequence[str], hits: Sequence[Sequence[Hit]]) -> pa.Table:
        rows: list[int] = []
        pieces: list[str | None] = []
        ids: list[str] = []
        own, whole = table["id"].to_pylist(), table[column].to_pylist()
        for row, (text, found) in enumerate(zip(texts, hits, strict=True)):
            left = cut(text, found) if found else [whole[row]]
            for number, piece in enumerate(left):
                rows.append(row)
                pieces.append(piece)
                ids.append(own[row] if len(left) == 1 else f"{own[row]}-{number}")
        made = table.take(pa.array(rows, pa.int64()))
        made = made.set_column(made.schema.get_field_index(column), column, pa.array(pieces, table[column].type))
        return made.set_column(made.schema.get_field_index("id"), "id", pa.array(ids, table["id"].type))


def load(config: DecontaminateConfig) -> tuple[list[Benchmark], list[Item], Finder]:
    """Benchmarks, their items, and what finds these."""
    benchmarks = read_benchmarks(config.benchmarks)
    items = read_items(benchmarks)
    return benchmarks, items, Finder(items, config.n, config.fuzzy)


def _summary(
    place: int,
    benchmark: Benchmark,
    items: Sequence[Item],
    skipped: Sequence[int],
    reports: Sequence[Report],
    rows: int,
    examples: int,
) -> dict[str, Any]:
    found = [report["found"][benchmark.name] for report in reports if benchmark.name in report.get("found", {})]
    documents = sum(part["documents"] for part in found)
    own = [item for item in items if item.benchmark == place]
    return {
        "name": benchmark.name,
        "items": len(own),
        "items_hit": len({number for part in found for number in part["items"]}),
        "items_skipped": [items[number].number for number in skipped if items[number].benchmark == place],
        "documents_hit": documents,
        "share": round(documents / rows, 6) if rows else 0.0,
        "examples": [example for part in found for example in part["examples"]][:examples],
    }
