"""What all commands of the form `alloy COMMAND RECIPE [dotted.key=value ...]` share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from alloy.core.recipe import LoadedRecipe, RunOptions, RunResult, load_recipe, run
from alloy.errors import RecipeError

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped name (alloy recipes list) or a TOML file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.lr=3e-4.")
]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", help="Directory of the run (default: below runs/).")]
Resume = Annotated[str | None, typer.Option(metavar="auto|DIR", help="Continue the newest unfinished run, or DIR.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe and print sizes, memory and time; run nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Profile = Annotated[
    bool, typer.Option("--profile", help="Print where the time of the first steps goes, by kind of layer.")
]


def run_recipe_command(command: str, recipe: str, overrides: list[str] | None, options: RunOptions) -> RunResult:
    """Load, check and run a recipe for `alloy COMMAND`, then say where things are."""
    loaded = load_for_command(command, recipe, overrides)
    result = run(loaded.recipe, replace(options, loaded=loaded))
    if options.json:
        checkpoint = str(result.checkpoint) if result.checkpoint else None
        typer.echo(
            json.dumps({"dir": str(result.dir), "checkpoint": checkpoint, "metrics": result.metrics}, default=str)
        )
    elif not options.quiet and not options.dry_run:
        typer.echo(closing_lines(result), err=True)
    return result


def load_for_command(command: str, recipe: str, overrides: list[str] | None) -> LoadedRecipe:
    """The recipe, refused if it is for another command."""
    loaded = load_recipe(recipe, overrides or ())
    if loaded.recipe.command != command:
        other = loaded.recipe.command
        raise RecipeError(
            f'{loaded.origins["command"]}: recipe "{recipe}" is for `alloy {other}`, not `alloy {command}`.'
        )
    return loaded


def closing_lines(result: RunResult) -> str:
    """Where the results are, and what to type next."""
    lines = [f"run         {result.dir}"]
    report = result.dir / "report.html"
    if report.is_file():
        lines.append(f"report      {report}")
    if result.checkpoint is None:
        return "\n".join(lines)
    lines += [f"checkpoint  {result.checkpoint}", "next:"]
    if not (result.checkpoint / "tokenizer.json").is_file():
        # trained on shards that brought none: no text goes in
        return "\n".join([*lines, f"  alloy model info {result.checkpoint}"])
    lines += [
        f'  alloy generate {result.checkpoint} --prompt "Once"',
        f"  alloy chat {result.checkpoint}",
        f"  alloy eval {result.checkpoint} --ppl FILE",
    ]
    return "\n".join(lines)
