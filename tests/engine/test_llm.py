"""Batched generation: the same tokens however a request is computed, and every rule that ends an answer."""

import random
from dataclasses import replace

import pytest
import torch

from alloy import errors
from alloy.engine.core import LLM
from alloy.engine.pool import plan_pool
from alloy.engine.request import SamplingParams
from alloy.errors import RequestError
from alloy.models.sizes import kv_bytes
from tests.engine.conftest import build

GREEDY = SamplingParams(temperature=0, max_tokens=13)
TIE = 1e-5


def prompts(count: int, seed: int = 3, longest: int = 19) -> list[list[int]]:
    """Ragged random prompts."""
    r = random.Random(seed)
    return [[r.randrange(256) for _ in range(r.randint(1, longest))] for _ in range(count)]


def same_until_tie(got: list[int], want: list[int], gaps: list[float]) -> bool:
    """Whether two greedy answers agree up to a position where the two best logits are as good as equal."""
    for a, b, gap in zip(got, want, gaps, strict=True):
        if gap < TIE:
            return True
        if a != b:
            return False
    return True


def test_batched_answers_are_those_of_single_passes(model, reference) -> None:
    """11 ragged prompts, 4 at a time, prompts in chunks of 7: the tokens of cacheless greedy decoding."""
    asked = prompts(11)
    outs = LLM(model, max_seqs=4, max_step_tokens=7, speculate=0).generate(asked, GREEDY)
    wide = LLM(model, max_seqs=32, speculate=0).generate(asked, GREEDY)
    for prompt, a, b in zip(asked, outs, wide, strict=True):
        want, gaps = reference(model, prompt, 13)
        assert same_until_tie(a.completions[0].token_ids, want, gaps)
        assert same_until_tie(b.completions[0].token_ids, want, gaps)
        assert a.completions[0].finish_reason == "length"
        assert a.finished


def test_samples_of_one_prompt_are_those_of_its_own_requests(model) -> None:
    """n = 3 computes the prompt once; each seeded sample differs from the others and is reproducible with fewer rows."""
    params = SamplingParams(n=3, seed=11, max_tokens=9)
    llm = LLM(model)
    one = llm.generate([5, 6, 7], params)[0]
    assert llm.stats.prompt_tokens == 3
    narrow = LLM(model, max_seqs=2).generate([5, 6, 7], params)[0]
    texts = [c.token_ids for c in one.completions]
    assert texts == [c.token_ids for c in narrow.completions]
    assert len({tuple(t) for t in texts}) == 3
    assert [c.index for c in one.completions] == [0, 1, 2]


def test_a_seeded_answer_does_not_depend_on_batch_mates(model) -> None:
    """Alone, beside greedy and beside unseeded requests; an unseeded one differs from call to call."""
    seeded = SamplingParams(seed=4, temperature=1.1, top_p=0.9, max_tokens=11)
    loose = SamplingParams(max_tokens=17)
    llm = LLM(model)
    alone = llm.generate([9, 8], seeded)[0].completions[0].token_ids
    mixed = llm.generate([[1, 2, 3], [9, 8], [4], [9, 8]], [GREEDY, seeded, loose, loose])
    assert mixed[1].completions[0].token_ids == alone
    assert mixed[3].completions[0].token_ids != mixed[2].completions[0].token_ids
    again = llm.generate([9, 8], loose)[0].completions[0].token_ids
    assert again != mixed[3].completions[0].token_ids


