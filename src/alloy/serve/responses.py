"""POST /v1/responses: the responses API over the chat route's own preparation; answers kept in memory, oldest use first out."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from alloy.core.logging import get_logger
from alloy.core.toml import is_list, is_table
from alloy.serve.answer import new_id
from alloy.serve.chat import Prepared, prepare
from alloy.serve.errors import ApiError, bad, internal
from alloy.serve.model import ServedModel
from alloy.serve.protocol import ChatRequest, Json, ResponseRequest, refuse_unserved, validated
from alloy.serve.service import Run, Service, Step
from alloy.serve.sse import end, event
from alloy.serve.tools import Call

log = get_logger(__name__)


# fields of a request that its response repeats, and what they are where they were left out
DEFAULTS: Json = {
    "background": False, "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "previous_response_id": None, "store": True, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
    "truncation": "disabled", "user": None,
}  # fmt: skip
# items that hold text: prefix of their ids, what they have besides, and their one part
TEXTS: dict[str, tuple[str, Json, Json]] = {
    "reasoning": ("rs_", {"summary": []}, {"type": "reasoning_text"}),
    "message": ("msg_", {"role": "assistant"}, {"type": "output_text", "annotations": [], "logprobs": []}),
}


@dataclass
class Stored:
    """A response, the conversation that led to it, and what computes it."""

    body: Json
    messages: list[Json]
    run: Run | None
    task: "asyncio.Task[None] | None" = None
    # what ended it early
    error: ApiError | None = None

    def stop(self, error: ApiError | None = None) -> None:
        """The client has gone, or the answer is done: nothing runs on for it."""
        if self.run is not None:
            self.run.cancel(error)
        if self.body["status"] == "in_progress":
            self.body["status"] = "cancelled"


@dataclass
class Output:
    """The items of one response, growing; each change is also an event of its stream."""

    items: list[Json] = field(default_factory=list[Json])
    _numbers: Iterator[int] = field(default_factory=count)

    def event(self, kind: str, **data: Any) -> Json:
        """An event with the next number."""
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **data}

    def advance(self, step: Step) -> Iterator[Json]:
        """What one increment adds."""
        for kind, text in (("reasoning", step.delta.thought), ("message", step.delta.text)):
            if text:
                yield from self._grow(kind, text)
        for call in step.delta.calls:
            yield from self._close("completed")
            yield from self._call(call)
        if step.completion.finish_reason is not None:
            yield from self._close("incomplete" if step.choice.finish_reason == "length" else "completed")

    def _grow(self, kind: str, text: str) -> Iterator[Json]:
        if not self.items or self.items[-1]["type"] != kind or self.items[-1]["status"] != "in_progress":
            yield from self._close("completed")
            prefix, item, part = TEXTS[kind]
            self.items.append({"id": new_id(prefix), "type": kind, **item, "status": "in_progress", "content": []})
            yield self._item("added")
            self.items[-1]["content"].append({**part, "text": ""})
            yield self._at("content_part.added", content_index=0, part=self.items[-1]["content"][0])
        part = self.items[-1]["content"][0]
        part["text"] += text
        yield self._text("delta", delta=text)

    def _close(self, status: str) -> Iterator[Json]:
        """End the item that grows, if one does."""
        if self.items and self.items[-1]["status"] == "in_progress":
            self.items[-1]["status"] = status
            part = self.items[-1]["content"][0]
            yield self._text("done", text=part["text"])
            yield self._at("content_part.done", content_index=0, part=part)
            yield self._item("done")

    def _call(self, call: Call) -> Iterator[Json]:
        whole = {"call_id": call.id, "name": call.name, "arguments": call.arguments, "status": "completed"}
        self.items.append({"id": new_id("fc_"), "type": "function_call", **whole})
        yield self._item("added", arguments="", status="in_progress")
        yield self._at("function_call_arguments.delta", delta=call.arguments)
        yield self._at("function_call_arguments.done", name=call.name, arguments=call.arguments)
        yield self._item("done")

    def _item(self, what: str, **changes: Any) -> Json:
        item = {**self.items[-1], **changes}
        return self.event(f"output_item.{what}", output_index=len(self.items) - 1, item=item)

    def _at(self, kind: str, **data: Any) -> Json:
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **data)

    def _text(self, what: str, **data: str) -> Json:
        kind = self.items[-1]["content"][0]["type"]
        logprobs: Json = {"logprobs": []} if kind == "output_text" else {}
        return self._at(f"{kind}.{what}", content_index=0, **data, **logprobs)


class Responses:
    """The routes of the responses API and what they have stored."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    async def create(self, http: HttpRequest, body: ResponseRequest, warnings: list[str]) -> Response:
        """Answer one request, whole, as a stream, or in the background."""
        name = self._service.model.check_name(body.model)
        if body.background and body.stream:
            raise bad("background", "background and stream cannot both be true; poll GET /v1/responses/{id} instead")
        if body.background and body.store is False:
            raise bad("store", "a background response must be stored; leave store out")
        messages = self._messages(body)
        request, layout = await asyncio.to_thread(_prepare, self._service.model, body, messages, warnings)
        run = self._service.run([request], layout)
        stored = Stored(_frame(body, name), messages, run)
        if body.store is not False:
            self._keep(stored)
        if body.background:
            stored.task = asyncio.create_task(_finish(stored, run))
            return JSONResponse(stored.body)

        async def whole() -> Json:
            await _finish(stored, run)
            if stored.error is not None:
                raise stored.error
            return stored.body

        framed = (event(data, data["type"]) async for data in _events(stored, run))
        return await run.respond(http, framed if body.stream else None, whole, stored.stop)

    async def get(self, response_id: str) -> Json:
        """A stored response."""
        return self._find(response_id).body

    async def delete(self, response_id: str) -> Json:
        """Forget a response; one that runs is stopped."""
        stored = self._find(response_id)
        stored.stop(ApiError(404, "the response was deleted", "response_not_found", "response_id"))
        if stored.task is not None:
            stored.task.cancel()
        del self._stored[response_id]
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, response_id: str) -> Json:
        """Stop a background response; one that is done stays as it is."""
        stored = self._find(response_id)
        if stored.task is None:
            raise bad("response_id", "only background responses can be cancelled")
        await end(stored.task)
        # a task that had not begun has cleaned nothing up
        stored.stop()
        return stored.body

    async def close(self) -> None:
        """Stop what runs in the background."""
        await end(*(s.task for s in self._stored.values() if s.task is not None))

    def _keep(self, stored: Stored) -> None:
        self._stored[stored.body["id"]] = stored
        while len(self._stored) > self._service.model.settings.max_responses:
            _, old = self._stored.popitem(last=False)
            if old.task is not None:
                old.task.cancel()

    def _find(self, response_id: str, param: str = "response_id") -> Stored:
        stored = self._stored.get(response_id)
        # a conversation goes on from an answer alone
        if stored is None or (param != "response_id" and stored.body["status"] not in ("completed", "incomplete")):
            what = "response" if param == "response_id" else "finished response"
            raise ApiError(404, f"no {what} with this id is stored here", "response_not_found", param)
        self._stored.move_to_end(response_id)
        return stored

    def _messages(self, body: ResponseRequest) -> list[Json]:
        """The whole conversation as chat messages; instructions are those of this request alone."""
        past: list[Json] = []
        if body.previous_response_id is not None:
            stored = self._find(body.previous_response_id, "previous_response_id")
            past = stored.messages + _items(stored.body["output"], "output")
        items: list[Json] = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
        return past + _items(items, "input")


