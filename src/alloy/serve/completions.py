"""POST /v1/completions: texts or token ids continued, with echo and log probabilities of the prompt for scoring."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from alloy.engine.request import Request, TokenLogprobs
from alloy.serve.answer import Choice, Layout, new_head, new_id, text_logprobs
from alloy.serve.errors import bad
from alloy.serve.model import Prompt, ServedModel
from alloy.serve.protocol import CompletionRequest, Json, refuse_unserved
from alloy.serve.service import Run, Service, Step


async def answer_completion(
    service: Service, http: HttpRequest, body: CompletionRequest, warnings: list[str]
) -> Response:
    """Answer one completion request."""
    model = service.model
    head = new_head("text_completion", new_id("cmpl-"), model.check_name(body.model))
    requests = await asyncio.to_thread(prepare, model, body)
    run = service.run(requests, Layout(model, has_thoughts=False, is_score=body.max_tokens == 0))
    chunks, choice = partial(_chunks, model, body, run), partial(_choice, model, body, run)
    return await run.complete(http, body, head, chunks, choice)


def prepare(model: ServedModel, body: CompletionRequest) -> list[Request]:
    """One request per prompt."""
    refuse_unserved(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad("best_of", "best_of is not supported; ask for n answers and choose among them")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens", "max_tokens = 0 asks for nothing; set echo = true to score the prompt")
    prompts = _prompts(model, body)
    # the default of the API, as far as there is room
    default = min(16, model.llm.max_model_len - max(map(len, prompts.values())))
    limit = default if body.max_tokens is None else body.max_tokens
    grammar = model.shape(body.response_format, body.structured_outputs)
    settings: dict[str, Any] = {"n": body.n or 1, "max_tokens": max(1, limit), "grammar": grammar}
    if body.logprobs is not None:
        settings["logprobs"] = body.logprobs
        if body.echo:
            settings["prompt_logprobs"] = body.logprobs
    return [model.request(body, Prompt(ids), name, settings) for name, ids in prompts.items()]


def _prompts(model: ServedModel, body: CompletionRequest) -> dict[str, list[int]]:
    """Token ids of each prompt, by what errors call it."""
    prompt = body.prompt or ""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    listed: list[Any] = [prompt] if is_one else list(prompt)
    found: dict[str, list[int]] = {}
    for i, one in enumerate(listed):
        name = "prompt" if len(listed) == 1 else f"prompt.{i}"
        found[name] = model.encode(one, name) if isinstance(one, str) else one
    return found


def _choice(model: ServedModel, body: CompletionRequest, run: Run, choice: Choice) -> Json:
    prompt, scores = choice.request.token_ids, run.scores.get(choice.request.id)
    text, ids = choice.text, choice.token_ids
    entries: list[TokenLogprobs | None] = [*choice.logprobs]
    if body.echo:
        text = model.decode(*prompt) + text
        ids = [*prompt, *ids]
        entries = [*(scores or []), *entries]
    whole: Json = {
        "index": choice.index,
        "text": text,
        "logprobs": text_logprobs(model, entries, ids, 0) if body.logprobs is not None else None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if body.prompt_logprobs is not None and scores is not None:
        whole["prompt_logprobs"] = [None if e is None else text_logprobs(model, [e], [e.token], 0) for e in scores]
    if body.return_token_ids:
        whole |= {"token_ids": choice.token_ids, "prompt_token_ids": list(prompt)}
    return whole


def _chunks(model: ServedModel, body: CompletionRequest, run: Run, step: Step) -> Iterator[Json]:
    """What an increment adds to a stream."""
    choice, news = step.choice, step.completion

    def chunk(text: str, entries: Sequence[TokenLogprobs | None], ids: Sequence[int], **more: Any) -> Json:
        scored = text_logprobs(model, entries, ids, choice.offset) if body.logprobs is not None and ids else None
        choice.offset += sum(map(len, scored["tokens"])) if scored else 0
        part = {"index": choice.index, "text": text, "logprobs": scored, "finish_reason": None, **more}
        return {"choices": [part]}

    if step.is_first and body.echo:
        scores = run.scores.get(choice.request.id, [])
        prompt = choice.request.token_ids
        yield chunk(model.decode(*prompt), scores, prompt if scores else [])
    if step.delta.text or (news.token_ids and (body.logprobs is not None or body.return_token_ids)):
        ids = {"token_ids": news.token_ids} if body.return_token_ids else {}
        yield chunk(step.delta.text, news.logprobs or [], news.token_ids, **ids)
    if news.finish_reason is not None:
        yield chunk("", [], [], finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)
