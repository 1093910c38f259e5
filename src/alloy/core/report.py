"""HTML reports: one self-contained file that opens without a network, in light and dark, on a telephone too.

`write_report` lays out sections; curves are SVG by matplotlib whose colours become CSS variables, so that one drawing
serves both colour schemes. `report_run` and `compare_runs` in `core.run_report` fill it from run directories.
"""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import alloy
from alloy.core.logging import short_count, short_exponent
from alloy.core.runs import atomic_write

# line of numbers: x and y of equal length
Points = tuple[Sequence[float], Sequence[float]]

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
# more points than this are drawn as the smallest and largest of each stretch
_MOST_POINTS = 1200
_COLOURS = 6
# stand-ins that matplotlib writes into the SVG, and the CSS they become
_INK, _GRID = "#00f001", "#00f002"
_SERIES = tuple(f"#00f01{index}" for index in range(_COLOURS))


@dataclass(frozen=True)
class Curves:
    """Lines over steps.

    Attributes:
        series: label -> (xs, ys); values that are not finite leave a gap.
        smooth: draw a running mean over the raw values.
        references: label -> y of a dashed line, such as a published number.
        x: name of the horizontal axis.
    """

    title: str
    series: Mapping[str, Points]
    smooth: bool = True
    references: Mapping[str, float] = field(default_factory=dict[str, float])
    x: str = "step"
    kind: str = field(default="curves", init=False)


@dataclass(frozen=True)
class Table:
    """Rows of values; numbers are set right. `folded`: shown when clicked."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = False
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Text:
    """Text as it is, line breaks kept; `caption` says where it comes from."""

    title: str
    body: str
    caption: str = ""
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Bars:
    """One horizontal bar a label, values >= 0; `references` mark published or earlier values of the same labels."""

    title: str
    values: Mapping[str, float]
    unit: str = ""
    references: Mapping[str, float] = field(default_factory=dict[str, float])
    kind: str = field(default="bars", init=False)

    def __post_init__(self) -> None:
        bad = {label: value for label, value in self.values.items() if not (math.isfinite(value) and value >= 0)}
        if bad:
            raise ValueError(f"bars show finite values >= 0, not {bad}")

    @property
    def top(self) -> float:
        """The value a full bar stands for."""
        return max([*self.values.values(), *self.references.values()], default=0.0) or 1.0


Section = Curves | Table | Text | Bars


def write_report(path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, str] | None = None) -> None:
    """Write a self-contained HTML page.

    Args:
        path: file to write.
        title: heading and window title.
        sections: shown in order; neighbouring curves and bars share a row where there is room.
        facts: label -> value, the few figures to see first.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    groups: list[list[Section]] = []
    for section in sections:
        is_small = isinstance(section, Curves | Bars)
        if is_small and groups and isinstance(groups[-1][-1], Curves | Bars):
            groups[-1].append(section)
        else:
            groups.append([section])
    figures = {
        id(section): draw(section, f"f{index}") for index, section in enumerate(sections) if isinstance(section, Curves)
    }
    page = template.render(
        title=title,
        facts=dict(facts or {}),
        groups=groups,
        figures=figures,
        id=id,
        cell=cell,
        colours=_COLOURS,
        is_number=_is_number,
        version=alloy.__version__,
    )
    atomic_write(path, page)


def cell(value: object) -> str:
    """A value as a table shows it: four significant digits, thousands separated, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
            return short_exponent(value)
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def draw(curves: Curves, prefix: str) -> str:
    """`curves` as an SVG element whose ids begin with `prefix` and whose colours are CSS variables."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9, "text.color": _INK, "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK, "xtick.color": _GRID, "ytick.color": _GRID, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK,
    }  # fmt: skip
    # matplotlib's own annotations are partial
    with cast(Any, mpl).rc_context(settings):
        # small on purpose: text stays readable when the drawing is as wide as a telephone
        figure: Any = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes: Any = figure.add_subplot()
        for index, points in enumerate(curves.series.values()):
            _draw_series(axes, points, _SERIES[index % _COLOURS], curves.smooth)
        for index, value in enumerate(curves.references.values()):
            axes.axhline(
                value, color=_SERIES[(len(curves.series) + index) % _COLOURS], linestyle=(0, (4, 3)), linewidth=1.2
            )
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_count_tick))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(curves.x)
        axes.margins(x=0.01)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return _themed(svg[svg.index("<svg") :], curves.title, prefix)


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value with its `reach` neighbours on either side: no lag, so that steep starts are not misdrawn.

    At the ends the window narrows to a third and is cut off there. Values that are not finite are left out of the means.
    """
    sums, counts = [0.0], [0]
    for value in values:
        is_finite = math.isfinite(value)
        sums.append(sums[-1] + (value if is_finite else 0.0))
        counts.append(counts[-1] + is_finite)
    result: list[float] = []
    for index in range(len(values)):
        width = max(min(reach, index, len(values) - 1 - index), reach // 3)
        first, end = max(0, index - width), min(len(values), index + width + 1)
        count = counts[end] - counts[first]
        result.append((sums[end] - sums[first]) / count if count else math.nan)
    return result


def thinned(xs: Sequence[float], ys: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most about `most` points: of each stretch the smallest and the largest, so that spikes stay visible."""
    if len(xs) <= most:
        return list(xs), list(ys)
    stretch = math.ceil(2 * len(xs) / most)
    kept: list[int] = []
    for start in range(0, len(xs), stretch):
        here = [index for index in range(start, min(start + stretch, len(xs))) if math.isfinite(ys[index])]
        if here:
            kept += sorted({min(here, key=lambda index: ys[index]), max(here, key=lambda index: ys[index])})
    return [xs[index] for index in kept], [ys[index] for index in kept]


def _draw_series(axes: Any, points: Points, colour: str, smooth: bool) -> None:
    xs, ys = points
    is_long = len(xs) >= 60
    thin_xs, thin_ys = thinned(xs, ys, _MOST_POINTS)
    if not (smooth and is_long):
        marker = "o" if len(xs) < 30 else None
        axes.plot(thin_xs, thin_ys, color=colour, linewidth=1.6, marker=marker, markersize=3)
        return
    axes.plot(thin_xs, thin_ys, color=colour, linewidth=0.8, alpha=0.3)
    # a window of about a twentieth of the run
    means = smoothed(ys, reach=max(2, len(ys) // 40))
    every = max(1, len(xs) // (_MOST_POINTS // 2))
    last = len(xs) - 1
    kept = sorted({*range(0, len(xs), every), last})
    axes.plot([xs[index] for index in kept], [means[index] for index in kept], color=colour, linewidth=1.8)


def _count_tick(value: float, position: int | None) -> str:
    return short_count(value)


def _tick(value: float, position: int | None) -> str:
    if value and abs(value) < 1e-2:
        return short_exponent(value)
    return short_count(value) if abs(value) >= 1e3 else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _themed(svg: str, title: str, prefix: str) -> str:
    """Make the SVG scale with its column, take its colours from the page and keep its ids to itself."""
    for index, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--c{index + 1})")
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box, "matplotlib writes a viewBox"
    opening = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box.group()} role="img" aria-label="{html.escape(title)}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
