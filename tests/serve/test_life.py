"""Clients that go away, slow readers, keep-alive comments, draining: what the engine holds always comes back."""

import asyncio
import json
import signal
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest

from tests.serve.test_chat import HELLO, ask, events

CHAT = "/v1/chat/completions"
ENDLESS = "</think>∞"


def raw_post(port: int, body: dict, path: str = CHAT) -> socket.socket:
    """A request on a bare socket, so that it can be dropped at any time."""
    data = json.dumps({"messages": HELLO, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + data)
    return connection


def port_of(site) -> int:
    return int(site.url.rpartition(":")[2])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(say, stream: bool) -> None:
    with say(ENDLESS, engine={"step_s": 0.002}) as site:
        connections = [raw_post(port_of(site), {"stream": stream}) for _ in range(5)]
        site.wait(lambda: len(site.engine.running) == 5)
        for connection in connections:
            connection.close()
        site.wait(lambda: not site.engine.running and not site.engine.waiting)
        assert len(site.engine.cancelled) == 5
        site.wait(lambda: site.listener.server.driver.in_flight == 0)
        site.wait(lambda: site.listener.server.driver.gauges.running == 0)
        assert ask(site, max_tokens=3).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_waiting_client_that_goes_away_never_runs(say, stream: bool) -> None:
    go = threading.Event()
    with say(ENDLESS, engine={"max_seqs": 1, "pause": go}) as site:
        first = raw_post(port_of(site), {})
        site.wait(lambda: site.engine.running)
        second = raw_post(port_of(site), {"stream": stream})
        site.wait(lambda: site.engine.waiting)
        second.close()
        site.wait(lambda: not site.engine.waiting)
        first.close()
        site.wait(lambda: not site.engine.running)


def test_many_timeouts_then_one_answer(say) -> None:
    """60 clients that give up after 50 ms do not keep the next one waiting."""
    with say(ENDLESS, engine={"step_s": 0.001}) as site:

        async def give_up() -> None:
            async with httpx.AsyncClient(base_url=site.url, timeout=0.05, trust_env=False) as client:
                with suppress(httpx.TimeoutException):
                    await client.post(CHAT, json={"messages": HELLO, "max_tokens": 500})

        async def all_of_them() -> None:
            await asyncio.gather(*(give_up() for _ in range(60)))

        asyncio.run(all_of_them())
        start = time.monotonic()
        assert ask(site, max_tokens=3).status_code == 200
        assert time.monotonic() - start < 5
        site.wait(lambda: not site.engine.busy)


def test_a_silent_stream_is_kept_alive_with_comments(say) -> None:
    go = threading.Event()
    with say("</think>ok", engine={"pause": go}, keepalive_s=0.05) as site, site.client() as client:
        with client.stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
            go.set()
            rest = [x for x in lines if x.startswith("data")]
        assert rest[-1] == "data: [DONE]"


def test_a_reader_that_does_not_read_is_cut_off(say) -> None:
    with say(ENDLESS, slow_reader_tokens=10, slow_reader_s=0.2) as site:
        connection = raw_post(port_of(site), {"stream": True, "logprobs": True, "top_logprobs": 2})
        site.wait(lambda: site.engine.running)
        site.wait(lambda: site.engine.cancelled, 30)
        assert not site.engine.running
        connection.close()


def test_a_stream_of_many_tokens_arrives_whole_and_in_order(say) -> None:
    text = "".join(chr(97 + i % 26) for i in range(600))
    with say(f"</think>{text}") as site:
        chunks = events(ask(site, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == text


def test_draining_finishes_what_runs_and_takes_nothing_new(say) -> None:
    go = threading.Event()
    with say("</think>done", engine={"pause": go}) as site, site.client() as client:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask(site)))
        thread.start()
        site.wait(lambda: site.engine.running)
        site.do(lambda: site.listener._begin_drain(signal.SIGTERM))
        site.wait(lambda: site.listener.server.driver.is_draining)
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        refused = ask(site)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        go.set()
        thread.join()
        assert answers[0].json()["choices"][0]["message"]["content"] == "done"
        site.thread.join(10)
        assert not site.thread.is_alive()
        assert not site.failure
        assert site.engine.closed


def test_what_draining_cannot_finish_ends_with_an_error(say) -> None:
    with say(ENDLESS, engine={"step_s": 0.002}, shutdown_s=0.1) as site:
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda s=s: answers.append(ask(site, stream=s))) for s in (True, False)]
        for thread in threads:
            thread.start()
        site.wait(lambda: len(site.engine.running) == 2)
        site.do(lambda: site.listener._begin_drain(signal.SIGTERM))
        for thread in threads:
            thread.join(10)
        site.thread.join(10)
        assert not site.thread.is_alive()
    streamed, whole = sorted(answers, key=lambda a: a.status_code)
    assert events(streamed)[-1]["error"]["code"] == "server_shutdown"
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "server_shutdown")


def test_a_response_that_is_deleted_while_it_streams_ends(say) -> None:
    """Its reader is told, and waits for nothing more."""
    with say("</think>∞", engine={"step_s": 0.005}) as site, site.client() as client, site.client() as other:
        with client.stream("POST", "/v1/responses", json={"input": "x", "stream": True}) as stream:
            found = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            assert other.delete(f"/v1/responses/{next(found)['response']['id']}").json()["deleted"]
            *_, last = found
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert "deleted" in last["response"]["error"]["message"]
        site.wait(lambda: not site.engine.running)
