"""A small server that plays the chat page's part of the OpenAI protocol, one scripted reply a request."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "alloy" / "serve" / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Gate:
    """A place in a reply where the server waits until the test opens it."""

    opened: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        """Lets the reply go on."""
        self.opened.set()


CUT = object()  # the connection ends here, without the end of the stream


@dataclass
class Reply:
    """A status, headers, and either a JSON body or parts of a stream: dicts, gates, raw bytes or CUT."""

    parts: tuple[object, ...] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: object = None


def chunk(finish: str | None = None, **delta: str) -> dict[str, Any]:
    """One chunk of a chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], "usage": None}


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    """The last chunk, which has no choice."""
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": counts}


def stream(*parts: object, finish: str = "stop", counts: dict[str, Any] | None = None) -> Reply:
    """A whole answer: role, the parts (a plain string is content), finish reason, usage, end."""
    made = [chunk(content=part) if isinstance(part, str) else part for part in parts]
    return Reply(
        (
            chunk(role="assistant", content=""),
            *made,
            chunk(finish=finish),
            counts or usage(7, len(made)),
            b"data: [DONE]\n\n",
        )
    )


def error(status: int, code: str, message: str, **headers: str) -> Reply:
    """A refusal in the protocol's form; names of headers have _ for -."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Reply((), status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


class Stub:
    """Serves the page with the policy it must live under, and the scripted replies."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models: Reply | None = None
        self.gone = threading.Event()  # a client went away in the middle of a reply
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                stub.get(self)

            def do_POST(self) -> None:
                stub.post(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        """The three files and the list of models."""
        if handler.path == "/v1/models":
            entry = {"id": "tiny-hybrid", "object": "model", "created": 0, "owned_by": "alloy", "max_model_len": 4096}
            self.send(handler, self.models or Reply(body={"object": "list", "data": [entry]}))
            return
        file = PAGE / (handler.path.lstrip("/") or "index.html")
        if file.parent != PAGE or not file.is_file():
            self.send(handler, error(404, "not_found", "no such page"))
            return
        handler.send_response(200)
        handler.send_header("content-type", TYPES[file.suffix])
        handler.send_header("content-security-policy", POLICY)
        handler.send_header("x-content-type-options", "nosniff")
        handler.end_headers()
        handler.wfile.write(file.read_bytes())

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        """The next scripted reply."""
        body = handler.rfile.read(int(handler.headers["content-length"]))
        self.requests.append({"path": handler.path, **json.loads(body)})
        self.keys.append(handler.headers["authorization"])
        self.send(handler, self.replies.pop(0))

    def send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        """Writes one reply, part by part."""
        is_stream = reply.body is None
        handler.send_response(reply.status)
        handler.send_header("content-type", "text/event-stream; charset=utf-8" if is_stream else "application/json")
        if is_stream and CUT in reply.parts:
            handler.send_header("content-length", "1000000000")
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        try:
            for data in self.pieces(reply):
                handler.wfile.write(data)
                handler.wfile.flush()
        except OSError:
            self.gone.set()

    def pieces(self, reply: Reply) -> Iterator[bytes]:
        """The bytes of a reply; waits at its gates, and then keeps writing so that a lost client is noticed."""
        if reply.body is not None:
            yield json.dumps(reply.body).encode()
        for part in reply.parts:
            if part is CUT:
                return
            if isinstance(part, Gate):
                while not part.opened.wait(0.02):
                    yield b": keep-alive\n\n"
            elif isinstance(part, bytes):
                yield part
            else:
                yield b"data: " + json.dumps(part, ensure_ascii=False).encode() + b"\n\n"
