"""The real engine behind the server: prefix reuse in `usage`, cancellation without leaks, grammars, the command itself."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from alloy.engine.core import LLM
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM
from alloy.models.llama import DecoderLM
from tests.engine.conftest import MODELS, SPECIAL, byte_tokenizer
from tests.serve.conftest import TOOL_TEMPLATE, serving
from tests.serve.test_chat import ask, events, joined
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


@pytest.fixture(scope="module", params=["attention", "mtp"])
def site(request: pytest.FixtureRequest):
    """A server of a random model on its own engine."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    config = MODELS[request.param]().model_copy(update={"max_positions": 700})
    model = HybridLM(config) if isinstance(config, HybridConfig) else DecoderLM(config)
    model.init_weights(0)
    llm = LLM(model.eval(), tokenizer, max_seqs=4)
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
