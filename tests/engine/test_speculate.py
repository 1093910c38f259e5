"""MTP drafts: the same tokens as without, rules kept inside accepted runs, honest counts."""

import random
from collections.abc import Callable

import pytest
import torch

from alloy.bench.tiny import teach
from alloy.engine.core import LLM
from alloy.engine.request import Output, SamplingParams
from alloy.engine.speculate import DraftLength, Pairs, merge, stack
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
