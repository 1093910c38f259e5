"""`alloy bench serve` against a server with known delays; the arrival process against its distribution."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alloy.bench.load import Answer, Measured, Pace
from alloy.bench.prompts import Lengths, Shape, make_talks
from alloy.cli import main
from alloy.core.client import Usage
from alloy.errors import DataError
from tests.bench.stub import OVERHEAD, Script, StubServer

ROOT = Path(__file__).parents[2]


def run(server: StubServer | str, *arguments: object) -> int:
    """Exit code of `alloy bench serve`."""
    url = server if isinstance(server, str) else server.url
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "serve", "--url", url, *map(str, arguments)])
    return int(exit_.value.code or 0)


def figures(path: Path) -> dict[str, Any]:
    """What --save wrote; constants that JSON does not have are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_latencies_are_those_of_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First token after 120 ms, four more 40 ms apart: TTFT, ITL, TPOT, E2E and rates follow."""
    path = tmp_path / "run.json"
    with StubServer(lambda n, body: Script(0.12, 0.04)) as server:
        options = ["--input-len", 40, "--output-len", 5, "--num-prompts", 6, "--max-concurrency", 2, "--save", path]
        assert (
            run(server, *options, "--goodput", "ttft:500", "e2el:5000", "--api-key", "k", "--percentiles", "50,99.9")
            == 0
        )
    found = figures(path)
    for metric, want in {"ttft": 120, "itl": 40, "tpot": 40, "e2el": 280}.items():
        assert want - 1 <= found[f"median_{metric}_ms"] <= 1.3 * want + 20, metric
        assert found[f"median_{metric}_ms"] == pytest.approx(found[f"p50_{metric}_ms"])
        assert found[f"mean_{metric}_ms"] <= found[f"p99.9_{metric}_ms"]
        assert found[f"std_{metric}_ms"] >= 0
    assert (found["completed"], found["failed"], found["unfinished"]) == (6, 0, 0)
    # a word is a token, and the server adds the template's
    assert (found["total_input"], found["total_output"], found["total_cached_tokens"]) == (6 * 40, 30, 18)
    assert found["total_input_tokens"] == found["total_input"]
    # three rounds of two
    assert 3 * 0.28 <= found["duration"] <= 3 * 0.28 + 0.8
    assert found["request_throughput"] == pytest.approx(6 / found["duration"])
    assert found["request_goodput"] == found["request_throughput"]
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    assert found["total_token_throughput"] == pytest.approx(270 / found["duration"])
    assert (found["request_rate"], found["max_concurrency"], found["model_id"]) == (None, 2, "stub")
    assert server.most_at_once == 2
    # a connection is kept for the next request
    assert server.connections <= 2
    assert server.keys == {"bearer k"}
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in server.requests)
    output = capsys.readouterr()
    assert "6 of 6 requests, 0 failed" in output.err
    assert "TTFT" in output.out


def test_an_open_loop_does_not_wait_for_answers(tmp_path: Path) -> None:
    """A server that works on one request at a time cannot hide its queue: latencies count from when a request was due."""
    path = tmp_path / "run.json"
    # 20 requests/s for a server of 0.4 s: without waiting for answers about 8 are at work at once
    with StubServer(lambda n, body: Script(0.4)) as server:
        assert run(server, "--request-rate", 20, "--num-prompts", 24, "--output-len", 1, "--save", path) == 0
        assert server.most_at_once >= 5
    assert figures(path)["median_e2el_ms"] < 600
    # with room for one, the wait for it counts: the last is late by about 12 x (100 - 50) ms
    with StubServer(lambda n, body: Script(0.1)) as server:
        options = ["--request-rate", 20, "--num-prompts", 12, "--output-len", 1, "--max-concurrency", 1, "--save", path]
        assert run(server, *options) == 0
        assert server.most_at_once == 1
    found = figures(path)
    assert found["p99_e2el_ms"] > 350
    assert found["p99_e2el_ms"] == pytest.approx(found["max_sent_late_ms"] + 100, rel=0.25)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_arrivals_are_a_gamma_process(burstiness: float) -> None:
    """Gaps against the gamma distribution of that shape and mean (Kolmogorov-Smirnov), and against the next shape."""
    gaps = np.diff(Pace(rate=8.0, burstiness=burstiness, seed=3).starts(4001))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.1)
    assert gaps.var() == pytest.approx(1 / 8**2 / burstiness, rel=0.2)
    assert stats.kstest(gaps, stats.gamma(burstiness, scale=1 / (8 * burstiness)).cdf).pvalue > 0.01
    assert stats.kstest(gaps, stats.gamma(1.3 * burstiness, scale=1 / (8 * 1.3 * burstiness)).cdf).pvalue < 0.01


def test_arrivals_repeat_with_their_seed() -> None:
    """The same seed, the same times; an unlimited rate has none."""
    assert Pace(2.0, seed=1).starts(50) == Pace(2.0, seed=1).starts(50)
    assert Pace(2.0, seed=1).starts(50) != Pace(2.0, seed=2).starts(50)
    assert Pace(2.0).starts(0) == []
    assert Pace(math.inf).starts(3) == [0.0, 0.0, 0.0]


def test_figures_by_hand() -> None:
    """Two answers worked out on paper; a failed one has no latencies; goodput counts what keeps all limits."""
    # 3 tokens: first after 1 s, all after 3 s; 1 token after 2 s
    whole = Answer(0.0, 0.5, 1.0, 3.0, [0.5, 1.5], Usage(10, 3))
    short = Answer(1.0, 1.0, 3.0, 3.0, [], Usage(20, 1))
    broken = Answer(0.0, 0.0, 0.5, 9.0, [0.1], None, failure=("timeout", "no whole answer within 9 s"))
    run = Measured(Pace(2.0), 4, [whole, short, broken], duration_s=10.0)
    found = run.report([75], {"ttft": 1500, "tpot": 2000})
    assert (found["mean_ttft_ms"], found["std_ttft_ms"], found["p75_ttft_ms"]) == (1500, 500, 1750)
    assert (found["mean_tpot_ms"], found["mean_itl_ms"], found["mean_e2el_ms"]) == (1000, 1000, 2500)
    assert (found["completed"], found["failed"], found["unfinished"], found["failures"]) == (2, 1, 1, {"timeout": 1})
    assert (found["request_throughput"], found["request_goodput"], found["total_token_throughput"]) == (0.2, 0.1, 3.4)
    assert found["max_sent_late_ms"] == 500
    assert Measured(Pace(), 4).report()["mean_ttft_ms"] is None


def test_failures_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refusals, cut streams, error events, garbage, timeouts and missing usage; the others are measured, one
    of them whole but without its mark at the end."""
    path = tmp_path / "run.json"
    scripts = [Script(fault=kind) for kind in ("busy", "busy", "cut", "error", "garbage")]
    scripts += [Script(first_s=30), Script(has_usage=False), Script(fault="no mark"), Script()]
    with StubServer(lambda n, body: scripts[n]) as server:
        options = ["--num-prompts", 9, "--output-len", 3, "--max-concurrency", 1, "--timeout", 0.5, "--save", path]
        assert run(server, *options) == 0
    found = figures(path)
    assert found["failures"] == {
        "HTTP 503": 2, "broken stream": 1, "error event engine_dead": 1, "not JSON": 1, "timeout": 1, "no usage": 1,
    }  # fmt: skip
    assert (found["completed"], found["failed"], found["total_output"]) == (2, 7, 6)
    text = capsys.readouterr().out
    assert "2 failed, HTTP 503: the server answered 503: too busy" in text
    assert "1 failed, error event engine_dead: the server broke off: engine died" in text


