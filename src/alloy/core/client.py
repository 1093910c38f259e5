"""Talking to OpenAI-compatible servers: addresses, streamed events, and what their chunks and errors mean."""

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from alloy.core.device import require
from alloy.core.toml import is_list, is_table
from alloy.errors import AlloyError, RequestError

DONE = "[DONE]"
# a lone carriage return ends a line, too, but only the next byte tells it from the first half of "\r\n"
_LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")


class ServerError(AlloyError):
    """A server that is not there, refuses or breaks off; failures are counted by `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, as the server counts them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Delta:
    """What one chunk of a streamed answer adds."""

    text: str = ""
    thought: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None


class EventReader:
    """Cuts a byte stream into server-sent events, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that `chunk` completes; comments and other fields are left out."""
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        events: list[str] = []
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode(errors="replace"))
                self._data = []
        return events


class ChatServer:
    """A model behind a server, one answer at a time.

    Args:
        url: address of the server
        model: as the server calls it; None: the first that it lists
        key: bearer key
        timeout_s: longest silence
    """

    def __init__(self, url: str, model: str | None = None, key: str | None = None, timeout_s: float = 600.0) -> None:
        require("httpx", extra="serve", why="servers are talked to")
        import httpx

        self.root = api_root(url)
        timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._client = httpx.Client(headers=headers(key), timeout=timeout, trust_env=False)
        self.model = self._first_model() if model is None else model

    def stream(self, messages: Sequence[Mapping[str, object]], body: Mapping[str, object]) -> Generator[Delta]:
        """The answer as it comes; closing the generator stops it at the server, too."""
        import httpx

        wanted = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self.model, "messages": list(messages), **wanted, **body}
        events = EventReader()
        try:
            with self._client.stream("POST", self.root + "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read())
                for chunk in response.iter_raw():
                    for data in events.feed(chunk):
                        if data == DONE:
                            return
                        yield read_delta(data)
        except httpx.ConnectError as error:
            raise unreachable(self.root, error) from error
        except httpx.HTTPError as error:
            raise ServerError("broken stream", f"the connection to {self.root} was lost ({error})") from error
        raise ServerError("broken stream", f"the stream ended before its {DONE}")

    def _first_model(self) -> str:
        import httpx

        try:
            response = self._client.get(self.root + "/models")
        except httpx.HTTPError as error:
            raise unreachable(self.root, error) from error
        return read_first_model(self.root, response.status_code, response.content)


def read_first_model(root: str, status: int, body: bytes) -> str:
    """The first name in a server's list of models."""
    if status != 200:
        raise refusal(status, body)
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    models = answer.get("data") if is_table(answer) else None
    if not is_list(models) or not models or not is_table(models[0]):
        raise ServerError("no model", f"{root}/models lists no model; is it an OpenAI-compatible server?")
    return str(models[0].get("id"))


def api_root(url: str) -> str:
    """The address that API paths are appended to: "http://host:8000" and "http://host:8000/v1/" are the same."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise RequestError(f'url = "{url}" is not the address of a server; write it as http://127.0.0.1:8000')
    root = url.rstrip("/")
    return root if re.search(r"/v\d+$", root) else root + "/v1"


def headers(key: str | None) -> dict[str, str]:
    """Request headers; compressed streams would hold tokens back."""
    plain = {"Accept-Encoding": "identity"}
    return plain if key is None else {**plain, "Authorization": f"Bearer {key}"}


def read_delta(data: str) -> Delta:
    """The meaning of one event of a chat or completion stream; ServerError for an error or for what is neither."""
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise ServerError("not JSON", f"the server sent an event that is not JSON: {data[:80]!r}") from error
    if not is_table(chunk):
        raise ServerError("not JSON", f"the server sent an event that is not an object: {data[:80]!r}")
    if chunk.get("error") is not None:
        kind, message = _error(chunk)
        raise ServerError(f"error event {kind}", f"the server broke off: {message}")
    choices = chunk.get("choices")
    choice = choices[0] if is_list(choices) and choices and is_table(choices[0]) else {}
    delta = choice.get("delta")
    part = delta if is_table(delta) else choice
    thought = part.get("reasoning") or part.get("reasoning_content") or ""
    text = part.get("content") or part.get("text") or ""
    reason = choice.get("finish_reason")
    return Delta(str(text), str(thought), None if reason is None else str(reason), read_usage(chunk))


def read_usage(answer: object) -> Usage | None:
    """The token counts of an answer or chunk, where it has them."""
    usage = answer.get("usage") if is_table(answer) else None
    if not is_table(usage):
        return None

    def detail(group: str, name: str) -> int:
        found = usage.get(group)
        return _count(found.get(name)) if is_table(found) else 0

    return Usage(
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        detail("prompt_tokens_details", "cached_tokens"),
        detail("completion_tokens_details", "reasoning_tokens"),
    )


def refusal(status: int, body: bytes) -> ServerError:
    """The error of a response that is not a success."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    message = _error(answer)[1] if is_table(answer) else body[:200].decode(errors="replace").strip()
    return ServerError(f"HTTP {status}", f"the server answered {status}: {message or 'no message'}")


def unreachable(url: str, error: Exception) -> ServerError:
    """The error of a server that cannot be talked to."""
    return ServerError(
        "no connection", f"no server answers at {url} ({error}); start one with `alloy serve MODEL` or mend the address"
    )


def _error(answer: Mapping[str, object]) -> tuple[str, str]:
    """(kind, message) of an error body: OpenAI's, or FastAPI's `detail`."""
    error = answer.get("error", answer.get("detail"))
    if not is_table(error):
        return "", str(error or "")
    return str(error.get("code") or error.get("type") or ""), str(error.get("message") or "")


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
