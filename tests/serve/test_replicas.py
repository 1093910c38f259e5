"""Several engines behind one server: the same answers, chats that stay where their prefix is, and replicas that die."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from alloy.cli.serve import _load, start_rows
from alloy.engine.core import LLM
from alloy.engine.engine import Gauges
from alloy.engine.request import Completion, Output, Request, SamplingParams
from alloy.engine.runner import EngineStats
from alloy.errors import RequestError, ResourceError
from alloy.serve.driver import Driver
from alloy.serve.errors import ApiError
from alloy.serve.settings import ServerSettings
from tests.cli.test_serve import running, stream, wait_for
from tests.serve.conftest import Site, serving
from tests.serve.test_chat import events
from tests.serve.test_life import port_of, raw_post

pytest.importorskip("ray.serve", reason='serve.replicas needs ray: pip install "alloy-lm[scale]"')

from ray.exceptions import ActorDiedError

from alloy.serve.fleet import Fleet, Report, launch

COMPLETIONS = "/v1/completions"
LENGTH = 3000
EMPTY = Gauges(0, 0, 10, 10, 0, 4, 4, 0)


class FakeHandle:
    """Ray's handle of a deployment, with scripted replicas: each call does what the next entry says."""

    def __init__(self, *calls: list[Report | Exception]) -> None:
        self.calls = list(calls)
        self.answer = self

    def options(self, stream: bool) -> "FakeHandle":
        assert stream
        return self

    async def remote(self, request: Request, name: str | None) -> Any:
        for step in self.calls.pop(0):
            if isinstance(step, Exception):
                raise step
            yield step

    def broadcast(self, name: str) -> "FakeHandle":
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Report]:
        return [said()]


def said(text: str = "", finished: bool = False) -> Report:
    completion = Completion(0, text, [65] * len(text), finish_reason="stop" if finished else None)
    outputs = (Output("prompt-1", 0, (), [completion], finished=finished),) if text else ()
    return Report("r", EMPTY, EngineStats(generated_tokens=len(text)), outputs)


def answer_of(*calls: list[Report | Exception]) -> tuple[str, ApiError | None, int]:
    """What the reader of one request gets, its error, and the calls that were not needed."""
    handle: Any = FakeHandle(*calls)

    async def ask() -> tuple[str, ApiError | None]:
        driver = Driver(Fleet(handle, 2, 100, {}), ServerSettings())
        await driver.start()
        text = ""
        try:
            async for output in driver.submit([Request(id="prompt-1", token_ids=[1, 2, 3], params=SamplingParams())]):
                text += output.text
            return text, None
        except ApiError as error:
            return text, error
        finally:
            assert driver.queued == 0
            await driver.close()

    return *asyncio.run(ask()), len(handle.calls)


DEATH = ActorDiedError()


def test_what_was_not_answered_yet_is_computed_elsewhere() -> None:
    assert answer_of([said(), DEATH], [said(), said("ab"), said("c", True)]) == ("abc", None, 0)


def test_what_was_answered_in_part_fails_cleanly() -> None:
    text, error, left = answer_of([said(), said("ab"), DEATH], [said("ab", True)])
    assert (error and error.status, error and error.code, left) == (500, "replica_died", 1)
    assert text in ("", "ab")


def test_a_request_that_kills_replicas_is_not_tried_for_ever() -> None:
    _, error, left = answer_of([DEATH], [DEATH], [said("ab", True)])
    assert (error and error.code, left) == ("replica_died", 1)


def test_a_refusal_of_the_engine_reaches_the_reader() -> None:
    refusal = Report("r", EMPTY, EngineStats(), (), ApiError(400, "too much", param="prompt"))
    _, error, _ = answer_of([refusal])
    assert (error and error.status, error and error.param) == (400, "prompt")


@dataclass
class Stage:
    """A server over two replicas, and the same model in this process."""

    site: Site
    fleet: Fleet
    llm: LLM

    def post(self, prompt: str, **body: Any) -> httpx.Response:
        with self.site.client() as client:
            return client.post(COMPLETIONS, json={"prompt": prompt, "temperature": 0, "ignore_eos": True, **body})

    def right(self, prompt: str, tokens: int) -> str:
        """The greedy answer of one engine."""
        return self.llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))[0].text

    @property
    def gauges(self) -> list[Gauges]:
        return list(self.fleet.replicas.values())


