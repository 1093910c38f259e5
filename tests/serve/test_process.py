"""The engine in a process of its own: either side may die, sockets may be full, and grammars take their time."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from alloy.core.pipe import beside, packed, receive, send
from alloy.engine.core import LLM
from alloy.engine.grammar import Grammar
from alloy.engine.request import Request, SamplingParams
from alloy.errors import RequestError
from alloy.serve.driver import Driver
from alloy.serve.errors import ApiError
from alloy.serve.process import EngineLoop, RemoteEngine, engine_thread
from alloy.serve.settings import ServerSettings
from tests.cli.test_serve import ENVIRONMENT, begun, running
from tests.core.test_pipe import is_alive
from tests.serve.conftest import ScriptedEngine, serving
from tests.serve.test_chat import ask, events
from tests.serve.test_life import ENDLESS

FREE = Grammar("regex", "a*")
MILLION = 1_000_000


def engine_of(pid: int) -> int:
    """The engine's process of a server."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes())


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.01)


def request(name: str, tokens: list[int] | None = None, **params: Any) -> Request:
    return Request(id=f"prompt-{name}", token_ids=tokens or [1], params=SamplingParams(**params))


@pytest.mark.slow
@pytest.mark.multi
def test_an_engine_that_is_killed_ends_the_server(folder: Path) -> None:
    """Who waits is told, the log says how it ended, and a supervisor sees a failure."""
    with running(folder, "engine.max_model_len=100000") as (process, url, lines):
        out, thread = begun(url, 90_000)
        answers: list[httpx.Response] = []
        body = {"prompt": "ab", "max_tokens": 90_000, "ignore_eos": True}
        whole = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False))
        )
        whole.start()
        until(lambda: 'requests_running{model_name="tiny"} 2' in httpx.get(f"{url}/metrics", trust_env=False).text)
        os.kill(engine_of(process.pid), signal.SIGKILL)
        thread.join()
        whole.join()
        assert process.wait(30) == 1
    assert json.loads(out[-2][6:])["error"]["code"] == "engine_dead"
    assert out[-1] == "data: [DONE]"
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (500, "engine_dead")
    log = "\n".join(lines)
    assert "the engine's process ended with code -9" in log
    assert "error: the engine failed" in log
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.multi
def test_an_engine_whose_server_is_killed_ends(folder: Path) -> None:
    with running(folder, "engine.max_model_len=100000") as (process, url, lines):
        _, thread = begun(url, 90_000)
        engine = engine_of(process.pid)
        process.kill()
        thread.join()
        until(lambda: not is_alive(engine))
    assert not any("Traceback" in line for line in lines)