def _prepare(model: ServedModel, body: ResponseRequest, messages: list[Json], warnings: list[str]) -> Prepared:
    refuse_unserved(body)
    if body.instructions is not None:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    tools: list[Json] = []
    for i, tool in enumerate(body.tools or []):
        if tool.get("type") != "function":
            raise bad(f"tools.{i}.type", f'tools.{i}.type must be "function"; this server runs no tools of its own')
        tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    data: Json = {name: getattr(body, name) for name in ("temperature", "top_p", "parallel_tool_calls")}
    data |= {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "tools": tools,
        "tool_choice": choice,
    }
    if body.text is not None and body.text.format is not None:
        shape = body.text.format
        schema = {"name": shape.name, "schema": shape.schema_} if shape.type == "json_schema" else None
        data["response_format"] = {"type": shape.type, "json_schema": schema}
    # extensions of the chat route pass through
    data |= {k: v for k, v in (body.model_extra or {}).items() if k in ChatRequest.model_fields and k not in data}
    try:
        return prepare(model, validated(ChatRequest, data), warnings)
    except ApiError as error:
        if error.param is not None and error.param.startswith("messages"):
            error.param = "input"
            error.message = error.message.replace("messages has", "input has")
        raise


def _items(items: list[Json], where: str) -> list[Json]:
    """Input items as chat messages."""
    messages: list[Json] = []
    thought = ""
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "reasoning":
            found = [part for key in ("content", "summary") if is_list(item.get(key)) for part in item[key]]
            thought = "".join(str(part.get("text", "")) for part in found if is_table(part))
            continue
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise bad(f"{where}.{i}.type", f'{where}.{i}.type is "{str(kind)[:64]}", which this server cannot read')
        # a thought belongs to what the assistant said after it
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"], thought = thought, ""
    return messages


async def _events(stored: Stored, run: Run) -> AsyncGenerator[Json]:
    """All that happens to a response, until it is over: complete, failed, or left."""
    output, body = Output(), stored.body
    try:
        yield output.event("created", response=body)
        yield output.event("in_progress", response=body)
        async for step in run.steps():
            for data in output.advance(step):
                yield data
        is_cut, usage = run.choices[0].finish_reason == "length", run.usage
        body.update(
            status="incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=output.items,
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
                "total_tokens": usage["total_tokens"],
            },
        )
    except Exception as error:
        if not isinstance(error, ApiError):
            log.exception("a response failed")
        stored.error = error if isinstance(error, ApiError) else internal()
        body.update(status="failed", error={"code": "server_error", "message": stored.error.message})
    finally:
        stored.stop()
        stored.run = None
    yield output.event(body["status"], response=body)


async def _finish(stored: Stored, run: Run) -> None:
    async for _ in _events(stored, run):
        pass


def _frame(body: ResponseRequest, name: str) -> Json:
    """The response before it says anything: what was asked for, with the defaults of the API."""
    shape = body.text.format if body.text else None
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": name,
        "output": [],
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "text": {"format": shape.model_dump(by_alias=True, exclude_none=True) if shape else {"type": "text"}},
        "usage": None,
        **DEFAULTS,
        **body.model_dump(include=set(DEFAULTS), exclude_none=True),
    }
