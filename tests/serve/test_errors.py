"""Every row of the table of errors (serving.md 7.5), and what must be refused: status, body, and that nothing breaks."""

import json
import socket
import threading
from typing import Any

import httpx
import pytest

from alloy.engine.core import LLM
from tests.engine.conftest import build, byte_tokenizer
from tests.serve.conftest import ScriptedEngine, serving
from tests.serve.test_chat import HELLO, ask, events

CHAT = "/v1/chat/completions"


def check(response: httpx.Response, status: int, code: str | None, param: str | None, *words: str) -> dict[str, Any]:
    """One error body, all four keys, no trace of our own files."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    for word in words:
        assert word in error["message"], error
    assert ".py" not in error["message"]
    assert "pydantic" not in response.text
    assert response.headers["x-request-id"]
    return error


BAD = [
    ({"messages": "hi"}, "messages", "array"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "user"),
    ({"messages": [*HELLO, {"role": "user", "content": 3}]}, "messages.1.content", "string or an array"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content.0.type", "text alone"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
     "messages.1.tool_calls.0.function.arguments", "JSON object"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 17}, "n", "16"),
    ({"n": True}, "n", "whole number"),
    ({"seed": 2**63}, "seed", ""),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "more than max_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "token id"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "function"),
    ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ({"function_call": "auto"}, "function_call", "use tool_choice"),
    ({"audio": {"voice": "x"}}, "audio", "text"),
    ({"modalities": ["audio"]}, "modalities", "text"),
    ({"web_search_options": {}}, "web_search_options", "web"),
    ({"chat_template": "{{ x }}"}, "chat_template", "serve.trust_request_template"),
    ({"thinking_budget": 1, "reasoning_budget": 2}, "thinking_budget", "one limit"),
    ({"thinking_budget": -2}, "thinking_budget", "-1"),
    ({"nvext": {"max_thinking_tokens": "x"}}, "nvext.max_thinking_tokens", "whole number"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "medium"),
    ({"continue_final_message": True}, "continue_final_message", "assistant message"),
]  # fmt: skip


def test_bad_fields_are_400_with_their_path(say) -> None:
    with say("</think>x") as site:
        for body, param, word in BAD:
            check(ask(site, **body), 400, None, param, word)
        assert site.engine.added == []


RAW = [
    (b"{", "not valid JSON"),
    (b"[1]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b"\xff\xfe{}", "not UTF-8 at byte 0"),
    (b'{"temperature": 1e999}', "too large"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', "lone surrogate at character 1"),
    (b'{"messages": [{"role": "user", "content": "a"}], "\\udfff": 1}', "lone surrogate"),
]


@pytest.mark.parametrize(("raw", "word"), RAW, ids=range(len(RAW)))
def test_bodies_that_are_no_json_are_400(say, raw: bytes, word: str) -> None:
    with say("</think>x") as site, site.client() as client:
        response = client.post(CHAT, content=raw, headers={"content-type": "application/json"})
        param = "messages.0.content" if word.endswith("character 1") else None
        check(response, 400, None, param, word)


def test_a_prompt_that_does_not_fit_names_all_three_numbers(say) -> None:
    with say("</think>x") as site, site.client() as client:
        long = [{"role": "user", "content": "a" * 900}]
        check(ask(site, messages=long, max_tokens=200), 400, "context_length_exceeded", "messages", "9", "200", "1,000")
        check(ask(site, messages=[{"role": "user", "content": "a" * 2000}]), 400, "context_length_exceeded", "messages")
        response = client.post("/v1/completions", json={"prompt": "a" * 990, "max_tokens": 20})
        check(response, 400, "context_length_exceeded", "prompt", "990", "20", "1,000")


def test_keys_are_needed_for_v1_alone(say, tiny_llm) -> None:
    with (
        serving(tiny_llm, ScriptedEngine(lambda r: "</think>x"), keys=("sesame", "second")) as site,
        site.client() as c,
    ):
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "sesame"},
            {"authorization": "Basic sesame"},
        ):
            response = c.get("/v1/models", headers=header)
            check(response, 401, "invalid_api_key", None, "Bearer")
            assert response.headers["www-authenticate"] == "Bearer"
        assert c.post("/tokenize", json={"prompt": "x"}).status_code == 401
        for key in ("sesame", "second"):
            assert c.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/livez", "/ready", "/metrics", "/version"):
            assert c.get(path).status_code == 200


def test_unknown_names_paths_and_methods(say) -> None:
    with say("</think>x") as site, site.client() as client:
        check(ask(site, model="gpt-9"), 404, "model_not_found", "model", "gpt-9", "tiny", "other-name")
        check(client.get("/v1/models/gpt-9"), 404, "model_not_found", "model")
        assert client.get("/v1/models/other-name").json()["id"] == "other-name"
        check(client.get("/v1/nothing"), 404, "not_found", None)
        check(client.get("/a/b"), 404, "not_found", None)
        check(client.get(CHAT), 405, "method_not_allowed", None, "GET")
        check(client.post("/v1/embeddings", json={}), 404, "not_supported", None, "writes text")
        check(client.post("/v1/audio/speech", json={}), 404, "not_supported", None)


def test_bodies_too_large_or_of_another_kind(say) -> None:
    with say("</think>x", max_body_mb=0.01) as site, site.client() as client:
        check(ask(site, user="x" * 20_000), 413, "request_too_large", None, "10,485")
        chunks = (b"x" * 1000 for _ in range(50))
        check(
            client.post(CHAT, content=chunks, headers={"content-type": "application/json"}),
            413,
            "request_too_large",
            None,
        )
        check(
            client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}),
            415,
            "unsupported_media_type",
            None,
        )
        check(client.post(CHAT, content=b"{}"), 415, "unsupported_media_type", None, "application/json")


def test_a_full_queue_is_503_with_retry_after(say) -> None:
    """One runs, two wait, the next is refused; by tokens too. Afterwards all is well."""
    go = threading.Event()
    with say("</think>x", engine={"max_seqs": 1, "pause": go}, max_queue=2) as site:
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(site))) for _ in range(3)]
        for n, thread in enumerate(threads):
            thread.start()
            site.wait(lambda n=n: site.listener.server.driver._sent == n + 1 and site.engine.added[n:])
            site.wait(lambda n=n: site.listener.server.driver.queued == n)
        response = ask(site)
        check(response, 503, "server_overloaded", None, "2 requests are waiting")
        assert int(response.headers["retry-after"]) > 0
        go.set()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200] * 3
        assert ask(site).status_code == 200
        with site.client() as client:
            assert (
                'alloy:request_rejected_total{code="server_overloaded",model_name="tiny"} 1.0'
                in client.get("/metrics").text
            )


def test_too_many_waiting_tokens_are_503(say) -> None:
    go = threading.Event()
    with say("</think>x", engine={"max_seqs": 1, "pause": go}, max_queue_tokens=300) as site:
        threads = [threading.Thread(target=ask, args=(site,)) for _ in range(2)]
        for n, thread in enumerate(threads):
            thread.start()
            site.wait(lambda n=n: site.listener.server.driver.queued == n and len(site.engine.added) == n + 1)
        response = ask(site, messages=[{"role": "user", "content": "x" * 260}])
        check(response, 503, "server_overloaded", None, "prompt tokens are waiting")
        go.set()
        for thread in threads:
            thread.join()


def test_more_prompts_than_the_queue_holds_are_400(say) -> None:
    with say("x", max_queue=2) as site, site.client() as client:
        check(client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}), 400, None, "prompt", "at most 2")


def test_a_rate_limit_is_429_with_retry_after(say, tiny_llm) -> None:
    with say("</think>x", rate_limit=2) as site:
        assert [ask(site).status_code for _ in range(2)] == [200, 200]
        response = ask(site)
        error = check(response, 429, "rate_limit_exceeded", None, "2 requests a minute")
        assert error["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) > 0


def test_a_request_that_takes_too_long_is_408_or_an_event(say) -> None:
    with say("</think>∞", engine={"step_s": 0.01}, request_timeout_s=0.3) as site:
        check(ask(site), 408, "timeout", None, "0.3 s")
        streamed = events(ask(site, stream=True))
        assert streamed[-1]["error"]["code"] == "timeout"
        site.wait(lambda: not site.engine.running)


def test_the_clock_of_a_request_runs_while_its_reader_is_behind(say) -> None:
    """64 samples a step, as fast as the engine goes."""
    with say("</think>∞", request_timeout_s=0.3) as site, site.client() as client:
        body = {"prompt": "a", "n": 64, "max_tokens": 900, "logprobs": 2, "ignore_eos": True}
        check(client.post("/v1/completions", json=body), 408, "timeout", None, "0.3 s")
        site.wait(lambda: not site.engine.running)


def test_a_dead_engine_is_500_then_503(say, tiny_llm) -> None:
    with say("</think>∞", engine={"step_s": 0.01}) as site, site.client() as client:
        # a process would end now; this one stays to be asked
        site.listener.server.driver._on_death = None
        with client.stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            waiting: list[httpx.Response] = []
            thread = threading.Thread(target=lambda: waiting.append(ask(site)))
            thread.start()
            site.wait(lambda: len(site.engine.running) == 2)
            site.engine.fail = ZeroDivisionError("secret")
            rest = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
            assert rest[-1]["error"]["code"] == "engine_dead"
        thread.join()
        check(waiting[0], 500, "engine_dead", None)
        check(ask(site), 503, "engine_dead", None)
        assert client.get("/health").status_code == client.get("/livez").status_code == 503
        assert client.get("/ready").status_code == 503
        assert site.engine.closed


def test_a_dead_engine_ends_the_process(say) -> None:
    with say("</think>∞", engine={"step_s": 0.01}) as site:
        site.engine.fail = ZeroDivisionError()
        check(ask(site), 500, "engine_dead", None)
        site.thread.join(10)
        assert not site.thread.is_alive()
        assert site.listener.has_died


def test_numbers_that_are_none_fail_one_request(say) -> None:
    def script(request) -> str:
        return "</think>\x00" if request.params.seed == 1 else "</think>fine"

    with say(script) as site:
        check(ask(site, seed=1), 500, "model_error", None, "NaN")
        assert ask(site).json()["choices"][0]["message"]["content"] == "fine"
        with site.client() as client:
            assert 'alloy:request_error_total{model_name="tiny"} 1.0' in client.get("/metrics").text


def test_what_the_engine_refuses_late_is_400(say) -> None:
    with say("</think>x") as site:
        site.engine.refuse = "n x max_tokens = 99 is more than the cache holds"
        check(ask(site), 400, None, "messages", "more than the cache holds")
        check(ask(site, stream=True), 400, None, "messages", "more than the cache holds")


def test_a_template_of_the_request_has_no_other_way_in(say) -> None:
    """Neither among the template's variables nor as an unknown field of /tokenize."""
    with say("</think>x") as site, site.client() as client:
        plain = client.post("/tokenize", json={"messages": HELLO})
        for body in ({"chat_template_kwargs": {"chat_template": "mine"}}, {"chat_template": "mine"}):
            response = client.post("/tokenize", json={"messages": HELLO, **body})
            assert response.json() == plain.json()
            assert "chat_template" in response.headers["x-alloy-warning"]


