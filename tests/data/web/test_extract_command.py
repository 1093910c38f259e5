"""`alloy data eval-extract`."""

import json
from pathlib import Path

import pytest

from alloy.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exit_info:
        main(["data", "eval-extract", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    """Two pages with three formulas, of which two are in the texts, and one string of navigation, which is too."""
    pages = [
        {"page": "a.html", "carriers": ["katex"], "equations": [{"latex": "a=1"}, {"latex": "b=2"}]},
        {"page": "b.html", "carriers": ["image-alt"], "equations": [{"latex": "c=3"}], "boilerplate": ["Menu"]},
    ]
    (tmp_path / "pages").mkdir()
    for page, text in zip(pages, ["$a=1$ or b=2", "Menu"], strict=True):
        (tmp_path / "pages" / page["page"]).write_text("<p>words")
        (tmp_path / f"{page['page']}.txt").write_text(text)
    (tmp_path / "expected.jsonl").write_text("\n".join(map(json.dumps, pages)))
    return ["--expected", tmp_path, "--outputs", tmp_path]


def test_table_and_misses(capsys: pytest.CaptureFixture[str], options: list[object]) -> None:
    """A line for each family or page, all of them, the mean of families, and what is missed."""
    code, out, _ = run(capsys, *options)
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in out.splitlines() if line.startswith("│")}
    assert code == 0
    assert {name: [cell.strip() for cell in cells] for name, cells in rows.items()} == {
        "katex": ["2", "100.0", "50.0"],
        "image": ["1", "0.0", "0.0"],
        "all": ["3", "66.7", "33.3"],
        "mean of carriers": ["", "50.0", "25.0"],
    }
    assert "eq          b.html: c=3" in out
    assert "boilerplate b.html: Menu" in out
    _, out, _ = run(capsys, *options, "--by", "page")
    assert "│ a.html " in out


def test_goals_decide_the_exit_code(capsys: pytest.CaptureFixture[str], options: list[object]) -> None:
    """At least, for shares that should be high; at most, for boilerplate; what is not measured is not met."""
    assert run(capsys, *options, "--min", "eq=66,eq_macro=50,boilerplate=100")[0] == 0
    code, _, err = run(capsys, *options, "--min", "eq=66.7,boilerplate=4,prose=1")
    assert (code, err.splitlines()) == (
        1,
        ["eq = 66.67, below 66.7", "boilerplate = 100.00, above 4", "prose: the set measures none"],
    )


def test_json(capsys: pytest.CaptureFixture[str], options: list[object]) -> None:
    """The same numbers for machines."""
    code, out, _ = run(capsys, *options, "--json")
    data = json.loads(out)
    assert (code, data["pages"], data["equations"], data["by_carrier"]["katex"]["eq_delim"]) == (0, 2, 3, 50)
    assert {"page": "b.html", "metric": "eq", "wanted": "c=3"} in data["misses"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--by", "host"], '--by = "host" is neither carrier nor page'),
        (["--min", "equations=3"], '"equations" is no metric; use eq, eq_delim'),
        (["--min", "eq"], '"eq" is not NAME=NUMBER'),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], options: list[object], more: list[str], message: str) -> None:
    """Before anything is measured, with exit code 2."""
    code, _, err = run(capsys, *options, *more)
    assert (code, message in err) == (2, True)
