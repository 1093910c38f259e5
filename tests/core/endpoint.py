"""A small chat endpoint that answers as its script says: whole answers, errors, silence, and broken JSON."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Reply:
    """One response. `content`, where it is set, is sent instead of an answer with `text`; `hang` sends nothing."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    finish_reason: str = "stop"
    content: bytes | None = None
    hang: bool = False

    def body(self, request: dict[str, Any]) -> bytes:
        if self.content is not None:
            return self.content
        if self.status != 200:
            return json.dumps({"error": {"message": "as the script says", "code": "scripted"}}).encode()
        message = {"role": "assistant", "content": self.text}
        words = sum(len(m["content"].split()) for m in request["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": len(self.text.split())}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return json.dumps({"choices": [choice], "usage": usage}).encode()


@dataclass
class Endpoint:
    """Serves in threads between `with` and its end.

    Args:
        script: answers the n-th (from 0) request whose last message says `text`
        requests: bodies, in the order of arrival, without probes
        authorizations: header of every request
    """

    script: Callable[[str, int], Reply | str]
    requests: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    authorizations: list[str | None] = field(default_factory=list[str | None])
    running: int = 0
    most_at_once: int = 0

    def __enter__(self) -> Self:
        endpoint, lock, seen = self, threading.Lock(), Counter[str]()
        self._over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(200, {}, json.dumps({"data": [{"id": "scripted"}]}).encode())

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = request["messages"][-1]["content"]
                is_probe = request["max_tokens"] == 1
                with lock:
                    count = seen[text]
                    seen[text] += 1
                    endpoint.authorizations.append(self.headers["Authorization"])
                    if not is_probe:
                        endpoint.requests.append(request)
                    endpoint.running += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.running)
                reply = Reply("Hi") if is_probe else endpoint.script(text, count)
                reply = Reply(reply) if isinstance(reply, str) else reply
                if reply.hang:
                    endpoint._over.wait(30)
                with lock:
                    endpoint.running -= 1
                # half a body ends with its connection
                self.close_connection = reply.hang or "Content-Length" in reply.headers
                if not reply.hang:
                    self.answer(reply.status, reply.headers, reply.body(request))

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
