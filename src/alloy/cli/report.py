"""`alloy report`: rebuild the HTML report of a run, or compare several."""

from pathlib import Path
from typing import Annotated

import typer

from alloy.core.run_report import compare_runs, report_run
from alloy.core.runs import MANIFEST
from alloy.errors import DataError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: report.html of the one run, else comparison.html).")
    ] = None,
) -> None:
    """Rebuild report.html of one run, or write one page that compares several."""
    for run in runs:
        if not (run / MANIFEST).is_file():
            raise DataError(f"{run}: no run there ({MANIFEST} is missing). Give a directory below runs/.")
    typer.echo(report_run(runs[0], out) if len(runs) == 1 else compare_runs(runs, out or Path("comparison.html")))
