"""Load on an OpenAI-compatible server: requests at a rate or at a concurrency, and what their streams show.

An open loop (a rate) sends each request when it is due, however many answers are still coming, and every latency counts from
that moment: a server or client that falls behind cannot hide it. A closed loop (a concurrency at an unlimited rate) sends the
next request when one has ended, and its latencies count from there. Figures have the names of `vllm bench serve`.
"""

import asyncio
import contextlib
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from alloy.bench.prompts import Talk, transcript
from alloy.core import client as wire
from alloy.core.client import DONE, EventReader, ServerError, Usage
from alloy.core.device import require

if TYPE_CHECKING:
    import httpx

Endpoint = Literal["chat", "completions"]
METRICS = ("ttft", "tpot", "itl", "e2el")
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_CONNECT_S = 10.0


@dataclass(frozen=True)
class Target:
    """A server and what every request to it carries."""

    root: str
    model: str
    endpoint: Endpoint = "chat"
    key: str | None = None
    body: dict[str, Any] = field(default_factory=dict[str, Any])
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Pace:
    """When requests start. With a finite rate they start by themselves; `concurrency` bounds how many are at work."""

    rate: float = math.inf
    burstiness: float = 1.0
    concurrency: int | None = None
    seed: int = 0

    def starts(self, count: int) -> list[float]:
        """Seconds from the beginning: a Poisson process for burstiness 1, else gaps of the gamma distribution of that shape."""
        if math.isinf(self.rate):
            return [0.0] * count
        rng = random.Random(self.seed)
        times = [0.0]
        for _ in range(count - 1):
            times.append(times[-1] + rng.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness)))
        return times[:count]


@dataclass
class Answer:
    """One request as the client saw it; times are seconds of one clock."""

    due: float
    sent: float
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list[float])
    usage: Usage | None = None
    text: str = ""
    thought: str = ""
    # kind and message of what went wrong
    failure: tuple[str, str] | None = None

    def latencies(self) -> dict[str, float]:
        """Milliseconds: ttft and e2el, and tpot where there is more than one token."""
        first = self.last if self.first is None else self.first
        found = {"ttft": 1e3 * (first - self.due), "e2el": 1e3 * (self.last - self.due)}
        if self.usage and self.usage.completion_tokens > 1:
            found["tpot"] = 1e3 * (self.last - first) / (self.usage.completion_tokens - 1)
        return found


@dataclass
class Measured:
    """What a load has shown so far."""

    pace: Pace
    planned: int
    answers: list[Answer] = field(default_factory=list[Answer])
    duration_s: float = 0.0
    # share of the time for which this client's own thread computed
    client_busy_frac: float = 0.0
    # signal that ended it early
    stopped_by: int | None = None

    def report(self, percentiles: Sequence[float] = (99,), goodput: dict[str, float] | None = None) -> dict[str, Any]:
        """Figures under the names that `vllm bench serve` gives them; null where nothing was measured.

        Args:
            percentiles: of every latency, 0 to 100
            goodput: upper limits in ms by metric; `request_goodput` counts the requests that keep all of them
        """
        import numpy as np

        good = [a for a in self.answers if a.failure is None]
        failures = Counter(a.failure[0] for a in self.answers if a.failure)
        usages = [a.usage for a in good if a.usage]
        inputs, outputs = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
        each = [a.latencies() for a in good]
        keeping = [m for m in each if all(m.get(name, 0.0) <= limit for name, limit in (goodput or {}).items())]
        # None for an unlimited rate: JSON has no infinity
        rate = None if math.isinf(self.pace.rate) else self.pace.rate
        found: dict[str, Any] = {
            "request_rate": rate,
            "burstiness": self.pace.burstiness,
            "max_concurrency": self.pace.concurrency,
            "num_prompts": self.planned,
            "duration": self.duration_s,
            "completed": len(good),
            "failed": sum(failures.values()),
            "unfinished": self.planned - len(self.answers),
            "interrupted": self.stopped_by is not None,
            "failures": dict(failures.most_common()),
            "messages": self.messages(),
            "total_input": inputs,
            "total_output": outputs,
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "total_cached_tokens": sum(u.cached_tokens for u in usages),
            "request_throughput": self._rate(len(good)),
            "request_goodput": self._rate(len(keeping)) if goodput else None,
            "output_throughput": self._rate(outputs),
            "total_token_throughput": self._rate(inputs + outputs),
            "max_sent_late_ms": max((1e3 * (a.sent - a.due) for a in self.answers), default=None),
            "client_busy_frac": self.client_busy_frac,
        }
        series = {name: [m[name] for m in each if name in m] for name in METRICS}
        series["itl"] = [1e3 * gap for a in good for gap in a.gaps]
        for name, values in series.items():
            figures = {"mean": np.mean, "median": np.median, "std": np.std}
            for key, function in figures.items():
                found[f"{key}_{name}_ms"] = float(function(values)) if values else None
            for p in percentiles:
                found[f"p{p:g}_{name}_ms"] = float(np.percentile(values, p)) if values else None
        return found

    def messages(self) -> dict[str, str]:
        """One message of every kind of failure."""
        found: dict[str, str] = {}
        for answer in self.answers:
            if answer.failure:
                found.setdefault(*answer.failure)
        return found

    def _rate(self, count: float) -> float | None:
        return count / self.duration_s if self.duration_s else None


