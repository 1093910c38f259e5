"""A small OpenAI-compatible server with known delays: every word is a token, and answers come as its script says."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

OVERHEAD = 7


@dataclass
class Script:
    """How one request is answered; a `fault` replaces or breaks the stream."""

    first_s: float = 0.0
    gap_s: float = 0.0
    pieces: list[str] | None = None
    thoughts: list[str] = field(default_factory=list[str])
    fault: str | None = None
    has_usage: bool = True


@dataclass
class StubServer:
    """Serves in a thread between `with` and its end.

    Args:
        script: of the n-th streamed request with this body
        requests: bodies of streamed requests, in the order of arrival
        most_at_once: of streamed requests
    """

    script: Callable[[int, dict[str, Any]], Script] = lambda n, body: Script()
    requests: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: set[str] = field(default_factory=set[str])
    most_at_once: int = 0
    running: int = 0
    connections: int = 0
    url: str = ""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        async def serve() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await self._stop.wait()
            server.close()

        self._loop.run_until_complete(serve())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                self.keys.add(fields.get("authorization", ""))
                if not await self._answer(head.split()[1], json.loads(body or b"{}"), writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        if path == "/v1/models":
            return await _plain(writer, 200, {"object": "list", "data": [{"id": "stub"}]})
        words = (
            sum(len(m["content"].split()) for m in body["messages"]) if "chat" in path else len(body["prompt"].split())
        )
        usage = {"prompt_tokens": words + OVERHEAD, "completion_tokens": 1}
        if not body.get("stream"):
            return await _plain(writer, 200, {"choices": [], "usage": usage})
        self.requests.append(body)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            return await self._stream(self.script(len(self.requests) - 1, body), path, body, usage, writer)
        finally:
            self.running -= 1

    async def _stream(
        self, script: Script, path: str, body: dict[str, Any], usage: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        if script.fault == "busy":
            return await _plain(writer, 503, {"error": {"message": "too busy", "code": "server_overloaded"}})
        pieces = [f" w{i}" for i in range(body["max_tokens"])] if script.pieces is None else script.pieces
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

        async def send(event: object) -> None:
            data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()

        def chunk(text: str, kind: str = "content", reason: str | None = None) -> dict[str, Any]:
            part = {"delta": {kind: text} if text else {}} if "chat" in path else {"text": text}
            return {"id": "x", "choices": [{"index": 0, **part, "finish_reason": reason}], "usage": None}

        await send({"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        news = [("reasoning", text) for text in script.thoughts] + [("content", text) for text in pieces]
        for i, (kind, text) in enumerate(news):
            await asyncio.sleep(script.gap_s if i else script.first_s)
            await send(chunk(text, kind))
            if i == 1 and script.fault == "cut":
                return False
            if i == 1 and script.fault == "error":
                await send({"error": {"message": "engine died", "type": "server_error", "code": "engine_dead"}})
                return False
            if i == 1 and script.fault == "garbage":
                await send("{half")
        await send(chunk("", reason="length"))
        if script.has_usage:
            details = {"completion_tokens_details": {"reasoning_tokens": len(script.thoughts)}}
            details |= {"prompt_tokens_details": {"cached_tokens": 3}}
            await send({"id": "x", "choices": [], "usage": {**usage, "completion_tokens": len(news), **details}})
        if script.fault != "no mark":
            await send("[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def _plain(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> bool:
    data = json.dumps(body).encode()
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    await writer.drain()
    return True
