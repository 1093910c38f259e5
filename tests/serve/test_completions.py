"""Completions, tokenize, models and metrics; scores through the server equal those in process."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from tests.serve.conftest import serving
from tests.serve.test_chat import events
from tests.serve.test_errors import check


@pytest.fixture(scope="module")
def real(tiny_llm: LLM):
    """A server of a real model."""
    with serving(tiny_llm, tiny_llm.engine()) as site, site.client() as client:
        yield client


@pytest.fixture(scope="module")
def library(tiny_llm: LLM) -> LLM:
    """The same model with an engine of its own: that of the server is its thread's alone."""
    return LLM(tiny_llm.model, tiny_llm.tokenizer, max_model_len=1000)


def complete(client, **body):
    response = client.post("/v1/completions", json={"temperature": 0, "max_tokens": 7, **body})
    assert response.status_code == 200, response.text
    return events(response) if body.get("stream") else response.json()


def test_every_kind_of_prompt_gives_the_tokens_of_the_library(real, library: LLM) -> None:
    texts = ["one", "another prompt"]
    want = [o.completions[0].token_ids for o in library.generate(texts, SamplingParams(temperature=0, max_tokens=7))]
    ids = [library.encode(t) for t in texts]
    for prompt in (texts, ids):
        body = complete(real, prompt=prompt, return_token_ids=True)
        assert [c["token_ids"] for c in body["choices"]] == want
        assert [c["index"] for c in body["choices"]] == [0, 1]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    for prompt in (texts[0], ids[0]):
        body = complete(real, prompt=prompt, return_token_ids=True)
        assert [c["token_ids"] for c in body["choices"]] == want[:1]
    streamed = complete(real, prompt=texts, stream=True, return_token_ids=True)
    for i in range(2):
        got = [t for c in streamed for ch in c["choices"] if ch["index"] == i for t in ch.get("token_ids", [])]
        assert got == want[i]


def test_scores_of_a_prompt_are_those_of_the_library(real, library: LLM) -> None:
    """As lm-eval asks: echo, log probabilities, one token more; and max_tokens = 0 for the prompt alone."""
    ids = library.encode("score this")
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=2, prompt_logprobs=2)
    out = library.generate([ids], params)[0]
    want = [e.model for e in out.prompt_logprobs[1:]] + [out.completions[0].logprobs[0].model]
    body = complete(real, prompt=[ids], echo=True, logprobs=2, max_tokens=1)
    scored = body["choices"][0]["logprobs"]
    assert scored["token_logprobs"][0] is None
    assert scored["token_logprobs"][1:] == pytest.approx(want)
    assert scored["top_logprobs"][0] is None
    assert all(scored["tokens"][i] in scored["top_logprobs"][i] for i in range(1, len(want)))
    assert scored["text_offset"][:4] == [0, 1, 2, 3]
    alone = complete(real, prompt=[ids], echo=True, logprobs=2, max_tokens=0)
    assert alone["choices"][0]["text"] == "score this"
    assert alone["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(want[:-1])
    assert alone["usage"]["completion_tokens"] == 0
    streamed = complete(real, prompt=[ids], echo=True, logprobs=2, max_tokens=1, stream=True)
    got = [v for c in streamed for ch in c["choices"] if ch["logprobs"] for v in ch["logprobs"]["token_logprobs"]]
    assert got[1:] == pytest.approx(want)


def test_scores_of_fifty_texts_are_those_of_the_library_to_the_last_bit(real, library: LLM) -> None:
    """Batches of token ids of all lengths, several at once, beside each other; JSON holds every float whole."""
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(draw.randrange(1, 300))] for _ in range(50)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    want = [[e and e.model for e in out.prompt_logprobs or []] for out in library.generate(prompts, params)]
    batches = [prompts[i : i + 7] for i in range(0, 50, 7)]
    with ThreadPoolExecutor(3) as pool:
        bodies = list(pool.map(lambda b: complete(real, prompt=b, echo=True, logprobs=1, max_tokens=0), batches))
    found = [c["logprobs"]["token_logprobs"] for body in bodies for c in body["choices"]]
    assert found == want
    assert [c["index"] for body in bodies for c in body["choices"]] == [i for b in batches for i in range(len(b))]


def test_samples_are_numbered_within_each_prompt(real) -> None:
    body = complete(real, prompt=["a", "b"], n=2, temperature=1, seed=5)
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]


