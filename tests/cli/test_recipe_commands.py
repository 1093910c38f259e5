"""`alloy recipes`, `alloy report`, `alloy doctor`, and what commands that run a recipe share."""

import json
import tomllib
from pathlib import Path

import pytest

from alloy.cli import main
from alloy.cli.doctor import diagnose
from alloy.cli.run_command import closing_lines, run_recipe_command
from alloy.core import compose
from alloy.core.metrics import MetricLog
from alloy.core.recipe import COMMANDS, Config, Recipe, RunOptions, RunResult
from alloy.core.runs import RunDir
from alloy.errors import RecipeError


class Train(Config):
    steps: int = 10
    lr: float = 1e-3


class PlayRecipe(Recipe):
    train: Train = Train()

    def run(self, options: RunOptions) -> RunResult:
        assert options.loaded is not None
        with RunDir.create(options.loaded, options, "play") as run, MetricLog(run.path / "metrics.jsonl") as log:
            for step in range(1, self.train.steps + 1):
                log.log(step, loss=1 / step)
        return RunResult(run.path, {"loss": 1 / self.train.steps}, run.path / "checkpoint")


if "play" not in COMMANDS:
    COMMANDS.add("play", PlayRecipe)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipes folder of our own, with a fragment and two recipes; the working directory is elsewhere."""
    folder = tmp_path / "alloy" / "recipes"
    (folder / "play").mkdir(parents=True)
    (folder / "base").mkdir()
    (folder / "base" / "steps.toml").write_text('command = "play"\n[train]\nsteps = 3\n')
    (folder / "play" / "tiny.toml").write_text(
        '# A few steps of nothing.\nextends = ["base/steps"]\n[train]\nlr = 0.5\n'
    )
    (folder / "play" / "wide.toml").write_text('command = "play"\nextends = ["../base/steps.toml", "play/tiny.toml"]\n')
    monkeypatch.setattr(compose, "SHIPPED", folder)
    monkeypatch.setattr("alloy.cli.recipes.SHIPPED", folder)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return folder


def alloy(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_list_shows_recipes_and_leaves_fragments_out(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, command, first comment line."""
    assert alloy("recipes", "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "play/tiny  play        A few steps of nothing.",
        "play/wide  play        alloy/recipes/play/wide.toml",
    ]


def test_show_prints_toml_with_origins(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A valid, complete recipe; each key says where it came from."""
    assert alloy("recipes", "show", "play/tiny", "seed=4") == 0
    shown = capsys.readouterr().out
    assert tomllib.loads(shown) == {"command": "play", "seed": 4, "train": {"steps": 3, "lr": 0.5}}
    assert 'seed = 4  # override "seed=4"' in shown
    assert "steps = 3  # alloy/recipes/base/steps.toml:3" in shown
    assert "lr = 0.5  # alloy/recipes/play/tiny.toml:4" in shown


def test_check(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All recipes or one; every broken one is named and the exit code is 2."""
    assert alloy("recipes", "check") == 0
    assert capsys.readouterr().out == "play/tiny: ok\nplay/wide: ok\n"
    (shipped / "play" / "bad.toml").write_text('command = "play"\n[train]\nstep = 3\n')
    (shipped / "play" / "worse.toml").write_text('command = "play"\nsed = 3\n')
    assert alloy("recipes", "check") == 2
    captured = capsys.readouterr()
    assert captured.out == "play/tiny: ok\nplay/wide: ok\n"
    assert captured.err.splitlines() == [
        'error: alloy/recipes/play/bad.toml:3: unknown key "train.step". Did you mean "train.steps"?',
        'alloy/recipes/play/worse.toml:2: unknown key "sed". Did you mean "seed"?',
    ]
    assert alloy("recipes", "check", "play/tiny", "train.lr=x") == 2
    assert alloy("recipes", "check", "play/tini") == 2
    assert 'Did you mean "play/tiny"?' in capsys.readouterr().err


def test_run_command_prints_where_things_are(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run directory, checkpoint, next commands that it can take; on standard error."""
    result = run_recipe_command("play", "play/tiny", ["train.steps=4"], RunOptions(run_dir=Path("x")))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "run         x", f"checkpoint  {result.checkpoint}", "next:", f"  alloy model info {result.checkpoint}"
    ]  # fmt: skip
    assert result.checkpoint is not None
    result.checkpoint.mkdir(parents=True, exist_ok=True)
    (result.checkpoint / "tokenizer.json").touch()
    assert [line.split()[1] for line in closing_lines(result).splitlines()[3:]] == ["generate", "chat", "eval"]


def test_run_command_as_json(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object on standard output."""
    run_recipe_command("play", "play/tiny", None, RunOptions(run_dir=Path("x"), json=True))
    assert json.loads(capsys.readouterr().out) == {"dir": "x", "checkpoint": "x/checkpoint", "metrics": {"loss": 1 / 3}}


def test_run_command_refuses_a_recipe_of_another_command(shipped: Path) -> None:
    """It names both commands and where the recipe says so."""
    with pytest.raises(RecipeError, match=r"steps\.toml:1: recipe .* is for `alloy play`, not `alloy pretrain`"):
        run_recipe_command("pretrain", "play/tiny", None, RunOptions())


def test_report_command(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run: its own report. Several: a comparison. No run: exit code 4."""
    for name in ("x", "y"):
        run_recipe_command("play", "play/tiny", None, RunOptions(run_dir=Path(name), quiet=True))
    assert alloy("report", "x") == 0
    assert capsys.readouterr().out == "x/report.html\n"
    assert alloy("report", "x", "y", "--out", "both.html") == 0
    assert "Comparison of 2 runs" in Path("both.html").read_text()
    assert alloy("report", "z") == 4
    assert alloy("report", "x", "--out", "one.html") == 0
    assert Path("one.html").read_text() == Path("x/report.html").read_text()
    assert "z: no run there" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and text hold the same; the advice goes away when it is followed."""
    import torch

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert alloy("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["versions", "devices", "threads", "backends", "extras", "advice"]
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["backends"]["ssd_scan"]["cpu"] in ("torch", "cpu")
    assert any("GOMP_SPINCOUNT=1000" in line for line in facts["advice"])
    assert alloy("doctor") == 0
    text = capsys.readouterr().out
    assert "GOMP_SPINCOUNT=1000" in text
    assert "ssd_scan" in text
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert diagnose()["advice"] == []