def test_nothing_answered_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and why."""
    with StubServer(lambda n, body: Script(fault="busy")) as server:
        assert run(server, "--num-prompts", 3) == 1
    assert "error: no request was answered; the server answered 503: too busy" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and exit code 1; a wrong address is 2."""
    with StubServer() as server:
        url = server.url
    assert run(url) == 1
    assert f"error: no server answers at {url}/v1 (" in capsys.readouterr().err
    assert run("localhost:8000") == 2
    assert 'url = "localhost:8000" is not the address of a server' in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_what_was_measured(tmp_path: Path, number: signal.Signals) -> None:
    """The fourth answer never ends; a signal then shows and saves the other three."""
    path = tmp_path / "run.json"
    with StubServer(lambda n, body: Script(first_s=60 if n >= 3 else 0.0)) as server:
        options = ["--num-prompts", "9", "--output-len", "2", "--max-concurrency", "1", "--save", str(path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "alloy", "bench", "serve", "--url", server.url, *options],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(server.requests) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"error: interrupted after 3 of 9 requests; what was measured is shown above and saved in {path}\n" in err
    assert "TTFT" in out
    found = figures(path)
    assert (found["interrupted"], found["completed"], found["unfinished"], found["total_output"]) == (True, 3, 6, 6)


def test_a_sweep_is_tabled_saved_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run per rate, each with text of its own; throughput grows with the rate while the server keeps up."""
    path, plot = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    with StubServer(lambda n, body: Script(0.01)) as server:
        options = ["--rate-sweep", "10,40", "--num-prompts", 12, "--output-len", 2, "--save", path, "--plot", plot]
        assert run(server, *options) == 0
        prompts = {body["messages"][0]["content"] for body in server.requests}
    assert len(prompts) == 24
    runs = figures(path)["runs"]
    assert [found["request_rate"] for found in runs] == [10, 40]
    assert runs[0]["request_throughput"] < runs[1]["request_throughput"]
    assert plot.read_text().startswith("<?xml")
    assert "40/s" in capsys.readouterr().out


def test_conversations_carry_their_answers(tmp_path: Path) -> None:
    """Turns follow each other with the answers of the earlier ones; thoughts go along; a failed turn ends its conversation."""
    path = tmp_path / "run.json"
    options = ["--dataset", "multi-turn", "--turns", 3, "--num-prompts", 5, "--output-len", 2, "--max-concurrency", 1]
    script = Script(pieces=["so", " be it"], thoughts=["hm"])
    with StubServer(lambda n, body: script) as server:
        assert run(server, *options, "--input-len", 20, "--save", path) == 0
    assert [len(body["messages"]) for body in server.requests] == [1, 3, 5, 1, 3]
    reply = {"role": "assistant", "content": "so be it", "reasoning_content": "hm"}
    assert server.requests[2]["messages"][1::2] == [reply, reply]
    with StubServer(lambda n, body: Script(fault="busy" if n == 1 else None)) as server:
        assert run(server, *options, "--endpoint", "completions", "--save", path) == 0
    assert figures(path)["failures"] == {"HTTP 503": 1, "earlier turn": 1}
    assert server.requests[1]["prompt"].split("\n")[:2] == [server.requests[0]["prompt"], " w0 w1"]


def test_lengths_vary_within_their_range() -> None:
    """Uniform in 20 +- 25%, every value reached; the same seed gives the same text."""
    talks = make_talks("random", 400, Lengths(20, 8, 0.25), Shape(), lambda tokens: tokens, seed=1)
    turns = [turn for talk in talks for turn in talk.turns]
    sizes = [len(turn.messages[0]["content"].split()) for turn in turns]
    assert set(sizes) == set(range(15, 26))
    assert {turn.max_tokens for turn in turns} == set(range(6, 11))
    assert statistics.mean(sizes) == pytest.approx(20, abs=0.5)
    assert talks == make_talks("random", 400, Lengths(20, 8, 0.25), Shape(), lambda tokens: tokens, seed=1)


def test_prefixes_are_shared() -> None:
    """12 requests over 3 prefixes of 9 words: four of each, with their own endings."""
    shape = Shape(prefix_len=9, num_prefixes=3)
    talks = make_talks("prefix-repetition", 12, Lengths(5, 8), shape, lambda tokens: tokens, seed=1)
    words = [talk.turns[0].messages[0]["content"].split() for talk in talks]
    starts = [tuple(w[:9]) for w in words]
    assert sorted(starts.count(start) for start in set(starts)) == [4, 4, 4]
    assert len({tuple(w[9:]) for w in words}) == 12
    assert {len(w) for w in words} == {14}


def test_prompt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ShareGPT's questions with the lengths of their answers; JSONL prompts and messages; a short file is repeated."""
    path, lines = tmp_path / "chats.json", tmp_path / "prompts.jsonl"
    said = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "x" * 80}]
    path.write_text(json.dumps([{"conversations": said}, {"conversations": said[:1]}, {"other": 1}]))
    (talk,) = make_talks("sharegpt", 1, Lengths(1, None), Shape(path), int, 0)
    assert (talk.turns[0].messages, talk.turns[0].max_tokens) == ([{"role": "user", "content": "why?"}], 20)
    assert make_talks("sharegpt", 1, Lengths(1, 3), Shape(path), int, 0)[0].turns[0].max_tokens == 3
    system = {"role": "system", "content": "s"}
    lines.write_text(json.dumps({"prompt": "a", "max_tokens": 2}) + "\n\n" + json.dumps({"messages": [system]}) + "\n")
    with StubServer() as server:
        options = ["--dataset", "jsonl", "--dataset-path", lines, "--num-prompts", 4, "--max-concurrency", 1]
        assert run(server, *options, "--extra-body", '{"top_p": 0.5}') == 0
    asked = sorted((body["messages"][0]["content"], body["max_tokens"]) for body in server.requests)
    assert asked == [("a", 2), ("a", 2), ("s", 128), ("s", 128)]
    assert all(body["top_p"] == 0.5 and "ignore_eos" not in body for body in server.requests)
    for text, message in {
        "": "has no prompts",
        "{": ":1: is not JSON",
        '{"prompt": "a", "messages": []}': ':1: needs one of "prompt" and "messages"',
        '{"prompt": 3}': ":1: prompt must be a text",
        '{"prompt": "a", "max_tokens": 0}': ":1: max_tokens = 0 must be a whole number from 1",
    }.items():
        lines.write_text(text)
        with pytest.raises(DataError, match=message):
            make_talks("jsonl", 1, Lengths(1, None), Shape(lines), int, 0)
    path.write_text("[]")
    assert run("http://127.0.0.1:1", "--dataset", "sharegpt", "--dataset-path", path) == 4
    assert "has no conversations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "speech"], '--endpoint = "speech" is not known; use chat, completions'),
        (["--dataset", "sonnet"], '--dataset = "sonnet" is not known; use random, sharegpt'),
        (["--dataset", "jsonl"], "read the file of --dataset-path"),
        (["--dataset-path", "x"], "read the file of --dataset-path"),
        (["--num-prompts", 0], "--num-prompts = 0 must be at least 1"),
        (["--request-rate", 0], "--request-rate = 0 must be above 0"),
        (["--request-rate", "nan"], "--request-rate = nan must be above 0"),
        (["--range-ratio", 1], "--range-ratio = 1 must be from 0 to below 1"),
        (["--rate-sweep", "1,x"], '--rate-sweep = "1,x" must be numbers'),
        (["--percentiles", "101"], '--percentiles = "101" must be numbers from 0 to 100'),
        (["--goodput", "speed:1"], '--goodput = "speed:1" must be a metric and milliseconds'),
        (["--goodput", "ttft:1", "itl:1"], '--goodput = "itl:1" must be a metric'),
        (["stray"], '"stray" is not an option'),
        (["--extra-body", "[]"], "--extra-body = [] must be a JSON object"),
        (["--plot", "x.svg"], "needs --rate-sweep and a name that ends in .svg"),
        (["--save", "."], "a folder stands where a file is wanted"),
        (["--url", "http://h:port"], 'url = "http://h:port" is not the address of a server'),
    ],
)
def test_bad_command_lines(capsys: pytest.CaptureFixture[str], options: list[object], message: str) -> None:
    """Exit code 2 and one sentence, before any request."""
    assert run("http://127.0.0.1:1", *options) == 2
    assert message in capsys.readouterr().err


def test_prompt_lengths_are_the_servers() -> None:
    """The server's count of a template's tokens is part of the length."""
    with StubServer() as server:
        assert run(server, "--input-len", 60, "--num-prompts", 2, "--output-len", 1) == 0
    assert [len(body["messages"][0]["content"].split()) for body in server.requests] == [60 - OVERHEAD] * 2
