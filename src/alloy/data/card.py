"""What a data set is: counts in and out of every stage with reasons and examples, histograms, samples, and its card.

`write_card` looks at the folders of a chain's stages and writes `report.html` (opens without a network), `stats.json` and
`dataset/`: Parquet with a column `text` in the layout of Nemotron-CC-Math, configs 3, 4plus and 4plus_MIND where rows have bands
and dialogues, else one config `default`; its README.md is the card that `datasets.load_dataset` reads.
"""

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from alloy.core.recipe import Config
from alloy.core.report import Bars, Section, Table, Text, write_report
from alloy.core.runs import atomic_write
from alloy.data.document import COLUMNS, FINE
from alloy.data.parts import Part, RowWriter, find_files, read_part
from alloy.data.pipeline import STAGES, read_manifest
from alloy.errors import DataError

NUM_SAMPLES, SAMPLE_CHARS, EXAMPLES, TOP = 10, 1500, 3, 12
PART_ROWS = 100_000
# columns that say what became of a row
STATES = ("_status", "dup_keep", "drop_reason")
compute: Any = pc


class CardTable(Config):
    """`[card]`: what no stage knows."""

    title: Annotated[str, Field(description="Of the data set.")] = ""
    license: Annotated[str, Field(description="Identifier, such as odc-by.")] = ""
    export: Annotated[bool, Field(description="Write dataset/ beside the report.")] = True
    seed: Annotated[int, Field(description="Of the choice of samples.")] = 0


@dataclass
class Statistics:
    """Figures of the rows of one stage."""

    rows: int = 0
    kept: int = 0
    chars: int = 0
    tokens: int = 0
    # bins are powers of two
    lengths: Counter[int] = field(default_factory=Counter)
    math_density: Counter[int] = field(default_factory=Counter)
    values: dict[str, Counter[str]] = field(default_factory=dict)
    samples: list[tuple[str, str, str]] = field(default_factory=list)


def write_card(folders: Sequence[Path], out: Path, table: CardTable | None = None) -> dict[str, Any]:
    """Write report, statistics and data set of a chain; the statistics are returned.

    Args:
        folders: of the stages, in order
        out: folder to write to
        table: what no stage knows
    """
    table = table or CardTable()
    manifests = [(folder, read_manifest(folder)) for folder in folders]
    unfinished = [str(folder) for folder, manifest in manifests if manifest.get("status") != "done"]
    if unfinished:
        raise DataError(f"{unfinished[0]} is not finished; run that stage again before its card is written.")
    rows = [(folder, manifest) for folder, manifest in manifests if list(folder.glob("part-*"))]
    if not rows:
        raise DataError(f"none of {', '.join(map(str, folders))} holds rows; name the folders of stages.")
    main = [folder for folder, manifest in rows if manifest["stage"] not in ("mind", "rephrase")] or [rows[-1][0]]
    statistics = collect(main[-1], table.seed)
    facts = _facts(manifests, statistics)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "stats.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    title = table.title or out.resolve().name
    write_report(out / "report.html", title, _sections(manifests, statistics), _headline(manifests, statistics))
    if table.export:
        dialogues = next((folder for folder, manifest in rows if manifest["stage"] == "mind"), None)
        has_bands = bool(statistics.values.get("band"))
        configs = export(main[-1], dialogues, out / "dataset", has_bands)
        atomic_write(out / "dataset" / "README.md", _readme(title, table, manifests, statistics, configs))
    return facts


