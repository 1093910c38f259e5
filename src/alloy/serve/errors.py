"""Errors of the HTTP API: one class, one body shape (serving.md 7.5), and the way from pydantic's complaints to it.

Messages name the field and the mend; they never hold prompts, paths or tracebacks.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alloy.core.toml import is_list, is_table
from alloy.errors import RequestError

_KINDS = {408: "timeout", 429: "rate_limit_error"}
# what pydantic calls them -> what a user of JSON calls them
_SAID = {
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "json_type": "must be a string with a JSON object",
    "json_invalid": "must be a string with a JSON object",
    "missing": "is missing",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error: status, and the four keys of its body.

    Attributes:
        status: HTTP status
        message: what is wrong, with the values, and what to do
        code: a word for programs; None when the type says it all
        param: dotted path of the field at fault
        headers: to send beside the body
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def kind(self) -> str:
        """The body's "type"."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, code, param)


def overloaded(message: str, retry_s: int) -> ApiError:
    """The queue is full, or nothing new is taken."""
    return ApiError(503, message, "server_overloaded", headers={"Retry-After": str(retry_s)})


def timed_out(seconds: float) -> ApiError:
    """The wall clock of one request ran out."""
    return ApiError(408, f"the request ran longer than {seconds:g} s; ask for fewer tokens, or try again", "timeout")


def engine_dead(status: int) -> ApiError:
    """The engine thread ended: 500 for what it was computing, 503 for all that comes after."""
    return ApiError(status, "the engine stopped after an internal error; the server restarts", "engine_dead")


def internal() -> ApiError:
    """A fault of ours; the log has the traceback."""
    return ApiError(500, "internal error; the server's log says more under this request id", "internal_error")


def from_request_error(error: RequestError, fields: Set[str], prompt: str) -> ApiError:
    """The engine's refusal; its first word is the field at fault where the request has one of that name."""
    word = str(error).partition(" ")[0].partition("[")[0].rstrip(":,")
    param = word if word in fields else prompt if word in (prompt, "prompt", "a") else None
    return bad(param, str(error), "context_length_exceeded" if "max_model_len" in str(error) else None)


def from_validation(error: ValidationError, data: object) -> ApiError:
    """The complaint that reaches deepest into `data`: of a union, the member that was meant."""
    placed = [(_path(detail, data), detail) for detail in error.errors(include_url=False)]
    path, _ = max(placed, key=lambda p: len(p[0]))
    said = [d for p, d in placed if p == path]
    # the member of a union whose type fits says more than those whose type does not
    said = [d for d in said if d["type"] not in _SAID] or said
    texts = list(dict.fromkeys(_SAID.get(d["type"], _lowered(d["msg"])) for d in said))
    param = ".".join(map(str, path)) or None
    return bad(param, f"{param or 'the body'} {_joined(texts)}")


def _path(detail: ErrorDetails, data: object) -> tuple[str | int, ...]:
    """The part of pydantic's location that exists in `data`; names of union members are left out."""
    path: list[str | int] = []
    here: Any = data
    for i, step in enumerate(detail["loc"]):
        is_missing = detail["type"] == "missing" and i == len(detail["loc"]) - 1
        if is_table(here) and isinstance(step, str) and (step in here or is_missing):
            path.append(step)
            here = None if is_missing else here[step]
        elif is_list(here) and isinstance(step, int):
            path.append(step)
            here = here[step]
    return tuple(path)


def _lowered(text: str) -> str:
    text = text.removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _joined(texts: Sequence[str]) -> str:
    musts = [t.removeprefix("must be ") for t in texts]
    return "must be " + " or ".join(musts) if all(t.startswith("must be ") for t in texts) else texts[0]