class Lanes:
    """Connections to a server, each with a client of its own: the pool of one client looks through all its connections,
    for each of them, at every request."""

    def __init__(self, target: Target) -> None:
        require("httpx", extra="serve", why="alloy bench serve talks to the server")
        import httpx

        self._target = target
        # reading the certificates takes as long as hundreds of requests
        self._certificates = httpx.create_ssl_context(trust_env=False)
        self._all: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []

    @contextlib.contextmanager
    def lane(self) -> "Iterator[httpx.AsyncClient]":
        """A client that no other request uses meanwhile."""
        client = self._free.pop() if self._free else self._new()
        try:
            yield client
        finally:
            self._free.append(client)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._all:
            await client.aclose()

    def _new(self) -> "httpx.AsyncClient":
        import httpx

        client = httpx.AsyncClient(
            headers=wire.headers(self._target.key),
            timeout=httpx.Timeout(None, connect=min(_CONNECT_S, self._target.timeout_s)),
            verify=self._certificates,
            trust_env=False,
        )
        self._all.append(client)
        return client


async def first_model(lanes: Lanes, root: str) -> str:
    """The name of the first model that the server lists."""
    response = await _plain(lanes, root, "GET", "/models", None, _CONNECT_S)
    return wire.read_first_model(root, response.status_code, response.content)


