"""Who works on the parts: this process, several processes, Ray, or the tasks of a job array. The results are the same bytes.

Work is an object that is pickled to where it is done: `start` once there, then `run` for every part. It stores its results
itself, so that what a killed worker leaves is either a whole part or nothing.
"""

import logging
import os
import pickle
import select
import selectors
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from alloy.core.device import require
from alloy.core.pipe import beside, receive, send
from alloy.core.recipe import Config
from alloy.data.parts import Part
from alloy.errors import AlloyError, RecipeError, ResourceError

# rows and bytes done since the last call; raises Stopped when the work is to be left
Tick = Callable[[int, int], None]
Report = dict[str, Any]
# how schedulers name a task's index, the number of tasks, and the first index
ARRAYS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("PBS_ARRAY_INDEX", "PBS_ARRAY_COUNT", "0"),
    ("SGE_TASK_ID", "SGE_TASK_LAST", "1"),
    ("LSB_JOBINDEX", "LSB_JOBINDEX_END", "1"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE", "0"),
)


# a worker that is told to stop ends within the rows in flight, or is killed
LEAVE_S = 20.0


class Stopped(Exception):  # noqa: N818  the word is what happened, not a fault
    """The work on a part was left because the run ends."""


class Work(Protocol):
    """What is done to every part."""

    def start(self) -> None:
        """Load what all parts need."""
        ...

    def run(self, part: Part, tick: Tick) -> Report:
        """Do one part, store the result, and say what was done (plain values)."""
        ...

    def close(self) -> None:
        """Give back what `start` took."""
        ...


class Executor(Config):
    """Where parts are worked on."""

    kind: Annotated[
        Literal["serial", "process", "ray", "array"],
        Field(description="serial, process, ray, or array (this task's share of a job array)."),
    ] = "process"
    workers: Annotated[int | None, Field(ge=1, description="Processes or Ray workers; default: one a core.")] = None
    recycle_mib: Annotated[int, Field(ge=64, description="A process that holds more than this is replaced.")] = 4096
    address: Annotated[str | None, Field(description="Ray cluster to use; default: a local one.")] = None
    array_index: Annotated[int | None, Field(ge=0, description="Of this task, where no scheduler says.")] = None
    array_count: Annotated[int | None, Field(ge=1, description="Tasks of the array, where no scheduler says.")] = None

    def share(self) -> tuple[int, int]:
        """(index, count) of this task among those of the array; (0, 1) for all other kinds."""
        if self.kind != "array":
            return 0, 1
        index, count = self.array_index, self.array_count
        for name, total, first in ARRAYS:
            if index is None and name in os.environ:
                index = int(os.environ[name]) - int(first if first.isdigit() else os.environ.get(first, "0"))
                count = count or int(os.environ.get(total, "0")) or None
        if index is None or count is None or index >= count:
            raise RecipeError(
                f"executor.kind = array: this is task {index} of {count}; start it from a job array, "
                "or set executor.array_index and executor.array_count."
            )
        return index, count


def map_parts(work: Work, parts: Sequence[Part], executor: Executor, tick: Tick) -> Iterator[tuple[Part, Report]]:
    """Do every part and give the reports as they come.

    Args:
        work: what to do
        parts: what to do it to
        executor: where
        tick: hears of progress in this process
    """
    index, count = executor.share()
    mine = [part for part in parts if part.index % count == index]
    if not mine:
        return
    workers = min(executor.workers or len(os.sched_getaffinity(0)), len(mine))
    if executor.kind == "ray":
        yield from _ray(work, mine, executor, workers, tick)
    elif executor.kind == "process":
        yield from _processes(work, mine, executor, workers, tick)
    else:
        work.start()
        try:
            for part in mine:
                yield part, work.run(part, tick)
        finally:
            work.close()


