"""`alloy data train-scorer`: a scorer of one's own from labelled rows."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from alloy.errors import DataError, RecipeError


def train_scorer(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Rows: .parquet, .jsonl[.gz|.zst], folders.")],
    out: Annotated[Path, typer.Option(help="Folder to write: the scorer, scorer.json and report.html.")],
    label: Annotated[
        str | None, typer.Option(help="Column of grades from 0 to 5, such as label_math5 of alloy data clean.")
    ] = None,
    good: Annotated[
        Path | None, typer.Option(help="Instead: a file of URLs, hosts and beginnings* of grade 5.")
    ] = None,
    bad: Annotated[Path | None, typer.Option(help="And of grade 0; without it, all others are.")] = None,
    text: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    group: Annotated[
        str | None, typer.Option(help="Column of what must not be trained and tested on; default: the host of url.")
    ] = None,
    backend: Annotated[Literal["linear", "encoder"], typer.Option(help="Hashed words, or an encoder.")] = "linear",
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the encoder to begin with.")] = None,
    test_share: Annotated[float, typer.Option(help="Share of the rows that are tested on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 0,
) -> None:
    """Train a scorer (0-5) on labelled rows and test it on hosts it has not seen."""
    from pydantic import ValidationError

    from alloy.data.document import require_columns
    from alloy.data.parts import columns_of, find_files, list_parts, read_part
    from alloy.data.train_scorer import ScorerConfig, grades_of_urls, host_of
    from alloy.data.train_scorer import train_scorer as train

    if (label is None) == (good is None):
        raise RecipeError("grades come from --label COLUMN or from --good FILE; give one of the two.")
    try:
        config = ScorerConfig(backend=backend, model=model, test_share=test_share, seed=seed)
    except ValidationError as error:
        raise RecipeError(f"test_share = {test_share} is not between 0 and 1.") from error
    needs = [text, *([label] if label else ["url"]), group or "url"]
    columns: dict[str, list[object]] = {name: [] for name in needs}
    for part in list_parts(find_files(inputs, raw=False), 64 << 20):
        require_columns(columns_of(part), needs, "train-scorer", part.files[0])
        for table in read_part(part, rows=4096):
            for name, values in columns.items():
                values += table[name].to_pylist()
    if label:
        grades = [_grade(value, label) for value in columns[label]]
    else:
        assert good is not None, "checked above"
        grades = grades_of_urls([str(url or "") for url in columns["url"]], good, bad)
    rows = [row for row, grade in enumerate(grades) if grade is not None and columns[text][row]]
    hosts = columns[group or "url"]
    groups = [str(hosts[row]) if group else host_of(str(hosts[row] or "")) for row in rows]
    facts = train([str(columns[text][row]) for row in rows], [grades[row] or 0.0 for row in rows], groups, config, out)
    test = facts["test"]
    left_out = f", {len(grades) - len(rows)} without a grade or text left out" if len(rows) < len(grades) else ""
    typer.echo(f"{facts['train']['rows']:,} rows of {facts['train']['hosts']:,} hosts trained on{left_out}")
    shown = ", ".join(
        f"{name} {'-' if test[name] is None else format(test[name], '.3f')}"
        for name in ("precision", "recall", "f1", "spearman", "mae")
    )
    typer.echo(f"{out}: {test['rows']:,} rows of {test['hosts']:,} other hosts, scores >= 3: {shown}; see report.html")


def _grade(value: object, column: str) -> float | None:
    if value is None:
        return None
    try:
        return float(str(value))
    except ValueError as error:
        raise DataError(f'column "{column}" holds {value!r}, which is no grade; give numbers from 0 to 5.') from error
