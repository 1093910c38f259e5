"""Between the event loop and what computes: everything talks to the engine through this.

`Driver.submit` admits requests or refuses them, a `Ticket` yields their outputs, `cancel` ends them. What computes them is a
`Backend`: an engine in a process of its own (process.py), or several (fleet.py). All outputs of a step are handed over in one
call, and counters of what waits come with them, so that admission reads consistent numbers without locks.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

from alloy.engine.request import Output, Request
from alloy.serve.errors import ApiError, bad, engine_dead, overloaded, timed_out
from alloy.serve.settings import ServerSettings

if TYPE_CHECKING:
    # it imports PyTorch
    from alloy.engine.engine import Gauges

RETRY_S = 5

Told = Literal["cancel", "pause", "resume"]
# ids of requests that end with an error
Failed = Sequence[tuple[str, ApiError]]


class Ticket:
    """Requests that were admitted together, and their outputs as they come."""

    def __init__(self, driver: "Driver", requests: Sequence[Request], timeout_s: float) -> None:
        self.requests = {request.id: request for request in requests}
        self.prompt_tokens = sum(len(request.token_ids) for request in requests)
        self.arrival = perf_counter()
        self.deadline = self.arrival + timeout_s
        # when the engine was first heard from, and last
        self.first_output: float | None = None
        self.last_output: float | None = None
        self._driver = driver
        self._timeout_s = timeout_s
        # requests without an end
        self.open_ids = set(self.requests)
        self._ready: deque[Output] = deque()
        self._error: ApiError | None = None
        self._wake = asyncio.Event()
        # (request, sample) -> when it was heard last
        self._heard: dict[tuple[str, int], float] = {}
        self.unread_tokens = 0
        self.samples = sum(request.params.n for request in requests)
        # when the reader that the engine waits for read last; None: it does not wait
        self.behind_since: float | None = None

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Output:
        """The next increment; ApiError when the request cannot be finished."""
        # an engine that is always ahead of its reader leaves nothing to wait for
        if self.open_ids and self._error is None and perf_counter() > self.deadline:
            self._driver.cancel(self, timed_out(self._timeout_s))
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self.open_ids:
                raise StopAsyncIteration
            self._wake.clear()
            try:
                async with asyncio.timeout(self.deadline - perf_counter()):
                    await self._wake.wait()
            except TimeoutError:
                self._driver.cancel(self, timed_out(self._timeout_s))
        output = self._ready.popleft()
        self.unread_tokens -= _tokens(output)
        self._driver.note_read(self)
        return output

    async def opened(self, seconds: float) -> None:
        """Wait for the first output, at most so long; raises what ended the request before it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        if self._error is not None:
            raise self._error

    def put(self, output: Output) -> list[float]:
        """Take one increment from the engine; seconds since the last one of each sample in it."""
        now = perf_counter()
        gaps = [now - self._heard[key] for c in output.completions if (key := (output.id, c.index)) in self._heard]
        self._heard.update({(output.id, c.index): now for c in output.completions})
        self.first_output = self.first_output or now
        self.last_output = now
        self._ready.append(output)
        self.unread_tokens += _tokens(output)
        if output.finished:
            self.open_ids.discard(output.id)
        self._wake.set()
        return gaps

    def fail(self, error: ApiError) -> None:
        """End with an error; what was not read is lost, except in an error of the reader's own making."""
        if self._error is None:
            self._error = error
            self._ready.clear()
        self._wake.set()


class Backend(Protocol):
    """What computes the requests of a `Driver`; all calls come from the event loop."""

    @property
    def is_up(self) -> bool:
        """Whether a request that comes now would be computed at once."""
        ...

    @property
    def gauges(self) -> "Gauges":
        """What is held before anything ran."""
        ...

    async def start(self, driver: "Driver") -> None:
        """Begin; from now on `driver.stepped` and `driver.died` are called on the running event loop."""

    def add(self, request: Request) -> None:
        """Compute a request."""

    def tell(self, kind: Told, request_id: str) -> None:
        """End a request, let it hold nothing for a while, or go on with it."""

    async def close(self) -> None:
        """Stop, and give back everything."""


