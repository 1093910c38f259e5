"""The main job end to end, in seconds: all stages, interruption, the user's own text, refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alloy.demo import SCORES, SETTINGS, Settings, run_demo
from alloy.errors import DataError, RecipeError


def make_text(folder: Path) -> Path:
    """Thirty short files of plain sentences, a text of our own."""
    words = ["the", "cache", "holds", "keys", "and", "values", "of", "every", "layer", "while", "states", "move", "on"]
    folder.mkdir()
    for i in range(30):
        draw = random.Random(i)
        lines = [" ".join(draw.choices(words, k=11)) + "." for _ in range(60)]
        (folder / f"part-{i:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_demo_on_own_text(tmp_path: Path) -> None:
    """All six stages leave what they promise, and a finished folder is not overwritten."""
    settings = Settings(text=make_text(tmp_path / "text"), seconds=4)
    folder = run_demo(settings, tmp_path / "demo")
    scores = json.loads((folder / "train" / SCORES).read_text())
    rows = scores["held-out bits per byte"]
    assert len(rows) == 4
    assert all(0 < value < 8 for value in rows.values())
    same, answers = scores["samples"]["same text with drafts"].split(" of ")
    assert same == answers
    assert scores["transformers"]["largest difference of a logit"] < 2e-4
    assert (folder / "train" / "report.html").stat().st_size > 10_000
    assert json.loads((folder / SETTINGS).read_text())["finished"]
    with pytest.raises(RecipeError, match="holds a demo already"):
        run_demo(settings, folder)


@pytest.mark.slow
def test_interrupted_demo_goes_on(tmp_path: Path) -> None:
    """SIGTERM during training saves and exits with 143; the same command finishes the same folder."""
    text = make_text(tmp_path / "text")
    command = [sys.executable, "-m", "alloy", "demo", "--seconds", "16", "--text", str(text), "--run-dir", "demo"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "demo" / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert (tmp_path / "demo" / "train" / "state" / "latest").exists()
    before = len(metrics.read_text().splitlines())
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(metrics.read_text().splitlines()) >= before
    assert json.loads((tmp_path / "demo" / SETTINGS).read_text())["finished"]


def test_unfinished_demo_of_other_settings_is_refused(tmp_path: Path) -> None:
    """A folder belongs to the settings it was begun with; the message names what changed."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps(Settings(seconds=5).as_dict()))
    with pytest.raises(RecipeError, match=r"seconds was 5.*now 6"):
        run_demo(Settings(seconds=6), folder)


def test_strange_folder_is_refused(tmp_path: Path) -> None:
    """A folder with something else in it is left alone."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not empty"):
        run_demo(Settings(seconds=1), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"caf\xe9 " * 50, "not UTF-8"), (b"too short", "too short")],
)
def test_bad_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Empty, wrongly encoded or tiny texts stop before anything is trained."""
    text = tmp_path / "mine.txt"
    text.write_bytes(content)
    with pytest.raises(DataError, match=message):
        run_demo(Settings(text=text, seconds=1), tmp_path / "demo")
    with pytest.raises(DataError, match=r"does not exist"):
        run_demo(Settings(text=tmp_path / "nowhere.txt", seconds=1), tmp_path / "other")
    assert not (tmp_path / "other").exists()