def test_draws_follow_the_models_distribution(model) -> None:
    """First tokens of 3,000 samples at temperature 0.7, top_k 4: frequencies against the softmax of a full pass."""
    prompt = [17, 4, 99]
    out = LLM(model, max_seqs=1000).generate(
        prompt, [SamplingParams(n=1000, seed=s, max_tokens=1, temperature=0.7, top_k=4) for s in [1]]
    )
    more = LLM(model, max_seqs=1000).generate(
        [prompt] * 2, [SamplingParams(n=1000, seed=s, max_tokens=1, temperature=0.7, top_k=4) for s in (2, 3)]
    )
    drawn = [c.token_ids[0] for o in out + more for c in o.completions]
    logits = model(torch.tensor([prompt]), logits="last").logits[0, -1]
    best = logits.topk(4)
    probs = (best.values / 0.7).softmax(-1)
    assert set(drawn) <= set(best.indices.tolist())
    for token, p in zip(best.indices.tolist(), probs.tolist(), strict=True):
        assert abs(drawn.count(token) / 3000 - p) < 4 * (p * (1 - p) / 3000) ** 0.5 + 1e-3


def test_logprobs_are_those_of_a_full_pass(model) -> None:
    """Model's logprobs before penalties and temperature, the sampled ones after; prompt logprobs in chunks of 4."""
    prompt = [3, 250, 17, 90, 90, 1, 33]
    params = SamplingParams(
        temperature=0.6,
        top_k=5,
        repetition_penalty=1.3,
        seed=1,
        max_tokens=6,
        logprobs=3,
        logprobs_of=["model", "sampled"],
        prompt_logprobs=2,
    )
    out = LLM(model, max_step_tokens=4).generate([[1], prompt], [GREEDY, params])[1]
    answer = out.completions[0]
    logits = model(torch.tensor([prompt + answer.token_ids])).logits[0].detach()
    table = logits.log_softmax(-1)
    assert answer.logprobs is not None
    assert out.prompt_logprobs is not None
    assert len(answer.logprobs) == 6
    for j, entry in enumerate(answer.logprobs):
        at = len(prompt) - 1 + j
        assert entry.token == answer.token_ids[j]
        assert entry.model == pytest.approx(float(table[at, entry.token]), abs=2e-5)
        assert [i for i, _ in entry.top] == table[at].topk(3).indices.tolist()
        # by hand: penalise what was seen, divide by the temperature, keep five
        seen = torch.tensor(sorted(set(prompt + answer.token_ids[:j])))
        changed = logits[at].clone()
        changed[seen] = torch.where(changed[seen] > 0, changed[seen] / 1.3, changed[seen] * 1.3)
        kept = (changed / 0.6).topk(5)
        want = dict(zip(kept.indices.tolist(), kept.values.log_softmax(-1).tolist(), strict=True))
        assert entry.sampled == pytest.approx(want[entry.token], abs=1e-4)
    assert out.prompt_logprobs[0] is None
    assert [e.token for e in out.prompt_logprobs[1:]] == prompt[1:]
    for at, entry in enumerate(out.prompt_logprobs[1:]):
        assert entry.model == pytest.approx(float(table[at, entry.token]), abs=2e-5)
        assert entry.top[0][0] == int(table[at].argmax())


def test_penalties_and_bias_change_the_greedy_choice_as_computed_by_hand(model) -> None:
    """Greedy with all three penalties and a bias, against a loop over full passes."""
    prompt = [5, 9, 5]
    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        presence_penalty=0.7,
        frequency_penalty=0.5,
        repetition_penalty=1.4,
        logit_bias={9: 3.0, 40: 2},
    )
    got = LLM(model, speculate=0).generate(prompt, params)[0].completions[0].token_ids
    tokens: list[int] = []
    for _ in range(12):
        logits = model(torch.tensor([prompt + tokens]), logits="last").logits[0, -1].detach().clone()
        logits[9] += 3
        logits[40] += 2
        for t in set(prompt + tokens):
            logits[t] = logits[t] / 1.4 if logits[t] > 0 else logits[t] * 1.4
        for t in set(tokens):
            logits[t] -= 0.7 + 0.5 * tokens.count(t)
        tokens.append(int(logits.argmax()))
    assert got == tokens