class Driver:
    """Which requests are admitted, and who waits for what.

    Args:
        backend: started and closed by this driver
        settings: queue limits and timeouts
        on_step: told on the event loop after each round: gauges, stats, and the seconds between tokens
        on_death: called on the event loop once the backend has failed
    """

    def __init__(
        self,
        backend: Backend,
        settings: ServerSettings,
        on_step: Callable[["Gauges", Any, Sequence[float]], None] | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._on_step = on_step
        self._on_death = on_death
        # whose each open request is
        self._owners: dict[str, Ticket] = {}
        # requests handed to the backend, and those that it has taken up
        self._sent = 0
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.gauges = backend.gauges
        self.is_dead = False
        self.is_draining = False

    async def start(self) -> None:
        """Begin to compute; outputs arrive on the running event loop."""
        await self._backend.start(self)

    async def close(self) -> None:
        """Stop computing."""
        await self._backend.close()

    @property
    def state(self) -> str:
        """ "ready", or why new requests had better go elsewhere."""
        if self.is_dead:
            return "dead"
        if self.is_draining:
            return "draining"
        return "ready" if self._backend.is_up else "starting"

    @property
    def in_flight(self) -> int:
        """Tickets that are not done."""
        return len(self._tickets)

    @property
    def _tickets(self) -> set[Ticket]:
        return set(self._owners.values())

    @property
    def queued(self) -> int:
        """Requests that have not begun: on their way to the engine, or waiting in it."""
        return self._sent - self._taken + self.gauges.waiting

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Admit all of `requests`, or refuse them with a 503 (400 if they could never be admitted)."""
        if self.is_dead:
            raise engine_dead(503)
        if self.is_draining:
            raise overloaded("the server is shutting down; ask another one, or try again", RETRY_S)
        limits = self._settings
        if limits.max_queue and len(requests) > limits.max_queue:
            raise bad("prompt", f"prompt has {len(requests)} prompts; this server queues at most {limits.max_queue}")
        # a request that waits for nothing is never refused
        if limits.max_queue and self.queued + len(requests) > limits.max_queue and self.queued:
            raise overloaded(f"{self.queued} requests are waiting; try again in {RETRY_S} s", RETRY_S)
        ticket = Ticket(self, requests, limits.request_timeout_s)
        waiting = sum(t.prompt_tokens for t in self._tickets if t.first_output is None) if self.queued else 0
        if limits.max_queue_tokens and waiting and waiting + ticket.prompt_tokens > limits.max_queue_tokens:
            raise overloaded(f"{waiting:,} prompt tokens are waiting; try again in {RETRY_S} s", RETRY_S)
        self._idle.clear()
        self._owners.update(dict.fromkeys(ticket.requests, ticket))
        self._sent += len(requests)
        for request in requests:
            self._backend.add(request)
        return ticket

    def cancel(self, ticket: Ticket, error: ApiError | None = None) -> None:
        """End a ticket; nothing happens to one that is done. `error` is what its reader is told."""
        self._tell("cancel", ticket)
        self._forget(*ticket.open_ids)
        if error is not None:
            ticket.fail(error)

    def note_read(self, ticket: Ticket) -> None:
        """Its reader took an output: a ticket that was paused goes on once half is read."""
        if ticket.behind_since is None:
            return
        ticket.behind_since = perf_counter()
        if ticket.unread_tokens <= self._settings.slow_reader_tokens * ticket.samples // 2:
            ticket.behind_since = None
            self._tell("resume", ticket)

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish, and after `seconds` end the rest with an error."""
        self.is_draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for ticket in self._tickets:
                message = "the server is shutting down and could not finish this answer; ask again"
                self.cancel(ticket, ApiError(503, message, "server_shutdown"))

    def _tell(self, kind: Told, ticket: Ticket) -> None:
        for request_id in ticket.open_ids:
            if request_id in self._owners:
                self._backend.tell(kind, request_id)

    def stepped(self, outputs: Sequence[Output], failed: Failed, taken: int, gauges: "Gauges", stats: Any) -> None:
        """Hand a round's outputs to their tickets.

        Args:
            outputs: in the order in which they were computed; the prompts are left out
            failed: ids of requests that end here, and what their readers are told
            taken: requests that the backend has taken up since it began
            gauges: what it holds
            stats: its counters
        """
        self._taken = taken
        self.gauges = gauges
        for request_id, error in failed:
            if (ticket := self._owners.get(request_id)) is not None:
                self.cancel(ticket, error)
        gaps: list[float] = []
        for output in outputs:
            if (ticket := self._owners.get(output.id)) is not None:
                gaps += ticket.put(output)
                if output.finished:
                    self._forget(output.id)
        self._watch_readers()
        if self._on_step is not None:
            self._on_step(gauges, stats, gaps)

    def _watch_readers(self) -> None:
        now, limits = perf_counter(), self._settings
        for ticket in self._tickets:
            if ticket.behind_since is None:
                if ticket.unread_tokens > limits.slow_reader_tokens * ticket.samples:
                    ticket.behind_since = now
                    self._tell("pause", ticket)
            elif now - ticket.behind_since > limits.slow_reader_s:
                message = f"the client read nothing for {limits.slow_reader_s:g} s; read the stream as it comes"
                self.cancel(ticket, ApiError(408, message, "slow_reader"))

    def died(self) -> None:
        """The backend has failed and comes back no more."""
        self.is_dead = True
        for ticket in self._tickets:
            self.cancel(ticket, engine_dead(500))
        if self._on_death is not None:
            self._on_death()

    def _forget(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self._owners.pop(request_id, None)
        if not self._owners:
            self._idle.set()


def _tokens(output: Output) -> int:
    return sum(len(completion.token_ids) for completion in output.completions)
