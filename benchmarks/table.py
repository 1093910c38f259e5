"""Markdown tables of a run of `alloy bench --json`, for docs/performance.md.

python benchmarks/table.py benchmarks/results/h200.jsonl [CASE ...]
"""

import sys
from pathlib import Path

from alloy.bench.result import OURS, Row, read_run


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
    lines = [
        "| | ms | of floor | peak GB | error | tok/s | " + " | ".join(heads) + " |",
        "|---" * (6 + len(peers)) + "|",
    ]
    for label in dict.fromkeys(row.label for row in rows):
        mine = {row.name: row for row in rows if row.label == label}
        ours = mine.get(OURS)
        if ours is None:
            continue
        cells = [
            label,
            time(ours),
            "" if ours.fraction is None else f"{ours.fraction:.2f} {'B' if ours.bound == 'bytes' else 'F'}",
            "" if ours.peak_bytes is None else f"{ours.peak_bytes / 1e9:.3g}",
            "" if ours.error is None else f"{ours.error:.1e}",
            "" if ours.tokens_per_s is None else f"{ours.tokens_per_s:,.0f}",
            *(time(mine.get(name)) for name in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print ceilings and the tables of the named cases, or of all."""
    run = read_run(Path(sys.argv[1]))
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {dtype}" for dtype, rate in run.ceilings.flops_per_s.items())
    versions = ", ".join(f"{name} {run.machine[name]}" for name in ("torch", "triton", "cuda") if name in run.machine)
    print(
        f"{run.machine['device']}, {versions}, {run.machine['date'][:10]}: {run.ceilings.bytes_per_s / 1e12:.2f} TB/s, {rates}"
    )
    for case in sys.argv[2:] or dict.fromkeys(row.case for row in run.rows):
        print("\n".join([f"\n**{case}**\n", *table([row for row in run.rows if row.case == case])]))


if __name__ == "__main__":
    main()
