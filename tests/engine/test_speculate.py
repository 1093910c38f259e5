"""MTP drafts: the same tokens as without, rules kept inside accepted runs, honest counts."""

import random
from collections.abc import Callable

import pytest
import torch

from alloy.bench.tiny import teach
from alloy.engine.core import LLM
from alloy.engine.request import Output, Request, SamplingParams
from alloy.engine.speculate import MOST_PENDING, DraftLength, Pairs, merge, stack
from alloy.errors import RequestError
from alloy.models.base import CausalLM

PERIOD = [7, 91, 33, 200, 91, 12, 64]
TIE = 1e-5


@pytest.fixture(scope="module")
def taught(build_model: Callable[..., CausalLM]) -> CausalLM:
    """A hybrid that learned to repeat a pattern, so that most of its drafts are right."""
    return teach(build_model("mtp", seed=2), PERIOD)


def asked(count: int) -> list[list[int]]:
    """Ragged prompts, half of them cut from the pattern."""
    r = random.Random(9)
    cut = [(PERIOD * 4)[r.randrange(7) :][: r.randint(1, 17)] for _ in range(count)]
    return [p if i % 2 else [r.randrange(256) for _ in p] for i, p in enumerate(cut)]


def tokens(outs: list[Output]) -> list[list[int]]:
    return [c.token_ids for o in outs for c in o.completions]


@pytest.mark.parametrize("length", [1, 2, 5, "auto"])
def test_greedy_answers_are_the_same_with_drafts(
    taught: CausalLM, mtp_model: CausalLM, length: int | str, reference
) -> None:
    """Ragged batches whose rows accept different numbers of drafts; a difference is allowed after a tie, and counted."""
    ties = 0
    for model, many in ((taught, True), (mtp_model, False)):
        params = SamplingParams(temperature=0, max_tokens=31)
        llm = LLM(model, max_seqs=4, max_step_tokens=20, speculate=length)
        drafted = tokens(llm.generate(asked(9), params))
        rate = llm.stats.acceptance_rate
        plain = tokens(LLM(model, max_seqs=4, speculate=0).generate(asked(9), params))
        for prompt, a, b in zip(asked(9), drafted, plain, strict=True):
            if a != b:
                _, gaps = reference(model, prompt, 31)
                first = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                assert min(gaps[: first + 1]) < TIE
                ties += 1
        assert rate is not None
        if many and length == 2:
            assert rate > 0.6
    assert ties <= 1


def test_drafts_are_those_of_a_full_pass(taught: CausalLM) -> None:
    """With one draft a step, the number accepted is what whole passes with `return_mtp` over the final text predict."""
    params = SamplingParams(temperature=0, max_tokens=25)
    outs = LLM(taught, max_seqs=3, max_step_tokens=11, speculate=1).generate(asked(8), params)
    counts = []
    for prompt, out in zip(asked(8), outs, strict=True):
        text, start = prompt + out.completions[0].token_ids, len(prompt)
        accepted, end = 0, start + 1
        while end < len(text):
            with torch.no_grad():
                guess = int(taught(torch.tensor([text[:end]]), return_mtp=1).mtp_logits[0][0, -1].argmax())
            hit = guess == text[end] and end + 1 < len(text)
            accepted += hit
            end += 1 + hit
        counts.append(accepted)
        assert abs(out.completions[0].accepted - accepted) <= 1
    # neither all nor none, or the test would show little
    assert 8 < sum(counts) < 8 * 12


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, seed=5, max_tokens=23, n=2),
        SamplingParams(temperature=1.3, top_k=9, top_p=0.8, min_p=0.01, seed=-1, max_tokens=23),
        SamplingParams(temperature=0, repetition_penalty=1.7, frequency_penalty=0.4, max_tokens=23),
        SamplingParams(temperature=0.7, presence_penalty=1.1, logit_bias={7: 2.5, 91: -100}, seed=8, max_tokens=23),
        SamplingParams(temperature=0, min_tokens=9, stop_token_ids=[33, 12], max_tokens=23),
        SamplingParams(temperature=0, stop_token_ids=[12], max_tokens=23),
    ],
    ids=["sampled", "truncated", "penalties", "bias", "min_tokens", "stop"],
)
def test_every_rule_gives_the_same_answer_with_drafts(taught: CausalLM, params: SamplingParams) -> None:
    """Drafts are checked against the very token that would have been chosen without them."""
    plain = LLM(taught, max_seqs=3, speculate=0).generate(asked(5), params)
    llm = LLM(taught, max_seqs=3, speculate=3)
    drafted = llm.generate(asked(5), params)
    assert tokens(drafted) == tokens(plain)
    assert [c.finish_reason for o in drafted for c in o.completions] == [
        c.finish_reason for o in plain for c in o.completions
    ]
    assert sum(llm.stats.drafted_at) > 0