def collect(folder: Path, seed: int) -> Statistics:
    """Figures of all rows of a folder, read once and a table at a time."""
    found = Statistics()
    hosts = Counter[str]()
    chosen: list[tuple[int, str, str, str]] = []
    for table in _tables(folder):
        names = table.column_names
        kept = _kept(table)
        found.rows += table.num_rows
        found.kept += kept.num_rows
        for name in ("lang", "band", "type", "encoding", "crawl"):
            if name in names:
                _count(found.values.setdefault(name, Counter()), kept[name])
        for name in ("math_carriers", "contaminated_with"):
            if name in names:
                source = table if name == "contaminated_with" else kept
                _count(found.values.setdefault(name, Counter()), compute.list_flatten(source[name]))
        if "dup_keep" in names:
            _count(found.values.setdefault("dup_keep", Counter()), compute.cast(table["dup_keep"], pa.string()))
        if "url" in names:
            host = compute.struct_field(compute.extract_regex(kept["url"], r"^[a-z]+://(?P<host>[^/:?#]+)"), "host")
            _count(hosts, host)
        text = _text(kept)
        if text is None:
            continue
        lengths = compute.utf8_length(text).to_pylist()
        found.chars += sum(filter(None, lengths))
        found.lengths.update(_bin(n or 0) for n in lengths)
        if "n_math" in names:
            pairs = zip(kept["n_math"].to_pylist(), lengths, strict=True)
            found.math_density.update(_bin(round(1e4 * (n or 0) / chars)) for n, chars in pairs if chars)
        if "n_tokens" in names:
            found.tokens += compute.sum(kept["n_tokens"]).as_py() or 0
        urls = kept["url"].to_pylist() if "url" in names else [""] * kept.num_rows
        for place, (name, url) in enumerate(zip(kept["id"].to_pylist(), urls, strict=True)):
            key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest())
            if len(chosen) < NUM_SAMPLES or -key > chosen[0][0]:
                entry = (-key, name, url or "", (text[place].as_py() or "")[:SAMPLE_CHARS])
                (heapq.heappushpop if len(chosen) == NUM_SAMPLES else heapq.heappush)(chosen, entry)
    if hosts:
        found.values["host"] = hosts
    found.samples = [(name, url, text) for _, name, url, text in sorted(chosen, reverse=True)]
    return found


def export(folder: Path, dialogues: Path | None, out: Path, has_bands: bool) -> dict[str, int]:
    """Write the rows to train on as a data set; rows by config.

    Args:
        folder: rows; duplicates, dropped and empty ones are left out
        dialogues: rows made by `mind`
        out: folder with one folder a config
        has_bands: whether rows have quality bands; then those below 3 are left out
    """
    counts: Counter[str] = Counter()
    for name in ("3", "4plus", "4plus_MIND", "default"):
        for part in (out / name).glob("part-*.parquet"):
            part.unlink()
    for table in _tables(folder):
        rows = _published(_kept(table))
        if has_bands:
            for name in sorted({str(band) for band in rows["band"].to_pylist() if band in ("3", "4plus")}):
                _append(out / name, rows.filter(compute.equal(rows["band"], name)), counts)
        else:
            _append(out / "default", rows, counts)
    if dialogues is not None:
        for table in _tables(dialogues):
            kept = table.filter(table["kept"]) if "kept" in table.column_names else table
            _append(out / "4plus_MIND", _published(kept), counts)
    return dict(counts)


def _append(folder: Path, rows: pa.Table, counts: Counter[str]) -> None:
    """One more part of a config, if it has rows."""
    if not rows.num_rows:
        return
    name = f"part-{counts[f'{folder.name} parts']:05d}.parquet"
    with RowWriter(folder / name) as writer:
        writer.add(rows)
    counts[f"{folder.name} parts"] += 1
    counts[folder.name] += rows.num_rows


def _published(table: pa.Table) -> pa.Table:
    """`id`, `text` (the cleaned one where there is one) and what is known of it."""
    text = _text(table)
    if text is None:
        raise DataError(f"rows have no column text to publish; columns: {', '.join(table.column_names)}.")
    hidden = ("text", "cleaned_text", "binary_content", "id")
    others = {name: table[name] for name in table.column_names if name not in hidden}
    return pa.table({"id": table["id"], "text": text, **others})


def _tables(folder: Path) -> Iterator[pa.Table]:
    for index, file in enumerate(find_files([str(folder)], raw=False)):
        yield from read_part(Part(index, (str(file),)), PART_ROWS)


def _kept(table: pa.Table) -> pa.Table:
    """Without duplicates and empty texts."""
    if "dup_keep" in table.column_names:
        table = table.filter(compute.fill_null(table["dup_keep"], True))
    text = _text(table)
    return table if text is None else table.filter(compute.greater(compute.fill_null(compute.utf8_length(text), 0), 0))


def _text(table: pa.Table) -> Any:
    """The text to train on: the cleaned one where a row has one."""
    names = table.column_names
    if "cleaned_text" not in names:
        return compute.cast(table["text"], pa.large_string()) if "text" in names else None
    cleaned = compute.cast(table["cleaned_text"], pa.large_string())
    return compute.coalesce(cleaned, compute.cast(table["text"], pa.large_string())) if "text" in names else cleaned


