"""Plots as SVG: the roofline of a run (what was reached against what bandwidth and the matrix units allow), a sweep of rates."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alloy.bench.result import OURS, Row, Run
from alloy.core.runs import atomic_path

# as many as there are cases
_COLOURS = (
    *("#1f6fb2", "#d1495b", "#3a7d44", "#8f5bb3", "#c98a1b", "#3b9c9c", "#7a7a7a"),
    *("#101820", "#e377c2", "#8c5a3c", "#9acd32"),
)


def draw(run: Run, path: Path) -> None:
    """Write the plot: rate over arithmetic intensity for every case; beside it, where `decode` ran, tokens over batch."""
    from matplotlib.figure import Figure

    ours = [row for row in run.rows if row.name == OURS and row.ms is not None]
    decode = [row for row in ours if row.case == "decode"]
    figure: Any = Figure(figsize=(11 if decode else 6.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if decode else 1, squeeze=False)[0]
    _roofline(panels[0], run, [row for row in ours if row.flops and row.bytes])
    if decode:
        _throughput(panels[1], run, decode)
    figure.suptitle(f"{run.machine.get('device', '')}, {run.machine.get('date', '')[:10]}", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def draw_sweep(reports: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the plot of a sweep of `alloy bench serve`: tokens per second and time to first token over the request rate."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = [report["request_rate"] for report in reports]
    left.plot(rates, [report["output_throughput"] for report in reports], "o-", color=_COLOURS[0])
    left.set(xlabel="requests per second", ylabel="answer tokens per second", ylim=(0, None))
    # p50 is the median
    marks = [name for name in reports[0] if re.fullmatch(r"p(?!50_)[\d.]+_ttft_ms", name)]
    names = ["median_ttft_ms", *marks]
    for colour, name in zip(_COLOURS[1:], names, strict=False):
        right.plot(rates, [report[name] for report in reports], "o-", color=colour, label=name.split("_")[0])
    right.set(xlabel="requests per second", ylabel="time to first token, ms", yscale="log", xlim=left.get_xlim())
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.grid(which="major", linewidth=0.4)
    figure.suptitle(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _roofline(axes: Any, run: Run, rows: list[Row]) -> None:
    """Achieved operations per second over operations per byte, under the roofs of memory and of each dtype."""
    bandwidth, rates = run.ceilings.bytes_per_s, run.ceilings.flops_per_s
    # rows are held against the ceiling of the dtype they compute in
    tops = {dtype: rate for dtype, rate in rates.items() if not rows or any(row.compute == dtype for row in rows)}
    knees = [top / bandwidth for top in tops.values()]
    intensities = [row.flops / row.bytes for row in rows] + knees
    ends = [min(intensities) / 4, max(intensities) * 4]
    for style, (dtype, top) in zip(("-", "--", ":"), tops.items(), strict=False):
        roof = [ends[0], top / bandwidth, ends[1]]
        heights = [min(top, bandwidth * x) for x in roof]
        axes.plot(roof, heights, style, color="black", linewidth=1.2, label=f"{top / 1e12:.3g} TFLOP/s {dtype}")
    for index, case in enumerate(dict.fromkeys(row.case for row in rows)):
        mine = [row for row in rows if row.case == case]
        xs = [row.flops / row.bytes for row in mine]
        ys = [row.flops / (row.ms or 1.0) * 1e3 for row in mine]
        axes.scatter(xs, ys, s=18, color=_COLOURS[index % len(_COLOURS)], label=case)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set_title(f"{bandwidth / 1e9:,.4g} GB/s measured", fontsize=9)
    axes.grid(which="major", linewidth=0.4)
    axes.legend(fontsize=7, frameon=False)


def _throughput(axes: Any, run: Run, rows: list[Row]) -> None:
    """Decoded tokens per second over batch, and the dashed line that the bytes of a step allow."""
    series: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        model, _, batch = row.label.rpartition(" batch ")
        series.setdefault(model, []).append((int(batch), row))
    for index, (model, points) in enumerate(series.items()):
        points.sort(key=lambda point: point[0])
        xs, colour = [batch for batch, _ in points], _COLOURS[index % len(_COLOURS)]
        axes.plot(xs, [row.tokens_per_s for _, row in points], "o-", markersize=4, color=colour, label=model)
        limits = [batch / run.ceilings.floor(row)[0] * 1e3 for batch, row in points]
        axes.plot(xs, limits, "--", linewidth=1, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens per second")
    axes.set_title("decode; dashed: the bytes of a step at the measured bandwidth", fontsize=9)
    axes.grid(which="major", linewidth=0.4)
    axes.legend(fontsize=7, frameon=False)
