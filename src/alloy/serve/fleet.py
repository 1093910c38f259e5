"""Several engines, each in a process of its own, behind one front: `serve.replicas` (serving.md section 11).

The front is the server of app.py; in the place of one engine its driver has a `Fleet`. Ray Serve starts the replicas,
looks after them, replaces those that die, and carries requests there and outputs back. This is the only module that
imports Ray.
"""
# Ray's annotations leave much unknown
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import asyncio
import logging
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from alloy.core.device import memory_bytes
from alloy.core.logging import get_logger, setup
from alloy.engine.core import LLM
from alloy.engine.engine import Gauges
from alloy.engine.pool import CPU_FRAC, MOST_CPU_BYTES
from alloy.engine.request import Output, Request
from alloy.engine.runner import EngineStats
from alloy.errors import AlloyError, RecipeError, ResourceError
from alloy.serve.affinity import Affinity
from alloy.serve.driver import Driver, Failed, Told
from alloy.serve.errors import ApiError, internal
from alloy.serve.process import engine_thread
from alloy.serve.settings import ServerSettings
from alloy.serve.sse import end

log = get_logger(__name__)

NAME = "alloy"
# how often replicas are asked what they hold, and Ray asks whether they live
WATCH_S = 1.0
ANSWER_S = 10.0
# a request that was lost twice may be what kills replicas
ATTEMPTS = 2
# messages larger than 100 KB go through it
OBJECT_STORE_BYTES = 256 * 2**20
# engines queue for themselves
MOST_ONGOING = 1_000_000

# Ray tells of its own work in files alone
QUIET = LoggingConfig(enable_access_log=False, log_level="CRITICAL")

NOTHING = Gauges(0, 0, 0, 0, 0, 0, 0, 0)

Numbers = TypeVar("Numbers", Gauges, EngineStats)
# rows of the start-up table
Rows = Mapping[str, str]
Describe = Callable[[LLM, Gauges], Rows]


@dataclass(frozen=True)
class Report:
    """What a replica says.

    Attributes:
        replica: its name
        outputs: what is new of a request
        gauges: what its engine holds; as waiting counts what has not begun
        stats: its engine's counters
        refused: why the engine does not take the request
    """

    replica: str
    gauges: Gauges
    stats: EngineStats
    outputs: tuple[Output, ...] = ()
    refused: ApiError | None = None


class Replica:
    """One engine and its thread, as Ray Serve runs it.

    Args:
        load: makes the model, and rows of the start-up table
        settings: of the server
        threads: of PyTorch
        describe: rows of the start-up table
        failure: file for an error that the user can mend
    """

    def __init__(
        self,
        load: Callable[[], tuple[LLM, Rows]],
        settings: ServerSettings,
        threads: int,
        describe: Describe,
        failure: Path,
    ) -> None:
        setup(console=False)
        torch.set_num_threads(threads)
        try:
            llm, rows = load()
            llm.warm_up()
            self._engine = llm.engine()
        except AlloyError as error:
            # all that Ray passes on is a traceback
            if failure.parent.exists():
                failure.write_bytes(pickle.dumps(error))
            raise
        # the front has admitted what comes here
        settings = settings.model_copy(update={"max_queue": 0, "max_queue_tokens": 0})
        self._thread = engine_thread(self._engine, llm.check)
        # an engine that failed ends its process: who waits for it learns so, and Ray starts another
        self._driver = Driver(self._thread, settings, on_death=partial(os._exit, 1))
        self._facts = llm.max_model_len, {**describe(llm, self._driver.gauges), **rows}
        self._name = serve.get_replica_context().replica_id.unique_id
        # Ray makes replicas on the event loop that calls them
        self._starting = asyncio.create_task(self._driver.start())

    async def describe(self) -> tuple[int, Rows]:
        """What the front must know: max_model_len, and rows of the start-up table."""
        return self._facts

    async def report(self) -> Report:
        """What is held now."""
        gauges = replace(self._driver.gauges, waiting=self._driver.queued)
        return Report(self._name, gauges, self._engine.stats)

    async def tell(self, request_id: str, name: str | None, kind: Told) -> None:
        """Pause or resume a request, if it is here. `name` is the router's."""
        self._thread.tell(kind, request_id)

    async def answer(self, request: Request, name: str | None) -> AsyncGenerator[Report]:
        """Outputs of a request as they come; the first report only says that it was taken up. `name` is the router's."""
        ticket = self._driver.submit([request])
        try:
            yield await self.report()
            async for output in ticket:
                outputs = [output]
                while ticket.unread_tokens:
                    outputs.append(await anext(ticket))
                yield replace(await self.report(), outputs=tuple(outputs))
        except ApiError as error:
            yield replace(await self.report(), refused=error)
        finally:
            self._driver.cancel(ticket)


