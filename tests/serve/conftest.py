"""A server over loopback with an engine that says what it is told to, and one with a real tiny model."""

import asyncio
import functools
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import alloy
from alloy.engine.core import LLM
from alloy.engine.request import Completion, Output, Request, TokenLogprobs
from alloy.errors import RequestError
from alloy.serve.driver import Backend
from alloy.serve.guard import Keys
from alloy.serve.listen import Listener
from alloy.serve.model import ServedModel
from alloy.serve.process import engine_thread
from alloy.serve.settings import ServerSettings
from tests.engine.conftest import SPECIAL, TEMPLATE, build, byte_tokenizer

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }} as <tool_call>...</tool_call><|im_end|>\n{% endif %}"
    + TEMPLATE
)


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random hybrid called "tiny"."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    alloy.save(build("hybrid"), path, byte_tokenizer())
    return path


@functools.cache
def encode(text: str) -> list[int]:
    """Ids of the byte tokenizer."""
    return TOKENIZER.encode(text, add_special_tokens=False)


@dataclass
class Running:
    """A request in the scripted engine."""

    request: Request
    pieces: list[deque[tuple[str, list[int]]]]
    done: set[int] = field(default_factory=set)


class ScriptedEngine:
    """Says `script(request)` token by token: one step, one token of each sample of each running request.

    Args:
        script: the text of an answer; a special "..." prefix makes it endless
        max_seqs: requests that run at once
        pause: nothing is said until it is set
    """

    def __init__(
        self,
        script: Callable[[Request], str],
        max_seqs: int = 8,
        pause: threading.Event | None = None,
        step_s: float = 0,
    ) -> None:
        self.script = script
        self.counts: dict[tuple[str, int], int] = {}
        self.max_seqs = max_seqs
        self.gate = pause
        self.step_s = step_s
        self.waiting: list[Request] = []
        self.running: dict[str, Running] = {}
        self.paused: dict[str, Running] = {}
        self.cancelled: list[str] = []
        self.added: list[Request] = []
        self.closed = False
        self.fail: Exception | None = None
        self.refuse: str | None = None
        self.stats = SimpleNamespace(
            prompt_tokens=0, cached_tokens=0, generated_tokens=0, preemptions=0, drafted_at=[], accepted_at=[]
        )

    def add(self, request: Request) -> None:
        if self.refuse:
            raise RequestError(self.refuse)
        self.added.append(request)
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.waiting = [r for r in self.waiting if r.id != request_id]
        self.running.pop(request_id, None)
        self.paused.pop(request_id, None)

    def pause(self, request_id: str) -> None:
        if request_id in self.running:
            self.paused[request_id] = self.running.pop(request_id)

    def resume(self, request_id: str) -> None:
        if request_id in self.paused:
            self.running[request_id] = self.paused.pop(request_id)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def gauges(self) -> Any:
        used = len(self.running)
        return SimpleNamespace(
            running=used, waiting=len(self.waiting), blocks=100, blocks_free=100 - used, blocks_cached=0,
            slots=self.max_seqs, slots_free=self.max_seqs - used, slots_cached=0,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True

    def step(self) -> list[Output]:
        if self.step_s:
            time.sleep(self.step_s)
        if self.fail is not None:
            raise self.fail
        while self.waiting and len(self.running) < self.max_seqs:
            request = min(self.waiting, key=lambda r: r.priority)
            self.waiting.remove(request)
            self.running[request.id] = Running(request, [self.tokens(request) for _ in range(request.params.n)])
            self.stats.prompt_tokens += len(request.token_ids)
        if self.gate is not None and not self.gate.is_set():
            time.sleep(0.002)
            return []
        return [output for run in list(self.running.values()) for output in self.advance(run)]

    def tokens(self, request: Request) -> deque[tuple[str, list[int]]]:
        text = self.script(request)
        return deque((character, encode(character)) for character in pieces(text))

    def advance(self, run: Running) -> Iterator[Output]:
        request = run.request
        for index, waiting in enumerate(run.pieces):
            if index in run.done:
                continue
            if waiting and waiting[0][0] == "\x00":
                run.done.add(index)
                yield self.output(run, Completion(index, finish_reason="error"))
                continue
            text, ids = waiting.popleft() if waiting else ("", [])
            if waiting and waiting[0][0] == "∞":
                waiting.appendleft((text, ids))
            made = request.params.max_tokens
            completion = Completion(index, text, ids)
            run.pieces[index] = waiting
            count = self.counts.setdefault((request.id, index), 0) + len(ids)
            self.counts[request.id, index] = count
            self.stats.generated_tokens += len(ids)
            if request.params.logprobs is not None:
                completion.logprobs = [TokenLogprobs(i, -0.5, None, ((i, -0.5), (65, -1.5))) for i in ids]
            if not waiting or (made is not None and count >= made):
                run.done.add(index)
                completion.finish_reason = "stop" if not waiting and (made is None or count < made) else "length"
            completion.timings = replace(completion.timings, started_s=0.0, first_token_s=0.1, finished_s=0.2)
            yield self.output(run, completion)

    def output(self, run: Running, completion: Completion) -> Output:
        request = run.request
        finished = len(run.done) == request.params.n
        if finished:
            self.running.pop(request.id, None)
        output = Output(request.id, 0, request.token_ids, [completion], finished=finished, cached_tokens=3)
        if request.params.prompt_logprobs is not None:
            output.prompt_logprobs = [
                None,
                *(TokenLogprobs(t, -1.0, None, ((t, -1.0),)) for t in request.token_ids[1:]),
            ]
        return output


def pieces(text: str) -> list[str]:
    """Characters, special tokens whole."""
    found: list[str] = []
    while text:
        special = next((s for s in SPECIAL if text.startswith(s)), text[0])
        found.append(special)
        text = text[len(special) :]
    return found


@dataclass
class Site:
    """A running server."""

    url: str
    engine: Any
    listener: Listener
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    failure: list[BaseException]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)

    def do(self, call: Callable[[], object]) -> None:
        """Run something on the server's event loop."""
        self.loop.call_soon_threadsafe(call)

    def wait(self, condition: Callable[[], object], seconds: float = 10) -> None:
        """Until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "this never came true"
            time.sleep(0.005)


@contextmanager
def serving(
    llm: LLM,
    engine: Any,
    keys: tuple[str, ...] = (),
    backend: Backend | None = None,
    send_buffer: int | None = None,
    **settings: Any,
) -> Iterator[Site]:
    """A server in a thread, on a free port; `backend` takes the engine's place, and `send_buffer` bytes wait in the system
    for a client to read them."""
    model = ServedModel(llm, ["tiny", "other-name"], ServerSettings(**settings))
    bound = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener = Listener(model, backend or engine_thread(engine, llm.check), Keys(keys))
    loop = asyncio.new_event_loop()
    failure: list[BaseException] = []

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(listener.serve([bound]))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    site = Site(url, engine, listener, loop, thread, failure)
    site.wait(lambda: listener.started)
    try:
        yield site
    finally:
        listener.should_exit = True
        thread.join(20)
        loop.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tiny_llm() -> LLM:
    """A random attention model with the byte tokenizer and a template that takes tools."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return LLM(build("hybrid"), tokenizer, max_model_len=1000)


@pytest.fixture
def say(tiny_llm: LLM) -> Callable[..., Any]:
    """`with say("text", **settings) as site`: a server that answers so."""

    @contextmanager
    def start(script: str | Callable[[Request], str], engine: dict[str, Any] | None = None, **settings: Any):
        scripted = ScriptedEngine(script if callable(script) else lambda _: script, **(engine or {}))
        with serving(tiny_llm, scripted, **settings) as site:
            yield site

    return start
