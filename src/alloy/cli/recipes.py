"""`alloy recipes`: list the shipped recipes, show one fully resolved, check one or all."""

from typing import Annotated

import typer

from alloy.cli.run_command import Overrides
from alloy.core.compose import SHIPPED, compose, display_path, shipped_names
from alloy.core.recipe import load_recipe
from alloy.errors import RecipeError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List, show and check recipes.")


@app.command("list")
def list_recipes() -> None:
    """Names of the shipped recipes, the command that runs each, and their first line."""
    names = runnable()
    width = max((len(name) for name in names), default=0)
    for name in names:
        command = str(compose(name).data.get("command", "?"))
        typer.echo(f"{name.ljust(width)}  {command.ljust(10)}  {first_comment(name)}".rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="RECIPE")], overrides: Overrides = None) -> None:
    """Print the merged recipe as TOML, with the origin of each key as a comment."""
    typer.echo(load_recipe(name, overrides or ()).to_toml(origins=True), nl=False)


@app.command()
def check(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Default: all shipped recipes.")] = None,
    overrides: Overrides = None,
) -> None:
    """Validate a recipe, or all that are shipped."""
    problems: list[str] = []
    names = [name] if name else runnable()
    for one in names:
        try:
            load_recipe(one, overrides or ())
        except RecipeError as error:
            problems.append(str(error))
            continue
        typer.echo(f"{one}: ok")
    if problems:
        raise RecipeError("\n".join(problems))


def runnable() -> list[str]:
    """Shipped recipes; what lies in `base/` is there to be extended."""
    return [name for name in shipped_names() if not name.startswith("base/")]


def first_comment(name: str) -> str:
    """What a shipped recipe's first comment line says."""
    first = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else display_path(SHIPPED / f"{name}.toml")