async def count_words(lanes: Lanes, target: Target, tokens: int) -> Callable[[int], int]:
    """How many words make a prompt of so many tokens, by the server's own count of two short requests."""
    counts: list[tuple[int, int]] = []
    for words in (max(1, tokens // 16), max(2, tokens // 8)):
        body = _body(target, [{"role": "user", "content": " ".join(["word"] * words)}], 1)
        response = await _plain(lanes, target.root, "POST", _PATHS[target.endpoint], body, target.timeout_s)
        if response.status_code != 200:
            raise wire.refusal(response.status_code, response.content)
        try:
            usage = wire.read_usage(response.json())
        except ValueError:
            usage = None
        if usage is None:
            raise ServerError(
                "no usage", f"{target.root} counts no tokens (its answers have no usage); it cannot be measured"
            )
        counts.append((words, usage.prompt_tokens))
    (few, low), (many, high) = counts
    slope = max((high - low) / (many - few), 0.1)
    return lambda wanted: round((wanted - low) / slope) + few


async def measure(
    lanes: Lanes,
    target: Target,
    talks: Sequence[Talk],
    pace: Pace,
    progress: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Send all requests of `talks` at `pace`; a signal ends it early, and what was measured until then is returned.

    Args:
        lanes: connections
        target: where to
        talks: conversations, which start at the pace's times; requests of one follow each other
        pace: rate, concurrency
        progress: told after every answer
    """
    found = Measured(pace, sum(len(talk.turns) for talk in talks))
    start, busy = time.perf_counter(), time.thread_time()
    closed = math.isinf(pace.rate) and pace.concurrency is not None
    gate = asyncio.Semaphore(pace.concurrency) if pace.concurrency else contextlib.nullcontext()

    async def converse(talk: Talk, due: float) -> None:
        async with gate:
            await _converse(lanes, target, talk, time.perf_counter() if closed else due, keep)

    def keep(answer: Answer) -> None:
        found.answers.append(answer)
        found.duration_s = time.perf_counter() - start
        progress(found)

    async def drive() -> None:
        async with asyncio.TaskGroup() as group:
            for talk, at in zip(talks, pace.starts(len(talks)), strict=True):
                ahead = start + at - time.perf_counter()
                if ahead > 0:
                    await asyncio.sleep(ahead)
                group.create_task(converse(talk, start + at))

    found.stopped_by = await stoppable(drive())
    end = time.perf_counter()
    # requests that were cut off took their share of the time, too
    found.duration_s = end - start if found.stopped_by else found.duration_s
    found.client_busy_frac = (time.thread_time() - busy) / (end - start)
    return found


async def stoppable(work: Coroutine[Any, Any, None]) -> int | None:
    """Run `work` to its end, or until SIGINT or SIGTERM, whose number is returned."""
    task = asyncio.ensure_future(work)
    caught: list[int] = []

    def stop(number: int) -> None:
        caught.append(number)
        task.cancel()

    with _handled((signal.SIGINT, signal.SIGTERM), stop):
        try:
            await task
        except asyncio.CancelledError:
            if not caught:
                raise
    return caught[0] if caught else None


async def _converse(lanes: Lanes, target: Target, talk: Talk, due: float, keep: Callable[[Answer], None]) -> None:
    """The requests of one conversation, each with what was said before it; a failure ends it, for all its requests."""
    history: list[dict[str, Any]] = []
    for i, turn in enumerate(talk.turns):
        history += turn.messages
        answer = await _ask(lanes, target, _body(target, history, turn.max_tokens), due)
        keep(answer)
        if answer.failure:
            for _ in talk.turns[i + 1 :]:
                keep(
                    Answer(
                        answer.last, answer.last, failure=("earlier turn", "an earlier turn of the conversation failed")
                    )
                )
            return
        reply = {"role": "assistant", "content": answer.text}
        history.append({**reply, "reasoning_content": answer.thought} if answer.thought else reply)
        due = answer.last


async def _ask(lanes: Lanes, target: Target, body: dict[str, Any], due: float) -> Answer:
    """One streamed request; whatever goes wrong with it is its failure."""
    import httpx

    answer = Answer(due, time.perf_counter())
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with lanes.lane() as client:
            async with asyncio.timeout(target.timeout_s):
                await _read_stream(client, target.root + _PATHS[target.endpoint], body, answer)
        if answer.usage is None:
            raise ServerError("no usage", "the stream ended without usage, so its tokens are not known")
    except ServerError as error:
        answer.failure = (error.kind, str(error))
    except (TimeoutError, httpx.TimeoutException):
        answer.failure = ("timeout", f"no whole answer within {target.timeout_s:g} s")
    except httpx.ConnectError as error:
        answer.failure = ("no connection", str(error))
    except httpx.HTTPError as error:
        answer.failure = ("broken stream", f"{type(error).__name__}: {error}")
    if answer.failure:
        answer.last = time.perf_counter()
    return answer


async def _read_stream(client: "httpx.AsyncClient", url: str, body: dict[str, Any], answer: Answer) -> None:
    """Fill `answer` from the events of the stream; it is read beyond its [DONE], which keeps the connection for the next."""
    import httpx

    events, done, is_whole = EventReader(), False, False
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                raise wire.refusal(response.status_code, await response.aread())
            async for chunk in response.aiter_raw():
                now = time.perf_counter()
                for data in events.feed(chunk):
                    done = done or data == DONE
                    if not done:
                        delta = wire.read_delta(data)
                        is_whole = is_whole or delta.finish_reason is not None
                        _take(answer, delta, now)
    except httpx.HTTPError:
        if not done:
            raise
    # transformers' server ends without the mark
    if not (done or is_whole):
        raise ServerError("broken stream", f"the stream ended before its {DONE}")


def _take(answer: Answer, delta: wire.Delta, now: float) -> None:
    """Add one chunk that came at `now`."""
    answer.usage = delta.usage or answer.usage
    if delta.text or delta.thought:
        if answer.first is None:
            answer.first = now
        else:
            answer.gaps.append(now - answer.last)
        answer.text += delta.text
        answer.thought += delta.thought
    if delta.text or delta.thought or delta.finish_reason:
        answer.last = now


def _body(target: Target, messages: Sequence[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    said = {"messages": messages} if target.endpoint == "chat" else {"prompt": transcript(messages)}
    return {"model": target.model, **said, "max_tokens": max_tokens, **target.body}


async def _plain(
    lanes: Lanes, root: str, method: str, path: str, body: dict[str, Any] | None, timeout_s: float
) -> "httpx.Response":
    """One request without a stream, whose failure ends the command."""
    import httpx

    try:
        with lanes.lane() as client:
            return await client.request(method, root + path, json=body, timeout=timeout_s)
    except httpx.ConnectError as error:
        raise wire.unreachable(root, error) from error
    except httpx.HTTPError as error:
        what = f"{type(error).__name__} {error}".strip()
        raise ServerError("broken", f"{root} did not answer the first request: {what}") from error


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Callable[[int], None]) -> Iterator[None]:
    """Signals go to `handler` inside the event loop, and where they went before afterwards."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number, old in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, old)
