"""The real engine behind the server: prefix reuse in `usage`, cancellation without leaks, grammars, the command itself."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest

from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM
from alloy.models.llama import DecoderLM
from tests.engine.conftest import MODELS, SPECIAL, byte_tokenizer
from tests.serve.conftest import TOOL_TEMPLATE, serving
from tests.serve.test_chat import ask, events, joined
from tests.serve.test_errors import check
from tests.serve.test_life import port_of, raw_post

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]


def make_llm(name: str) -> LLM:
    """A random model with its own engine."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    config = MODELS[name]().model_copy(update={"max_positions": 700})
    model = HybridLM(config) if isinstance(config, HybridConfig) else DecoderLM(config)
    model.init_weights(0)
    return LLM(model.eval(), tokenizer, max_seqs=4)


@pytest.fixture(scope="module", params=["attention", "mtp"])
def site(request: pytest.FixtureRequest):
    """A server of a random model on its own engine."""
    llm = make_llm(request.param)
    with serving(llm, llm.engine()) as running:
        yield running


def idle(site) -> bool:
    g = site.engine.gauges()
    return (
        not site.engine.busy
        and g.blocks_free + g.blocks_cached == g.blocks
        and g.slots_free + g.slots_cached == g.slots
    )


def test_an_identical_prompt_is_found_but_for_one_token(site) -> None:
    body = {"temperature": 0, "max_tokens": 5, "messages": [{"role": "user", "content": "the same again"}]}
    first, second = (ask(site, **body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == second["usage"]["prompt_tokens"] - 1


def test_streams_beside_each_other_say_what_each_says_alone(site) -> None:
    bodies = [
        {
            "messages": [{"role": "user", "content": f"n {i}"}],
            "temperature": 0,
            "max_tokens": 9,
            "return_token_ids": True,
        }
        for i in range(9)
    ]
    alone = [ask(site, **b).json()["choices"][0]["token_ids"] for b in bodies]
    with ThreadPoolExecutor(9) as pool:
        chunks = list(pool.map(lambda b: events(ask(site, stream=True, **b)), bodies))
    assert [[t for c in one for ch in c["choices"] for t in ch.get("token_ids", [])] for one in chunks] == alone


@pytest.mark.parametrize("stream", [True, False])
def test_vanished_clients_leave_nothing_behind(site, stream: bool) -> None:
    for _ in range(5):
        connections = [raw_post(port_of(site), {"stream": stream, "ignore_eos": True}) for _ in range(8)]
        site.wait(lambda: site.engine.busy)
        for connection in connections:
            connection.close()
        site.wait(lambda: idle(site))


def test_forced_calls_hold_for_a_model_that_knows_nothing(site) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        body = ask(
            site,
            tools=TOOLS,
            tool_choice=choice,
            max_tokens=400,
            seed=1,
            reasoning_effort="none",
            parallel_tool_calls=False,
        ).json()
        made = body["choices"][0]
        assert made["finish_reason"] == "tool_calls", body
        assert made["message"]["content"] is None
        call = made["message"]["tool_calls"][0]["function"]
        assert call["name"] == "add"
        assert isinstance(json.loads(call["arguments"]), dict)


def test_a_shape_that_cannot_be_compiled_is_400(site) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    response = ask(site, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "response_format"
    good = ask(site, structured_outputs={"choice": ["yes", "no"]}, reasoning_effort="none").json()
    assert good["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_budget_ends_the_thought(site) -> None:
    body = ask(site, thinking_budget=3, max_tokens=20, ignore_eos=True, seed=3).json()
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 3


def slow_client(site, **body) -> HTTPConnection:
    """A client whose system takes next to nothing ahead of its reads, with a request on the way."""
    connection = HTTPConnection("127.0.0.1", port_of(site), timeout=30)
    connection.sock = socket.socket()
    connection.sock.settimeout(30)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sock.connect(("127.0.0.1", port_of(site)))
    # large chunks fill what is between server and client soon
    whole = {"stream": True, "ignore_eos": True, "logprobs": 20, "return_token_ids": True, **body}
    connection.request("POST", "/v1/completions", json.dumps(whole), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("name", ["attention", "mtp"])
def test_a_reader_that_falls_behind_and_reads_on_gets_the_whole_answer(name: str) -> None:
    """Meanwhile its request holds nothing, and others are answered."""
    llm = make_llm(name)
    prompt = llm.encode("slowly")
    params = SamplingParams(seed=4, n=2, max_tokens=300, ignore_eos=True)
    want = [c.token_ids for c in LLM(llm.model, speculate=0).generate([prompt], params)[0].completions]
    with serving(llm, llm.engine(), send_buffer=4096, slow_reader_tokens=20, request_timeout_s=120) as site:
        connection = slow_client(site, prompt=prompt, seed=4, n=2, max_tokens=300)
        site.wait(lambda: site.engine._paused and not site.engine.busy)
        assert idle(site)
        assert ask(site, max_tokens=3).status_code == 200
        answer = connection.getresponse().read().decode()
        connection.close()
        site.wait(lambda: idle(site) and not site.engine._paused)
    got: list[list[int]] = [[], []]
    for line in answer.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                got[choice["index"]] += choice.get("token_ids", [])
    assert got == want


def test_a_reader_that_never_reads_on_is_cut_off() -> None:
    llm = make_llm("mtp")
    with serving(llm, llm.engine(), send_buffer=4096, slow_reader_tokens=20, slow_reader_s=0.3) as site:
        connection = slow_client(site, prompt="slowly", max_tokens=600)
        site.wait(lambda: site.engine._paused)
        site.wait(lambda: not site.engine._paused and site.listener.server.driver.in_flight == 0)
        assert idle(site)
        connection.close()


def test_special_tokens_have_text_where_it_is_asked_for(site) -> None:
    """A bias makes <|im_start|> the only token there is."""
    forced = {"logit_bias": {"257": 100}, "max_tokens": 3, "temperature": 0, "reasoning_effort": "none"}
    shown = ask(site, skip_special_tokens=False, **forced).json()["choices"][0]["message"]["content"]
    assert shown == "<|im_start|>" * 3
    assert ask(site, **forced).json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize(
    "grammar", ['start: "a" start', 'start: ("x" | "y") tail\ntail: "ab" tail', 'start: x\nx: x x "b" | "a" x']
)
def test_a_grammar_without_end_ends_at_max_tokens(site, grammar: str) -> None:
    body = ask(site, structured_outputs={"grammar": grammar}, max_tokens=60, reasoning_effort="none", seed=2).json()
    assert body["choices"][0]["finish_reason"] == "length", body
    assert body["usage"]["completion_tokens"] == 60
    assert set(body["choices"][0]["message"]["content"]) <= set("abxy")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"grammar": "start: start"}, "cannot be met"),
        ({"regex": "[^\\s\\S]"}, "cannot be met"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"json": {"$ref": "#"}}, "cannot be met"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
    ],
)
def test_a_shape_that_nothing_meets_is_400(site, shape, words: str) -> None:
    error = ask(site, structured_outputs=shape).json()["error"]
    assert error["param"].startswith("structured_outputs.")
    assert words in error["message"]


def test_banned_tokens_leave_nothing_of_a_shape_and_fail_one_request(site) -> None:
    """The grammar is fine, and every text of it is out of reach: its one token may not come yet."""
    banned = {"stop_token_ids": [97], "min_tokens": 3, "max_tokens": 5, "reasoning_effort": "none"}
    response = ask(site, structured_outputs={"choice": ["a"]}, **banned)
    check(response, 500, "model_error", None, "other sampling values")
    assert ask(site, max_tokens=2).status_code == 200


EXTREMES = [
    {"temperature": 2, "top_p": 1e-300, "top_k": 2**31, "min_p": 1},
    {"temperature": 1e-300},
    {"temperature": 0, "presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 100},
    {"repetition_penalty": 1e-300, "seed": 1},
    {"seed": -(2**63), "n": 16},
    {"seed": 2**63 - 1, "logit_bias": {str(i): -100 for i in range(261)}},
    {"logit_bias": {str(i): 100 for i in range(261)}, "logprobs": True, "top_logprobs": 20},
    {"stop": ["\U0010ffff" * 1000] * 16, "stop_token_ids": list(range(261))},
    {"min_tokens": 5, "thinking_budget": 10**18, "thinking_grace": 10**18},
    {"priority": -(2**31), "cache_salt": "x" * 100_000, "request_id": "y" * 100_000},
    {"min_tokens": 5, "stop_token_ids": list(range(261)), "ignore_eos": True},
    {"thinking_budget": 0, "thinking_close_text": "x" * 10_000},
]


@pytest.mark.parametrize("body", EXTREMES, ids=range(len(EXTREMES)))
def test_the_ends_of_what_is_allowed_are_answered(site, body) -> None:
    response = ask(site, **{"max_tokens": 5, **body})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] <= 5 * body.get("n", 1)


ABSURD = [
    {"max_tokens": 10**18},
    {"max_tokens": 2**64},
    {"max_tokens": -1},
    {"max_tokens": 5, "min_tokens": 10**30},
    {"seed": 10**30},
    {"n": 10**9},
    {"temperature": -1e-300},
    {"top_p": 1 + 1e-15},
    {"stop_token_ids": [261]},
    {"stop_token_ids": [10**30]},
    {"logit_bias": {"9" * 30: 1}},
    {"logit_bias": {"1": 1e300}},
    {"priority": 10**30},
    {"repetition_penalty": 0},
]


def test_absurd_parameters_are_400(site) -> None:
    for body in ABSURD:
        response = ask(site, **body)
        assert response.status_code == 400, (body, response.text)
        assert response.json()["error"]["param"].partition(".")[0] in (*body, "messages")
    assert ask(site, max_tokens=2).status_code == 200


@pytest.fixture(scope="module")
def spelled():
    """A server of a random model with drafts, whose tokenizer has no tokens for the markers of thoughts."""
    tokenizer = byte_tokenizer(SPECIAL[:3])
    model = HybridLM(MODELS["mtp"]().model_copy(update={"max_positions": 700}))
    model.init_weights(0)
    llm = LLM(model.eval(), tokenizer, max_seqs=4)
    with serving(llm, llm.engine()) as running:
        yield running


def test_a_budget_is_exact_where_markers_are_several_tokens(spelled) -> None:
    """As many tokens of thought as the budget has, the newline of the prompt counted, then its marker and the answer; whole
    and streamed."""
    asked = {"thinking_token_budget": 12, "max_tokens": 40, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    body = ask(spelled, **asked).json()
    chunks = events(ask(spelled, stream=True, stream_options={"include_usage": True}, **asked))
    choice, usage = body["choices"][0], body["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 12
    assert usage["completion_tokens"] == 40
    assert bytes(choice["token_ids"][11:19]) == b"</think>"
    codec = byte_tokenizer(SPECIAL[:3])
    assert choice["message"]["reasoning"] == codec.decode(choice["token_ids"][:11]).strip("\n")
    assert choice["message"]["content"]
    assert choice["message"]["content"] == codec.decode(choice["token_ids"][19:]).lstrip("\n")
    assert joined(chunks, "reasoning") == choice["message"]["reasoning"]
    assert joined(chunks, "content") == choice["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12


def test_a_shape_holds_after_a_thought_of_several_tokens(spelled) -> None:
    """The thought is no JSON, the answer is."""
    shape = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}
    body = ask(spelled, response_format=format, thinking_token_budget=9, seed=5, max_tokens=400).json()
    message = body["choices"][0]["message"]
    assert json.loads(message["content"])["a"] in (1, 2)
    assert message["reasoning"]
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 9
