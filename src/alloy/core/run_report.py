"""What a run's report shows: curves, throughput, samples, evaluation, settings with origin, environment."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alloy.core.compose import leaves, read_toml
from alloy.core.logging import short_count, short_time
from alloy.core.metrics import read_metrics, series
from alloy.core.report import Curves, Points, Section, Table, Text, write_report
from alloy.core.runs import RunDir
from alloy.core.toml import dotted, is_list, is_table, value_at
from alloy.errors import DataError

# metric -> (chart, label, factor); the charts come in this order, other metrics follow one a chart
_CHARTS: dict[str, tuple[str, str, float]] = {
    "loss": ("Loss", "training", 1.0),
    "val_loss": ("Loss", "validation", 1.0),
    "val_bits_per_byte": ("Bits per byte", "validation", 1.0),
    "val_bits_per_token": ("Bits per token", "validation", 1.0),
    "tokens_per_s": ("Throughput (tokens/s)", "tokens/s", 1.0),
    "mfu": ("Model FLOPs utilisation (%)", "MFU", 100.0),
    "lr": ("Learning rate", "lr", 1.0),
    "grad_norm": ("Gradient norm", "gradient norm", 1.0),
    "memory_bytes": ("Peak memory (GiB)", "memory", 2.0**-30),
    "mtp1_loss": ("Loss of later tokens (MTP)", "depth 1", 1.0),
    "mtp2_loss": ("Loss of later tokens (MTP)", "depth 2", 1.0),
    "balance_loss": ("Router balance loss", "main blocks", 1.0),
    "mtp_balance_loss": ("Router balance loss", "MTP blocks", 1.0),
    "loss_max": ("Highest loss since the last line", "loss", 1.0),
    "max_vio": ("Load of the busiest expert above the mean (MaxVio; 0: balanced)", "MaxVio", 1.0),
    "dead_experts": ("Experts that got no token", "experts", 1.0),
    "router_entropy": ("Entropy of the router (nats)", "entropy", 1.0),
}
# charts that hold several metrics
_SHARED = {chart for chart, count in Counter(chart for chart, _, _ in _CHARTS.values()).items() if count > 1}
# counters: they grow with the step and say nothing as a curve
_COUNTERS = {"step", "time", "tokens", "elapsed_s", "epoch"}
# smoothing these would hide what they are for
_EXACT = {"Learning rate", "Peak memory (GiB)"}
_WARM_UP = 5
_MOST_SAMPLES = 12


def report_run(run_dir: Path, path: Path | None = None, title: str | None = None) -> Path:
    """Write the report of one run from its files, by default to its report.html under its name; returns where."""
    run = RunDir(run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    sections: list[Section] = [
        *_evaluation(run_dir / "eval" / "scores.json"),
        *_charts({"": records}),
        *_samples(run_dir / "eval" / "samples.jsonl"),
        *_settings(run),
        _environment(run),
    ]
    path = path or run_dir / "report.html"
    write_report(path, title or run_dir.resolve().name, sections, _facts(run, records))
    return path


def compare_runs(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write one page that lays the curves of several runs over each other and lists the settings in which they differ."""
    names = _short_names(run_dirs)
    records = {name: read_metrics(run_dir / "metrics.jsonl") for name, run_dir in zip(names, run_dirs, strict=True)}
    sections: list[Section] = [
        *_charts(records),
        _last_values(records),
        _differences(names, run_dirs),
    ]
    write_report(path, f"Comparison of {len(names)} runs", sections)
    return path


def _charts(runs: dict[str, list[dict[str, Any]]]) -> Iterator[Curves]:
    """One chart per metric (loss: training and validation together), one line per run."""
    names = dict.fromkeys([*_CHARTS, *(name for records in runs.values() for record in records for name in record)])
    charts: dict[str, dict[str, Points]] = {}
    for name in names:
        title = name.replace("_", " ").capitalize()
        chart, label, factor = _CHARTS.get(name, (title, name, 1.0))
        for run, records in runs.items():
            steps, values = series(records, name)
            if name not in _COUNTERS and len(steps) > 1:
                line = f"{run}, {label}" if run and chart in _SHARED else run or label
                charts.setdefault(chart, {})[line] = (steps, [factor * value for value in values])
    for chart, lines in charts.items():
        yield Curves(chart, lines, smooth=chart not in _EXACT)


