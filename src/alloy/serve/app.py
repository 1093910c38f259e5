"""The routes (serving.md 7.1): bodies in, answers out. What they do lives beside this file, one module each."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from alloy import __version__
from alloy.core.logging import get_logger
from alloy.serve.chat import answer_chat
from alloy.serve.completions import answer_completion
from alloy.serve.driver import Backend, Driver
from alloy.serve.errors import ApiError, bad, internal, timed_out
from alloy.serve.guard import Guard, Keys
from alloy.serve.metrics import Metrics
from alloy.serve.model import ServedModel
from alloy.serve.protocol import (
    AnyBody,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Json,
    ResponseRequest,
    TokenizeRequest,
    parse_body,
)
from alloy.serve.responses import Responses
from alloy.serve.service import Service
from alloy.serve.sse import ClientGone, end

log = get_logger(__name__)

STATUS_S = 10.0
BODIES: tuple[type[Body], ...] = (ChatRequest, CompletionRequest, ResponseRequest, TokenizeRequest, DetokenizeRequest)
# what other servers do and this model cannot
NOT_HERE = (
    "/v1/embeddings", "/v1/score", "/v1/moderations", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/audio/speech", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations",
)  # fmt: skip
PAGE = {"index.html": "text/html", "chat.js": "text/javascript", "style.css": "text/css"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Server:
    """The application with what computes for it.

    Args:
        model: what is served, with its settings
        backend: what computes; closed when the application ends
        keys: API keys
        on_death: called once the backend has failed
    """

    def __init__(
        self, model: ServedModel, backend: Backend, keys: Keys | None = None, on_death: Callable[[], None] | None = None
    ) -> None:
        settings = model.settings
        self.keys = keys or Keys(())
        metrics = Metrics(settings.metrics_prefix, model.name)
        self.driver = Driver(backend, settings, metrics.stepped, on_death)
        self.service = Service(model, self.driver, metrics)
        self.responses = Responses(self.service)
        self._warned: set[str] = set()
        routes = FastAPI(title="alloy", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None)
        self._add_routes(routes)
        # OpenAPI of the routes, with the bodies that they parse by hand
        kinds: list[tuple[type[Body], JsonSchemaMode]] = [(kind, "validation") for kind in BODIES]
        _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        routes.openapi()["components"]["schemas"].update(schemas["$defs"])
        for kind in (ApiError, HTTPException, ClientGone, ClientDisconnect, Exception):
            routes.add_exception_handler(kind, _answer)
        self.app = Guard(routes, self.keys, settings, metrics.refused)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncGenerator[None]:
        await self.driver.start()
        status = asyncio.create_task(self._report())
        try:
            yield
        finally:
            await end(status)
            await self.responses.close()
            await self.driver.close()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(STATUS_S)
            if (line := self.service.metrics.status_line()) is not None:
                log.info("%s", line)

    async def _read(self, kind: type[AnyBody], request: Request) -> tuple[AnyBody, list[str]]:
        """The body as a request, and the list that collects warnings."""
        limits = self.service.model.settings
        try:
            async with asyncio.timeout(limits.request_timeout_s):
                raw = await read_body(request, int(limits.max_body_mb * 2**20))
        except TimeoutError as error:
            raise timed_out(limits.request_timeout_s) from error
        body = parse_body(kind, raw)
        warnings: list[str] = request.state.warnings
        names = sorted(ascii(name)[1:-1][:64] for name, value in (body.model_extra or {}).items() if value is not None)
        if names:
            warnings.append(f"unknown fields left alone: {', '.join(names[:16])}")
        for name in names:
            if name not in self._warned and len(self._warned) < 1000:
                self._warned.add(name)
                log.warning("requests have the unknown field %s, which is left alone", name)
        if limits.log_prompts:
            log.info("request %s: %s", request.state.request_id, raw.decode("utf-8", "replace"))
        return body, warnings

    def _add_routes(self, app: FastAPI) -> None:
        driver, model = self.driver, self.service.model

        @app.get("/health")
        @app.get("/livez")
        async def health() -> Response:
            return JSONResponse({"status": "dead" if driver.is_dead else "ok"}, 503 if driver.is_dead else 200)

        @app.get("/ready")
        async def ready() -> Response:
            return JSONResponse({"status": driver.state}, 200 if driver.state == "ready" else 503)

        @app.get("/version")
        async def version() -> Json:
            return {"version": __version__}

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(generate_latest(self.service.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

        @app.get("/v1/models")
        async def models() -> Json:
            return {"object": "list", "data": [_entry(model, name) for name in model.names]}

        @app.get("/v1/models/{model_id:path}")
        async def one_model(model_id: str) -> Json:
            return _entry(model, model.check_name(model_id))

        @app.get("/", include_in_schema=False)
        @app.get("/{name}", include_in_schema=False)
        async def page(name: str = "index.html") -> Response:
            found = files("alloy.serve").joinpath("page", name)
            if not model.settings.page or name not in PAGE or not found.is_file():
                raise HTTPException(404)
            return Response(found.read_bytes(), media_type=PAGE[name], headers=PAGE_HEADERS)

        async def not_here() -> Response:
            raise ApiError(404, f"the model {model.name} writes text; it cannot do this", "not_supported")

        for path in NOT_HERE:
            app.post(path, include_in_schema=False)(not_here)

        app.get("/v1/responses/{response_id}")(self.responses.get)
        app.delete("/v1/responses/{response_id}")(self.responses.delete)
        app.post("/v1/responses/{response_id}/cancel")(self.responses.cancel)
        post = partial(self._add_post, app)
        post("/v1/chat/completions", ChatRequest, partial(answer_chat, self.service))
        post("/v1/completions", CompletionRequest, partial(answer_completion, self.service))
        post("/v1/responses", ResponseRequest, self.responses.create)
        post("/tokenize", TokenizeRequest, partial(_tokenize, model))
        post("/detokenize", DetokenizeRequest, partial(_detokenize, model))

    def _add_post(
        self, app: FastAPI, path: str, kind: type[AnyBody], answer: Callable[[Request, AnyBody, list[str]], Any]
    ) -> None:
        """A route whose body is parsed by hand; `answer` gets it and the list that collects warnings."""

        @app.post(path, name=path.strip("/"), openapi_extra=_takes(kind), response_model=None)
        async def endpoint(request: Request) -> Any:
            return await answer(request, *await self._read(kind, request))


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request, refused as soon as it is known to be too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, "the body must be JSON; send Content-Type: application/json", "unsupported_media_type")
    large = ApiError(413, f"the body has more than {limit:,} bytes; send less at once", "request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise large
        parts.append(part)
    return b"".join(parts)


def _takes(kind: type[Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content = {"application/json": {"schema": schema}}
    error = {"description": "An error", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {str(status): error for status in (400, 401, 404, 408, 413, 415, 429, 500, 503)},
    }


def _entry(model: ServedModel, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "alloy",
        "root": model.name,
        "max_model_len": model.llm.max_model_len,
    }


async def _tokenize(model: ServedModel, http: Request, body: TokenizeRequest, warnings: list[str]) -> Json:
    model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad("prompt", "send either prompt or messages")
    if body.messages is not None:
        prompt = await asyncio.to_thread(model.chat_prompt, body.messages, body)
        warnings += prompt.warnings
        ids = prompt.ids
    else:
        special = body.add_special_tokens is not False
        ids = await asyncio.to_thread(model.encode, body.prompt or "", "prompt", special)
    return {"tokens": ids, "count": len(ids), "max_model_len": model.llm.max_model_len}


async def _detokenize(model: ServedModel, http: Request, body: DetokenizeRequest, warnings: list[str]) -> Json:
    model.check_name(body.model)
    vocab = model.llm.model.config.vocab
    for i, token in enumerate(body.tokens):
        if token >= vocab:
            raise bad(f"tokens.{i}", f"tokens.{i} = {token} is outside the vocabulary of {vocab}")
    return {"prompt": await asyncio.to_thread(model.codec("tokens").decode, body.tokens)}


async def _answer(request: Request, error: Exception) -> Response:
    """Every error in the one body shape; what it was is left for the access log and the metrics."""
    if isinstance(error, ClientGone | ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        path = json.dumps(request.url.path[:256])
        said = {
            404: (f"there is nothing at {path}; /openapi.json lists what there is", "not_found"),
            405: (f"{path} does not take {request.method}", "method_not_allowed"),
        }
        message, code = said.get(error.status_code, (str(error.detail), "http_error"))
        error = ApiError(error.status_code, message, code, headers=error.headers)
    known = error if isinstance(error, ApiError) else internal()
    request.state.refused = known.code or known.kind
    return JSONResponse(known.body, known.status, known.headers)
