"""Around every request: its id, the access log, warnings, API keys and rate limits (serving.md 7.2, 7.5, 7.7)."""

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alloy.core.logging import get_logger
from alloy.errors import RecipeError
from alloy.serve.errors import ApiError
from alloy.serve.settings import ServerSettings

log = get_logger(__name__)

PROTECTED = ("/v1/", "/tokenize", "/detokenize")
MAX_ID = 128
MINUTE_S = 60.0


class Keys:
    """The API keys, kept and compared as hashes."""

    def __init__(self, keys: Iterable[str], file: Path | None = None) -> None:
        self._fixed = {_hash(key) for key in keys}
        self._file = file
        self._known = set(self._fixed)
        self.reload()

    def __len__(self) -> int:
        return len(self._known)

    def reload(self) -> None:
        """Read the file of keys again."""
        if self._file is None:
            return
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f'serve.api_key_file = "{self._file}" cannot be read: {error}') from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise RecipeError(f'serve.api_key_file = "{self._file}" has no keys; write one a line')
        self._known = self._fixed | {_hash(key) for key in keys}

    def check(self, header: str | None) -> bytes:
        """The hash of the key in an Authorization header; ApiError without a known one."""
        scheme, _, key = (header or "").partition(" ")
        given = _hash(key.strip())
        # all are compared, so that the time says nothing
        found = [hmac.compare_digest(given, known) for known in self._known]
        if scheme.lower() != "bearer" or not any(found):
            message = "the API key is wrong" if header else "an API key is needed"
            message += "; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return given


class RateLimit:
    """So many requests a minute for each key, in bursts of at most as many."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        # when the bucket of a key will be full again
        self._full_at: dict[bytes, float] = {}

    def take(self, key: bytes) -> None:
        """Count one request; ApiError when there were too many."""
        if not self._per_minute:
            return
        now = time.monotonic()
        if len(self._full_at) > 10_000:
            self._full_at = {k: then for k, then in self._full_at.items() if then > now}
        full_at = max(now, self._full_at.get(key, now)) + MINUTE_S / self._per_minute
        if full_at > now + MINUTE_S:
            wait_s = int(full_at - now - MINUTE_S) + 1
            message = f"more than {self._per_minute} requests a minute; try again in {wait_s} s"
            after = {"Retry-After": str(wait_s)}
            raise ApiError(429, message, "rate_limit_exceeded", headers=after)
        self._full_at[key] = full_at


class Guard:
    """The outermost layer: nothing leaves without an id, and nothing enters without a key.

    Args:
        app: the routes
        keys: of protected paths; empty: none needed
        settings: rate limit, whether /metrics needs a key too, and origins whose pages may ask
        refused: told the code of every refusal
    """

    def __init__(self, app: ASGIApp, keys: Keys, settings: ServerSettings, refused: Callable[[str], None]) -> None:
        self._app = app
        self._inner: ASGIApp = self._gate
        if settings.cors:
            self._inner = CORSMiddleware(
                self._gate, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "x-alloy-warning", "retry-after"],
            )  # fmt: skip
        self._keys = keys
        self._rate = RateLimit(settings.rate_limit)
        self._on_refusal = refused
        self._protected = (*PROTECTED, "/metrics") if settings.metrics_auth else PROTECTED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        is_fit = 0 < len(given) <= MAX_ID and given.isascii() and given.isprintable()
        request_id = given if is_fit else uuid.uuid4().hex
        warnings: list[str] = []
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, warnings=warnings)
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = request_id
                if warnings:
                    sent["x-alloy-warning"] = ascii("; ".join(warnings))[1:-1][:1024]
            await send(message)

        try:
            await self._inner(scope, receive, send_with_id)
        except Exception:
            # the client has its answer
            log.exception("request %s failed", request_id)
        finally:
            if state.get("refused"):
                self._on_refusal(state["refused"])
            took_ms = 1000 * (time.perf_counter() - start)
            log.info("%s %s %d %.1f ms id=%s", scope["method"], ascii(scope["path"])[1:-1], status, took_ms, request_id)

    async def _gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] != "OPTIONS" and str(scope["path"]).startswith(self._protected):
                key = self._keys.check(Headers(scope=scope).get("authorization")) if len(self._keys) else b""
                client = scope.get("client")
                self._rate.take(key or str(client[0] if client else "").encode())
        except ApiError as error:
            scope["state"]["refused"] = error.code or error.kind
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