def _count(counter: Counter[str], column: Any) -> None:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    for entry in array.drop_null().value_counts().to_pylist():
        counter[str(entry["values"])] += entry["counts"]


def _bin(value: int) -> int:
    return 0 if value <= 0 else 1 << (value.bit_length() - 1)


def _facts(manifests: list[tuple[Path, dict[str, Any]]], found: Statistics) -> dict[str, Any]:
    names = ("stage", "key", "settings", "rows_in", "rows_out", "counts", "losses", "wall_s", "work_s", "peak_bytes")
    return {
        "stages": [{name: manifest.get(name) for name in names} for _, manifest in manifests],
        "rows": found.rows,
        "kept": found.kept,
        "chars": found.chars,
        "tokens": found.tokens or None,
        "lengths": {str(k): n for k, n in sorted(found.lengths.items())},
        "formulas_per_10k_chars": {str(k): n for k, n in sorted(found.math_density.items())},
        "values": {name: dict(counter.most_common(100)) for name, counter in found.values.items()},
    }


def _headline(manifests: list[tuple[Path, dict[str, Any]]], found: Statistics) -> dict[str, str]:
    facts = {"rows": f"{found.rows:,}", "to train on": f"{found.kept:,}", "characters": f"{found.chars:,}"}
    if found.tokens:
        facts["tokens"] = f"{found.tokens:,}"
    return facts | {"stages": str(len(manifests))}


def _sections(manifests: list[tuple[Path, dict[str, Any]]], found: Statistics) -> list[Section]:
    funnel = {"read": float(manifests[0][1]["rows_in"])}
    rows: list[list[object]] = []
    for index, (folder, manifest) in enumerate(manifests, start=1):
        funnel[f"{index} {manifest['stage']}"] = float(manifest["rows_out"])
        rate = manifest["rows_in"] / manifest["work_s"] if manifest.get("work_s") else None
        rows.append(
            [folder.name, manifest["rows_in"], manifest["rows_out"], manifest["wall_s"], rate, manifest["key"][:12]]
        )
    if found.kept != found.rows:
        funnel["to train on"] = float(found.kept)
    sections: list[Section] = [
        Bars("Rows after each stage", funnel),
        _histogram("Length of a text, characters", found.lengths),
    ]
    if found.math_density:
        sections.append(_histogram("Formulas in 10,000 characters", found.math_density))
    titles = {"band": "Quality band", "lang": "Language", "math_carriers": "Kinds of mathematical markup (pages)", "type": "Kind of page",
              "contaminated_with": "Contaminated with (documents)", "dup_keep": "Kept by deduplication", "host": "Hosts", "crawl": "Crawls",
              "encoding": "Encodings"}  # fmt: skip
    for name, title in titles.items():
        top = dict(found.values.get(name, Counter()).most_common(TOP))
        if top:
            sections.append(Bars(title, {label: float(number) for label, number in top.items()}))
    sections.append(Table("Stages", ["folder", "rows in", "rows out", "seconds", "rows/s of one worker", "key"], rows))
    reasons = [row for folder, manifest in manifests for row in _reasons(folder, manifest)]
    if reasons:
        sections.append(Table("What happened to rows, with examples", ["stage", "what", "rows", "examples"], reasons))
    sections += [Text(url or name, text, caption=name) for name, url, text in found.samples]
    return sections


def _histogram(title: str, bins: Counter[int]) -> Bars:
    if not bins:
        return Bars(title, {})
    edges = [0, *(1 << i for i in range(int(math.log2(max(max(bins), 1))) + 1))]
    first = next(i for i, edge in enumerate(edges) if edge and edge in bins) if max(bins) else 0
    labels = {0: "0"} if 0 in bins else {}
    labels |= {
        edge: "0" if not edge else str(edge) if edge == 1 else f"{edge:,} to {2 * edge - 1:,}" for edge in edges[first:]
    }
    return Bars(title, {label: float(bins[edge]) for edge, label in labels.items()})


