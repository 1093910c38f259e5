"""What all routes share: the model, its driver, metrics, and one way to run requests and to tell what comes of them."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from alloy.engine.request import Completion, Request, Timings, TokenLogprobs
from alloy.serve.answer import Choice, Delta, Layout
from alloy.serve.driver import Driver, Ticket
from alloy.serve.errors import ApiError
from alloy.serve.metrics import Metrics
from alloy.serve.model import ServedModel
from alloy.serve.protocol import Json, Sampled
from alloy.serve.sse import DONE, EventStream, event, unless_gone


class Step(NamedTuple):
    """News of one sample."""

    choice: Choice
    completion: Completion
    delta: Delta
    is_first: bool


# what an increment adds to a stream
Chunks = Callable[[Step], Iterator[Json]]


@dataclass(frozen=True)
class Service:
    """One served model."""

    model: ServedModel
    driver: Driver
    metrics: Metrics

    def run(self, requests: Sequence[Request], layout: Layout) -> "Run":
        """Submit requests; ApiError if they are not admitted."""
        return Run(self, self.driver.submit(requests), layout)


class Run:
    """Submitted requests and what has come of them.

    Attributes:
        scores: log probabilities of the prompts that have them, by request
    """

    def __init__(self, service: Service, ticket: Ticket, layout: Layout) -> None:
        self.scores: dict[str, list[TokenLogprobs | None]] = {}
        self._ticket = ticket
        self._service = service
        self._layout = layout
        self._choices: dict[tuple[str, int], Choice] = {}
        self._cached: dict[str, int] = {}

    @property
    def choices(self) -> list[Choice]:
        """All choices so far, by index."""
        return sorted(self._choices.values(), key=lambda c: c.index)

    @property
    def usage(self) -> Json:
        """The `usage` object of chat and completions."""
        prompt = self._ticket.prompt_tokens
        choices = self._choices.values()
        completion = sum(len(c.token_ids) for c in choices)
        accepted = sum(c.accepted for c in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values()), "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": sum(c.reasoning_tokens for c in choices),
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(c.drafted for c in choices) - accepted,
                "audio_tokens": 0,
            },
        }

    async def steps(self) -> AsyncGenerator[Step]:
        """News as they come, until all is said."""
        timings = Timings()
        try:
            async for output in self._ticket:
                self._cached[output.id] = max(output.cached_tokens, self._cached.get(output.id, 0))
                if output.prompt_logprobs is not None:
                    self.scores[output.id] = output.prompt_logprobs
                for completion in output.completions:
                    if self._layout.is_score:
                        reason = completion.finish_reason and "length"
                        completion = Completion(completion.index, finish_reason=reason, timings=completion.timings)
                    key = (output.id, completion.index)
                    is_first = key not in self._choices
                    if is_first:
                        request = self._ticket.requests[output.id]
                        place = list(self._ticket.requests).index(output.id)
                        index = place * request.params.n + completion.index
                        self._choices[key] = Choice(index, request, self._layout)
                    timings = completion.timings
                    choice = self._choices[key]
                    yield Step(choice, completion, choice.feed(completion), is_first)
        except ApiError as error:
            if error.code == "model_error":
                self._service.metrics.failed()
            self.cancel()
            raise
        reasons = [c.finish_reason or "stop" for c in self.choices]
        self._service.metrics.answered(self._ticket, reasons, self.usage, timings)

    async def complete(
        self, http: HttpRequest, body: Sampled, head: Json, chunks: Chunks, choice: Callable[[Choice], Json]
    ) -> Response:
        """The answer of chat and completions.

        Args:
            http: who waits for it
            body: what was asked
            head: what every body and chunk has
            chunks: of a stream, what an increment adds
            choice: of a whole answer, one choice
        """

        async def whole() -> Json:
            async for _ in self.steps():
                pass
            return {**head, "choices": [choice(c) for c in self.choices], "usage": self.usage}

        return await self.respond(http, self._stream(body, head, chunks) if body.stream else None, whole)

    async def respond(
        self,
        http: HttpRequest,
        events: AsyncGenerator[bytes] | None,
        whole: Callable[[], Awaitable[Json]],
        close: Callable[[], None] | None = None,
    ) -> Response:
        """A stream of `events` from the first output on, or without them the `whole` body; `close` ends either."""
        keepalive_s = self._service.model.settings.keepalive_s
        close = close or self.cancel
        try:
            if events is None:
                return JSONResponse(await unless_gone(http.receive, whole()))
            await unless_gone(http.receive, self._ticket.opened(keepalive_s))
            return EventStream(events, close, keepalive_s)
        except BaseException:
            close()
            raise

    def cancel(self, error: ApiError | None = None) -> None:
        """Give back what the engine holds for it; nothing happens to one that is done. `error` is what its reader is told."""
        self._service.driver.cancel(self._ticket, error)

    async def _stream(self, body: Sampled, head: Json, chunks: Chunks) -> AsyncGenerator[bytes]:
        options = body.stream_options
        has_usage = options is not None and bool(options.include_usage)
        is_running_usage = options is not None and bool(options.continuous_usage_stats)
        async for step in self.steps():
            for chunk in chunks(step):
                if has_usage or is_running_usage:
                    chunk["usage"] = self.usage if is_running_usage else None
                yield event({**head, **chunk})
        if has_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield event(DONE)
