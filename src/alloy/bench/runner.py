"""Runs cases, each in a process of its own, and collects their rows. What one process loses by crashing is one row."""

import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from alloy.bench.case import Case, Size, Task
from alloy.bench.result import OURS, Ceilings, Row, Run
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
    with Workers(plan.device == "cuda", deadline) as workers:
        progress("ceilings")
        head, error = None, ""
        for line in workers.lines(Task("ceilings", "", plan.device, plan.size)):
            head = line if "ceilings" in line else head
            error = str(line.get("died", error))
        if head is None:
            raise ResourceError(f"the ceilings of {plan.device} could not be measured: {error}")
        run = Run(head["machine"], Ceilings(**head["ceilings"]))
        keep(run)
        for name, case in plan.cases.items():
            task = Task(name, case.target, plan.device, plan.size, peers=plan.peers, only=plan.only)
            for row in _rows(workers, task, progress):
                run.add(row)
            if time.monotonic() > deadline:
                progress(f"{QUICK_S:.0f} s are over; run without --quick for the rest")
                break
    return run


def tune_cases(plan: Plan, progress: Progress) -> dict[str, dict[str, int]]:
    """Time the candidates of every kernel of these cases: "op/key" -> the best configuration."""
    found: dict[str, dict[str, int]] = {}
    with Workers(plan.device == "cuda") as workers:
        for name, case in plan.cases.items():
            progress(name)
            for line in workers.lines(Task(name, case.target, plan.device, plan.size, only=plan.only, autotune=True)):
                if "tuned" in line:
                    tuned = line["tuned"]
                    found[tuned["entry"]] = tuned["config"]
                    progress(f"{tuned['entry']}: {tuned['config']}, candidates {tuned['relative']}")
                elif "died" in line:
                    progress(f"{name}: {line['died']}")
    return found


def _rows(workers: "Workers", task: Task, progress: Progress) -> Iterator[Row]:
    """Rows of a case, by as many processes as it takes."""
    while True:
        begun: list[str] = []
        done = 0
        for line in workers.lines(task):
            if "begin" in line:
                begun = line["begin"]
                progress(" ".join((task.case, *begun)))
            elif "row" in line:
                done, begun = done + 1, []
                yield Row(**line["row"])
            else:
                label, name = begun or ("", OURS)
                yield Row(task.case, label, name, status="error", message=line["died"])
        if not begun or time.monotonic() > workers.deadline:
            return
        task = replace(task, start=task.start + done + 1)


class Workers:
    """Starts processes, one task each.

    Args:
        spare: load the next process's libraries while one measures (on a CPU that would disturb it)
        deadline: when the last one is stopped, by `time.monotonic`
    """

    def __init__(self, spare: bool, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self._spare = _Worker() if spare else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._spare is not None:
            self._spare.end()

    def lines(self, task: Task) -> Iterator[dict[str, Any]]:
        """What the worker of a task says; at last {"died": why} if it ended badly before the deadline."""
        worker = self._spare or _Worker()
        clock = threading.Timer(max(0.0, self.deadline - time.monotonic()), worker.process.kill)
        if self.deadline < math.inf:
            clock.start()
        try:
            lines = worker.begin(task)
            if self._spare is not None:
                self._spare = _Worker()
            for line in lines:
                yield json.loads(line)
            if worker.process.wait() and time.monotonic() < self.deadline:
                yield {"died": worker.last_words()}
        finally:
            clock.cancel()
            worker.end()


class _Worker:
    """A process that loads its libraries and waits for a task."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `end`
        # a group of its own: Ctrl-C reaches this process alone, which then stops the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alloy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,
        )

    def begin(self, task: Task) -> Iterable[str]:
        """Hand it the task; returns its lines."""
        assert self.process.stdin is not None, "a pipe was asked for"
        assert self.process.stdout is not None, "a pipe was asked for"
        self.process.stdin.write(json.dumps(asdict(task)) + "\n")
        self.process.stdin.close()
        return self.process.stdout

    def last_words(self) -> str:
        """The last line that names an error, or the last at all."""
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        errors = [text for text in said if re.match(r"[\w.]+(Error|Exception|Exit)\b", text)]
        return (errors or said or [f"the process ended with code {self.process.returncode}"])[-1]

    def end(self) -> None:
        """Stop it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self._errors.close()
