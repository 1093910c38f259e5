"""Many answers from a model: the protocol that stages are written for, and its implementation for OpenAI-compatible servers.

Nothing that a server does ends a run. Requests are retried with growing, jittered pauses; how many are under way follows what
the server bears (one more for each round of answers, half as many on 429, 5xx and timeouts, as TCP does); what still has no
answer comes back as a typed failure in its place. Answers stand in the order of the prompts, whatever order they came in.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from alloy.core.client import ServerError, Usage, api_root, headers, read_first_model, read_usage, refusal, unreachable
from alloy.core.device import require
from alloy.core.toml import is_list, is_table
from alloy.errors import DataError, RecipeError, RequestError

if TYPE_CHECKING:
    import httpx

_Result = TypeVar("_Result")

KEY_VARIABLE = "ALLOY_API_KEY"
# prompts given up in succession after which a call counts the server as gone and gives up the rest at once
GONE_AFTER = 20
# requests under way before the first answer
_START = 4
# a server that asks for a longer pause is asked again after this one
_LONGEST_PAUSE_S = 60.0
_RETRIED = {"timeout", "no connection", "broken connection", "not JSON", "no answer"}
_OVERLOADED = {"timeout", "no connection", "broken connection"}


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. `top_k` and `min_p` are sent where they are not 0: not every server knows them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 1024
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """The request's fields."""
        optional = {name: value for name in ("top_k", "min_p", "seed") if (value := getattr(self, name))}
        return {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, **optional}


@dataclass(frozen=True)
class Prompt:
    """A conversation to be continued."""

    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling


