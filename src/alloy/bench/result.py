"""What a run of the benchmark found: rows, the machine's ceilings, JSON lines, and the comparison with an earlier run."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from alloy.core.runs import atomic_write
from alloy.errors import DataError

OURS = "alloy"
# a row counts as slower when its share of the floor fell by more than this
SLOWER = 0.05


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in this run: bytes and matrix operations per second."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def floor(self, row: "Row") -> tuple[float, Literal["bytes", "flops"]]:
        """Milliseconds below which no implementation can be, and which of the two limits says so."""
        moving = row.bytes / self.bytes_per_s * 1e3
        multiplying = row.flops / self.flops_per_s[row.compute] * 1e3 if row.flops else 0.0
        return (moving, "bytes") if moving >= multiplying else (multiplying, "flops")


@dataclass
class Row:
    """One implementation of one problem. Times are there only if its numbers were right."""

    case: str
    label: str
    # "alloy", or a peer
    name: str
    # failed: wrong numbers; error: it crashed; absent: the peer is not installed
    status: Literal["ok", "failed", "error", "absent"] = "ok"
    ms: float | None = None
    # the peer's time over ours
    ratio: float | None = None
    # floor over time, and the limit that makes the floor
    fraction: float | None = None
    bound: str | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    # relative error of the worst output, and what it may be
    error: float | None = None
    tolerance: float | None = None
    output: str | None = None
    tokens_per_s: float | None = None
    bytes: float = 0.0
    flops: float = 0.0
    compute: str = "bfloat16"
    version: str | None = None
    message: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same row in another run."""
        return self.case, self.label, self.name


@dataclass
class Run:
    """Rows in the order they were measured, with where and when."""

    machine: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Take in a row, with what follows from the ceilings and from our own row of the same problem."""
        if row.ms is not None:
            floor, row.bound = self.ceilings.floor(row)
            row.fraction = floor / row.ms
            ours = next((r for r in self.rows if r.key == (row.case, row.label, OURS)), None)
            if row.name != OURS and ours is not None and ours.ms is not None:
                row.ratio = row.ms / ours.ms
        self.rows.append(row)

    def lines(self) -> list[str]:
        """JSON lines: the run, then its rows."""
        head = {"kind": "run", **self.machine, "ceilings": asdict(self.ceilings)}
        return [json.dumps(head), *(json.dumps({"kind": "row", **asdict(row)}) for row in self.rows)]

    def write(self, path: Path) -> None:
        """Write the JSON lines, in one step."""
        atomic_write(path, "\n".join(self.lines()) + "\n")


def read_run(path: Path) -> Run:
    """The run that `Run.write` wrote."""
    try:
        head, *rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        known = {f.name for f in fields(Row)}
        ceilings = Ceilings(**head.pop("ceilings"))
        machine = {key: value for key, value in head.items() if key != "kind"}
        run = Run(machine, ceilings, [Row(**{k: v for k, v in row.items() if k in known}) for row in rows])
        # what a comparison calculates with
        damaged = [row for row in run.rows if not _is_sound(row)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(_foreign(path)) from error
    if damaged:
        raise DataError(_foreign(path))
    return run


def _is_sound(row: Row) -> bool:
    numbers = all(value is None or type(value) in (int, float) for value in (row.ms, row.fraction))
    return numbers and all(type(value) is str for value in row.key)


def _foreign(path: Path) -> str:
    return f"{path} is not a result of `alloy bench --json`, or it is damaged; give a file which that option wrote"


def slower(new: Iterable[Row], old: Iterable[Row]) -> list[str]:
    """Our rows that are worse than in an earlier run, one line each.

    Shares of the floor are compared, not times: each run's own ceilings take out a faster or slower machine.
    """
    before = {row.key: row for row in old if row.name == OURS and row.status == "ok"}
    found: list[str] = []
    for row in new:
        past = before.get(row.key)
        if past is None or past.fraction is None or past.ms is None:
            continue
        where = f"{row.case} {row.label}"
        if row.fraction is None or row.ms is None:
            found.append(f"{where}: {row.status}, was {past.ms:.4g} ms")
        elif row.fraction < past.fraction * (1 - SLOWER):
            change = past.fraction / row.fraction - 1
            found.append(
                f"{where}: {change:.0%} slower, {row.fraction:.3f} of the floor ({row.ms:.4g} ms), was {past.fraction:.3f} ({past.ms:.4g} ms)"
            )
    return found