def _facts(run: RunDir, records: list[dict[str, Any]]) -> dict[str, str]:
    """The figures to see first."""
    facts: dict[str, str] = {"status": run.status or "unknown"}
    if records:
        facts["steps"] = f"{max(record['step'] for record in records):,}"

    def add(label: str, name: str, choose: Callable[[list[float]], float], form: Callable[[float], str]) -> None:
        values = series(records, name)[1]
        if values:
            facts[label] = form(choose(values))

    add("tokens", "tokens", lambda values: values[-1], short_count)
    add("last loss", "loss", lambda values: values[-1], lambda value: f"{value:.3f}")
    add("best validation loss", "val_loss", min, lambda value: f"{value:.3f}")
    add("best bits per byte", "val_bits_per_byte", min, lambda value: f"{value:.3f}")
    add("tokens/s", "tokens_per_s", _mean_after_warm_up, short_count)
    add("MFU", "mfu", _mean_after_warm_up, lambda value: f"{value:.0%}")
    add("training time", "elapsed_s", lambda values: values[-1], short_time)
    return facts


def _mean_after_warm_up(values: list[float]) -> float:
    counted = values[_WARM_UP:] or values
    return sum(counted) / len(counted)


def _evaluation(path: Path) -> Iterator[Table]:
    """scores.json: numbers, or tables with "value" and, where there is one, "reference"; nested tables are groups."""
    if not path.is_file():
        return
    scores = _load(path, path.read_text(encoding="utf-8"))
    rows: list[tuple[str, object, object]] = []

    def walk(value: Any, name: str) -> None:
        if is_table(value) and "value" not in value:
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)
        elif is_table(value):
            rows.append((name, value["value"], value.get("reference")))
        elif not is_list(value):
            rows.append((name, value, None))

    walk(scores, "")
    has_reference = any(reference is not None for _, _, reference in rows)
    columns = ["score", "value", "reference"] if has_reference else ["score", "value"]
    yield Table("Evaluation", columns, [row[: len(columns)] for row in rows])


def _samples(path: Path) -> Iterator[Text]:
    """samples.jsonl: objects with "text" and, where known, "prompt" and "step"; first and last ones if there are many."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) > _MOST_SAMPLES:
        lines = [*lines[: _MOST_SAMPLES // 2], *lines[-_MOST_SAMPLES // 2 :]]
    for line in lines:
        sample = _load(path, line)
        step = sample.get("step")
        title = "Sample" if step is None else f"Sample at step {step:,}"
        others = {name: value for name, value in sample.items() if name not in ("step", "text", "prompt")}
        caption = ", ".join(f"{name} {value}" for name, value in others.items())
        yield Text(title, f"{sample.get('prompt', '')}{sample.get('text', '')}", caption)


def _settings(run: RunDir) -> Iterator[Table]:
    path = run.path / "recipe.toml"
    if not path.is_file():
        return
    data, _ = read_toml(path)
    origins = run.manifest.get("origins", {})
    rows = [(dotted(key), _written(value_at(data, key)), origins.get(dotted(key), "")) for key in leaves(data)]
    columns = ["key", "value", "origin"]
    yield Table("Settings", columns, [row for row in rows if row[2] != "default"])
    yield Table("Settings left at their defaults", columns, [row for row in rows if row[2] == "default"], folded=True)


def _environment(run: RunDir) -> Table:
    rows: list[tuple[str, str]] = []
    for name, value in run.manifest.items():
        if name in ("origins", "resumed") or value is None:
            continue
        if is_table(value):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        rows.append((name.replace("_", " "), _written(value)))
    return Table("Environment", ["fact", "value"], rows)


def _last_values(records: dict[str, list[dict[str, Any]]]) -> Table:
    """The last value of each metric, a column per run."""
    names = dict.fromkeys(
        name for rows in records.values() for row in rows for name in row if name not in ("step", "time")
    )
    table: list[list[object]] = []
    for name in names:
        last = [series(rows, name)[1][-1:] for rows in records.values()]
        if any(last):
            table.append([name, *(values[0] if values else None for values in last)])
    return Table("Last values", ["metric", *records], table)


def _differences(names: Sequence[str], run_dirs: Sequence[Path]) -> Table:
    """Settings that are not the same in all runs."""
    recipes = [read_toml(run_dir / "recipe.toml")[0] for run_dir in run_dirs]
    rows: list[list[object]] = []
    for key in dict.fromkeys(key for recipe in recipes for key in leaves(recipe)):
        values = [value_at(recipe, key) for recipe in recipes]
        if any(value != values[0] for value in values):
            rows.append([dotted(key), *(None if value is None else _written(value) for value in values)])
    return Table("Settings that differ", ["key", *names], rows or [["all settings are equal", *("" for _ in names)]])


def _short_names(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names; whole paths where two folders share a name."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _load(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON: {error}. Mend or delete it, then run `alloy report` again."
        ) from error
