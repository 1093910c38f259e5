"""`alloy bench`: how fast the operations and models are, beside other packages and against this machine's limits."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from alloy.bench.case import CASES, PEERS, Case, Size
from alloy.bench.pairs import pairs
from alloy.bench.result import OURS, Row, Run, read_run, slower
from alloy.bench.runner import Plan, run_cases, tune_cases
from alloy.core.runs import atomic_write
from alloy.errors import AlloyError, InterruptedRun, RecipeError, ResourceError

_STARTED = time.monotonic()


def bench(
    cases: Annotated[list[str] | None, typer.Argument(help="Names of cases; default: all that run here.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only problems whose label holds this text; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few problems, 60 s in all; peers only if named.")] = False,
    peer: Annotated[list[str] | None, typer.Option(help="Measure this peer alone; repeatable.")] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Measure no other package.")] = False,
    json_path: Annotated[
        str | None,
        typer.Option("--json", help="Write JSON lines (with --autotune: the table) to this file; - for stdout."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline as SVG.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Earlier JSON lines: exit code 1 if a row is more than 5% slower.")
    ] = None,
    autotune: Annotated[
        bool, typer.Option("--autotune", help="Time the candidates of the kernels and write this GPU's table.")
    ] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Show cases and peers and stop.")] = False,
) -> None:
    """Speed against other packages and against the machine's own limits.

    Every time stands beside its error against a reference; what computes wrong numbers gets no time. `alloy bench serve`
    puts load on a server instead.
    """
    if list_cases:
        _list()
        return
    if peer and no_peers:
        raise RecipeError("--peer and --no-peers exclude each other; give one of them")
    elsewhere = {"--peer": peer, "--no-peers": no_peers, "--plot": plot, "--compare": compare}
    useless = [name for name, value in elsewhere.items() if value]
    if autotune and useless:
        raise RecipeError(
            f"{useless[0]} means nothing with --autotune, which times our kernels alone; leave one of them out"
        )
    if plot is not None and plot.suffix.lower() != ".svg":
        raise RecipeError(f'--plot = "{plot}": the plot is SVG; choose a name that ends in .svg')
    for target in (None if json_path in (None, "-") else Path(json_path), plot):
        if target is not None:
            check_target(target)
    size: Size = "quick" if quick else "full"
    plan = Plan(_chosen(cases or []), _device(), size, _peers(peer or [], no_peers, quick), only or [])
    if autotune:
        _autotune(plan, json_path)
        return
    earlier = read_run(compare) if compare else None
    found: list[Run] = []
    interrupted: BaseException | None = None
    try:
        run_cases(plan, _progress, found.append)
    except (KeyboardInterrupt, InterruptedRun) as error:
        interrupted = error
    if interrupted is None and plan.only and not found[0].rows:
        raise RecipeError(
            f"no problem of {', '.join(plan.cases)} has {' or '.join(map(repr, plan.only))} in its label; --only takes a part "
            'of what the column "problem" shows'
        )
    for run in found:
        _show(run, json_path)
        if plot is not None:
            from alloy.bench.plot import draw

            draw(run, plot.resolve())
            _progress(f"plot in {plot}")
    if interrupted is not None:
        raise interrupted
    for name in plan.peers or []:
        if not any(row.name.split("/")[0] == name for row in found[0].rows):
            _progress(f"no problem here is solved by {name}")
    _judge(found[0], earlier)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_target(path: Path) -> None:
    """Refuse a file that could not be written, before hours of measurements."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # a file is replaced, which its folder must allow; a pipe or device is not
    for place in [path, path.parent] if path.is_file() else [path if path.exists() else path.parent]:
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def _chosen(names: list[str]) -> dict[str, Case]:
    """The named cases, or all that this machine can run."""
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise RecipeError(f'unknown case "{unknown[0]}". Cases: {", ".join(CASES)}.')
    here = {name: case for name, case in CASES.items() if case.device in ("any", _device())}
    missing = [name for name in names if name not in here]
    if missing:
        raise ResourceError(
            f"{missing[0]} needs a CUDA device, and there is none. Cases for this machine: {', '.join(here)}."
        )
    return {name: here[name] for name in names} if names else here