def test_a_model_without_a_template_points_to_completions() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with serving(LLM(build("attention"), tokenizer), ScriptedEngine(lambda r: "x")) as site:
        check(ask(site), 400, None, "messages", "/v1/completions")
        with site.client() as client:
            assert client.post("/v1/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == "x"


def test_a_body_that_never_ends_is_408(say) -> None:
    """And a client that leaves in the middle of one is no error of the server's."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with say("x", request_timeout_s=0.2) as site:
        for is_patient in (True, False):
            connection = socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2])))
            connection.sendall(head)
            if is_patient:
                assert connection.recv(4096).startswith(b"HTTP/1.1 408")
            connection.close()
        with site.client() as client:
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_the_page_is_served_under_a_strict_policy_or_not_at_all(say) -> None:
    with say("x", page=False) as site, site.client() as client:
        check(client.get("/"), 404, "not_found", None)
    with say("x") as site, site.client() as client:
        response = client.get("/")
        if response.status_code == 200:
            assert "default-src 'none'" in response.headers["content-security-policy"]
        check(client.get("/page/index.html"), 404, "not_found", None)


def test_request_ids_are_echoed_when_they_are_fit(say) -> None:
    with say("</think>x") as site, site.client() as client:
        for given, is_kept in (("abc-1", True), ("x" * 129, False), ("", False)):
            answer = client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
            assert (answer == given) is is_kept