@pytest.mark.parametrize("tiny", [1e-12, 1e-40, 1e-300])
def test_divisors_near_zero_leave_the_largest_logit(model, tiny: float) -> None:
    """What fp32 cannot hold does no harm: a temperature is greedy then, a penalty lets a token win that was seen."""
    llm, prompt = LLM(model), prompts(1)[0]
    params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=tiny, seed=1)
    cold, greedy = llm.generate([prompt, prompt], [params, replace(params, temperature=0)])
    assert cold.completions[0].token_ids == greedy.completions[0].token_ids
    out = llm.generate([prompt], replace(params, temperature=1, repetition_penalty=tiny))[0].completions[0]
    assert out.finish_reason == "length"
    assert set(out.token_ids) <= set(prompt)


def test_bans_of_every_token_are_no_way_out_of_the_vocabulary(model) -> None:
    """Drawn as well as greedy: no token may come before min_tokens, and one has to."""
    everything = range(model.config.vocab)
    for temperature in (0, 1):
        params = SamplingParams(max_tokens=5, min_tokens=3, stop_token_ids=everything, temperature=temperature)
        out = LLM(model).generate([[1, 2, 3]], params)[0].completions[0]
        assert len(out.token_ids) == 4
        assert all(token < model.config.vocab for token in out.token_ids)


def test_stop_ids_min_tokens_and_ignore_eos(model, reference) -> None:
    """A stop id ends the answer and is its last token; it is banned before min_tokens; eos can be ignored."""
    prompt = [40, 2, 77]
    plain, _ = reference(model, prompt, 13)
    stop = plain[4]
    llm = LLM(model, speculate=0)
    a = llm.generate(prompt, SamplingParams(temperature=0, stop_token_ids=[stop], max_tokens=13))[0].completions[0]
    assert a.token_ids == plain[: plain.index(stop) + 1]
    assert (a.finish_reason, a.stop_reason) == ("stop", stop)
    b = llm.generate(prompt, SamplingParams(temperature=0, stop_token_ids=[stop], min_tokens=8, max_tokens=13))[
        0
    ].completions[0]
    assert stop not in b.token_ids[:8]
    assert len(b.token_ids) >= 8