def children(pid: int) -> dict[int, str]:
    """All processes below one, and their titles."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(path.name)] = (int(parent), title)
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        above = todo.pop()
        below = {p: title for p, (parent, title) in parents.items() if parent == above}
        found |= below
        todo += below
    return found


def replica_pids() -> set[int]:
    return {pid for pid, title in children(os.getpid()).items() if title.startswith("ray::ServeReplica")}


def test_the_front_reads_no_weights(folder: Path) -> None:
    """It knows the shapes and the tokenizer, and refuses what replicas would."""
    llm = LLM(folder, device="meta", max_model_len=100)
    assert all(p.is_meta for p in llm.model.parameters())
    assert llm.encode("ab") == [97, 98]
    with pytest.raises(RequestError, match="exceed max_model_len = 100"):
        llm.check(Request(id="a", token_ids=[1] * 60, params=SamplingParams(max_tokens=60)))


@pytest.mark.slow
@pytest.mark.multi
def test_what_does_not_fit_is_said_by_the_front(folder: Path) -> None:
    """The error is the replica's own; no process is left, and Ray can be started again."""
    load, arguments = partial(_load, str(folder)), {"memory": 0.00001}
    with (
        pytest.raises(ResourceError, match="one sequence of 1 tokens needs"),
        launch(load, arguments, ServerSettings(replicas=2), start_rows),
    ):
        pass
    assert not replica_pids()


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Stage]:
    settings = {"replicas": 2, "shutdown_s": 1.0}
    arguments = {"max_model_len": LENGTH, "max_seqs": 8, "memory": 0.2}
    llm = LLM(folder, **arguments)
    with (
        launch(partial(_load, str(folder)), arguments, ServerSettings(**settings), start_rows) as fleet,
        serving(llm, None, backend=fleet, **settings) as site,
    ):
        site.wait(lambda: len(fleet.replicas) == 2)
        yield Stage(site, fleet, llm)


