"""`alloy demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    text: Annotated[
        Path | None, typer.Option(help="Your own text: a file or a folder (default: Python's documentation).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds of training.")] = 250.0,
    source_mb: Annotated[
        float, typer.Option(min=0.0, help="Megabytes of Python source added to the training text.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, data order and samples.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Directory of the run (default: below runs/).")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew although an interrupted demo could be continued.")
    ] = False,
) -> None:
    """Real text to a trained, talking hybrid model in minutes. Interrupted, the same command goes on where it stopped."""
    from alloy.demo import Settings, run_demo

    run_demo(Settings(text=text, seconds=seconds, source_mb=source_mb, seed=seed), run_dir, fresh)
