"""The engine in a process of its own, so that HTTP and the engine do not share one interpreter's lock.

Between them is a socket: requests go there and what they are told, and after each round one message comes back. The server
never waits for room in it; the engine may, as long as somebody is there to read. When either side ends, the other finds its
end closed: the server then fails, and the engine's process ends wherever it is.
"""

import asyncio
import queue
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from alloy.core.logging import get_logger
from alloy.core.pipe import Unpacker, packed, receive, send
from alloy.engine.request import Request
from alloy.errors import RequestError
from alloy.serve.driver import Driver, Told
from alloy.serve.errors import ApiError, bad

if TYPE_CHECKING:
    # it imports PyTorch
    from alloy.engine.engine import Engine, Gauges

log = get_logger(__name__)

# an idle engine says so this often: readers that have fallen behind are looked after then
IDLE_S = 1.0
# an engine that is told to stop may take so long
STOP_S = 5.0


class RemoteEngine(asyncio.Protocol):
    """An engine behind a socket, as a backend of `Driver`.

    Args:
        pipe: its other end is that of an `EngineLoop`
        gauges: what the engine holds before it runs
    """

    is_up = True

    def __init__(self, pipe: socket.socket, gauges: "Gauges") -> None:
        self._pipe, self.gauges = pipe, gauges
        self._messages = Unpacker()
        self._is_closing = False
        self._ended = asyncio.Event()
        # known from the start on
        self._driver: Driver
        self._transport: asyncio.Transport

    async def start(self, driver: Driver) -> None:
        """Begin to read what it says."""
        self._driver = driver
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._pipe)

    def add(self, request: Request) -> None:
        """Hand a request to the engine."""
        self._send("add", request)

    def tell(self, kind: Told, request_id: str) -> None:
        """Have the engine's method of this name called."""
        self._send(kind, request_id)

    async def close(self) -> None:
        """Stop the engine."""
        self._is_closing = True
        if not self._transport.is_closing():
            self._transport.write_eof()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), STOP_S)

    def data_received(self, data: bytes) -> None:
        """Hand over the rounds that are whole."""
        for news in self._messages.feed(data):
            self._driver.stepped(*news)

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine has ended."""
        self._ended.set()
        if not self._is_closing:
            self._driver.died()

    def _send(self, kind: str, value: Request | str) -> None:
        if not self._transport.is_closing():
            self._transport.write(packed((kind, value)))


class EngineLoop:
    """Takes what comes from a socket, steps, and says what is new, until the socket is closed.

    Args:
        pipe: its other end is that of a `RemoteEngine`; read from now on, in a thread
        on_end: called by that thread when there is no other end any more
    """

    def __init__(self, pipe: socket.socket, on_end: Callable[[], None] | None = None) -> None:
        self._pipe, self._on_end = pipe, on_end
        # what is to be done with what; None: stop
        self._inbox: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._refused: list[tuple[str, ApiError]] = []
        # requests that have come, and ids of those whose grammar is not compiled yet
        self._come = 0
        self._compiling: set[str] = set()
        self._compilers = ThreadPoolExecutor(thread_name_prefix="grammar")
        Thread(target=self._read, daemon=True).start()

    def run(self, engine: "Engine", check: Callable[[Request], None]) -> None:
        """Serve; the engine and the socket are closed at the end.

        Args:
            engine: touched by this thread alone
            check: compiles the grammar of a request, in other threads: this one has no time
        """
        try:
            while self._take(engine, check):
                outputs = engine.step() if engine.busy else []
                for output in outputs:
                    # who asked knows it
                    output.prompt_token_ids = ()
                taken = self._come - len(self._compiling)
                send(self._pipe, (outputs, self._refused, taken, engine.gauges(), engine.stats))
                self._refused = []
        except Exception:
            log.exception("the engine failed")
        finally:
            engine.close()
            # both ends notice, whoever holds a copy of this one
            with suppress(OSError):
                self._pipe.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        with suppress(EOFError, ConnectionError):
            while True:
                self._inbox.put(receive(self._pipe))
        if self._on_end is not None:
            self._on_end()
        self._inbox.put(None)

    def _take(self, engine: "Engine", check: Callable[[Request], None]) -> bool:
        """Do all that has come, and wait for it while there is nothing else to do; False: stop."""
        block = not engine.busy
        with suppress(queue.Empty):
            while (message := self._inbox.get(block, IDLE_S)) is not None:
                block = False
                kind, value = message
                if kind == "add" and value.params.grammar is not None:
                    self._come += 1
                    self._compiling.add(value.id)
                    compiled = self._compilers.submit(check, value)
                    compiled.add_done_callback(partial(self._compiled, value))
                elif kind == "add":
                    self._come += 1
                    self._add(engine, value)
                elif kind == "compiled":
                    # unless it was cancelled meanwhile
                    if value[0].id in self._compiling:
                        self._compiling.remove(value[0].id)
                        self._add(engine, *value)
                else:
                    if kind == "cancel":
                        self._compiling.discard(value)
                    # or "pause", or "resume"
                    getattr(engine, kind)(value)
            return False
        return True

    def _compiled(self, request: Request, compiled: Future[None]) -> None:
        self._inbox.put(("compiled", (request, compiled)))

    def _add(self, engine: "Engine", request: Request, compiled: Future[None] | None = None) -> None:
        try:
            if compiled is not None:
                compiled.result()
            engine.add(request)
        except RequestError as error:
            self._refused.append((request.id, bad(request.id.partition("-")[0], str(error))))


def engine_thread(engine: "Engine", check: Callable[[Request], None]) -> RemoteEngine:
    """An engine in a thread of this process, such as of a replica; arguments as of `EngineLoop.run`."""
    here, there = socket.socketpair()
    remote = RemoteEngine(here, engine.gauges())
    Thread(target=EngineLoop(there).run, args=(engine, check), name="engine", daemon=True).start()
    return remote