@dataclass(frozen=True)
class Generated:
    """One answer, or why there is none."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    failure: ServerError | None = None
    attempts: int = 0


@dataclass
class Spent:
    """What answers have cost; `failures` counts by kind those given up."""

    answers: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter[str])

    def price(self, usd_in: float, usd_out: float) -> float:
        """USD, for prices per million tokens read and written."""
        return (self.prompt_tokens * usd_in + self.completion_tokens * usd_out) / 1e6


class TextGenerator(Protocol):
    """Messages in, texts out, in order; a prompt that cannot be answered gives a `Generated` with its failure."""

    @property
    def model(self) -> str:
        """Name of the model."""
        ...

    @property
    def spent(self) -> Spent:
        """Sums over all calls."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """One answer for each prompt."""
        ...


@dataclass(frozen=True)
class Patience:
    """How hard a server is tried.

    Attributes:
        max_in_flight: requests under way at most
        max_retries: of one prompt
        timeout_s: for one request
        total_s: for one prompt with all its retries and pauses
        backoff_s: pause before the first retry, doubled for each further one, times a random factor of 0.5 to 1.5
    """

    max_in_flight: int = 32
    max_retries: int = 5
    timeout_s: float = 300.0
    total_s: float = 1200.0
    backoff_s: float = 1.0


class HttpGenerator:
    """A model behind an OpenAI-compatible server. The key is in the environment: ALLOY_API_KEY.

    Args:
        url: address of the server
        model: as the server calls it; None: the first that it lists
        cache: file of finished answers, by content of the request, so that a resumed run asks nothing twice
        trace: file to which requests and answers are appended as JSON lines

    Raises RecipeError where the server does not answer a probe of one token.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        patience: Patience | None = None,
        cache: Path | None = None,
        trace: Path | None = None,
    ) -> None:
        require("httpx", extra="data", why="endpoints are talked to")
        try:
            self.root = api_root(url)
        except RequestError as error:
            raise RecipeError(f'endpoint = "{url}" is not the address of a server: write http://HOST:PORT') from error
        self.patience = patience or Patience()
        self._spent = Spent()
        self._cache = AnswerCache(cache) if cache else None
        self._trace = trace
        self._limit = float(_START)
        self._jitter = random.Random()
        self._model = model or ""
        _run(self._probe())

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._model

    @property
    def spent(self) -> Spent:
        """Sums over all calls."""
        return self._spent

    def generate(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """One answer for each prompt, in order. Equal prompts are asked once."""
        start = time.monotonic()
        bodies = {content_key(body): body for body in map(self._body, prompts)}
        found = self._cache.find(list(bodies)) if self._cache else {}
        self._spent.cached += len(found)
        missing = {key: body for key, body in bodies.items() if key not in found}
        if missing:
            found |= _run(self._ask_all(missing))
        self._spent.seconds += time.monotonic() - start
        return [found[content_key(self._body(prompt))] for prompt in prompts]

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        messages = [dict(message) for message in prompt.messages]
        return {"model": self._model, "messages": messages, **prompt.sampling.body()}

    def _client(self) -> "httpx.AsyncClient":
        import httpx

        most = self.patience.max_in_flight
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
        timeout = httpx.Timeout(self.patience.timeout_s, connect=10.0, pool=None)
        key = os.environ.get(KEY_VARIABLE)
        return httpx.AsyncClient(headers=headers(key), timeout=timeout, limits=limits, trust_env=False)

    async def _probe(self) -> None:
        import httpx

        async with self._client() as client:
            if not self._model:
                try:
                    response = await client.get(self.root + "/models")
                    self._model = read_first_model(self.root, response.status_code, response.content)
                except httpx.HTTPError as error:
                    raise _unanswered(unreachable(self.root, error)) from error
                except ServerError as error:
                    raise _unanswered(error) from error
            probe = Prompt(({"role": "user", "content": "Hello"},), Sampling(max_tokens=1))
            answer = await self._ask(client, Throttle(1, 1.0), self._body(probe))
        if answer.failure:
            raise _unanswered(answer.failure)

    async def _ask_all(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, Generated]:
        """Answers by key; as many workers as requests may be under way take the prompts in order."""
        answers: dict[str, Generated] = {}
        queue = iter(bodies.items())
        throttle = Throttle(self.patience.max_in_flight, self._limit)
        # prompts given up since the last answer, and the newest reason
        lost, reason = 0, ServerError("", "")

        async def work(client: "httpx.AsyncClient") -> None:
            nonlocal lost, reason
            for key, body in queue:
                if lost >= GONE_AFTER:
                    answer = Generated(failure=reason)
                else:
                    answer = await self._ask(client, throttle, body)
                answers[key] = answer
                if answer.failure is None:
                    lost = 0
                elif _is_retried(answer.failure):
                    lost, reason = lost + 1, answer.failure
                self._note(key, body, answer)

        async with self._client() as client:
            await asyncio.gather(*(work(client) for _ in range(min(self.patience.max_in_flight, len(bodies)))))
        self._limit = throttle.limit
        return answers

    async def _ask(self, client: "httpx.AsyncClient", throttle: "Throttle", body: dict[str, Any]) -> Generated:
        """One prompt until it is answered or given up."""
        patience = self.patience
        deadline = time.monotonic() + patience.total_s
        attempt = 0
        while True:
            attempt += 1
            start = await throttle.enter()
            pause: float | None = None
            try:
                async with asyncio.timeout(min(patience.timeout_s, max(0.0, deadline - start))):
                    answer, pause = await self._request(client, body, attempt)
            except TimeoutError:
                failure = ServerError("timeout", f"{self.root} gave no whole answer within {patience.timeout_s:g} s")
                answer = Generated(failure=failure, attempts=attempt)
            finally:
                throttle.leave()
            throttle.report(start, answer.failure, pause)
            wait = max(pause or 0.0, patience.backoff_s * 2 ** (attempt - 1) * (0.5 + self._jitter.random()))
            given_up = attempt > patience.max_retries or time.monotonic() + wait > deadline
            if answer.failure is None or given_up or not _is_retried(answer.failure):
                return answer
            await asyncio.sleep(wait)

    async def _request(
        self, client: "httpx.AsyncClient", body: dict[str, Any], attempt: int
    ) -> tuple[Generated, float | None]:
        """(answer or failure, seconds that the server asks to wait)."""
        import httpx

        try:
            response = await client.post(self.root + "/chat/completions", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return Generated(failure=unreachable(self.root, error), attempts=attempt), None
        except httpx.TimeoutException as error:
            raise TimeoutError from error
        except httpx.HTTPError as error:
            failure = ServerError("broken connection", f"the connection to {self.root} was lost ({error})")
            return Generated(failure=failure, attempts=attempt), None
        if response.status_code != 200:
            failure = refusal(response.status_code, response.content)
            wait = retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
            return Generated(failure=failure, attempts=attempt), wait
        try:
            return read_answer(response.content, attempt), None
        except ServerError as error:
            return Generated(failure=error, attempts=attempt), None

    def _note(self, key: str, body: dict[str, Any], answer: Generated) -> None:
        spent = self._spent
        spent.retries += max(0, answer.attempts - 1)
        if answer.failure is None:
            spent.answers += 1
            if self._cache:
                self._cache.add(key, answer)
        else:
            spent.failures[answer.failure.kind] += 1
        if answer.usage:
            spent.prompt_tokens += answer.usage.prompt_tokens
            spent.completion_tokens += answer.usage.completion_tokens
        if self._trace:
            with self._trace.open("a") as file:
                _write_trace(file, body, answer)


class Throttle:
    """How many requests may be under way.

    Args:
        most: upper limit
        start: limit at the beginning
    """

    def __init__(self, most: int, start: float) -> None:
        self.most = most
        self.limit = min(float(most), start)
        self._running = 0
        self._resume_at = 0.0
        # requests sent before it met the overload that was answered then
        self._cut_at = 0.0
        self._changed = asyncio.Event()

    async def enter(self) -> float:
        """Wait for a place; the time at which it was free."""
        while True:
            now = time.monotonic()
            if now < self._resume_at:
                await asyncio.sleep(self._resume_at - now)
            elif self._running < int(self.limit):
                self._running += 1
                return now
            else:
                self._changed.clear()
                await self._changed.wait()

    def leave(self) -> None:
        """Give the place back."""
        self._running -= 1
        self._changed.set()

    def report(self, start: float, failure: ServerError | None, pause: float | None) -> None:
        """What came of a request that began at `start`; `pause`: seconds for which the server asks to be left alone."""
        now = time.monotonic()
        if failure is None:
            # as long as there was no overload the limit doubles with each round
            self.limit = min(float(self.most), self.limit + (1 / self.limit if self._cut_at else 1))
        elif _is_overload(failure) and start >= self._cut_at:
            self.limit, self._cut_at = max(1.0, self.limit / 2), now
        if pause is not None:
            self._resume_at = max(self._resume_at, now + pause)
        self._changed.set()


class AnswerCache:
    """Finished answers in a file (SQLite), by content of their requests; several processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path} is not a file of answers ({error}); delete it or name another cache.") from error

    def find(self, keys: Sequence[str]) -> dict[str, Generated]:
        """The answers there are."""
        return dict(self._find(keys))

    def _find(self, keys: Sequence[str]) -> Iterator[tuple[str, Generated]]:
        for key in keys:
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            if row:
                known = json.loads(row[0])
                usage = Usage(**known["usage"]) if known["usage"] else None
                yield key, Generated(known["text"], known["finish_reason"], usage)

    def add(self, key: str, answer: Generated) -> None:
        """Keep an answer."""
        usage = asdict(answer.usage) if answer.usage else None
        text = json.dumps({"text": answer.text, "finish_reason": answer.finish_reason, "usage": usage})
        try:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path} cannot be written ({error}); free space or name another cache.") from error


def content_key(body: Mapping[str, Any]) -> str:
    """Name of a request by what it says: model, messages and sampling."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_answer(content: bytes, attempts: int = 1) -> Generated:
    """The answer in the body of a response; ServerError where there is none."""
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise ServerError("not JSON", f"the server answered what is not JSON: {content[:80]!r}") from error
    choices = answer.get("choices") if is_table(answer) else None
    choice = choices[0] if is_list(choices) and choices else None
    message = choice.get("message") if is_table(choice) else None
    if not is_table(choice) or not is_table(message) or not isinstance(message.get("content") or "", str):
        raise ServerError("no answer", f"the server's answer holds no message: {content[:80]!r}")
    reason = choice.get("finish_reason")
    # lone surrogates are valid JSON and no text
    text = str(message.get("content") or "").encode(errors="replace").decode()
    return Generated(text, None if reason is None else str(reason), read_usage(answer), attempts=attempts)


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3), within reason; None where there is none."""
    if not value:
        return None
    seconds: float | None = None
    with suppress(ValueError):
        seconds = float(value)
    if seconds is None:
        with suppress(ValueError, TypeError):
            seconds = (parsedate_to_datetime(value) - now).total_seconds()
    return None if seconds is None or math.isnan(seconds) else min(max(0.0, seconds), _LONGEST_PAUSE_S)


def _is_retried(failure: ServerError) -> bool:
    return failure.kind in _RETRIED or failure.kind in ("HTTP 408", "HTTP 425") or _is_overload(failure)


def _is_overload(failure: ServerError) -> bool:
    return failure.kind in _OVERLOADED or failure.kind == "HTTP 429" or failure.kind.startswith("HTTP 5")


def _unanswered(failure: ServerError) -> RecipeError:
    return RecipeError(f"the endpoint does not answer a probe of one token: {failure}")


def _write_trace(file: IO[str], body: dict[str, Any], answer: Generated) -> None:
    said = {"text": answer.text, "finish_reason": answer.finish_reason}
    failed = {"failure": answer.failure.kind, "message": str(answer.failure)} if answer.failure else {}
    file.write(json.dumps({"request": body, **said, **failed, "attempts": answer.attempts}) + "\n")


def _run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of a coroutine, also where a loop is running already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
