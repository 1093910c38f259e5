"""Server-sent events by hand, and watching for a client that goes away (serving.md 7.2, 7.6)."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alloy.serve.errors import ApiError

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
DONE = "[DONE]"

T = TypeVar("T")


class ClientGone(Exception):  # noqa: N818  nobody is told of it
    """Nobody reads the answer any more."""


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """One event; `name` only where the protocol has named ones."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come, a comment when none comes for a while, and stops when the client has gone.

    Args:
        events: framed events; an ApiError from it becomes the last but one event
        close: called once, however the stream ends
        keepalive_s: silence that is broken with a comment
    """

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], None], keepalive_s: float) -> None:
        super().__init__(headers=HEADERS)
        # the length is not known
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._keepalive_s = keepalive_s
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            with suppress(ClientGone, OSError):
                await unless_gone(receive, self._send(send))
        finally:
            self._close()
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pulse = asyncio.create_task(self._keep_alive(send))
        try:
            async for data in self._events:
                await self._write(send, data)
        except ApiError as error:
            await self._write(send, event(error.body) + event(DONE))
        finally:
            pulse.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """A comment whenever nothing was sent for `keepalive_s`."""
        while True:
            wait_s = self._sent_at + self._keepalive_s - time.monotonic()
            if wait_s <= 0:
                await self._write(send, b": keep-alive\n\n")
            else:
                await asyncio.sleep(wait_s)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; ClientGone, with the work cancelled, when the client disconnects first."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        await end(worker, watcher)


async def end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