def test_text_streams_and_stops(model, tokenizer) -> None:
    """Pieces concatenate to the whole answer; a stop string is nowhere in them; eos ends with no text of its own."""
    llm = LLM(model, tokenizer)
    params = SamplingParams(seed=3, max_tokens=60, n=2)
    whole = llm.generate(["Grüße", "ab"], params)
    pieces: dict[tuple[int, int], str] = {}
    for news in llm.generate(["Grüße", "ab"], params, stream=True):
        for c in news.completions:
            key = (news.index, c.index)
            pieces[key] = pieces.get(key, "") + c.text
    for o in whole:
        for c in o.completions:
            assert pieces[o.index, c.index] == c.text
            shown = [t for t in c.token_ids if t not in (256, 257, 258)]
            assert c.text == tokenizer.decode(shown)
    text = whole[0].completions[0].text
    stop = text[9:11]
    cut = llm.generate("Grüße", SamplingParams(seed=3, max_tokens=60, stop=stop))[0].completions[0]
    assert cut.text == text[: text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate("Grüße", SamplingParams(seed=3, max_tokens=60, stop=[stop], include_stop_str_in_output=True))[0]
    assert kept.text == cut.text + stop
    eos = SamplingParams(temperature=0, logit_bias={256: 100}, max_tokens=5)
    ended = llm.generate("x", eos)[0].completions[0]
    assert (ended.text, ended.token_ids, ended.finish_reason, ended.stop_reason) == ("", [256], "stop", None)
    on = llm.generate("x", SamplingParams(temperature=0, logit_bias={256: 100}, max_tokens=5, ignore_eos=True))[0]
    assert on.completions[0].token_ids == [256] * 5


def test_closing_a_stream_cancels_the_rest(model) -> None:
    """After three increments the caller leaves; the next call starts fresh and the model's mode is what it was."""
    model.train()
    llm = LLM(model)
    stream = llm.generate(prompts(6), SamplingParams(temperature=0, max_tokens=50), stream=True)
    seen = [next(stream) for _ in range(3)]
    assert not any(o.finished for o in seen)
    assert not model.training
    stream.close()
    assert model.training
    assert llm.stats.generated_tokens < 6 * 50
    assert len(llm.generate([1, 2], GREEDY)[0].completions[0].token_ids) == 13


def test_requests_are_read_only_as_room_comes_free(model) -> None:
    """An endless source of requests is fine; priority decides among those waiting."""
    from itertools import count

    from alloy.engine.request import Request

    read: list[int] = []

    def endless():
        for i in count():
            read.append(i)
            yield Request(id=f"r{i}", token_ids=[i % 50 + 1], params=GREEDY, priority=-i if i < 5 else 0)

    stream = LLM(model, max_seqs=2).stream(endless())
    done = []
    for news in stream:
        if news.finished:
            done.append(news.id)
        if len(done) == 4:
            break
    stream.close()
    assert sorted(done) == ["r1", "r2", "r3", "r4"]
    assert len(read) < 100


def test_a_row_whose_logits_are_not_finite_ends_alone(model) -> None:
    """A NaN in one row's embedding: that request ends with an error, its neighbour is untouched."""
    want = LLM(model).generate([1, 2], GREEDY)[0].completions[0].token_ids
    bad = next(t for t in range(255) if t not in (1, 2, *want))
    with torch.no_grad():
        model.embed.weight[bad] = float("nan")
        if model.config.tie_embeddings:
            pytest.skip("a tied head spreads the NaN to every row")
    outs = LLM(model, speculate=0).generate([[1, 2], [bad, 3]], GREEDY)
    assert outs[0].completions[0].token_ids == want
    assert (outs[1].completions[0].finish_reason, outs[1].completions[0].token_ids) == ("error", [])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (
            [1] * 120,
            SamplingParams(max_tokens=50),
            r"prompt has 120 tokens and max_tokens is 50; together they exceed max_model_len = 160",
        ),
        (
            [1] * 160,
            SamplingParams(),
            r"prompt has 160 tokens, which leaves no room for an answer within max_model_len = 160",
        ),
        ([], SamplingParams(), r"is empty"),
        ([4, 261], SamplingParams(), r"prompt has the token id 261, outside the vocabulary of 261"),
        ([-1], SamplingParams(), r"token id -1"),
        ([1], SamplingParams(logit_bias={400: 1}), r"logit_bias names token 400"),
        ([1], SamplingParams(stop_token_ids=[400]), r"stop_token_ids names token 400"),
        ([1], SamplingParams(stop="x"), r"stop strings need a tokenizer"),
        ([1], SamplingParams(thinking_budget=3), r"thinking_budget = 3, but the tokenizer has no single tokens"),
        ("text", SamplingParams(), r"a text prompt needs a tokenizer"),
    ],
)
def test_impossible_requests_are_refused_before_work(mtp_model, prompt, params, message: str) -> None:
    """The message names the numbers."""
    with pytest.raises(RequestError, match=message):
        LLM(mtp_model).generate(prompt if isinstance(prompt, str) else [prompt], params)


def test_impossible_engines_are_refused(mtp_model, model, tokenizer) -> None:
    """Settings that cannot be met."""
    with pytest.raises(RequestError, match='weights = "int8"'):
        LLM(mtp_model, weights="int8")
    with pytest.raises(RequestError, match="max_seqs = 0"):
        LLM(mtp_model, max_seqs=0)
    with pytest.raises(RequestError, match="speculate = -1"):
        LLM(mtp_model, speculate=-1)
    if not model.has_mtp:
        with pytest.raises(RequestError, match="speculate = 2, but the model has no MTP"):
            LLM(model, speculate=2)
    with pytest.raises(RequestError, match="lone surrogate U\\+D800 at character 1"):
        LLM(mtp_model, tokenizer).generate("a\ud800")
    with pytest.raises(RequestError, match="params has 2 entries for 1 prompts"):
        LLM(mtp_model, tokenizer).generate("a", [GREEDY, GREEDY])
    assert issubclass(RequestError, errors.AlloyError)


