"""Chat completions as clients see them: whole, streamed, with thoughts, tools, log probabilities and several samples."""

import json
from typing import Any

import httpx
import pytest

HELLO = [{"role": "user", "content": "hello"}]


def ask(site: Any, **body: Any) -> httpx.Response:
    with site.client() as client:
        return client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **body})


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last one ends it."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    data = [b.removeprefix("data: ") for b in blocks[:-1] if not b.startswith(":")]
    assert data[-1] == "[DONE]"
    return [json.loads(d) for d in data[:-1]]


def joined(chunks: list[Any], field: str, index: int = 0) -> str:
    return "".join(c["delta"].get(field) or "" for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def test_a_plain_answer_has_every_required_key(say) -> None:
    with say("</think>Hi there.") as site:
        response = ask(site, reasoning_effort="low")
    body = response.json()
    assert response.status_code == 200, body
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hi there.", "refusal": None, "annotations": []}
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "stop"
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    usage = body["usage"]
    assert usage["completion_tokens"] == len("Hi there.") + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert response.headers["x-request-id"]


def test_a_thought_comes_under_both_names_and_is_counted(say) -> None:
    """The template opens the thought in the prompt; streamed and whole agree."""
    with say("\nlet me see\n</think>\n\nIt is 4.") as site:
        body = ask(site).json()
        chunks = events(ask(site, stream=True, stream_options={"include_usage": True}))
        hidden = ask(site, include_reasoning=False).json()
    message = body["choices"][0]["message"]
    assert message["content"] == "It is 4."
    assert message["reasoning"] == message["reasoning_content"] == "let me see"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("\nlet me see\n")
    assert joined(chunks, "content") == "It is 4."
    assert joined(chunks, "reasoning") == joined(chunks, "reasoning_content") == "let me see"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == body["usage"]
    assert all(c["usage"] is None for c in chunks[:-1])
    assert len({c["id"] for c in chunks}) == 1
    assert not {"reasoning", "reasoning_content"} & set(hidden["choices"][0]["message"])


def test_an_answer_cut_inside_the_thought_has_no_content(say) -> None:
    with say("thinking on and on") as site:
        choice = ask(site, max_tokens=5).json()["choices"][0]
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning"] == "think"
    assert choice["finish_reason"] == "length"


def test_without_thinking_everything_is_content(say) -> None:
    with say("plain </think> text") as site:
        a = ask(site, chat_template_kwargs={"enable_thinking": False}).json()
        b = ask(site, reasoning_effort="none").json()
    assert a["choices"][0]["message"]["content"] == b["choices"][0]["message"]["content"] == "plain </think> text"


def test_samples_have_their_own_index(say) -> None:
    with say("</think>ab") as site:
        body = ask(site, n=3).json()
        chunks = events(ask(site, n=3, stream=True))
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in body["choices"]] == ["ab"] * 3
    assert [joined(chunks, "content", i) for i in range(3)] == ["ab"] * 3


def test_logprobs_have_one_entry_a_token(say) -> None:
    with say("</think>ab") as site:
        whole = ask(site, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        chunks = events(ask(site, logprobs=True, top_logprobs=2, stream=True))
    assert [e["token"] for e in whole] == ["</think>", "a", "b"]
    assert whole[1]["bytes"] == [97]
    assert whole[1]["logprob"] == -0.5
    assert [t["token"] for t in whole[1]["top_logprobs"]] == ["a", "A"]
    streamed = [e for c in chunks for ch in c["choices"] if ch["logprobs"] for e in ch["logprobs"]["content"]]
    assert streamed == whole


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]
CALL = 'Sure. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'


def test_tool_calls_are_the_same_streamed_and_whole(say) -> None:
    with say(f"hm</think>{CALL}") as site:
        choice = ask(site, tools=TOOLS).json()["choices"][0]
        chunks = events(ask(site, tools=TOOLS, stream=True))
        none = ask(site, tools=TOOLS, tool_choice="none").json()["choices"][0]
        single = ask(site, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Sure."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(c["function"]["arguments"]) for c in calls] == [{"a": 1}, {"a": 2}]
    assert all(c["id"].startswith("call_") and len(c["id"]) == 29 for c in calls)
    pieces = [t for c in chunks for ch in c["choices"] for t in ch["delta"].get("tool_calls", [])]
    assert [p["index"] for p in pieces] == [0, 0, 1, 1]
    assert pieces[0]["function"] == {"name": "add", "arguments": ""}
    assert json.loads(pieces[3]["function"]["arguments"]) == {"a": 2}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert none["message"]["content"] == CALL
    assert len(single["message"]["tool_calls"]) == 1


def test_a_call_that_does_not_parse_is_content(say) -> None:
    text = 'x <tool_call>{"name": 3}</tool_call> y'
    with say(f"</think>{text}") as site:
        message = ask(site, tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] == text
    assert "tool_calls" not in message


def test_unknown_fields_and_template_variables_are_named_in_a_header(say) -> None:
    with say("</think>x") as site:
        response = ask(site, frobnicate=1, chat_template_kwargs={"colour": "red"})
    assert response.status_code == 200
    assert "frobnicate" in response.headers["x-alloy-warning"]
    assert "colour" in response.headers["x-alloy-warning"]


def test_parameters_reach_the_engine(say) -> None:
    """With the position where the last user turn ends, and null as left out."""
    with say("</think>x", default={"top_p": 0.5, "temperature": 0.3}) as site:
        ask(
            site, temperature=0.1, top_k=-1, seed=7, stop="END", logit_bias={"65": 3}, thinking_budget=5, priority=2,
            cache_salt="s", max_completion_tokens=9, top_p=None, tools=[],
        )  # fmt: skip
        request = site.engine.added[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.1, 0.5, 0, 7)
    assert (params.stop, params.logit_bias, params.thinking_budget, params.max_tokens) == (("END",), {65: 3}, 5, 9)
    assert (request.priority, request.salt) == (2, "s")
    tail = "<|im_start|>assistant\n<think>\n"
    assert len(request.token_ids) - request.keep_at[0] == len("assistant\n\n") + 2
    assert tail.startswith("<|im_start|>")


@pytest.mark.parametrize(
    "budget", [("thinking_budget", 3), ("reasoning_budget", 3), ("nvext", {"max_thinking_tokens": 3})]
)
def test_the_names_of_the_budget_mean_the_same(say, budget) -> None:
    with say("</think>x", max_thinking_budget=100) as site:
        ask(site, **{budget[0]: budget[1]})
        ask(site, thinking_token_budget=3, **{budget[0]: budget[1]})
        ask(site)
        ask(site, thinking_budget=-1)
        assert [r.params.thinking_budget for r in site.engine.added] == [3, 3, 100, 100]


def test_a_final_assistant_message_is_continued(say) -> None:
    with say(" world") as site:
        messages = [*HELLO, {"role": "assistant", "content": "hello"}]
        body = ask(site, messages=messages, continue_final_message=True).json()
        prompt = site.engine.added[0].token_ids
    assert body["choices"][0]["message"]["content"] == " world"
    assert bytes(prompt[-5:])
    assert prompt[-5:] == site.engine.added[0].token_ids[-5:]