def test_the_default_length_is_16(real) -> None:
    assert complete(real, prompt="a", max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_what_completions_refuse(real) -> None:
    for body, param in (
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt.1"), ({"prompt": [1, "a"]}, None), ({"prompt": [99999]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"prompt": [-1]}, "prompt.0"),
    ):  # fmt: skip
        response = real.post("/v1/completions", json=body)
        assert response.status_code == 400, (body, response.text)
        if param:
            check(response, 400, None, param)


def test_tokenize_and_back(real, tiny_llm: LLM) -> None:
    body = real.post("/tokenize", json={"prompt": "a é"}).json()
    assert body == {"tokens": tiny_llm.encode("a é"), "count": 4, "max_model_len": 1000}
    assert real.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "a é"}
    messages = [{"role": "user", "content": "x"}]
    whole = real.post("/tokenize", json={"messages": messages}).json()["tokens"]
    short = real.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert whole == tiny_llm.encode_chat(messages)
    assert whole[: len(short)] == short
    assert len(short) < len(whole)
    check(real.post("/tokenize", json={}), 400, None, "prompt")
    check(real.post("/detokenize", json={"tokens": [5, 99999]}), 400, None, "tokens.1")
    check(real.post("/tokenize", json={"prompt": "x", "model": "no"}), 404, "model_not_found", "model")


def test_models_health_and_version(real) -> None:
    body = real.get("/v1/models").json()
    assert [m["id"] for m in body["data"]] == ["tiny", "other-name"]
    assert {"id", "object", "created", "owned_by", "max_model_len"} <= set(body["data"][0])
    assert real.get("/v1/models/tiny").json() == body["data"][0]
    assert real.get("/health").status_code == real.get("/ready").status_code == 200
    assert "version" in real.get("/version").json()


METRICS = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "state_slot_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "state_snapshots",
    "prompt_tokens_total",
    "generation_tokens_total",
    "reasoning_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "request_prompt_tokens_sum",
    "request_generation_tokens_sum",
    "iteration_tokens_total_count",
]


@pytest.mark.parametrize("prefix", ["alloy", "vllm"])
def test_metrics_have_the_names_of_dashboards(say, prefix: str) -> None:
    with say("ab", metrics_prefix=prefix) as site, site.client() as client:
        for _ in range(3):
            complete(client, prompt="hello")
        text = client.get("/metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    names = {name.partition("{")[0] for name in values}
    assert {f"{prefix}:{name}" for name in METRICS} <= names
    assert all('model_name="tiny"' in name for name in values)
    assert values[f'{prefix}:request_success_total{{finished_reason="stop",model_name="tiny"}}'] == 3
    assert values[f'{prefix}:generation_tokens_total{{model_name="tiny"}}'] == 6
    assert values[f'{prefix}:request_generation_tokens_sum{{model_name="tiny"}}'] == 6
    assert values[f'{prefix}:time_to_first_token_seconds_count{{model_name="tiny"}}'] == 3
    assert values[f'{prefix}:inter_token_latency_seconds_count{{model_name="tiny"}}'] == 3


def test_metrics_ask_for_a_key_when_told_to(tiny_llm: LLM) -> None:
    with serving(tiny_llm, tiny_llm.engine(), keys=("k",), metrics_auth=True) as site, site.client() as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"authorization": "Bearer k"}).status_code == 200


def test_cross_origin_requests_only_where_allowed(say) -> None:
    ask_first = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with say("x", cors=["https://a.example"]) as site, site.client() as client:
        assert (
            client.options("/v1/completions", headers=ask_first).headers["access-control-allow-origin"]
            == "https://a.example"
        )
        # a page can read why it was refused
        refused = client.post("/v1/completions", content=b"{", headers={"origin": "https://a.example"})
        assert refused.status_code == 415
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
    with say("x") as site, site.client() as client:
        response = client.get("/health", headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers


def test_the_access_log_has_no_prompt(say, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="alloy"), say("ab") as site, site.client() as client:
        complete(client, prompt="my secret", user="nobody")
    assert any("POST /v1/completions 200" in r.getMessage() for r in caplog.records)
    assert "secret" not in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="alloy"), say("ab", log_prompts=True) as site, site.client() as client:
        complete(client, prompt="my secret")
    assert "secret" in caplog.text
