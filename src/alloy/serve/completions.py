"""POST /v1/completions: texts or token ids continued, with echo and log probabilities of the prompt for scoring."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from alloy.engine.request import Request, TokenLogprobs
from alloy.errors import RequestError
from alloy.serve.answer import Choice, Head, Layout, new_id, text_logprobs
from alloy.serve.chat import check_stream
from alloy.serve.errors import bad
from alloy.serve.model import ServedModel
from alloy.serve.protocol import CompletionRequest, Json, refuse_unserved
from alloy.serve.service import Run, Service
from alloy.serve.sse import DONE, EventStream, event, unless_gone


async def answer_completion(
    service: Service, http: HttpRequest, body: CompletionRequest, warnings: list[str]
) -> Response:
    """Answer one completion request."""
    model = service.model
    head = Head(model.check_name(body.model), new_id("cmpl-"))
    requests = await asyncio.to_thread(prepare, model, body)
    run = service.run(requests, Layout(model, has_thoughts=False))
    try:
        if body.stream:
            await unless_gone(http, run.ticket.opened(service.settings.keepalive_s))
            return EventStream(_chunks(service, body, head, requests, run), run.cancel, service.settings.keepalive_s)
        scores = await unless_gone(http, _read(run))
    except BaseException:
        run.cancel()
        raise
    samples = body.n or 1
    choices = [
        _choice(model, body, choice, requests[choice.index // samples], scores.get(choice.index // samples))
        for choice in run.choices
    ]
    return JSONResponse({**head.body("text_completion", choices), "usage": _usage(body, run)})


def prepare(model: ServedModel, body: CompletionRequest) -> list[Request]:
    """One request per prompt."""
    refuse_unserved(body)
    check_stream(body.stream, body.stream_options is not None)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad("best_of", "best_of is not supported; ask for n answers and choose among them")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens", "max_tokens = 0 asks for nothing; set echo = true to score the prompt")
    settings: dict[str, Any] = {
        "n": body.n or 1,
        "max_tokens": 16 if body.max_tokens is None else max(1, body.max_tokens),
    }
    if body.logprobs is not None:
        settings["logprobs"] = body.logprobs
        if body.echo:
            settings["prompt_logprobs"] = body.logprobs
    grammar = model.shape(body.response_format, body.structured_outputs)
    if grammar is not None:
        settings["grammar"] = grammar
    prompts = _prompts(model, body)
    if body.max_tokens is None:
        # the default of the API, as far as there is room
        longest = max(len(ids) for ids in prompts)
        settings["max_tokens"] = max(1, min(16, model.llm.max_model_len - longest))
    return [model.request(body, ids, "prompt", settings) for ids in prompts]


def _prompts(model: ServedModel, body: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    listed = cast("list[str | list[int]]", prompt)
    if not listed:
        raise bad("prompt", "prompt is empty; a model needs at least one token to continue")
    found: list[list[int]] = []
    for i, one in enumerate(listed):
        name = "prompt" if len(listed) == 1 else f"prompt.{i}"
        try:
            ids = model.llm.encode(one, name) if isinstance(one, str) else one
        except RequestError as error:
            raise bad(name, str(error)) from error
        if not ids:
            raise bad(name, f"{name} is empty; a model needs at least one token to continue")
        found.append(list(ids))
    return found


async def _read(run: Run) -> dict[int, list[TokenLogprobs | None]]:
    """Read to the end: log probabilities of each prompt that has them."""
    scores: dict[int, list[TokenLogprobs | None]] = {}
    places = {request_id: i for i, request_id in enumerate(run.ticket.requests)}
    async for step in run.steps():
        if step.output.prompt_logprobs is not None:
            scores[places[step.output.id]] = step.output.prompt_logprobs
    return scores


def _usage(body: CompletionRequest, run: Run) -> Json:
    usage = run.tally.usage
    if body.max_tokens == 0:
        usage.update(completion_tokens=0, total_tokens=usage["prompt_tokens"])
    return usage


def _prompt_text(model: ServedModel, request: Request) -> str:
    return model.llm.codec.decode(request.token_ids) if model.llm.codec else ""


def _choice(
    model: ServedModel,
    body: CompletionRequest,
    choice: Choice,
    request: Request,
    scores: Sequence[TokenLogprobs | None] | None,
) -> Json:
    is_scored = body.max_tokens == 0
    ids = [] if is_scored else choice.token_ids
    entries: list[TokenLogprobs | None] = [] if is_scored else [*choice.logprobs]
    text = "" if is_scored else choice.text
    if body.echo:
        text = _prompt_text(model, request) + text
        ids = [*request.token_ids, *ids]
        entries = [*(scores or []), *entries]
    whole: Json = {
        "index": choice.index,
        "text": text,
        "logprobs": text_logprobs(model, entries, ids, 0) if body.logprobs is not None else None,
        "finish_reason": "length" if is_scored else choice.finish_reason,
        "stop_reason": None if is_scored else choice.stop_reason,
    }
    if body.prompt_logprobs is not None and scores is not None:
        whole["prompt_logprobs"] = [None if e is None else text_logprobs(model, [e], [e.token], 0) for e in scores]
    if body.return_token_ids:
        whole |= {"token_ids": [] if is_scored else choice.token_ids, "prompt_token_ids": list(request.token_ids)}
    return whole


async def _chunks(
    service: Service, body: CompletionRequest, head: Head, requests: Sequence[Request], run: Run
) -> AsyncGenerator[bytes]:
    model, samples = service.model, body.n or 1
    options = body.stream_options
    has_usage = options is not None and bool(options.include_usage)
    is_running_usage = options is not None and bool(options.continuous_usage_stats)
    offsets: dict[int, int] = {}

    def chunk(choices: list[Json], usage: Json | None) -> bytes:
        whole = head.body("text_completion", choices)
        return event({**whole, "usage": usage} if has_usage or is_running_usage else whole)

    def part(index: int, text: str, entries: Sequence[TokenLogprobs | None], ids: Sequence[int]) -> Json:
        scored = text_logprobs(model, entries, ids, offsets[index]) if body.logprobs is not None and ids else None
        offsets[index] += sum(len(t) for t in scored["tokens"]) if scored else 0
        return {"index": index, "text": text, "logprobs": scored, "finish_reason": None}

    scores: dict[str, list[TokenLogprobs | None]] = {}
    async for step in run.steps():
        index = step.choice.index
        if step.output.prompt_logprobs is not None:
            scores[step.output.id] = step.output.prompt_logprobs
        parts: list[Json] = []
        if index not in offsets:
            offsets[index] = 0
            if body.echo:
                request = requests[index // samples]
                entries = scores.get(request.id, [])
                parts.append(part(index, _prompt_text(model, request), entries, request.token_ids if entries else []))
        if body.max_tokens != 0 and (step.delta.text or step.completion.token_ids):
            new = part(index, step.delta.text, step.completion.logprobs or [], step.completion.token_ids)
            if body.return_token_ids:
                new["token_ids"] = list(step.completion.token_ids)
            if step.delta.text or new["logprobs"] or body.return_token_ids:
                parts.append(new)
        if step.completion.finish_reason is not None:
            reason = "length" if body.max_tokens == 0 else step.choice.finish_reason
            last = {"index": index, "text": "", "logprobs": None, "finish_reason": reason}
            parts.append({**last, "stop_reason": step.choice.stop_reason})
        for one in parts:
            yield chunk([one], _usage(body, run) if is_running_usage else None)
    if has_usage:
        yield chunk([], _usage(body, run))
    yield event(DONE)
