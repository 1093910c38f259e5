"""Captured steps with drafts, run call by call on the CPU, and captured on a GPU."""

import random

import pytest
import torch

from alloy import LLM
from alloy.bench.tiny import build, teach
from alloy.engine.request import SamplingParams
from alloy.models.base import CausalLM
from alloy.models.draft_graphs import Buffers, DraftGraphs, may_capture
from tests.engine.test_graphs import captured, cuda, with_calls
from tests.engine.test_llm import TIE, prompts

FAMILIES = ["attention", "hybrid", "moe", "mtp"]
PERIOD = [5, 9, 200, 17, 3, 88, 41]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every step that took the path of the graphs."""
    step, found = DraftGraphs.step, list[int]()

    def count(self: DraftGraphs, rows: list[int], *args):
        found.append(len(rows))
        return step(self, rows, *args)

    monkeypatch.setattr(DraftGraphs, "step", count)
    return found


def subject(family: str, taught: bool) -> tuple[CausalLM, list[list[int]]]:
    """A model, and ragged prompts of what it knows."""
    model = build(family, 3, drafting=True)
    if not taught:
        return model, prompts(11)
    teach(model, PERIOD)
    r = random.Random(1)
    return model, [(PERIOD * 4)[r.randrange(7) :][: r.randint(1, 19)] for _ in range(11)]


def check(model: CausalLM, asked: list[list[int]], got: list[list[int]], reference: CausalLM, tie: float = TIE) -> None:
    """Each answer is greedy, token by token, up to ties."""
    for prompt, answer in zip(asked, got, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        behind = logits.max(-1).values - logits[torch.arange(len(answer)), torch.tensor(answer)]
        assert float(behind.max()) < tie


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_greedy_and_all_memory_comes_back(family: str, taught: bool, steps: list[int]) -> None:
    """Rows that come and go, in buckets with padding; every number of drafts; some kept, some dropped."""
    model, asked = subject(family, taught)
    params = [SamplingParams(temperature=0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(len(asked))]
    for length in (1, 3, 9, "auto"):
        llm = with_calls(model, speculate=length, max_model_len=80)
        outs = llm.generate(asked, params)
        assert [len(o.completions[0].token_ids) for o in outs] == [p.max_tokens for p in params]
        check(model, asked, [o.completions[0].token_ids for o in outs], model)
        assert steps
        steps.clear()
        stats = llm.stats
        if taught:
            assert sum(stats.accepted_at) > 0.5 * sum(stats.drafted_at)
        else:
            assert sum(stats.accepted_at) < 0.5 * sum(stats.drafted_at)
        engine = llm.engine()
        engine.forget()
        assert engine.pool.blocks_free == engine.pool.blocks
        assert engine.pool.slots_free == engine.pool.slots
        assert engine.pool.mtp.blocks_free == engine.pool.blocks


@pytest.mark.parametrize("family", ["hybrid", "mtp"])
def test_other_ways_are_the_same(family: str, steps: list[int]) -> None:
    """Seeded samples, penalties, log probabilities, prefix hits and preemption as without this path."""
    model, asked = subject(family, True)
    params = [
        SamplingParams(temperature=0.8, seed=3, top_p=0.9, max_tokens=60, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop_token_ids=[PERIOD[2]]),
    ]
    chosen = [params[i % 3] for i in range(len(asked))]
    # with so few blocks, sequences are put back
    for slots, blocks in ((11, 40), (4, 5)):
        llm = with_calls(model, slots, blocks, max_model_len=100, speculate=2)
        plain = LLM(model, max_model_len=100, speculate=0)
        for _ in range(2):
            for got, want in zip(llm.generate(asked, chosen), plain.generate(asked, chosen), strict=True):
                assert got.completions[0].token_ids == want.completions[0].token_ids
                for a, b in zip(got.completions[0].logprobs or (), want.completions[0].logprobs or (), strict=True):
                    assert a.model == pytest.approx(b.model, abs=1e-4)
        assert steps
        assert bool(llm.engine().stats.preemptions) == (slots == 4)


def test_prediction_blocks_with_states_are_not_captured() -> None:
    """Their wrong drafts cannot be taken back by counting."""
    assert may_capture(build("mtp").new_paged_cache(2, 4, 64))
    assert not may_capture(build("hybrid").new_paged_cache(2, 4, 64))


@pytest.mark.parametrize("taught", [False, True])
def test_the_end_of_an_answer_captures_nothing_shorter(taught: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts go on beyond max_tokens, and beyond the model's length where the cache has room for them."""
    capture, lengths = DraftGraphs._capture, set[int]()

    def note(self: DraftGraphs, size: int, length: int, buffers: Buffers):
        lengths.add(length)
        return capture(self, size, length, buffers)

    monkeypatch.setattr(DraftGraphs, "_capture", note)
    model, asked = subject("mtp", taught)
    for draft, limit in ((3, 80), (3, 40), (16, 40)):
        llm = with_calls(model, speculate=draft, max_model_len=limit)
        params = [SamplingParams(temperature=0, max_tokens=limit - len(prompt), ignore_eos=True) for prompt in asked]
        outs = llm.generate(asked, params)
        assert [len(o.completions[0].token_ids) for o in outs] == [p.max_tokens for p in params]
        check(model, asked, [o.completions[0].token_ids for o in outs], model)
        # sixteen do not fit behind a sequence that is nearly as long as it may be: there they get fewer
        assert draft == 16 or lengths == {3}
        lengths.clear()


def test_warming_up_is_for_accelerators() -> None:
    """On a CPU it computes nothing."""
    llm = with_calls(build("mtp"), max_model_len=80)
    llm.warm_up()
    assert llm.engine().stats.prompt_tokens == 0


@pytest.mark.gpu
@cuda
def test_warming_up_leaves_nothing() -> None:
    """Steps and drafts are captured, and the cache is empty."""
    llm = LLM(captured(build("mtp")), max_seqs=4, speculate=3, max_model_len=80, max_step_tokens=16)
    llm.warm_up()
    engine = llm.engine()
    assert engine._runner._draft_graphs is not None
    assert engine._runner._draft_graphs._steps
    assert llm.stats.prompt_tokens == 0
    assert engine.pool.blocks_free == engine.pool.blocks
    assert engine.pool.slots_free == engine.pool.slots


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_answers_are_greedy(family: str, taught: bool) -> None:
    """On the device, in fp32."""
    model, asked = subject(family, taught)
    reference = type(model)(model.config)
    reference.load_state_dict(model.state_dict())
    model = captured(model)
    params = [SamplingParams(temperature=0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(len(asked))]
    for length in (1, 3, 9, "auto"):
        llm = LLM(model, max_seqs=4, speculate=length, max_model_len=80)
        got = [o.completions[0].token_ids for o in llm.generate(asked, params)]
        assert llm.engine()._runner._draft_graphs is not None
        assert llm.engine()._runner._draft_graphs._steps
        # kernels sum in another order than the CPU
        check(model, asked, got, reference.eval(), 100 * TIE)