def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A server that has just begun to load, and its engine's process."""
    command = [sys.executable, "-m", "alloy", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    found: list[int] = []

    def is_there() -> bool:
        try:
            found.append(engine_of(process.pid))
        except (StopIteration, FileNotFoundError):
            return False
        return True

    until(is_there)
    return process, found[0]


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_while_it_loads_the_engine_ends_with_its_server(folder: Path, number: signal.Signals) -> None:
    """A terminal's Ctrl-C reaches all of its processes, and one answers."""
    process, engine = start(folder)
    # in the middle of its imports, behind Python's own hand-over
    time.sleep(1)
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    _, said = process.communicate(timeout=30)
    # after Ctrl-C in the middle of an import Python itself ends as interrupted; a shell calls both 130
    codes = {signal.SIGKILL: (-9,), signal.SIGINT: (130, -2), signal.SIGTERM: (143,)}
    assert process.returncode in codes[number]
    until(lambda: not is_alive(engine))
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.multi
def test_an_engine_that_is_killed_while_it_loads_is_one_sentence(folder: Path) -> None:
    process, engine = start(folder)
    os.kill(engine, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: the engine ended before the model was loaded" in said
    assert "ended with code -9" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_lets_answers_finish(folder: Path, number: signal.Signals) -> None:
    with running(folder) as (process, url, _):
        engine = engine_of(process.pid)
        out, thread = begun(url, 100)
        for pid in (process.pid, engine):
            os.kill(pid, number)
        thread.join()
        assert process.wait(30) == 0
        assert not is_alive(engine)
    assert json.loads(out[-2][6:])["choices"][0]["finish_reason"] == "length"


def _failing(pipe: socket.socket) -> None:
    """An engine's process whose engine fails at the tenth step."""
    engine = ScriptedEngine(lambda _: ENDLESS, step_s=0.01)
    step, steps = engine.step, iter(range(10))

    def fail_later() -> Any:
        next(steps)
        return step()

    engine.step = fail_later
    loop = EngineLoop(pipe, lambda: os._exit(0))
    send(pipe, engine.gauges())
    loop.run(engine, lambda _: None)


@pytest.mark.slow
@pytest.mark.multi
def test_an_engine_that_fails_in_its_process(tiny_llm: LLM) -> None:
    with beside("engine", _failing) as (process, pipe):
        remote = RemoteEngine(pipe, receive(pipe))
        with serving(tiny_llm, None, backend=remote) as site:
            found = events(ask(site, stream=True))
            assert len(found) > 3
            assert found[-1]["error"]["code"] == "engine_dead"
            assert site.listener.has_died
            process.join(10)
            assert process.exitcode == 0


def test_a_prompt_that_nobody_reads_holds_nobody_up() -> None:
    """A million tokens are far more than a socket takes; others of the event loop go on, and it arrives whole."""
    here, there = socket.socketpair()
    long = request("long", list(range(MILLION)))

    async def work() -> None:
        remote = RemoteEngine(here, ScriptedEngine(str).gauges())
        driver = Driver(remote, ServerSettings(max_queue_tokens=0))
        await driver.start()
        begin = time.monotonic()
        driver.submit([long])
        remote.tell("cancel", long.id)
        await asyncio.sleep(0)
        assert time.monotonic() - begin < 5
        found = [await asyncio.to_thread(receive, there) for _ in range(2)]
        assert found == [("add", long), ("cancel", long.id)]
        there.close()
        await driver.close()

    asyncio.run(work())


def test_an_engine_waits_for_its_reader() -> None:
    """Rounds that fill the socket stop the engine until somebody reads; nothing is lost."""
    here, there = socket.socketpair()
    steps: list[int] = []
    engine = ScriptedEngine(lambda _: "ab" * 100)
    step = engine.step
    engine.step = lambda: steps.append(1) or step()
    thread = threading.Thread(target=EngineLoop(there).run, args=(engine, lambda _: None))
    # log probabilities of a prompt make a round large
    here.sendall(packed(("add", request("a", [65] * 2000, prompt_logprobs=0, logprobs=1))))
    thread.start()
    before = -1
    while len(steps) != before:
        before = len(steps)
        time.sleep(0.2)
    assert before < 200
    text = ""
    while True:
        outputs, refused, taken, _, stats = receive(here)
        assert (refused, taken) == ([], 1)
        text += "".join(output.text for output in outputs)
        assert all(output.prompt_token_ids == () for output in outputs)
        if outputs and outputs[-1].finished:
            break
    assert text == "ab" * 100
    assert stats.generated_tokens == 200
    here.close()
    thread.join(10)
    assert engine.closed


class Slow:
    """A check that takes as long as it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.error: Exception | None = None

    def __call__(self, _: Request) -> None:
        self.begun.set()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error


def with_grammar(work: Callable[[Driver, ScriptedEngine, Slow], Any]) -> ScriptedEngine:
    """Run `work` over an engine in a thread whose checks are slow."""
    engine, check = ScriptedEngine(lambda _: "ab"), Slow()

    async def run() -> None:
        driver = Driver(engine_thread(engine, check), ServerSettings())
        await driver.start()
        try:
            await work(driver, engine, check)
        finally:
            check.go.set()
            await driver.close()

    asyncio.run(run())
    assert engine.closed
    return engine


async def text_of(ticket: Any) -> str:
    return "".join([output.text async for output in ticket])


def test_others_do_not_wait_for_a_grammar() -> None:
    async def work(driver: Driver, engine: ScriptedEngine, check: Slow) -> None:
        slow = driver.submit([request("slow", grammar=FREE)])
        assert await text_of(driver.submit([request("quick")])) == "ab"
        assert [r.id for r in engine.added] == ["prompt-quick"]
        assert driver.queued == 1
        check.go.set()
        assert await text_of(slow) == "ab"
        assert driver.queued == 0

    with_grammar(work)


def test_a_request_that_is_cancelled_while_its_grammar_is_compiled_never_runs() -> None:
    async def work(driver: Driver, engine: ScriptedEngine, check: Slow) -> None:
        slow = driver.submit([request("slow", grammar=FREE)])
        await asyncio.to_thread(check.begun.wait, 10)
        driver.cancel(slow)
        await asyncio.to_thread(until, lambda: engine.cancelled)
        check.go.set()
        # behind the end of the compilation
        assert await text_of(driver.submit([request("next", grammar=FREE)])) == "ab"
        assert driver.queued == 0

    engine = with_grammar(work)
    assert [r.id for r in engine.added] == ["prompt-next"]
    assert engine.cancelled == ["prompt-slow"]


def test_a_grammar_that_cannot_be_compiled_is_refused_and_a_fault_ends_the_engine() -> None:
    async def work(driver: Driver, engine: ScriptedEngine, check: Slow) -> None:
        check.go.set()
        check.error = RequestError("regex takes more than 10 s")
        with pytest.raises(ApiError, match="takes more than") as caught:
            await text_of(driver.submit([request("slow", grammar=FREE)]))
        assert (caught.value.status, caught.value.param) == (400, "prompt")
        check.error = ZeroDivisionError()
        with pytest.raises(ApiError) as caught:
            await text_of(driver.submit([request("broken", grammar=FREE)]))
        assert (caught.value.status, caught.value.code) == (500, "engine_dead")
        with pytest.raises(ApiError) as caught:
            driver.submit([request("late")])
        assert (caught.value.status, caught.value.code) == (503, "engine_dead")

    assert not with_grammar(work).added
