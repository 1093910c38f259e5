"""`alloy data STAGE`: one command a stage, its options made of the stage's table of settings."""

import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from alloy.errors import RecipeError

if TYPE_CHECKING:
    from alloy.data.pipeline import StageConfig, Totals

# of a plain log; a terminal's line is rewritten more often
EVERY_S, TERMINAL_S = 5.0, 0.2

Inputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUT", help="Files, folders or 'patterns'; rows as .parquet or .jsonl[.gz|.zst]."),
]
Out = Annotated[Path | None, typer.Option(help="Folder to write; without it rows go to standard output as JSON lines.")]
Text = Annotated[bool, typer.Option("--text", help="Without --out: the texts alone, not rows.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what other settings or inputs made in --out.")]
Progress = Annotated[Literal["line", "json", "none"], typer.Option(help="On standard error.")]
Kind = Annotated[
    Literal["serial", "process", "ray", "array"], typer.Option("--executor", help="Who works on the parts.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes or Ray workers; default: one a core.")]
Address = Annotated[str | None, typer.Option("--ray-address", help="Ray cluster to use; default: a local one.")]
Index = Annotated[int | None, typer.Option(min=0, help="Of this task in a job array, where no scheduler says.")]
Count = Annotated[int | None, typer.Option(min=1, help="Tasks of the job array, where no scheduler says.")]


def add_stage_command(app: typer.Typer, name: str) -> None:
    """Add the command of the stage called `name`."""
    from alloy.data.pipeline import STAGES

    stage: Any = STAGES.get(name)
    app.command(name, help=inspect.getdoc(stage), no_args_is_help=True)(_command(stage.Config))


def _command(config: "type[StageConfig]") -> Callable[..., None]:
    """A function whose parameters are the table's fields and those that all stages have."""
    fields = {name: field for name, field in config.model_fields.items() if name not in ("stage", "input")}

    def command(**given: Any) -> None:
        settings = {name: given.pop(name) for name in fields}
        wanted = {name: value for name, value in settings.items() if value not in (None, [])}
        run_command(_checked(config, wanted), **given)

    parameters = {"inputs": (Inputs, inspect.Parameter.empty), "out": (Out, None)}
    for name, field in fields.items():
        default, kind = field.get_default(call_default_factory=True), field.annotation
        if get_origin(kind) in (list, tuple):
            inner = get_args(kind)[0]
            # typer has no lists of choices; pydantic refuses what is none
            kind, default = list[str if get_origin(inner) is Literal else inner], list(default or ())
        flag = name.replace("_", "-")
        flags = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
        bounds = {
            to: getattr(m, of) for m in field.metadata for to, of in (("min", "ge"), ("max", "le")) if hasattr(m, of)
        }
        option = typer.Option(flags, help=field.description, show_default=default not in (None, []), **bounds)
        parameters[name] = (Annotated[kind, option], inspect.Parameter.empty if field.is_required() else default)
    for name, kind, default in (
        ("kind", Kind, "process"),
        ("workers", Workers, None),
        ("address", Address, None),
        ("array_index", Index, None),
        ("array_count", Count, None),
        ("overwrite", Overwrite, False),
        ("progress", Progress, "line"),
        ("text", Text, False),
    ):
        parameters[name] = (kind, default)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, (kind, default) in parameters.items()
        ]
    )
    command.__annotations__ = {name: kind for name, (kind, _) in parameters.items()}
    return command


def run_command(
    config: "StageConfig",
    inputs: list[str],
    out: Path | None,
    kind: Literal["serial", "process", "ray", "array"],
    workers: int | None,
    address: str | None,
    array_index: int | None,
    array_count: int | None,
    overwrite: bool,
    progress: Literal["line", "json", "none"],
    text: bool,
) -> None:
    """Run a stage for the command line and say what came of it."""
    from alloy.data.executors import Executor
    from alloy.data.pipeline import run_stage

    executor = Executor(kind=kind, workers=workers, address=address, array_index=array_index, array_count=array_count)
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            run_stage(config, inputs, Path(folder), Executor(kind="serial"))
            _print_rows(Path(folder), text)
        return
    with StageProgress(config.stage, progress) as line:
        manifest = run_stage(config, inputs, out, executor, overwrite, line.update)
    if progress == "json":
        typer.echo(
            json.dumps({name: manifest.get(name) for name in ("stage", "status", "rows_in", "rows_out", "counts")})
        )
    elif progress == "line":
        typer.echo(summary(manifest, out), err=True)


def summary(manifest: dict[str, Any], out: Path) -> str:
    """What a finished stage did, in a few lines."""
    rows_in, rows_out = manifest.get("rows_in", 0), manifest.get("rows_out", 0)
    lines = [f"{out}: {rows_in:,} rows in, {rows_out:,} out, {manifest.get('wall_s', 0.0):.1f} s"]
    lines += [f"  {name}  {number:,}" for name, number in manifest.get("counts", {}).items()]
    lines += [f"  left out: {name}  {number:,}" for name, number in manifest.get("losses", {}).items()]
    return "\n".join(lines)


class StageProgress:
    """A line of rates on standard error: rewritten on a terminal, now and then elsewhere, JSON on request."""

    def __init__(self, stage: str, kind: Literal["line", "json", "none"]) -> None:
        self.stage, self.kind = stage, kind
        self._is_live = kind == "line" and sys.stderr.isatty()
        self._start = self._told = time.monotonic()

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_live:
            sys.stderr.write("\r\033[K")

    def update(self, totals: "Totals") -> None:
        """Show how far the stage is."""
        from alloy.core.logging import short_count, short_time

        now = time.monotonic()
        if self.kind == "none" or now - self._told < (TERMINAL_S if self._is_live else EVERY_S):
            return
        self._told = now
        spent = max(now - self._start, 1e-9)
        done = min(totals.bytes_done / totals.bytes_all, 1.0) if totals.bytes_all else 1.0
        eta = spent / done - spent if done else float("inf")
        if self.kind == "json":
            facts = {"stage": self.stage, "rows": totals.rows, "done": round(done, 4), "seconds": round(spent, 1)}
            typer.echo(json.dumps(facts), err=True)
            return
        text = (
            f"{self.stage}  {done:.0%}  {totals.rows:,} rows  {short_count(totals.rows / spent)} rows/s  "
            f"{totals.bytes_done / spent / 1e6:.1f} MB/s  eta {short_time(eta)}"
        )
        sys.stderr.write(f"\r\033[K{text}" if self._is_live else text + "\n")
        sys.stderr.flush()


def _print_rows(folder: Path, text: bool) -> None:
    from alloy.data.parts import Part, read_part

    for index, file in enumerate(sorted(folder.glob("part-*"))):
        for table in read_part(Part(index, (str(file),)), rows=256):
            for row in table.to_pylist():
                if text:
                    typer.echo(row.get("cleaned_text") or row.get("text") or "")
                else:
                    typer.echo(json.dumps(row, ensure_ascii=False, default=str))


def _checked(config: "type[StageConfig]", settings: dict[str, Any]) -> "StageConfig":
    """The table of these settings; pydantic's complaint in the words of the command line."""
    from pydantic import ValidationError

    try:
        return config.model_validate({"stage": config.model_fields["stage"].default, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "the settings"
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{flag}: {message[0].lower()}{message[1:]}.") from error
