"""What a person sees while training."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from alloy.core import logging as alloy_logging
from alloy.core.logging import (
    ProgressLine,
    get_logger,
    progress_text,
    setup,
    short_count,
    short_exponent,
    short_time,
    start_panel,
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    setup()
    alloy_logging.console.cache_clear()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A console that believes it is a terminal."""
    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(alloy_logging, "console", lambda: fake)
    return screen


def test_progress_text_is_the_style_guides_example() -> None:
    """Character for character."""
    text = progress_text(
        1240,
        5000,
        loss=2.9131,
        lr=2.8e-3,
        tokens_per_s=412_345,
        mfu_frac=0.41,
        grad=0.83,
        memory_bytes=61.2 * 2**30,
        eta_s=4325,
    )
    assert text == "step 1,240/5,000  loss 2.913  lr 2.8e-3  412k tok/s  MFU 41%  grad 0.83  mem 61.2 GiB  eta 1h 12m"
    assert progress_text(3, loss=1.0) == "step 3  loss 1.000"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7.25, "7.25"),
        (999, "999"),
        (999.7, "1k"),
        (1234, "1.23k"),
        (99_900, "99.9k"),
        (999_600, "1M"),
        (2.5e9, "2.5G"),
    ],
)
def test_short_count(value: float, text: str) -> None:
    """Three digits, rounded into the next unit where they would be four."""
    assert short_count(value) == text


def test_short_forms() -> None:
    """Exponents without leading zeros; durations in two units."""
    assert [short_exponent(value) for value in (0.0028, 1e-12, 3.0, 0)] == ["2.8e-3", "1.0e-12", "3.0e0", "0"]
    assert [short_time(value) for value in (3.2, 65, 4325, 200_000, float("nan"))] == [
        "3s",
        "1m 05s",
        "1h 12m",
        "2d 07h",
        "?",
    ]


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line every `every` steps and at the end, on standard error, no control codes; the same in log.txt."""
    setup(file=tmp_path / "log.txt")
    with ProgressLine(steps=7, every=3) as line:
        for step in range(1, 8):
            line.update(step, loss=step / 10)
        line.note("validation  loss 0.712 (-0.031)")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 3/7  loss 0.300",
        "step 6/7  loss 0.600",
        "step 7/7  loss 0.700",
        "validation  loss 0.712 (-0.031)",
    ]
    written = [re.sub(r"^\d\d:\d\d:\d\d ", "", row) for row in (tmp_path / "log.txt").read_text().splitlines()]
    assert written == captured.err.splitlines()


def test_live_line_on_a_terminal(tmp_path: Path, terminal: io.StringIO) -> None:
    """Redrawn in place; notes stay above it; log.txt has plain lines all the same."""
    setup(file=tmp_path / "log.txt")
    with ProgressLine(steps=5, every=2) as line:
        line.update(1, loss=0.5)
        line.update(2, loss=0.4)
        line.note("checkpoint written")
    assert "checkpoint written" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
    log = (tmp_path / "log.txt").read_text()
    assert "step 2/5  loss 0.400" in log
    assert "step 1/5" not in log
    assert "\x1b" not in log


def test_quiet_keeps_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file still gets everything."""
    setup(console=False, file=tmp_path / "log.txt")
    log = get_logger("alloy.train.loop")
    log.info("step")
    log.warning("look %s", "here")
    assert capsys.readouterr().err == "look here\n"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_setup_again_replaces_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    """No line twice."""
    setup()
    setup()
    get_logger("elsewhere").info("once")
    assert capsys.readouterr().err == "once\n"


def test_start_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned plain lines off the terminal."""
    setup()
    start_panel("pretrain tiny", {"model": "hybrid", "parameters": "1.2M"})
    assert capsys.readouterr().err == "pretrain tiny\n  model       hybrid\n  parameters  1.2M\n"


def test_start_panel_on_a_terminal(tmp_path: Path, terminal: io.StringIO) -> None:
    """A box on the screen, plain text in the file."""
    setup(file=tmp_path / "log.txt")
    start_panel("pretrain tiny", {"model": "hybrid"})
    assert "╭" in terminal.getvalue()
    assert terminal.getvalue().count("hybrid") == 1
    assert "╭" not in (tmp_path / "log.txt").read_text()
    assert "hybrid" in (tmp_path / "log.txt").read_text()
