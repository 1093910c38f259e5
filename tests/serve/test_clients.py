"""Clients we did not write: openai, litellm and curl, and schemathesis over our own OpenAPI document."""

import json
import os
import re
import shutil
import subprocess

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.test_chat import CALL, HELLO, TOOLS


def client_of(site) -> "openai.OpenAI":
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)


def test_openai_chat_whole_and_streamed(say) -> None:
    with say(f"hm</think>{CALL}") as site, client_of(site) as client:
        whole = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
        assert whole.choices[0].message.content == "Sure."
        assert whole.choices[0].message.tool_calls[1].function.arguments == '{"a": 2}'
        assert whole.choices[0].message.reasoning_content == "hm"
        assert whole.choices[0].finish_reason == "tool_calls"
        # the package's own accumulator of streams checks indices and order
        with client.chat.completions.stream(
            model="tiny", messages=HELLO, tools=[{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
        ) as stream:
            final = stream.get_final_completion()
        message = final.choices[0].message
        assert message.content == "Sure."
        assert [c.function.arguments for c in message.tool_calls] == ['{"a": 1}', '{"a": 2}']
        assert [m.id for m in client.models.list()] == ["tiny", "other-name"]
        text = client.completions.create(model="tiny", prompt="x", max_tokens=3)
        assert text.choices[0].text


def test_openai_errors_have_its_classes(say) -> None:
    with say("x") as site, client_of(site) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="tiny", messages=HELLO, temperature=5)
        assert bad.value.param == "temperature"


def test_openai_responses_whole_streamed_stored_and_continued(say) -> None:
    with say("hm</think>Hi.") as site, client_of(site) as client:
        first = client.responses.create(model="tiny", input="hello", instructions="Be brief.")
        assert first.output_text == "Hi."
        assert [o.type for o in first.output] == ["reasoning", "message"]
        assert first.status == "completed"
        assert first.usage.output_tokens_details.reasoning_tokens == 2
        kinds: list[str] = []
        with client.responses.stream(model="tiny", input="more", previous_response_id=first.id) as stream:
            kinds += [event.type for event in stream]
            final = stream.get_final_response()
        assert final.output_text == "Hi."
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert "response.reasoning_text.delta" in kinds
        assert kinds.count("response.output_text.delta") == 3
        prompt = site.engine.added[-1].token_ids
        assert len(prompt) > len(site.engine.added[0].token_ids)
        assert client.responses.retrieve(first.id).output_text == "Hi."
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_openai_responses_call_functions(say) -> None:
    tool = {"type": "function", "name": "add", "parameters": TOOLS[0]["function"]["parameters"], "strict": False}
    with say(f"</think>{CALL}") as site, client_of(site) as client:
        response = client.responses.create(model="tiny", input="2?", tools=[tool])
        calls = [o for o in response.output if o.type == "function_call"]
        assert [c.arguments for c in calls] == ['{"a": 1}', '{"a": 2}']
        output = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "3"}
        again = client.responses.create(model="tiny", input=[*response.output, output], tools=[tool])
        assert again.status == "completed"
        with client.responses.stream(model="tiny", input="x", tools=[tool]) as stream:
            done = [e for e in stream if e.type == "response.function_call_arguments.done"]
        assert [e.arguments for e in done] == ['{"a": 1}', '{"a": 2}']


