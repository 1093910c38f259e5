"""`alloy data eval-extract`: how well pages become text."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alloy.errors import RecipeError

if TYPE_CHECKING:
    from alloy.data.web.extraction import Evaluation

# a smaller number is better
LESS_IS_BETTER = ("boilerplate", "error_rate")


def eval_extract(
    expected: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of expected.jsonl and pages/ or pages.warc.gz.")
    ],
    renderer: Annotated[str, typer.Option(metavar="dom|lynx|dom+lynx", help="What makes text of the pages.")] = "dom",
    outputs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measure texts made elsewhere instead: PAGE.txt or PAGE.md.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="carrier|page", help="What a line of the table is.")] = "carrier",
    minimum: Annotated[
        str, typer.Option("--min", metavar="eq=99.5,boilerplate=4", help="Exit with 1 if a share is worse.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how much of formulas, code and prose survives as text, and how much of the navigation."""
    from alloy.data.web.extraction import evaluate, evaluate_outputs
    from alloy.data.web.renderers import find_renderer

    if by not in ("carrier", "page"):
        raise RecipeError(f'--by = "{by}" is neither carrier nor page')
    goals = _goals(minimum)
    render = None if outputs else find_renderer(renderer)
    evaluation = evaluate(expected, render) if render else evaluate_outputs(expected, outputs or "")
    name = str(outputs) if outputs else renderer
    if as_json:
        typer.echo(json.dumps({"renderer": name, **evaluation.as_dict()}, ensure_ascii=False))
    else:
        _show(evaluation, name, by)
    missed = _missed(evaluation.summary(), goals)
    for line in missed:
        typer.echo(line, err=True)
    if missed:
        raise typer.Exit(1)


def _goals(text: str) -> dict[str, float]:
    from alloy.data.web.extraction import SUMMARY

    goals: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in SUMMARY:
            raise RecipeError(f'--min: "{name}" is no metric; use {", ".join(SUMMARY)}')
        try:
            goals[name.strip()] = float(value)
        except ValueError as error:
            raise RecipeError(f'--min: "{part}" is not NAME=NUMBER, as eq=99.5') from error
    return goals


def _missed(summary: dict[str, float | None], goals: dict[str, float]) -> list[str]:
    """A line for each goal that is not met; what the set does not measure is not met."""
    lines: list[str] = []
    for name, goal in goals.items():
        value = summary[name]
        if value is None:
            lines.append(f"{name}: the set measures none")
        elif value > goal if name in LESS_IS_BETTER else value < goal:
            lines.append(f"{name} = {value:.2f}, {'above' if name in LESS_IS_BETTER else 'below'} {goal:g}")
    return lines


def _show(evaluation: "Evaluation", name: str, by: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from alloy.data.web.extraction import METRICS

    summary = evaluation.summary()
    columns = [*METRICS, "length"]
    table = Table(title=f"{name}: {len(evaluation.pages)} pages", title_justify="left")
    table.add_column(by)
    table.add_column("formulas", justify="right")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    counts = {key: sum(len(score.page.equations) for score in group) for key, group in evaluation.groups(by).items()}
    rows = {**evaluation.rows(by), "all": summary}
    for key, row in rows.items():
        table.add_section() if key == "all" else None
        count = counts.get(key, sum(counts.values()))
        table.add_row(key, str(count or ""), *(_cell(row[column], column) for column in columns))
    macro = {"eq": summary["eq_macro"], "eq_delim": summary["eq_delim_macro"]}
    table.add_row("mean of carriers", "", *(_cell(macro.get(column), column) for column in columns))
    # nothing is folded away where the output is not a terminal
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    shown = [miss for miss in evaluation.misses() if miss["metric"] not in ("eq_soft", "eq_struct", "code_text")]
    for miss in shown:
        wanted = " ".join(miss["wanted"].split())
        console.print(f"{miss['metric']:<11} {miss['page']}: {wanted}", markup=False, highlight=False, soft_wrap=True)


def _cell(value: float | None, column: str) -> str:
    return "" if value is None else f"{value:.2f}" if column == "length" else f"{value:.1f}"
