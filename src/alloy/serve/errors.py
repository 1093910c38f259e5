"""Errors of the HTTP API: one class, one body shape (serving.md 7.5), and the way from pydantic's complaints to it.

Messages name the field and the mend; they never hold prompts, paths or tracebacks.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from alloy.core.explain import deepest
from alloy.errors import RequestError

_KINDS = {408: "timeout", 429: "rate_limit_error"}


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
    """The engine ended: 500 for what it was computing, 503 for all that comes after."""
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
    """The complaint that reaches deepest into `data`."""
    path, text = deepest(error, data)
    param = ".".join(map(str, path)) or None
    return bad(param, f"{param or 'the body'} {text}")