def test_openai_responses_in_the_background(say) -> None:
    def script(request) -> str:
        return "</think>∞" if request.params.max_tokens == 900 else "</think>ok"

    with say(script, engine={"step_s": 0.001}) as site, client_of(site) as client:
        quick = client.responses.create(model="tiny", input="x", background=True)
        site.wait(lambda: client.responses.retrieve(quick.id).status == "completed")
        slow = client.responses.create(model="tiny", input="x", background=True, max_output_tokens=900)
        assert slow.status == "in_progress"
        assert client.responses.cancel(slow.id).status == "cancelled"
        site.wait(lambda: not site.engine.running)
        cut = client.responses.create(model="tiny", input="x", max_output_tokens=1)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_litellm_chat_and_completions_whole_and_streamed(say, monkeypatch: pytest.MonkeyPatch) -> None:
    # else it asks the network for a table of prices
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="needs pip install litellm")
    with say(f"hm</think>{CALL}") as site:
        to = {"api_base": f"{site.url}/v1", "api_key": "none", "num_retries": 0}
        chat = {"model": "hosted_vllm/tiny", "messages": HELLO, **to}
        whole = litellm.completion(tools=TOOLS, **chat)
        message = whole.choices[0].message
        assert (message.content, message.reasoning_content) == ("Sure.", "hm")
        assert [c.function.arguments for c in message.tool_calls] == ['{"a": 1}', '{"a": 2}']
        assert whole.choices[0].finish_reason == "tool_calls"
        chunks = list(litellm.completion(tools=TOOLS, stream=True, stream_options={"include_usage": True}, **chat))
        built = litellm.stream_chunk_builder(chunks, messages=HELLO)
        assert built.choices[0].message.content == "Sure."
        assert built.choices[0].message.reasoning_content == "hm"
        assert [c.function.arguments for c in built.choices[0].message.tool_calls] == ['{"a": 1}', '{"a": 2}']
        assert built.usage.completion_tokens == whole.usage.completion_tokens
        text = {"model": "text-completion-openai/tiny", "prompt": "x", "max_tokens": 3, **to}
        said = litellm.text_completion(**text).choices[0].text
        assert said
        assert "".join(c.choices[0].text or "" for c in litellm.text_completion(stream=True, **text)) == said
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**{**chat, "model": "hosted_vllm/gpt-9"})
        with pytest.raises(litellm.BadRequestError, match="less than or equal to 2"):
            litellm.completion(temperature=5, **chat)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_whole_streamed_and_refused(say) -> None:
    """As the documentation writes it."""

    def curl(path: str, *arguments: str, body: dict | None = None) -> str:
        data = () if body is None else ("-H", "Content-Type: application/json", "-d", json.dumps(body))
        command = ["curl", "-sS", "-N", "--max-time", "20", *arguments, f"{site.url}{path}", *data]
        environment = {**os.environ, "no_proxy": "*"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    with say("hm</think>Hello.") as site:
        body = {"model": "tiny", "messages": HELLO}
        whole = json.loads(curl("/v1/chat/completions", body=body))
        assert whole["choices"][0]["message"]["content"] == "Hello."
        head, _, streamed = curl("/v1/chat/completions", "-i", body={**body, "stream": True}).partition("\n\n")
        assert "text/event-stream" in head
        *events, done, end = streamed.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
        assert "".join(d.get("content") or "" for d in deltas) == "Hello."
        assert json.loads(curl("/v1/models"))["data"][0]["id"] == "tiny"
        code = ("-o", os.devnull, "-w", "%{http_code}")
        assert curl("/v1/chat/completions", *code, body={"model": "tiny"}) == "400"
        assert curl("/health", *code) == "200"


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(say) -> None:
    """Valid and invalid requests to every route of the document: nothing answers 5xx, and the document itself is valid."""
    with say("hm</think>ok", request_timeout_s=5, rate_limit=0) as site:
        schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
        schema.validate()
        # every body that it names is in it
        named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema.raw_schema)))
        assert named >= {"ChatRequest", "CompletionRequest", "ResponseRequest", "ChatMessage"}
        assert named <= set(schema.raw_schema["components"]["schemas"])
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {o.path for o in operations} >= {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"}
        for operation in operations:

            @settings(max_examples=25, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            def trial(case) -> None:
                response = case.call(timeout=20)
                assert response.status_code < 500, (case.body, response.text)

            modes = ["positive", "negative"] if list(operation.body) else ["positive"]
            for mode in modes:
                given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))(trial)()
        assert site.thread.is_alive()
        assert not site.failure
