"""Runs cases, each in a process of its own, and collects their rows. What one process loses by crashing is one row."""

import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from alloy.bench.case import Case, Size
from alloy.bench.result import OURS, Ceilings, Row, Run
from alloy.bench.worker import Task
from alloy.errors import ResourceError

# a quick run ends by then, whatever is left
QUICK_S = 60.0
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        cases: name -> case, in order
        device: "cuda" or "cpu"
        peers: names of peers to measure; None: all
        only: parts of labels: other problems are left out
    """

    cases: Mapping[str, Case]
    device: str
    size: Size = "full"
    peers: list[str] | None = None
    only: list[str] = field(default_factory=list[str])


def run_cases(plan: Plan, progress: Progress, keep: Callable[[Run], None]) -> Run:
    """Measure the ceilings, then every case.

    Args:
        plan: what to run
        progress: told each implementation before it is tried
        keep: given the run as soon as it exists; it is filled while the cases run, so an interrupted caller has its rows
    """
    deadline = time.monotonic() + QUICK_S if plan.size == "quick" else math.inf
    progress("ceilings")
    task = Task("ceilings", "", plan.device, plan.size)
    head, error = None, ""
    for line in _lines(task, deadline):
        head = line if "ceilings" in line else head
        error = str(line.get("died", error))
    if head is None:
        raise ResourceError(f"the ceilings of {plan.device} could not be measured: {error}")
    run = Run(head["machine"], Ceilings(**head["ceilings"]))
    keep(run)
    for name, case in plan.cases.items():
        task = Task(name, case.target, plan.device, plan.size, peers=plan.peers, only=plan.only)
        for row in _rows(task, progress, deadline):
            run.add(row)
        if time.monotonic() > deadline:
            progress(f"{QUICK_S:.0f} s are over; run without --quick for the rest")
            break
    return run


def tune_cases(plan: Plan, progress: Progress) -> dict[str, dict[str, int]]:
    """Time the candidates of every kernel of these cases: "op/key" -> the best configuration."""
    found: dict[str, dict[str, int]] = {}
    for name, case in plan.cases.items():
        progress(name)
        for line in _lines(Task(name, case.target, plan.device, plan.size, autotune=True), math.inf):
            if "tuned" in line:
                tuned = line["tuned"]
                found[tuned["entry"]] = tuned["config"]
                progress(f"{tuned['entry']}: {tuned['config']}, candidates {tuned['relative']}")
            elif "died" in line:
                progress(f"{name}: {line['died']}")
    return found


def _rows(task: Task, progress: Progress, deadline: float) -> Iterator[Row]:
    """Rows of a case, by as many processes as it takes."""
    while True:
        begun: list[str] = []
        done = 0
        for line in _lines(task, deadline):
            if "begin" in line:
                begun = line["begin"]
                progress(" ".join((task.case, *begun)))
            elif "row" in line:
                done, begun = done + 1, []
                yield Row(**line["row"])
            else:
                label, name = begun or ("", OURS)
                yield Row(task.case, label, name, status="error", message=line["died"])
        if not begun or time.monotonic() > deadline:
            return
        task = replace(task, start=task.start + done + 1)


def _lines(task: Task, deadline: float) -> Iterator[dict[str, Any]]:
    """What a worker says; at last {"died": its last line of error} if it ended badly. It is stopped at the deadline."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "alloy.bench.worker", json.dumps(asdict(task))]
        # a group of its own: Ctrl-C reaches this process alone, which then stops the worker
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0)
        assert worker.stdout is not None, "a pipe was asked for"
        clock = threading.Timer(max(0.0, deadline - time.monotonic()), worker.kill) if deadline < math.inf else None
        if clock is not None:
            clock.start()
        try:
            for line in worker.stdout:
                yield json.loads(line)
            if worker.wait() and time.monotonic() < deadline:
                errors.seek(0)
                said = [text.strip() for text in errors if text.strip()]
                yield {"died": said[-1] if said else f"the process ended with code {worker.returncode}"}
        finally:
            if clock is not None:
                clock.cancel()
            worker.kill()
            worker.wait()
