"""Many answers from an endpoint that answers with errors, silence and broken JSON."""

import asyncio
import json
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.core.client import ServerError
from alloy.core.generator import (
    GONE_AFTER,
    HttpGenerator,
    Patience,
    Prompt,
    Sampling,
    Throttle,
    read_answer,
    retry_after,
)
from alloy.errors import DataError, RecipeError
from tests.core.endpoint import Endpoint, Reply

FAST = Patience(max_in_flight=7, max_retries=3, timeout_s=0.3, total_s=20.0, backoff_s=0.001)


def ask(text: str) -> Prompt:
    return Prompt(({"role": "system", "content": "be brief"}, {"role": "user", "content": text}), Sampling(seed=3))


def test_answers_stand_in_the_order_of_the_prompts() -> None:
    """The first answer comes last: it waits for the others."""
    others = threading.Semaphore(0)

    def script(text: str, n: int) -> str:
        if text == "0":
            for _ in range(12):
                assert others.acquire(timeout=10)
        else:
            others.release()
        return f"answer {text}"

    with Endpoint(script) as endpoint:
        generator = HttpGenerator(endpoint.url, patience=Patience(timeout_s=10.0))
        answers = generator.generate([ask(str(i)) for i in range(13)])
    assert [a.text for a in answers] == [f"answer {i}" for i in range(13)]
    assert generator.model == "scripted"
    assert {a.finish_reason for a in answers} == {"stop"}
    assert (generator.spent.answers, generator.spent.prompt_tokens, generator.spent.completion_tokens) == (13, 39, 26)
    assert generator.spent.price(1.0, 2.0) == pytest.approx((39 + 52) / 1e6)