@pytest.mark.slow
@pytest.mark.multi
def test_answers_are_those_of_one_engine(stage: Stage) -> None:
    """Many at a time over both replicas, whole and streamed, alone and with several samples."""
    prompts = [f"{i} of many prompts, all of them apart" for i in range(12)]
    before = [g.blocks for g in stage.gauges]
    answers: dict[str, str] = {}

    def ask(prompt: str, streamed: bool) -> None:
        response = stage.post(prompt, max_tokens=20 + len(prompt) % 3, stream=streamed)
        parts = events(response) if streamed else [response.json()]
        answers[prompt] = "".join(c["text"] for part in parts for c in part["choices"])

    threads = [threading.Thread(target=ask, args=(p, i % 2 == 0)) for i, p in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {p: stage.right(p, 20 + len(p) % 3) for p in prompts}
    assert len(before) == 2
    # what answers leave: both replicas have computed some
    stage.site.wait(lambda: all(g.blocks_cached for g in stage.gauges))
    two = stage.post("twice", max_tokens=6, n=2).json()["choices"]
    assert [c["text"] for c in two] == [stage.right("twice", 6)] * 2


@pytest.mark.slow
@pytest.mark.multi
def test_a_chat_stays_where_its_prefix_is(stage: Stage) -> None:
    """Ten chats of four turns each: every later turn finds all that came before it."""
    with stage.site.client() as client:
        for chat in range(10):
            messages = [{"role": "user", "content": f"chat {chat} begins with a sentence of its own"}]
            last = 0
            for turn in range(4):
                body = {
                    "messages": messages,
                    "max_tokens": 8,
                    "temperature": 0,
                    "chat_template_kwargs": {"enable_thinking": False},
                }
                said = client.post("/v1/chat/completions", json=body).json()
                usage = said["usage"]
                # up to the generation prompt of the turn before
                if turn:
                    assert usage["prompt_tokens_details"]["cached_tokens"] >= last - 30 > 0, (chat, turn, usage)
                last = usage["prompt_tokens"]
                messages += [{"role": "assistant", "content": "so"}, {"role": "user", "content": f"and turn {turn}?"}]


@contextmanager
def busy(stage: Stage, count: int, streamed: bool) -> Iterator[list[Any]]:
    """Long requests with one prefix, all running."""
    body = {"prompt": "the same beginning for everyone here", "max_tokens": LENGTH - 50, "stream": streamed}
    url = f"{COMPLETIONS}"
    connections = [raw_post(port_of(stage.site), {**body, "ignore_eos": True}, url) for _ in range(count)]
    try:
        stage.site.wait(lambda: sum(g.running for g in stage.gauges) == count)
        yield connections
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("streamed", [True, False])
def test_clients_that_go_away_free_their_places_on_replicas(stage: Stage, streamed: bool) -> None:
    """The load is spread although all have one prefix; what is cancelled is computed no further."""
    start = stage.fleet.stats.generated_tokens
    with busy(stage, 6, streamed):
        assert all(g.running >= 2 for g in stage.gauges)
        with stage.site.client() as client:
            assert 'num_requests_running{model_name="tiny"} 6.0' in client.get("/metrics").text
    stage.site.wait(lambda: all(g.running == g.waiting == 0 for g in stage.gauges))
    stage.site.wait(lambda: all(g.blocks == g.blocks_free + g.blocks_cached for g in stage.gauges))
    made = stage.fleet.stats.generated_tokens - start
    assert made < 6 * (LENGTH - 50) * 0.9, "they ran to their end"
    assert stage.site.listener.server.driver.in_flight == 0


@pytest.mark.slow
@pytest.mark.multi
def test_a_replica_that_is_killed_under_load(stage: Stage) -> None:
    """Every request is answered rightly or fails cleanly; the replica comes back, and so do right answers."""
    right = {f"prompt {i} under load": stage.right(f"prompt {i} under load", 400) for i in range(8)}
    outcomes: list[str] = []
    stop = threading.Event()

    def ask(prompt: str, streamed: bool) -> None:
        while not stop.is_set():
            response = stage.post(prompt, max_tokens=400, stream=streamed)
            parts = events(response) if streamed and response.status_code == 200 else [response.json()]
            error = parts[-1].get("error")
            text = "".join(c["text"] for part in parts for c in part.get("choices", ()))
            if error is not None:
                assert response.status_code == (200 if len(parts) > 1 else 500)
                assert right[prompt].startswith(text)
            outcomes.append(error["code"] if error else "right" if text == right[prompt] else f"wrong: {text!r}")

    threads = [threading.Thread(target=ask, args=(p, i % 2 == 0)) for i, p in enumerate(right)]
    for thread in threads:
        thread.start()
    stage.site.wait(lambda: outcomes and all(g.running for g in stage.gauges))
    # in the middle of answers, not between them
    made = stage.fleet.stats.generated_tokens
    stage.site.wait(lambda: stage.fleet.stats.generated_tokens > made + 8 * 100)
    old = replica_pids()
    assert len(old) == 2
    os.kill(min(old), signal.SIGKILL)
    stage.site.wait(lambda: len(stage.fleet.replicas) == 1)
    survived = len(outcomes)
    stage.site.wait(lambda: len(outcomes) > survived + 8)
    with stage.site.client() as client:
        assert client.get("/ready").status_code == 200
    stage.site.wait(lambda: len(stage.fleet.replicas) == 2, 60)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {"right", "replica_died"}, outcomes
    assert outcomes.count("replica_died") <= len(threads)
    assert len(replica_pids()) == 2
    assert replica_pids() & old == old - {min(old)}
    test_answers_are_those_of_one_engine(stage)


@pytest.mark.slow
@pytest.mark.multi
def test_signals_leave_no_process_behind(folder: Path) -> None:
    """SIGTERM lets answers finish first; when the front is killed outright, its replicas end by themselves."""
    for kill, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        with running(folder, "serve.replicas=2") as (process, url, lines):
            out: list[str] = []
            thread = stream(url, 100, out)
            wait_for(out)
            below = children(process.pid)
            assert sum(title.startswith("ray::ServeReplica") for title in below.values()) == 2
            process.send_signal(kill)
            thread.join()
            assert process.wait(30) == code, lines
        if kill == signal.SIGTERM:
            assert json.loads(out[-2][6:])["choices"][0]["finish_reason"] == "length"
            assert any("replicas" in line for line in lines)
        end = time.monotonic() + 20
        if kill == signal.SIGKILL:
            # two small ones of Ray try for a minute to tell the dead
            below = {
                p: t for p, t in below.items() if not t.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
            }
        while left := {p: t for p, t in below.items() if is_alive(p)}:
            assert time.monotonic() < end, left
            time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