def test_no_token_beyond_max_tokens_and_counts_add_up(taught: CausalLM) -> None:
    """Runs of accepted drafts end at max_tokens exactly; statistics equal the sum over answers."""
    llm = LLM(taught, speculate=4)
    for limit in (1, 2, 3, 8):
        outs = llm.generate([PERIOD * 2, PERIOD[:3]], SamplingParams(temperature=0, max_tokens=limit))
        assert [len(t) for t in tokens(outs)] == [limit, limit]
    answers = [o.completions[0] for o in outs]
    assert sum(a.accepted for a in answers) == sum(llm.stats.accepted_at)
    assert sum(a.drafted for a in answers) == sum(llm.stats.drafted_at)
    assert llm.stats.steps < 7


def test_pairs_of_uneven_rows_merge_in_order() -> None:
    """What a row saw stays in order and in front, whatever the padding between was."""
    first = Pairs(torch.tensor([[1, 2, 0], [5, 0, 0]]), torch.arange(6.0).view(2, 3, 1), torch.tensor([2, 1]))
    second = Pairs(torch.tensor([[3], [6]]), torch.tensor([[[10.0]], [[11.0]]]))
    merged = merge([first, second])
    assert [row[:n].tolist() for row, n in zip(merged.tokens, (3, 2), strict=True)] == [[1, 2, 3], [5, 6]]
    assert [row[:n, 0].tolist() for row, n in zip(merged.hidden, (3, 2), strict=True)] == [[0, 1, 10], [3, 11]]
    below = stack(merged, second.select(torch.tensor([1])))
    assert below.mask().sum(1).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("rate", "cost", "low", "high"), [(0.95, 0.05, 5, 6), (0.9, 2.0, 0, 0), (0.0, 0.05, 0, 0), (0.6, 0.3, 1, 2)]
)
def test_auto_settles_on_the_length_with_most_tokens_per_second(rate: float, cost: float, low: int, high: int) -> None:
    """Simulated steps of 1 + cost * length seconds, each draft right with the given rate: the best length is computable."""
    r, length = random.Random(1), DraftLength("auto")
    chosen = []
    for _ in range(400):
        n = length.choose(1)
        kept = 0
        while kept < n and r.random() < rate:
            kept += 1
        length.record(1, n, 1 + cost * n, [kept])
        chosen.append(n)
    usual = max(set(chosen[200:]), key=chosen[200:].count)
    assert low <= usual <= high


def greedy(length: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, n=n)


def test_more_samples_than_rows_wait(mtp_model: CausalLM) -> None:
    """Two prompts that end in one round, one of them with three samples: no round has more rows than were asked for."""
    engine = LLM(mtp_model, max_seqs=2, max_model_len=60).engine()
    engine.add(Request(id="a", token_ids=[5, 9, 3], params=greedy(6)))
    engine.add(Request(id="b", token_ids=[7, 8, 4], params=greedy(6, n=3)))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine._live()))
    assert most == 2


def test_prompts_of_one_token_do_not_keep_others_waiting(mtp_model: CausalLM) -> None:
    """One comes every round, with nothing to draft from: what the others' drafts have not seen stays bounded."""
    engine = LLM(mtp_model, max_seqs=3, speculate=2, max_model_len=160).engine()
    engine.add(Request(id="long", token_ids=[5, 9], params=greedy(140)))
    found, widest = list[int](), 0
    for i in range(400):
        if i < 100:
            engine.add(Request(id=f"{i}", token_ids=[i], params=greedy(1)))
        if i == 97:
            late = Request(id="late", token_ids=[7 * j % 250 for j in range(147)], params=greedy(9), priority=-1)
            engine.add(late)
        for news in engine.step():
            if news.id == "long":
                found += news.completions[0].token_ids
        drafter = engine._runner._drafter
        assert drafter is not None
        widest = max(widest, drafter.width)
        if not engine.busy:
            break
    assert len(found) == 140
    with torch.no_grad():
        logits = mtp_model(torch.tensor([[5, 9, *found]])).logits[0, 1:-1]
    behind = logits.max(-1).values - logits[torch.arange(140), torch.tensor(found)]
    assert float(behind.max()) < TIE
    assert widest <= MOST_PENDING + 3


def test_a_cache_as_large_as_one_sequence_is_enough(mtp_model: CausalLM) -> None:
    """Pieces that end anywhere, where keys and the prediction's keys need a block at different times."""
    llm = LLM(mtp_model, max_seqs=1, speculate=2, max_model_len=100, prefix_cache=False, max_step_tokens=1)
    engine = llm.engine()
    engine.add(Request(id="a", token_ids=[7 * j % 250 for j in range(90)], params=greedy(5)))
    for _ in range(120):
        engine.step()
        if not engine.busy:
            break
    assert not engine.busy


def test_too_many_drafts_are_refused(mtp_model: CausalLM) -> None:
    """They would not fit behind the longest answer."""
    with pytest.raises(RequestError, match="speculate = 17 is more than 16 drafts a step; lower it"):
        LLM(mtp_model, speculate=17)