class Router(RequestRouter):
    """Sends a call to the replica that its second argument names, as long as it lives, else to the least loaded."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, called by Ray Serve."""
        named = pending_request.args[1:] if pending_request is not None else []
        return [[r for r in candidate_replicas if r.replica_id.unique_id in named], candidate_replicas]


class Fleet:
    """All replicas, as a backend of `Driver`.

    Args:
        handle: of the deployment
        size: replicas there should be
        max_model_len: of the model as they have loaded it
        rows: of the start-up table
    """

    def __init__(self, handle: DeploymentHandle[Any], size: int, max_model_len: int, rows: Rows) -> None:
        self.max_model_len = max_model_len
        self.rows = {"replicas": f"{size}, each with", **rows}
        self._handle = handle
        self._size = size
        # known from the start on
        self._driver: Driver
        # of open requests, and the one that watches replicas
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sent = 0
        # ids that no replica has taken up yet
        self._unseen: set[str] = set()
        # what each replica that answers holds
        self.replicas: dict[str, Gauges] = {}
        # where each open request is, as far as it is known
        self._places: dict[str, str] = {}
        self._affinity = Affinity()
        # counters, also of the dead, so that sums never fall
        self._stats: dict[str, EngineStats] = {}

    @property
    def is_up(self) -> bool:
        """Whether any replica answers."""
        return bool(self.replicas)

    @property
    def gauges(self) -> Gauges:
        """What all replicas hold."""
        return _total([NOTHING, *self.replicas.values()])

    @property
    def stats(self) -> EngineStats:
        """Counters of all replicas there ever were."""
        return _total([EngineStats(), *self._stats.values()])

    async def start(self, driver: Driver) -> None:
        """Begin to ask replicas what they hold."""
        self._driver = driver
        self._tasks["watch"] = asyncio.create_task(self._watch_replicas())

    def add(self, request: Request) -> None:
        """Send a request to a replica."""
        self._sent += 1
        self._unseen.add(request.id)
        self._tasks[request.id] = asyncio.create_task(self._run(request))

    def tell(self, kind: Told, request_id: str) -> None:
        """End, pause or resume a request, wherever it is."""
        if kind != "cancel":
            self._handle.tell.remote(request_id, self._places.get(request_id), kind)
            return
        self._unseen.discard(request_id)
        if (task := self._tasks.pop(request_id, None)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop everything; the replicas end with `launch`."""
        await end(*self._tasks.values())

    async def _run(self, request: Request) -> None:
        """Have a request computed; once more if its replica died before it said anything."""
        error = ApiError(500, "the replica that computed this answer died; ask again", "replica_died")
        try:
            for _ in range(ATTEMPTS):
                heard = False
                stream: Any = self._handle.options(stream=True).answer.remote(request, self._place(request))
                try:
                    async for report in stream:
                        heard = heard or bool(report.outputs)
                        self._note(request, report)
                    return
                except asyncio.CancelledError:
                    stream.cancel()
                    raise
                except RayActorError:
                    log.warning("a replica died under request %s", request.id)
                    self.replicas.pop(self._places.pop(request.id, ""), None)
                    if heard:
                        break
                    self._unseen.add(request.id)
        except (RayError, RayServeException):
            log.exception("request %s failed on its replica", request.id)
            error = internal()
        finally:
            self._tasks.pop(request.id, None)
            self._places.pop(request.id, None)
            self._unseen.discard(request.id)
        self._tell([], [(request.id, error)])

    def _place(self, request: Request) -> str | None:
        """Choose a replica for a request."""
        loads = Counter(self._places.values())
        name = self._affinity.choose(request, {name: loads[name] for name in self.replicas})
        if name is not None:
            self._places[request.id] = name
            self._affinity.note(request, name)
        return name

    def _note(self, request: Request, report: Report) -> None:
        self._unseen.discard(request.id)
        self._places[request.id] = report.replica
        self.replicas[report.replica], self._stats[report.replica] = report.gauges, report.stats
        self._tell(report.outputs, [(request.id, report.refused)] if report.refused else [])

    def _tell(self, outputs: Sequence[Output], failed: Failed) -> None:
        self._driver.stepped(outputs, failed, self._sent - len(self._unseen), self.gauges, self.stats)

    async def _watch_replicas(self) -> None:
        """Ask replicas what they hold, again and again; without Ray the server ends."""
        try:
            while True:
                await self._ask_replicas()
                await asyncio.sleep(WATCH_S)
        except Exception:
            log.exception("Ray failed")
            self._driver.died()

    async def _ask_replicas(self) -> None:
        try:
            call = self._handle.broadcast("report")
            said: list[Any] = await call.results_async(timeout_s=ANSWER_S, return_exceptions=True)
        except DeploymentUnavailableError:
            said = []
        except TimeoutError:
            log.warning("a replica has not answered for %g s", ANSWER_S)
            return
        reports = [report for report in said if isinstance(report, Report)]
        # others are on their way, unless the process that starts them is gone
        if not reports and not any(node["Alive"] for node in await asyncio.to_thread(ray.nodes)):
            raise ResourceError("Ray has no machine left to run replicas on")
        if len(reports) != len(self.replicas):
            log.warning("%d of %d replicas answer", len(reports), self._size)
        self.replicas = {report.replica: report.gauges for report in reports}
        self._affinity.keep(self.replicas)
        self._stats.update({report.replica: report.stats for report in reports})
        self._tell([], [])


@contextmanager
def launch(
    load: Callable[..., tuple[LLM, Rows]], arguments: Mapping[str, Any], settings: ServerSettings, describe: Describe
) -> Generator[Fleet]:
    """Replicas that have loaded the model; all their processes end with the context, or with this process.

    Args:
        load: makes the model from `arguments`, in each replica, and rows of the start-up table
        arguments: of `LLM`; memory is that of one replica
        settings: of the server
        describe: rows of the start-up table, called in a replica
    """
    size, chosen = settings.replicas, dict(arguments)
    gpus = _gpus(chosen.get("device", "auto"), size)
    if not gpus:
        share = int(CPU_FRAC * memory_bytes(torch.device("cpu"))) // size
        chosen.setdefault("memory", min(MOST_CPU_BYTES, share) / 2**30)
    threads = max(1, torch.get_num_threads() // size)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with TemporaryDirectory(prefix="alloy-") as folder:
        failure = Path(folder, "failure")
        deployment: Any = serve.deployment(
            num_replicas=size,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus / size},
            max_ongoing_requests=MOST_ONGOING,
            health_check_period_s=WATCH_S,
            graceful_shutdown_timeout_s=0,
            # of the first start alone; replacements are tried for ever
            max_constructor_retry_count=1,
            request_router_config={"request_router_class": Router},
            logging_config=QUIET,
        )(Replica)
        application = deployment.bind(partial(load, chosen), settings, threads, describe, failure)
        try:
            ray.init(
                address="local", num_cpus=size, num_gpus=gpus, object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False, logging_level=logging.ERROR,
            )  # fmt: skip
            # Ray's own way is to print a stack and abort
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            serve.start(proxy_location="Disabled", logging_config=QUIET)
            try:
                handle = serve.run(application, name=NAME, route_prefix=None)
            except RuntimeError as error:
                if failure.exists():
                    raise pickle.loads(failure.read_bytes()) from error
                raise
            yield Fleet(handle, size, *handle.describe.remote().result())
        finally:
            ray.shutdown()


def _gpus(device: str, size: int) -> int:
    """GPUs for replicas, one each; 0: they run on the CPU."""
    count = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not count):
        return 0
    if device not in ("auto", "cuda"):
        raise RecipeError(f'engine.device = "{device}" is one device, and serve.replicas = {size}; leave it out')
    if count < size:
        raise ResourceError(
            f"serve.replicas = {size} takes a GPU each, and there are {count}; lower it, or give engine.device=cpu"
        )
    return size


def _total(parts: Sequence[Numbers]) -> Numbers:
    """Field by field the sum; of lists, position by position."""
    sums: dict[str, Any] = {}
    for field in fields(parts[0]):
        column: list[Any] = [getattr(part, field.name) for part in parts]
        is_list = isinstance(column[0], list)
        sums[field.name] = [sum(at) for at in zip_longest(*column, fillvalue=0)] if is_list else sum(column)
    return type(parts[0])(**sums)
