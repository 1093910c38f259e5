"""The process around the application: a socket, signals, draining, and the exit code (serving.md 7.6)."""

import asyncio
import errno
import ipaddress
import signal
import socket
from types import FrameType

import uvicorn

from alloy.core.logging import get_logger
from alloy.errors import AlloyError, RecipeError
from alloy.serve.app import Server
from alloy.serve.driver import Backend
from alloy.serve.guard import Keys
from alloy.serve.model import ServedModel

log = get_logger(__name__)


class EngineDiedError(AlloyError):
    """The engine failed; a supervisor starts the server again."""


def open_socket(host: str, port: int, has_keys: bool, insecure: bool) -> socket.socket:
    """A bound socket, before any model is loaded; refuses to serve other machines without a key."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise RecipeError(f'host = "{host}" with port {port} is no address of this machine ({error})') from error
    if not (has_keys or insecure or ipaddress.ip_address(info[4][0]).is_loopback):
        raise RecipeError(
            f'host = "{host}" can be reached from other machines, and no API key is set; give --api-key, '
            "or serve.insecure=true to serve everyone"
        )
    bound = socket.socket(*info[:3])
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted sockets inherit it: a token must not wait for the acknowledgement of the one before
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.bind(info[4])
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise RecipeError(f"port {port} on {host} is in use; stop what uses it, or give --port") from error
        raise RecipeError(f"cannot listen on {host}, port {port}: {error}; give --host or --port") from error
    return bound


class Listener(uvicorn.Server):
    """uvicorn, except that the first signal drains before it closes, and a dead engine ends the process."""

    def __init__(self, model: ServedModel, backend: Backend, keys: Keys) -> None:
        self.server = Server(model, backend, keys, self._backend_died)
        super().__init__(
            uvicorn.Config(
                self.server.app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5
            )
        )
        self.has_died = False
        self._drain: asyncio.Task[None] | None = None

    async def listen(self, bound: socket.socket) -> None:
        """Serve until told to stop."""
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_keys)
        await self.serve([bound])
        if self.has_died:
            raise EngineDiedError("the engine failed; the log above says why")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and Ctrl-C drain; a second Ctrl-C stops at once."""
        asyncio.get_running_loop().call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        if self._drain is not None:
            if sig == signal.SIGINT:
                self.should_exit = self.force_exit = True
            return
        seconds = self.server.service.model.settings.shutdown_s
        log.info("finishing %d answers, at most %g s", self.server.driver.in_flight, seconds)
        self._drain = asyncio.create_task(self._drained(seconds))

    async def _drained(self, seconds: float) -> None:
        await self.server.driver.drain(seconds)
        self.should_exit = True

    def _backend_died(self) -> None:
        self.has_died = True
        self.should_exit = True

    def _reload_keys(self) -> None:
        try:
            self.server.keys.reload()
            log.info("read the API keys again: %d", len(self.server.keys))
        except RecipeError as error:
            log.warning("%s; the keys stay as they were", error)
