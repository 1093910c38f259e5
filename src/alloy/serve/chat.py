"""POST /v1/chat/completions: a conversation into a request, and its answer into one body or a stream of chunks."""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from alloy.engine.request import Request
from alloy.serve.answer import Choice, Layout, chat_logprobs, new_head, new_id
from alloy.serve.errors import bad
from alloy.serve.model import ServedModel
from alloy.serve.protocol import ChatRequest, Json, Tool, refuse_unserved
from alloy.serve.service import Service, Step

# a request ready for the engine, and how its answer is taken apart
Prepared = tuple[Request, Layout]


async def answer_chat(service: Service, http: HttpRequest, body: ChatRequest, warnings: list[str]) -> Response:
    """Answer one chat request."""
    model, kind = service.model, "chat.completion.chunk" if body.stream else "chat.completion"
    name = model.check_name(body.model)
    request, layout = await asyncio.to_thread(prepare, model, body, warnings)
    head = new_head(kind, f"chatcmpl-{body.request_id[:128]}" if body.request_id else new_id("chatcmpl-"), name)
    if not body.stream and (body.prompt_logprobs is not None or body.return_token_ids):
        head["prompt_token_ids"] = list(request.token_ids)
    run = service.run([request], layout)
    return await run.complete(http, body, head, partial(_chunks, model, body), partial(_choice, model, body))


def prepare(model: ServedModel, body: ChatRequest, warnings: list[str]) -> Prepared:
    """Check what the fields say together, lay the conversation out, and compile what the answer must look like."""
    refuse_unserved(body, model.settings.trust_request_template)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", "top_logprobs needs logprobs = true")
    tools, choice = body.declared, body.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise bad("tool_choice", "tool_choice asks for a call, but tools is empty; declare the functions in tools")
    prompt = model.chat_prompt(body.messages, body, body.chat_template)
    warnings += prompt.warnings
    settings: dict[str, Any] = {"n": body.n or 1}
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if limit is not None:
        settings["max_tokens"] = limit
    if body.logprobs:
        settings["logprobs"] = body.top_logprobs or 0
    grammar = model.shape(body.response_format, body.structured_outputs)
    parser: dict[str, Any] | None = None
    if tools:
        schemas: dict[str, Json] = {t["name"]: t.get("parameters") or {} for t in tools}
        parallel = body.parallel_tool_calls is not False
        parser = {"format": model.tool_format, "schemas": schemas, "parallel": parallel}
        if choice == "required" or isinstance(choice, Tool):
            if grammar is not None:
                raise bad("tool_choice", "tool_choice and response_format both shape the answer; send one of them")
            named = choice.function.name if isinstance(choice, Tool) else None
            grammar = model.calls_grammar(tools, named, parallel)
            # what the grammar lets through is a list of calls, or the arguments of one
            parser = {**parser, "format": "llama_json", "named": named}
    settings["grammar"] = grammar
    request = model.request(body, prompt, "messages", settings)
    return request, Layout(model, prompt.is_inside, tools=parser)


def _choice(model: ServedModel, body: ChatRequest, choice: Choice) -> Json:
    content = choice.text if choice.text or not choice.calls else None
    message: Json = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    message |= _thought(body, choice.thought)
    if choice.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
    return {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(model, choice.logprobs, body.top_logprobs or 0) if body.logprobs else None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        **({"token_ids": choice.token_ids} if body.return_token_ids else {}),
    }


def _thought(body: ChatRequest, text: str) -> Json:
    """The thought under both names that clients know."""
    return {"reasoning": text, "reasoning_content": text} if text and body.include_reasoning is not False else {}


def _chunks(model: ServedModel, body: ChatRequest, step: Step) -> Iterator[Json]:
    """What an increment adds to a stream."""
    choice, news = step.choice, step.completion

    def chunk(delta: Json, **more: Any) -> Json:
        part = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {"choices": [part]}

    if step.is_first:
        ids = {"prompt_token_ids": list(choice.request.token_ids)} if body.return_token_ids else {}
        yield {**chunk({"role": "assistant", "content": ""}), **ids}
    extra: Json = {}
    if body.logprobs and news.logprobs:
        extra["logprobs"] = chat_logprobs(model, news.logprobs, body.top_logprobs or 0)
    if body.return_token_ids and news.token_ids:
        extra["token_ids"] = news.token_ids
    deltas = [*_deltas(body, step)]
    if extra and not deltas:
        deltas.append({})
    for delta in deltas:
        yield chunk(delta, **extra)
        extra = {}
    if news.finish_reason is not None:
        yield chunk({}, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)


def _deltas(body: ChatRequest, step: Step) -> Iterator[Json]:
    """The deltas of one increment; a call is its name first, then its arguments."""
    delta = step.delta
    if thought := _thought(body, delta.thought):
        yield thought
    if delta.text:
        yield {"content": delta.text}
    for index, call in enumerate(delta.calls, len(step.choice.calls) - len(delta.calls)):
        name = {"name": call.name, "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": name}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]}
