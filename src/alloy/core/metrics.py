"""Numbers over time: a JSONL log that survives being killed, sinks that mirror it, and rates that leave the warm-up out."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from alloy.core.registry import Registry
from alloy.core.runs import atomic_write, full_disk_is_resource_error
from alloy.core.toml import is_list, is_table
from alloy.errors import DataError

SINKS = Registry("metric sink")
SINKS.add("tensorboard", "alloy.core.metrics:TensorBoardSink")


class Sink(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Take the numbers of one step."""
        ...

    def truncate_after(self, step: int) -> None:
        """Forget what came after `step`: the run goes on from there."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


class MetricLog:
    """Appends one JSON object a line to `path`, at once; a last line torn by a crash is removed on opening."""

    def __init__(self, path: Path, sinks: Sequence[Sink] = ()) -> None:
        self.path = path
        self.sinks = list(sinks)
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        # unbuffered: nothing is left over that a later close could fail to write
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, **values: Any) -> None:
        """Record `values` at `step`, with the time. Numbers that are not finite are recorded as null."""
        record = {
            "step": step,
            "time": round(time.time(), 3),
            **{name: _plain(value) for name, value in values.items()},
        }
        with full_disk_is_resource_error(self.path):
            line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
            while line:
                line = line[self._file.write(line) :]
        for sink in self.sinks:
            sink.log(step, values)

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps, before a resumed run writes them again."""
        kept = [record for record in read_metrics(self.path) if _step_of(record) <= step]
        self._file.close()
        atomic_write(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        self._file = self.path.open("ab", buffering=0)
        for sink in self.sinks:
            sink.truncate_after(step)

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metric log; a torn last line is left out, any other damage is an error with its line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such metric log. Give a run directory that has trained.") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object ({error}). Remove that line.") from error
        if not is_table(record):
            raise DataError(f"{path}:{number}: not a JSON object. Remove that line.")
        records.append(record)
    return records


def series(records: Sequence[Mapping[str, object]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was recorded as a number."""
    steps: list[float] = []
    values: list[float] = []
    for record in records:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            steps.append(_step_of(record))
            values.append(float(value))
    return steps, values


class Meter:
    """Tokens per second. The first `skip` steps (compilation, warm-up) are left out of the average."""

    def __init__(self, skip: int = 5, window: int = 20) -> None:
        self.skip = skip
        self.window = window
        self.tokens = 0
        self.seconds = 0.0
        self._steps = 0
        self._last: list[tuple[int, float]] = []

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step: tokens of all ranks, wall-clock seconds."""
        self._steps += 1
        self._last = [*self._last[-(self.window - 1) :], (tokens, seconds)]
        if self._steps > self.skip:
            self.tokens += tokens
            self.seconds += seconds

    @property
    def rate(self) -> float | None:
        """Tokens per second over all counted steps; None before there is one."""
        return self.tokens / self.seconds if self.seconds > 0 else None

    @property
    def recent(self) -> float | None:
        """Tokens per second over the last `window` steps, what a live line shows."""
        seconds = sum(seconds for _, seconds in self._last)
        return sum(tokens for tokens, _ in self._last) / seconds if seconds > 0 else None


class TensorBoardSink:
    """Scalars for TensorBoard (extra "track")."""

    def __init__(self, directory: Path) -> None:
        from alloy.core.device import require

        require("tensorboard", extra="track", why="log.tensorboard writes event files")
        self.directory = directory
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.directory), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Write the numbers among `values`."""
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, step)  # pyright: ignore[reportUnknownMemberType]  untyped in torch

    def truncate_after(self, step: int) -> None:
        """Open a new event file that hides later steps."""
        self._writer.close()
        self._open(step + 1)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _plain(value: Any) -> Any:
    """A value JSON can hold; one-element tensors and numpy scalars become numbers."""
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_table(value):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if is_list(value):
        return [_plain(inner) for inner in value]
    raise TypeError(f"metrics are numbers, texts and lists of them, not {type(value).__name__}")


def _step_of(record: Mapping[str, object]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


def _cut_torn_line(path: Path) -> None:
    """Shorten the file to its last complete line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
