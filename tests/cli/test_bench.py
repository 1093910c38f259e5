"""`alloy bench`, as a user runs it."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alloy.bench.case import CASES, Case
from alloy.bench.result import Ceilings, Row, Run
from alloy.cli import main
from alloy.errors import ResourceError
from alloy.ops.triton import tuning

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs every case")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake cases stand in the table, and workers find them."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    for name in ("good", "bad", "endless", "tuned"):
        monkeypatch.setitem(CASES, name, Case(f"tests.bench.fake:{name}", "any", "a fake"))


def run(*arguments: object) -> int:
    """Exit code of `alloy bench` with these arguments."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    return int(exit_.value.code or 0)


def test_list_names_cases_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    """What there is, and what is installed."""
    assert run("--list") == 0
    text = capsys.readouterr().out
    assert "ssd-fwd    the chunked scan" in text
    assert f"torch          {torch.__version__}" in text


def earlier(path: Path, fraction: float) -> Path:
    """A run in which the row "two" had reached `fraction` of its floor."""
    found = Run({"device": "test"}, Ceilings(1e9, {"float32": 1e9}))
    found.rows.append(Row("good", "two", "alloy", ms=1.0, fraction=fraction))
    found.write(path)
    return path


@pytest.mark.slow
def test_a_run_is_shown_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table on standard output, progress on standard error, JSON lines and a plot in files; nothing became slower."""
    path, plot, old = tmp_path / "run.jsonl", tmp_path / "run.svg", earlier(tmp_path / "old.jsonl", 1e-12)
    options = ["--peer", "torch", "--json", path, "--plot", plot, "--compare", old]
    assert run("good", "--quick", *options) == 0
    output = capsys.readouterr()
    assert "good one torch/wrong" in output.err
    for part in ("of floor", "FAIL", "wrong numbers in y", "GB/s"):
        assert part in output.out
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["kind"] == "run"
    assert [(row["label"], row["name"]) for row in rows] == [
        ("one", "alloy"),
        ("one", "torch"),
        ("one", "torch/wrong"),
        ("two", "alloy"),
    ]
    assert plot.read_text().startswith("<?xml")


@pytest.mark.slow
def test_slower_rows_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The row is named."""
    old = earlier(tmp_path / "old.jsonl", 1e12)
    assert run("good", "--only", "two", "--no-peers", "--quick", "--compare", old) == 1
    assert "error: good two: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_without_common_rows_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A check that compared nothing has not passed."""
    old = earlier(tmp_path / "old.jsonl", 1.0)
    assert run("good", "--only", "one", "--no-peers", "--quick", "--compare", old) == 1
    assert "error: nothing was compared: the earlier run has none of these rows" in capsys.readouterr().err


@pytest.mark.slow
def test_json_lines_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else is printed there; wrong numbers of ours end with 1."""
    assert run("bad", "--quick", "--only", "wrong", "--json", "-") == 1
    output = capsys.readouterr()
    head, row = [json.loads(line) for line in output.out.splitlines()]
    assert head["kind"] == "run"
    assert (row["label"], row["status"], row["ms"]) == ("wrong", "failed", None)
    assert "error: bad wrong: failed, wrong numbers in y" in output.err


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tuned.json", "-"])
def test_tuned_tables_are_written_where_json_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    """This installation's table, and the same text in the file or on standard output; --only holds here, too."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    assert run("tuned", "--autotune", "--quick", "--only", "two", "--json", target) == 0
    output = capsys.readouterr()
    table = (tmp_path / "tables" / f"{tuning.arch()}.json").read_text()
    assert json.loads(table) == {"fake/two": {"factor": 2}}
    said = "1 entries in " + str(tmp_path)
    if target == "-":
        assert output.out == table
        assert said in output.err
    else:
        assert Path(target).read_text() == table
        assert said in output.out


def test_results_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot be written leaves the earlier one as it was, and nothing beside it."""
    path = earlier(tmp_path / "old.jsonl", 0.5)
    before = path.read_text()

    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(ResourceError, match=r"old\.jsonl: the disk is full"):
            earlier(path, 0.25)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_links_stay(tmp_path: Path) -> None:
    """What a link points at is replaced, not the link: /dev/stdout is one."""
    (tmp_path / "real").mkdir()
    links = [tmp_path / "run.jsonl", tmp_path / "run.svg"]
    for link in links:
        link.symlink_to(Path("real") / link.name)
    assert run("good", "--quick", "--no-peers", "--only", "two", "--json", links[0], "--plot", links[1]) == 0
    assert all(link.is_symlink() and link.read_text() for link in links)


def test_results_go_into_pipes(tmp_path: Path) -> None:
    """What is no file is written to, not replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    earlier(pipe, 0.5)
    assert b'"fraction": 0.5' in os.read(reader, 65536)
    os.close(reader)
    assert pipe.is_fifo()


@without_gpu
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ssd-forward"], 2, 'unknown case "ssd-forward". Cases: ssd-fwd, '),
        (["good", "--peer", "fast"], 2, 'unknown peer "fast". Peers: torch, mamba-ssm'),
        (["conv"], 3, "conv needs a CUDA device, and there is none. Cases for this machine: cpu"),
        (["good", "--autotune"], 3, "no kernel of these cases has candidates"),
        (["good", "--autotune", "--plot", "x.svg"], 2, "--plot means nothing with --autotune, which times our kernels"),
        (["good", "--autotune", "--no-peers"], 2, "--no-peers means nothing with --autotune"),
        (["good", "--compare", "/nowhere/old.jsonl"], 2, "/nowhere/old.jsonl"),
        (["good", "--plot", "roof.png"], 2, '--plot = "roof.png": the plot is SVG; choose a name that ends in .svg'),
        (["good", "--peer", "torch", "--no-peers"], 2, "--peer and --no-peers exclude each other"),
        (["good", "--json", "/"], 2, "/: Is a directory; a folder stands where a file is wanted"),
        (["good", "--only", "three"], 2, "no problem of good has 'three' in its label"),
    ],
)
def test_what_cannot_be_run(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says what there is."""
    assert run(*arguments) == code
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_runs_keep_what_is_done(tmp_path: Path) -> None:
    """Ctrl-C in the second problem: exit code 130, the first one's row is shown and written, no worker stays."""
    path = tmp_path / "run.jsonl"
    code = (
        "from alloy.bench.case import CASES, Case\n"
        "from alloy.cli import main\n"
        "CASES['endless'] = Case('tests.bench.fake:endless', 'any', '')\n"
        f"main(['bench', 'endless', '--json', {str(path)!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "forever" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "one" in out
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [row["label"] for row in rows] == ["one"]