def _peers(names: list[str], none: bool, quick: bool) -> list[str] | None:
    """Peers to measure; None: all. A quick run has no time for what peers tune when they are first called."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise RecipeError(f'unknown peer "{unknown[0]}". Peers: {", ".join(PEERS)}.')
    if none or (quick and not names):
        return []
    return names or None


def _autotune(plan: Plan, json_path: str | None) -> None:
    """Tune, then write the table of this installation, and once more where --json says."""
    from alloy.bench.autotune import merged_table, table_path

    path = table_path()
    check_target(path)
    found = tune_cases(plan, _progress)
    if not found:
        raise ResourceError("no kernel of these cases has candidates on this machine")
    text = merged_table(found)
    atomic_write(path, text)
    if json_path == "-":
        typer.echo(text, nl=False)
    elif json_path is not None:
        atomic_write(Path(json_path).resolve(), text)
    typer.echo(f"{len(found)} entries in {path}", err=json_path == "-")


def _list() -> None:
    from alloy.bench.peers import version

    for name, case in CASES.items():
        typer.echo(f"{name:<11}{case.help}{' (CUDA)' if case.device == 'cuda' else ''}")
    typer.echo("\npeers")
    for name, peer in PEERS.items():
        typer.echo(f"{name:<15}{version(name) or 'absent':<14}{peer.help}")


def _progress(line: str) -> None:
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.1f}] {line}\n")
    sys.stderr.flush()


def _show(run: Run, json_path: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    if json_path == "-":
        typer.echo("\n".join(run.lines()))
    elif json_path is not None:
        # a link, such as /dev/stdout, stays
        run.write(Path(json_path).resolve())
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {dtype}" for dtype, rate in run.ceilings.flops_per_s.items())
    title = f"{run.machine['device']}: {run.ceilings.bytes_per_s / 1e9:,.4g} GB/s, {rates}"
    table = Table(title=title, title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("problem")
    table.add_column("by")
    for name in ("ms", "ratio", "of floor", "peak GB", "error", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    for row in run.rows:
        table.add_row(*_cells(row, run.machine.get("peak_flops")))
    # nothing is folded away where the output is not a terminal
    console = Console(stderr=json_path == "-", width=None if sys.stdout.isatty() else 180)
    console.print(table)
    for line in pairs(run.rows):
        console.print(line, highlight=False)


def _cells(row: Row, peak_flops: float | None) -> list[str]:
    """One row: a failure shows its word where the time would be. Whole models show their share of the data sheet's rate."""

    def number(value: float | None, form: str = ".3g") -> str:
        return "" if value is None else format(value, form)

    peak = None if row.peak_bytes is None else row.peak_bytes / 1e9
    floor = "" if row.fraction is None else f"{row.fraction:.3f} {'B' if row.bound == 'bytes' else 'F'}"
    time = number(row.ms, ".4g") if row.status == "ok" else {"failed": "FAIL"}.get(row.status, row.status)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    note = (row.message or row.version or "")[:120]
    if row.ms and row.bound == "flops" and row.tokens_per_s and peak_flops:
        rate = row.flops / row.ms * 1e3
        note = f"{rate / 1e12:.0f} TFLOP/s, {rate / peak_flops:.2f} of the data sheet's; {note}".removesuffix("; ")
    if row.peak_bytes is not None and row.planned_bytes is not None:
        note = f"{note}; planned {row.planned_bytes / 1e9:.3g} GB, measured {row.peak_bytes / row.planned_bytes - 1:+.1%}".removeprefix(
            "; "
        )
    cells = [row.case, row.label, row.name, time, ratio, floor, number(peak), number(row.error, ".1e")]
    return [*cells, number(row.tokens_per_s, ",.0f"), note]


def _judge(run: Run, earlier: Run | None) -> None:
    """Exit code 1 for wrong numbers of ours, and for rows that became slower."""
    wrong = [f"{row.case} {row.label}: {row.status}, {row.message}" for row in run.rows if _is_broken(row)]
    late = slower(run.rows, earlier.rows) if earlier else []
    if earlier and not {row.key for row in run.rows} & {row.key for row in earlier.rows}:
        wrong.append(
            "nothing was compared: the earlier run has none of these rows; compare with a run of the same cases"
        )
    if wrong or late:
        raise AlloyError("\n".join([*wrong, *late]))


def _is_broken(row: Row) -> bool:
    return row.name == OURS and row.status in ("failed", "error")