def _processes(
    work: Work, parts: Sequence[Part], executor: Executor, workers: int, tick: Tick
) -> Iterator[tuple[Part, Report]]:
    waiting = list(reversed(parts))
    failed: set[int] = set()
    with selectors.DefaultSelector() as selector, ExitStack() as all_workers:
        lives: dict[socket.socket, ExitStack] = {}
        busy: dict[socket.socket, Part] = {}

        def start(part: Part) -> None:
            life = all_workers.enter_context(ExitStack())
            process, pipe = life.enter_context(beside("alloy data", _work, work, executor.recycle_mib))
            # before it is killed it may leave its part in order
            life.callback(process.join, LEAVE_S)
            life.callback(_hang_up, pipe)
            lives[pipe] = life
            selector.register(pipe, selectors.EVENT_READ)
            give(pipe, part)

        def give(pipe: socket.socket, part: Part) -> None:
            send(pipe, part)
            busy[pipe] = part

        def end(pipe: socket.socket) -> None:
            selector.unregister(pipe)
            del busy[pipe]
            lives.pop(pipe).close()

        while len(busy) < workers:
            start(waiting.pop())
        while busy:
            for key, _ in selector.select():
                pipe = key.fileobj
                assert isinstance(pipe, socket.socket)
                part = busy[pipe]
                try:
                    kind, value = receive(pipe)
                except (EOFError, ConnectionError):
                    end(pipe)
                    if part.index in failed:
                        raise ResourceError(
                            f"{part.files[0]} ({part.name}): the process that worked on it died twice, perhaps for want of "
                            "memory; use fewer executor.workers or a smaller part_mib."
                        ) from None
                    failed.add(part.index)
                    start(part)
                    continue
                if kind == "tick":
                    tick(*value)
                elif kind == "error":
                    raise value
                else:
                    report, is_large = value
                    if not waiting:
                        end(pipe)
                    elif is_large:
                        end(pipe)
                        start(waiting.pop())
                    else:
                        give(pipe, waiting.pop())
                    yield part, report


def _hang_up(pipe: socket.socket) -> None:
    with suppress(OSError):
        pipe.shutdown(socket.SHUT_WR)


def _work(pipe: socket.socket, work: Work, recycle_mib: int) -> None:
    """A worker process: parts until there are none, or until the process that gave them is gone."""

    def tick(rows: int, size: int) -> None:
        # nothing is sent to a worker in the middle of a part, so what can be read is the end
        if select.select([pipe], [], [], 0)[0]:
            raise Stopped
        send(pipe, ("tick", (rows, size)))

    try:
        work.start()
        while True:
            part = receive(pipe)
            report = work.run(part, tick)
            send(pipe, ("done", (report, _resident_mib() > recycle_mib)))
    except (EOFError, Stopped):
        pass
    except AlloyError as error:
        send(pipe, ("error", error))
    except Exception as error:
        import traceback

        error.add_note("".join(traceback.format_exception(error)))
        send(pipe, ("error", error))
    finally:
        work.close()


def _resident_mib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def _ray(
    work: Work, parts: Sequence[Part], executor: Executor, workers: int, tick: Tick
) -> Iterator[tuple[Part, Report]]:
    """Ray Data: a pool of actors, each of which starts the work once; lost actors and nodes are made good by Ray."""
    ray = require("ray", extra="scale", why="executor.kind = ray runs")
    data = require("ray.data", extra="scale", why="executor.kind = ray runs")
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        here: dict[str, Any] = {"address": executor.address} if executor.address else {"num_cpus": workers}
        ray.init(**here, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        rows = data.from_items([{"index": i} for i in range(len(parts))], override_num_blocks=len(parts))
        pool = data.ActorPoolStrategy(size=workers)
        done = rows.map(_Actor, fn_constructor_args=(work, list(parts)), compute=pool, num_cpus=1)
        for row in done.iter_rows():
            part, answer = parts[row["index"]], pickle.loads(row["answer"])
            if isinstance(answer, Exception):
                raise answer
            tick(answer.get("rows_in", 0), part.bytes)
            yield part, answer
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """A Ray worker."""

    def __init__(self, work: Work, parts: Sequence[Part]) -> None:
        self.work, self.parts = work, parts
        work.start()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: object = self.work.run(self.parts[row["index"]], lambda rows, size: None)
        except AlloyError as error:
            answer = error
        return {"index": row["index"], "answer": pickle.dumps(answer)}