BROKEN = {
    "429": Reply(status=429, headers={"Retry-After": "0"}),
    "500": Reply(status=500),
    "503": Reply(status=503, headers={"Retry-After": "0.01"}),
    "hang": Reply(hang=True),
    "truncated": Reply(content=b'{"choices": [{"message": {"content": "The ans'),
    "garbled": Reply(content=b"\x00\xff<html>"),
    "a list": Reply(content=b"[1, 2]"),
    "no message": Reply(content=b'{"choices": [{}]}'),
    "no choice": Reply(content=b'{"choices": []}'),
    "half a body": Reply(content=b"{}", headers={"Content-Length": "100"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_tried_again(name: str) -> None:
    with Endpoint(lambda text, n: BROKEN[name] if n == 0 else "well") as endpoint:
        generator = HttpGenerator(endpoint.url, patience=FAST)
        (answer,) = generator.generate([ask("a")])
    assert (answer.text, answer.failure, answer.attempts) == ("well", None, 2)
    assert generator.spent.retries == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("429", "HTTP 429"),
        ("500", "HTTP 500"),
        ("truncated", "not JSON"),
        ("no message", "no answer"),
        ("hang", "timeout"),
        ("half a body", "broken connection"),
    ],
)
def test_what_stays_broken_is_a_failure_in_its_place(name: str, kind: str) -> None:
    with Endpoint(lambda text, n: BROKEN[name] if text == "b" else text) as endpoint:
        patience = Patience(max_in_flight=2, max_retries=1, timeout_s=0.2, backoff_s=0.001)
        generator = HttpGenerator(endpoint.url, patience=patience)
        a, b, c = generator.generate([ask("a"), ask("b"), ask("c")])
    assert (a.text, c.text) == ("a", "c")
    assert b.failure is not None
    assert b.failure.kind == kind
    assert b.attempts == 2
    assert generator.spent.failures == {kind: 1}


def test_a_refused_request_is_not_tried_again() -> None:
    with Endpoint(lambda text, n: Reply(status=400)) as endpoint:
        (answer,) = HttpGenerator(endpoint.url, patience=FAST).generate([ask("a")])
        assert len(endpoint.requests) == 1
    assert answer.failure is not None
    assert "as the script says" in str(answer.failure)


def test_a_server_that_asks_for_longer_than_there_is_time_is_given_up() -> None:
    with Endpoint(lambda text, n: Reply(status=429, headers={"Retry-After": "50"})) as endpoint:
        patience = Patience(max_retries=9, total_s=5.0)
        (answer,) = HttpGenerator(endpoint.url, patience=patience).generate([ask("a")])
        assert len(endpoint.requests) == 1
    assert answer.failure is not None


def test_a_server_that_is_gone_ends_the_call_soon() -> None:
    """All prompts come back, but only some were tried."""
    with Endpoint(lambda text, n: Reply(status=500)) as endpoint:
        patience = Patience(max_in_flight=3, max_retries=1, backoff_s=0.001)
        answers = HttpGenerator(endpoint.url, patience=patience).generate([ask(str(i)) for i in range(211)])
        assert len(endpoint.requests) <= 2 * (GONE_AFTER + 3)
    assert [a.failure is not None and a.failure.kind for a in answers] == ["HTTP 500"] * 211


def test_requests_under_way_are_bounded() -> None:
    with Endpoint(lambda text, n: text) as endpoint:
        HttpGenerator(endpoint.url, patience=FAST).generate([ask(str(i)) for i in range(60)])
        assert endpoint.most_at_once <= FAST.max_in_flight


def test_the_limit_follows_the_load() -> None:
    """It doubles each round until the first overload, which halves it once a round; then it grows by one a round."""

    async def work() -> list[float]:
        throttle = Throttle(40, 4.0)
        limits: list[float] = []

        async def round_of(failure: ServerError | None) -> None:
            starts = [await throttle.enter() for _ in range(int(throttle.limit))]
            for start in starts:
                throttle.leave()
                throttle.report(start, failure, None)
            limits.append(throttle.limit)

        await round_of(None)
        await round_of(None)
        await round_of(ServerError("HTTP 503", ""))
        await round_of(None)
        await round_of(ServerError("HTTP 400", ""))
        for _ in range(40):
            await round_of(ServerError("timeout", ""))
        return limits

    first, second, halved, grown, refused, *_, last = asyncio.run(work())
    assert (first, second, halved, last) == (8.0, 16.0, 8.0, 1.0)
    assert 8.9 < grown == refused <= 9.0


def test_equal_prompts_are_asked_once() -> None:
    with Endpoint(lambda text, n: f"{text}{n}") as endpoint:
        answers = HttpGenerator(endpoint.url, patience=FAST).generate([ask("a"), ask("b"), ask("a")])
    assert [a.text for a in answers] == ["a0", "b0", "a0"]


def test_a_resumed_run_asks_for_no_finished_answer(tmp_path: Path) -> None:
    """Failures are not kept; another sampling is another request."""
    cache = tmp_path / "deep" / "answers.db"
    with Endpoint(lambda text, n: Reply(status=400) if text == "b" and n == 0 else f"{text}{n}") as endpoint:
        HttpGenerator(endpoint.url, patience=FAST, cache=cache).generate([ask("a"), ask("b")])
        generator = HttpGenerator(endpoint.url, patience=FAST, cache=cache)
        other = Prompt(ask("a").messages, Sampling(temperature=0.0))
        answers = generator.generate([ask("c"), ask("b"), ask("a"), other])
        assert [a.text for a in answers] == ["c0", "b1", "a0", "a1"]
        assert generator.spent.cached == 1
    assert len(endpoint.requests) == 5


def test_a_damaged_cache_is_one_sentence(tmp_path: Path) -> None:
    cache = tmp_path / "answers.db"
    cache.write_bytes(b"no database" * 99)
    with Endpoint(lambda text, n: text) as endpoint, pytest.raises(DataError, match="delete it"):
        HttpGenerator(endpoint.url, cache=cache)


def test_key_and_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOY_API_KEY", "geheim")
    trace = tmp_path / "trace.jsonl"
    with Endpoint(lambda text, n: Reply(status=400) if text == "b" else "well") as endpoint:
        HttpGenerator(endpoint.url, patience=FAST, trace=trace).generate([ask("a"), ask("b")])
        assert set(endpoint.authorizations) <= {"Bearer geheim", None}
        assert endpoint.authorizations[-1] == "Bearer geheim"
    lines = sorted(trace.read_text().splitlines(), key=len)
    assert "geheim" not in trace.read_text()
    assert json.loads(lines[0])["request"]["messages"][1] == {"role": "user", "content": "a"}
    assert json.loads(lines[1])["failure"] == "HTTP 400"


def test_an_endpoint_that_is_not_there_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    patience = Patience(max_retries=0)
    with pytest.raises(RecipeError, match="does not answer a probe of one token: no server answers") as error:
        HttpGenerator(f"http://127.0.0.1:{port}", patience=patience)
    assert error.value.exit_code == 2
    with pytest.raises(RecipeError, match="does not answer a probe"):
        HttpGenerator(f"http://127.0.0.1:{port}", model="m", patience=patience)
    with pytest.raises(RecipeError, match='endpoint = "nonsense" is not the address'):
        HttpGenerator("nonsense")


def test_an_endpoint_is_asked_from_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> str:
        return HttpGenerator(endpoint.url).generate([ask("a")])[0].text

    with Endpoint(lambda text, n: "well") as endpoint:
        assert asyncio.run(cell()) == "well"


def test_retry_after_is_a_number_or_a_date() -> None:
    now = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
    assert retry_after("3", now) == 3.0
    assert retry_after("Sat, 31 Jan 2026 12:00:07 GMT", now) == 7.0
    assert retry_after("Sat, 31 Jan 2026 11:00:00 GMT", now) == 0.0
    assert retry_after("86400", now) == 60.0
    assert retry_after("soon", now) is None
    assert retry_after("nan", now) is None
    assert retry_after(None, now) is None


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_no_body_of_a_response_breaks_the_reader(content: bytes) -> None:
    with pytest.raises(ServerError):
        read_answer(content)


def test_half_a_surrogate_pair_is_replaced() -> None:
    answer = read_answer(b'{"choices": [{"message": {"content": "a\\ud800b"}}]}')
    assert answer.text == "a?b"
