"""Metric logs, rates, sinks."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from alloy.core.metrics import SINKS, Meter, MetricLog, read_metrics, series
from alloy.errors import DataError, ResourceError


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_records_are_lines_and_floats_survive(tmp_path: Path) -> None:
    """What is read equals what was logged, bit for bit; numbers that are not finite become null."""
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as log:
        log.log(1, loss=0.1 + 0.2, note="é", parts={"a": 1})
        assert len(path.read_text().splitlines()) == 1
        log.log(2, loss=math.nan, other=math.inf)
    first, second = read_metrics(path)
    assert first["loss"] == 0.1 + 0.2
    assert (first["note"], first["parts"]) == ("é", {"a": 1})
    assert (second["loss"], second["other"]) == (None, None)
    assert series([first, second], "loss") == ([1], [0.1 + 0.2])


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00", '{"note": "é'])
def test_torn_last_line_is_ignored_and_removed(tmp_path: Path, torn: str) -> None:
    """A line without its newline was never finished, even if it happens to parse."""
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as log:
        log.log(1)
        log.log(2)
    with path.open("ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("é") else torn.encode())
    assert steps(path) == [1, 2]
    with MetricLog(path) as log:
        log.log(3)
    assert steps(path) == [1, 2, 3]
    assert path.read_bytes().endswith(b"}\n")


def test_a_log_cut_at_any_byte_reads(tmp_path: Path) -> None:
    """However much of the file reached the disk, the whole lines are read and the log goes on."""
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as log:
        for step in range(1, 4):
            log.log(step, loss=1 / step)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = list(range(1, whole[:cut].count(b"\n") + 1))
        assert steps(path) == expected
        with MetricLog(path) as log:
            log.log(9)
        assert steps(path) == [*expected, 9]


def test_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    """The last newline is searched backwards over any distance."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "x" * 200_001)
    MetricLog(path).close()
    assert path.read_text() == '{"step": 1}\n'
    path.write_text("x" * 70_001)
    MetricLog(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("bad", ["{torn}", "[1]"])
def test_damage_inside_is_an_error_with_its_line(tmp_path: Path, bad: str) -> None:
    """Only the last line may be torn."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)
    with pytest.raises(DataError, match="no such metric log"):
        read_metrics(tmp_path / "nothing")


class Recorder:
    """A sink that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, step: int, values: Any) -> None:
        self.calls.append((step, dict(values)))

    def truncate_after(self, step: int) -> None:
        self.calls.append(f"truncate {step}")

    def close(self) -> None:
        self.calls.append("close")


def test_truncate_after_drops_later_steps(tmp_path: Path) -> None:
    """A resumed run writes them again; sinks are told."""
    path, sink = tmp_path / "metrics.jsonl", Recorder()
    with MetricLog(path, [sink]) as log:
        for step in (5, 10, 10, 15):
            log.log(step, loss=1.0)
        log.truncate_after(10)
        log.log(11, loss=2.0)
    assert steps(path) == [5, 10, 10, 11]
    assert sink.calls[4:] == ["truncate 10", (11, {"loss": 2.0}), "close"]


@pytest.mark.slow
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    """TensorBoard's own reader gives the numbers back, without the steps that a resume dropped."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink: Any = SINKS.get("tensorboard")
    with MetricLog(tmp_path / "metrics.jsonl", [sink(tmp_path / "tb")]) as log:
        for step in (1, 2, 3):
            log.log(step, loss=float(step), note="text")
        log.truncate_after(2)
        log.log(3, loss=7.0)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 7.0)]


def test_full_disk(tmp_path: Path) -> None:
    """/dev/full refuses every byte, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="the disk is full") as caught, MetricLog(path) as log:
        log.log(1, loss=1.0)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_meter_leaves_the_first_steps_out() -> None:
    """Five slow steps do not count in the average; the recent rate is over the window."""
    meter = Meter(window=2)
    assert (meter.rate, meter.recent) == (None, None)
    for _ in range(5):
        meter.add(100, 10.0)
    assert meter.rate is None
    assert meter.recent == 10.0
    meter.add(100, 1.0)
    meter.add(300, 1.0)
    assert meter.rate == 200.0
    assert meter.recent == 200.0
    meter.add(900, 1.0)
    assert meter.recent == 600.0


def test_json_is_strict(tmp_path: Path) -> None:
    """Other programs read the file: no NaN, no Infinity."""
    with MetricLog(tmp_path / "m.jsonl") as log:
        log.log(1, values=[math.nan, 1.0, -math.inf])

    def refuse(text: str) -> None:
        raise AssertionError(text)

    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)["values"] == [None, 1.0, None]
    with MetricLog(tmp_path / "m.jsonl") as log, pytest.raises(TypeError, match="not object"):
        log.log(2, bad=object())