def test_chat_uses_the_template(mtp_model, tokenizer) -> None:
    """The template's text is the prompt; several conversations are answered together; no template: refused."""
    llm = LLM(mtp_model, tokenizer)
    talk = [{"role": "user", "content": "hi"}]
    out = llm.chat(talk, GREEDY)[0]
    assert tokenizer.decode(out.prompt_token_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    off, again = llm.chat([talk, talk], GREEDY, template={"enable_thinking": False})
    assert tokenizer.decode(off.prompt_token_ids).endswith("assistant\n")
    assert off.text == again.text
    with pytest.raises(RequestError, match="needs a tokenizer"):
        LLM(mtp_model).chat(talk)


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize(("budget", "grace"), [(0, 0), (1, 0), (2, 0), (9, 0), (9, 6)])
def test_a_thinking_budget_is_exact(mtp_model, tokenizer, speculate: int, budget: int, grace: int) -> None:
    """Never a thought token more than the budget, the newline of the prompt counted; the end marker follows at once."""
    think, end = 259, 260
    newline = tokenizer.encode("\n")[0]
    llm = LLM(mtp_model, tokenizer, speculate=speculate)
    for seed in range(6):
        params = SamplingParams(
            seed=seed,
            max_tokens=30,
            thinking_budget=budget,
            thinking_grace=grace,
            thinking_close_text="ok.",
            logit_bias={end: -100, think: -100, 256: -100, 258: -100, newline: 3.0},
        )
        answer = llm.chat([{"role": "user", "content": "hi"}], params)[0].completions[0]
        closing = tokenizer.encode("ok.")
        at = answer.token_ids.index(end)
        thought = answer.token_ids[: at - 3]
        assert answer.token_ids[at - 3 : at] == closing
        # the prompt's own newline is the first thought token
        used = max(1, len(thought) + 1)
        assert answer.reasoning_tokens == used
        if newline in thought[max(0, budget - grace - 1) :]:
            assert thought[-1] == newline
            assert used <= budget
        else:
            assert used == max(1, budget)
        assert answer.token_ids.count(end) == 1


def test_a_thought_that_ends_by_itself_is_left_alone(mtp_model, tokenizer) -> None:
    """An unused budget changes nothing."""
    llm = LLM(mtp_model, tokenizer)
    talk = [{"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    free = llm.chat(talk, params)[0].completions[0]
    budgeted = llm.chat(talk, params, thinking_budget=500)[0].completions[0]
    assert budgeted.token_ids == free.token_ids


def test_training_goes_on_after_generation(model) -> None:
    """What generation leaves behind does not get in the way of gradients."""
    LLM(model).generate([[5, 6], [7]], GREEDY)
    model.train()
    logits = model(torch.tensor([[5, 6, 7]])).logits
    logits.logsumexp(-1).sum().backward()
    assert model.embed.weight.grad is not None


def test_longer_than_the_rotary_embedding_is_refused() -> None:
    """When the engine is made, not in the middle of an answer."""
    with pytest.raises(RequestError, match="max_model_len = 161 is beyond max_positions = 160"):
        LLM(build("attention"), max_model_len=161)
    assert LLM(build("hybrid"), max_model_len=161).max_model_len == 161


def test_a_cache_leaves_a_fifth_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with little left gets a smaller cache than the machine around it would."""
    monkeypatch.setattr("alloy.engine.pool.memory_bytes", lambda device: 2**40)
    model = build("attention")
    sizes = []
    for free in (2**40, 2**20, 2**19):
        monkeypatch.setattr("alloy.engine.pool.free_memory_bytes", lambda device, free=free: free)
        blocks = plan_pool(model, 4, 160).blocks
        sizes.append(blocks * kv_bytes(model.config, 1, 64, "float32", False))
    assert sizes[0] > 0.8 * 2**20
    assert 0.7 * 2**20 < sizes[1] <= 0.8 * 2**20
    assert 0.7 * 2**19 < sizes[2] <= 0.8 * 2**19