def _reasons(folder: Path, manifest: dict[str, Any]) -> Iterator[list[object]]:
    """Counts of every status but the good ones, each with the rows it befell."""
    for kind, number in manifest.get("losses", {}).items():
        places = [p for p in manifest.get("loss_places", []) if p["kind"] == kind][:EXAMPLES]
        yield [
            manifest["stage"],
            kind,
            number,
            "; ".join(f"{p['file']} at {p['offset']:,}: {p['message']}" for p in places),
        ]
    wanted = {}
    for name, number in manifest.get("counts", {}).items():
        column, _, value = name.partition("=")
        if column.endswith(STATES) and value.lower() not in FINE:
            wanted[column, value] = number
    examples = _examples(folder, set(wanted)) if wanted else {}
    for (column, value), number in wanted.items():
        yield [manifest["stage"], f"{column} {value}", number, "; ".join(examples.get((column, value), []))]


def _examples(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {key: [] for key in wanted}
    for table in _tables(folder):
        for column in {column for column, _ in wanted} & set(table.column_names):
            error = column.replace("_status", "_error")
            names = [name for name in (column, "url", "id", error) if name in table.column_names]
            for row in table.select(list(dict.fromkeys(names))).to_pylist():
                here = found.get((column, str(row[column])))
                if here is not None and len(here) < EXAMPLES:
                    why = f" ({row[error]})" if error != column and row.get(error) else ""
                    here.append((row.get("url") or row["id"]) + why)
        if all(len(here) >= EXAMPLES for here in found.values()):
            break
    return found


def _readme(
    title: str,
    table: CardTable,
    manifests: list[tuple[Path, dict[str, Any]]],
    found: Statistics,
    configs: dict[str, int],
) -> str:
    names = sorted(name for name in configs if not name.endswith(" parts"))
    languages = [name for name, _ in found.values.get("lang", Counter()).most_common(5) if name not in ("None", "")]
    size = sum(configs[name] for name in names)
    header = ["---", f"license: {table.license or 'other'}", f"pretty_name: {json.dumps(title)}"]
    header += ["language:", *(f"- {name}" for name in languages)] if languages else []
    header += [f"size_categories:\n- {_size_category(size)}", "task_categories:\n- text-generation", "configs:"]
    for name in names:
        header += [
            f"- config_name: {json.dumps(name)}",
            "  data_files:",
            "  - split: train",
            f"    path: {name}/part-*.parquet",
        ]
    lines = [*header, "---", "", f"# {title}", ""]
    lines += [
        "Not measured: anything that is not listed here.",
        "" if table.license else "The licence was not stated.",
        "",
    ]
    lines += ["| config | rows |", "|---|---|", *(f"| {name} | {configs[name]:,} |" for name in names), ""]
    lines += ["## How it was made", "", "| stage | settings | rows in | rows out | counts |", "|---|---|---|---|---|"]
    for _, manifest in manifests:
        settings = _set(manifest)
        counts = ", ".join(
            f"{k} {n:,}" for k, n in {**manifest.get("counts", {}), **manifest.get("losses", {})}.items()
        )
        shown = json.dumps(settings, ensure_ascii=False).replace("|", "\\|")
        lines.append(
            f"| {manifest['stage']} | `{shown}` | {manifest['rows_in']:,} | {manifest['rows_out']:,} | {counts} |"
        )
    lines += ["", "## Figures", "", f"{found.kept:,} texts, {found.chars:,} characters."]
    for name, counter in found.values.items():
        lines.append(f"- {name}: " + ", ".join(f"{value} {number:,}" for value, number in counter.most_common(TOP)))
    lines += ["", "## Columns", ""]
    lines += [
        f"- `{name}`" + (f" (made by {COLUMNS[name][1]})" if name in COLUMNS else "")
        for name in _columns(found, configs)
    ]
    return "\n".join(lines) + "\n"


def _set(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a stage was told besides the defaults."""
    stage: Any = STAGES.get(manifest["stage"])
    fields = stage.Config.model_fields
    told = {
        name: value for name, value in manifest.get("settings", {}).items() if name != "stage" and value is not None
    }
    return {n: v for n, v in told.items() if n not in fields or v != fields[n].get_default(call_default_factory=True)}


def _columns(found: Statistics, configs: dict[str, int]) -> list[str]:
    return ["id", "text", *sorted(set(found.values) & set(COLUMNS))]


def _size_category(rows: int) -> str:
    edges = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    return next((name for edge, name in edges if rows < edge), "10M<n<100M" if rows < 10**8 else "100M<n<1B")
