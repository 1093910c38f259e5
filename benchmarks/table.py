"""Markdown tables of runs of `alloy bench --json`, for docs/performance.md.

    python benchmarks/table.py benchmarks/results/h200/moe.jsonl [CASE ...]
    python benchmarks/table.py --update docs/performance.md
    python benchmarks/table.py --plot docs/images/roofline.svg benchmarks/results/h200/*.jsonl

The second form writes the tables anew between the lines `<!-- table FILE [CASE ...] -->` and `<!-- end -->` of a page, with files
relative to benchmarks/results; the third draws the rows of several runs on one GPU, under the ceilings of the first.
"""

import argparse
import re
import sys
from pathlib import Path

from alloy.bench.pairs import pairs
from alloy.bench.plot import draw
from alloy.bench.result import OURS, Row, Run, read_run
from alloy.errors import AlloyError

RESULTS = Path(__file__).parent / "results"


def time(row: Row | None) -> str:
    """Milliseconds, and for a peer how many times ours that is."""
    if row is None:
        return ""
    if row.ms is None:
        return row.status
    ratio = f" ({row.ratio:.2f}x)" if row.ratio is not None else ""
    return f"{row.ms:.4g}{ratio}"


def table(rows: list[Row]) -> list[str]:
    """One line a problem, one column a peer."""
    peers = list(dict.fromkeys(row.name for row in rows if row.name != OURS))
    versions = {row.name: row.version for row in rows if row.version}
    heads = [f"{name} {versions[name]}" if name in versions else name for name in peers]
    columns = ["", "ms", "of floor", "peak GB", "error", "tok/s", *heads]
    lines: list[list[str]] = []
    for label in dict.fromkeys(row.label for row in rows):
        mine = {row.name: row for row in rows if row.label == label}
        ours = mine.get(OURS)
        if ours is None:
            continue
        cells = [
            label,
            time(ours),
            "" if ours.fraction is None else f"{ours.fraction:.2f} {'B' if ours.bound == 'bytes' else 'F'}",
            "" if ours.peak_bytes is None else f"{ours.peak_bytes / 1e9:.3f}",
            "" if ours.error is None else f"{ours.error:.1e}",
            "" if ours.tokens_per_s is None else f"{ours.tokens_per_s:,.0f}",
            *(time(mine.get(name)) for name in peers),
        ]
        lines.append(cells)
    used = [i for i in range(len(columns)) if i < 2 or any(cells[i] for cells in lines)]
    return ["| " + " | ".join(cells[i] for i in used) + " |" for cells in (columns, ["---"] * len(columns), *lines)]


def head(run: Run) -> str:
    """What was measured on, and its ceilings."""
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {dtype}" for dtype, rate in run.ceilings.flops_per_s.items())
    versions = ", ".join(f"{name} {run.machine[name]}" for name in ("torch", "triton", "cuda") if name in run.machine)
    where = f"{run.machine['device']}, {versions}, {run.machine['date'][:10]}"
    return f"{where}: {run.ceilings.bytes_per_s / 1e12:.2f} TB/s, {rates}"


def tables(run: Run, cases: list[str]) -> str:
    """The tables of the named cases, or of all."""
    names = cases or list(dict.fromkeys(row.case for row in run.rows))
    parts: list[str] = []
    for case in names:
        rows = [row for row in run.rows if row.case == case]
        parts += ["\n".join([f"**{case}**\n", *table(rows)]), *pairs(rows)]
    return "\n\n".join(parts)


def update(page: str) -> str:
    """The page with its tables as the results are now."""

    def fill(found: re.Match[str]) -> str:
        file, *cases = found[2].split()
        run = read_run(RESULTS / file)
        return f"{found[1]}\n{head(run)}. `{file}`\n\n{tables(run, cases)}\n\n<!-- end -->"

    return re.sub(r"(<!-- table (.+?) -->)\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main() -> None:
    """Print, update or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, help="page to write the tables into")
    parser.add_argument("--plot", type=Path, help="SVG to draw")
    parser.add_argument("rest", nargs="*", help="a file and cases; with --plot, files")
    options = parser.parse_args()
    if options.update:
        options.update.write_text(update(options.update.read_text()))
    elif not options.rest:
        parser.error("name a file of benchmarks/results, or --update PAGE")
    elif options.plot:
        runs = [read_run(Path(file)) for file in options.rest]
        draw(Run(runs[0].machine, runs[0].ceilings, [row for run in runs for row in run.rows]), options.plot)
    else:
        run = read_run(Path(options.rest[0]))
        print(f"{head(run)}\n\n{tables(run, options.rest[1:])}")


if __name__ == "__main__":
    try:
        main()
    except (AlloyError, OSError) as error:
        sys.exit(f"error: {error}")
