"""POST /v1/responses: the responses API over the chat route's own preparation; answers kept in memory, oldest use first out."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from alloy.core.logging import get_logger
from alloy.core.toml import is_list, is_table
from alloy.serve.answer import Choice, new_id
from alloy.serve.chat import Prepared, prepare
from alloy.serve.errors import ApiError, bad, internal
from alloy.serve.protocol import ChatRequest, Json, ResponseRequest, refuse_unserved, validated
from alloy.serve.service import Run, Service, Step
from alloy.serve.sse import EventStream, event, unless_gone
from alloy.serve.tools import Call

log = get_logger(__name__)


@dataclass
class Stored:
    """A response and the conversation that led to it."""

    body: Json
    messages: list[Json]
    run: Run | None = None
    task: "asyncio.Task[None] | None" = None


@dataclass
class Output:
    """The items of one response, growing; each change is also an event of its stream."""

    items: list[Json] = field(default_factory=list[Json])
    _numbers: int = 0

    def event(self, kind: str, **data: Any) -> Json:
        """An event with the next number."""
        self._numbers += 1
        return {"type": kind, "sequence_number": self._numbers - 1, **data}

    def advance(self, step: Step) -> list[Json]:
        """What one increment adds."""
        events: list[Json] = []
        if step.delta.thought:
            events += self._grow("reasoning", step.delta.thought)
        if step.delta.text:
            events += self._grow("message", step.delta.text)
        for call in step.delta.calls:
            events += self._close("completed") + self._call(call)
        if step.completion.finish_reason is not None:
            events += self._close("incomplete" if step.choice.finish_reason == "length" else "completed")
        return events

    def _grow(self, kind: str, text: str) -> list[Json]:
        events: list[Json] = []
        if not self.items or self.items[-1]["type"] != kind or self.items[-1]["status"] != "in_progress":
            events += self._close("completed")
            item: Json = {"id": new_id("msg_"), "type": "message", "role": "assistant"}
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            if kind == "reasoning":
                item = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
                part = {"type": "reasoning_text", "text": ""}
            item |= {"status": "in_progress", "content": []}
            self.items.append(item)
            events.append(
                self.event("response.output_item.added", output_index=self._last, item={**item, "content": []})
            )
            item["content"].append(part)
            events.append(self.event("response.content_part.added", **self._at(), part=dict(part)))
        self.items[-1]["content"][0]["text"] += text
        name, extra = _names(kind)
        events.append(self.event(f"response.{name}.delta", **self._at(), delta=text, **extra))
        return events

    def _close(self, status: str) -> list[Json]:
        """End the item that grows, if one does."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        item["status"] = status
        part = item["content"][0]
        name, extra = _names(item["type"])
        return [
            self.event(f"response.{name}.done", **self._at(), text=part["text"], **extra),
            self.event("response.content_part.done", **self._at(), part=dict(part)),
            self.event("response.output_item.done", output_index=self._last, item=item),
        ]

    def _call(self, call: Call) -> list[Json]:
        item: Json = {
            "id": new_id("fc_"), "type": "function_call", "call_id": call.id, "name": call.name,
            "arguments": call.arguments, "status": "completed",
        }  # fmt: skip
        self.items.append(item)
        at = {"item_id": item["id"], "output_index": self._last}
        begun = {**item, "arguments": "", "status": "in_progress"}
        return [
            self.event("response.output_item.added", output_index=self._last, item=begun),
            self.event("response.function_call_arguments.delta", **at, delta=call.arguments),
            self.event("response.function_call_arguments.done", **at, name=call.name, arguments=call.arguments),
            self.event("response.output_item.done", output_index=self._last, item=item),
        ]

    @property
    def _last(self) -> int:
        return len(self.items) - 1

    def _at(self) -> Json:
        return {"item_id": self.items[-1]["id"], "output_index": self._last, "content_index": 0}


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
        prepared = await asyncio.to_thread(_prepare, self._service, body, messages)
        warnings += prepared.warnings
        run = self._service.run([prepared.request], prepared.layout)
        stored = Stored(_frame(body, name), messages, run)
        if body.store is not False:
            self._keep(stored)
        if body.background:
            stored.task = asyncio.create_task(self._behind(stored, run))
            return JSONResponse(stored.body)
        keepalive_s = self._service.settings.keepalive_s
        try:
            if body.stream:
                await unless_gone(http, run.ticket.opened(keepalive_s))
                return EventStream(self._events(stored, run), lambda: self._abandon(stored, run), keepalive_s)
            await unless_gone(http, _finish(stored, run))
        except BaseException:
            self._abandon(stored, run)
            raise
        return JSONResponse(stored.body)

    def get(self, response_id: str) -> Json:
        """A stored response."""
        return self._find(response_id).body

    def delete(self, response_id: str) -> Json:
        """Forget a response; one that runs is stopped."""
        stored = self._find(response_id)
        if stored.run is not None:
            stored.run.cancel()
        if stored.task is not None:
            stored.task.cancel()
        del self._stored[response_id]
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, response_id: str) -> Json:
        """Stop a background response; one that is done stays as it is."""
        stored = self._find(response_id)
        if stored.task is None:
            raise bad("response_id", "only background responses can be cancelled")
        if not stored.task.done():
            stored.task.cancel()
            await asyncio.gather(stored.task, return_exceptions=True)
        return stored.body

    async def close(self) -> None:
        """Stop what runs in the background."""
        tasks = [s.task for s in self._stored.values() if s.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _behind(self, stored: Stored, run: Run) -> None:
        try:
            await _finish(stored, run)
        except ApiError as error:
            stored.body.update(status="failed", error={"code": "server_error", "message": error.message})
        except asyncio.CancelledError:
            stored.body["status"] = "cancelled"
            raise
        except Exception:
            log.exception("a background response failed")
            stored.body.update(status="failed", error={"code": "server_error", "message": internal().message})
        finally:
            run.cancel()

    def _abandon(self, stored: Stored, run: Run) -> None:
        """The client has gone, or the answer is done: nothing runs on for it."""
        run.cancel()
        if stored.body["status"] == "in_progress":
            stored.body["status"] = "cancelled"

    async def _events(self, stored: Stored, run: Run) -> AsyncGenerator[bytes]:
        output = Output()
        body = stored.body

        def framed(data: Json) -> bytes:
            return event(data, data["type"])

        yield framed(output.event("response.created", response=body))
        yield framed(output.event("response.in_progress", response=body))
        try:
            async for step in run.steps():
                for data in output.advance(step):
                    yield framed(data)
        except ApiError as error:
            body.update(status="failed", error={"code": "server_error", "message": error.message})
            yield framed(output.event("response.failed", response=body))
            return
        _complete(stored, run, output)
        yield framed(output.event(f"response.{body['status']}", response=body))

    def _keep(self, stored: Stored) -> None:
        self._stored[stored.body["id"]] = stored
        while len(self._stored) > self._service.settings.max_responses:
            _, old = self._stored.popitem(last=False)
            if old.task is not None:
                old.task.cancel()

    def _find(self, response_id: str) -> Stored:
        stored = self._stored.get(response_id)
        if stored is None:
            raise ApiError(404, "no response with this id is stored here", "response_not_found", "response_id")
        self._stored.move_to_end(response_id)
        return stored

    def _messages(self, body: ResponseRequest) -> list[Json]:
        """The whole conversation as chat messages; instructions are those of this request alone."""
        past: list[Json] = []
        if body.previous_response_id is not None:
            stored = self._stored.get(body.previous_response_id)
            if stored is None or stored.body["status"] not in ("completed", "incomplete"):
                raise ApiError(
                    404,
                    "no finished response with this id is stored here",
                    "response_not_found",
                    "previous_response_id",
                )
            self._stored.move_to_end(body.previous_response_id)
            past = stored.messages + _items([_as_input(item) for item in stored.body["output"]], "output")
        items: list[Json] = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
        return past + _items(items, "input")


def _prepare(service: Service, body: ResponseRequest, messages: list[Json]) -> Prepared:
    refuse_unserved(body)
    data: Json = {"messages": messages}
    if body.instructions is not None:
        data["messages"] = [{"role": "system", "content": body.instructions}, *messages]
    for name in ("temperature", "top_p", "parallel_tool_calls"):
        data[name] = getattr(body, name)
    data["max_completion_tokens"] = body.max_output_tokens
    data["reasoning_effort"] = body.reasoning.effort if body.reasoning else None
    tools: list[Json] = []
    for i, tool in enumerate(body.tools or []):
        if tool.get("type") != "function":
            raise bad(f"tools.{i}.type", f'tools.{i}.type must be "function"; this server runs no tools of its own')
        tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
    data["tools"] = tools
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    data["tool_choice"] = choice
    if body.text is not None and body.text.format is not None:
        shape = body.text.format
        schema = {"name": shape.name, "schema": shape.schema_} if shape.type == "json_schema" else None
        data["response_format"] = {"type": shape.type, "json_schema": schema}
    # extensions of the chat route pass through
    data.update({k: v for k, v in (body.model_extra or {}).items() if k in ChatRequest.model_fields and k not in data})
    try:
        return prepare(service.model, validated(ChatRequest, data))
    except ApiError as error:
        if error.param is not None and error.param.startswith("messages"):
            error.param = "input"
            error.message = error.message.replace("messages has", "input has")
        raise


def _items(items: list[Json], where: str) -> list[Json]:
    """Input items as chat messages."""
    messages: list[Json] = []
    thought: str | None = None
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "reasoning":
            found: list[Any] = [item.get("content"), item.get("summary")]
            parts = [part for listed in found if is_list(listed) for part in listed]
            thought = "".join(str(part.get("text", "")) for part in parts if is_table(part))
        elif kind == "message":
            message: Json = {"role": item.get("role"), "content": item.get("content")}
            if item.get("role") == "assistant" and thought:
                message["reasoning_content"], thought = thought, None
            messages.append(message)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
                if thought:
                    messages[-1]["reasoning_content"], thought = thought, None
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise bad(f"{where}.{i}.type", f'{where}.{i}.type is "{str(kind)[:64]}", which this server cannot read')
    return messages


def _as_input(item: Json) -> Json:
    return {k: v for k, v in item.items() if k not in ("status", "id")}


async def _finish(stored: Stored, run: Run) -> None:
    output = Output()
    async for step in run.steps():
        output.advance(step)
    _complete(stored, run, output)


def _complete(stored: Stored, run: Run, output: Output) -> None:
    """Write the end into the response's body."""
    choice: Choice = run.choices[0]
    tally = run.tally
    is_cut = choice.finish_reason == "length"
    stored.run = None
    stored.body.update(
        status="incomplete" if is_cut else "completed",
        incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
        output=output.items,
        usage={
            "input_tokens": tally.prompt_tokens,
            "input_tokens_details": {"cached_tokens": tally.cached_tokens},
            "output_tokens": tally.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": tally.reasoning_tokens},
            "total_tokens": tally.prompt_tokens + tally.completion_tokens,
        },
    )


def _frame(body: ResponseRequest, name: str) -> Json:
    """The response before it says anything."""
    reasoning, text = body.reasoning, body.text
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": text.format.model_dump(by_alias=True, exclude_none=True)
            if text and text.format
            else {"type": "text"}
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _names(kind: str) -> tuple[str, Json]:
    """Name of a text's events, and what they carry besides."""
    return ("reasoning_text", {}) if kind == "reasoning" else ("output_text", {"logprobs": []})
