"""Talking to OpenAI-compatible servers: addresses, streamed events, and what their chunks and errors mean."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

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


def read_usage(answer: Mapping[str, object]) -> Usage | None:
    """The token counts of an answer or chunk, where it has them."""
    usage = answer.get("usage")
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
