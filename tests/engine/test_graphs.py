"""Captured steps give the tokens of single calls; on a CPU the same bookkeeping runs with calls in place of replays."""

import math
from functools import partial

import pytest
import torch

from alloy.engine.core import LLM
from alloy.engine.pool import plan_pool
from alloy.engine.request import Output, SamplingParams
from alloy.errors import RequestError, ResourceError
from alloy.models.base import CausalLM
from alloy.models.graphs import DecodeGraphs, buckets_for, obstacle
from alloy.models.mamba import Mamba
from alloy.models.paged import StaticView
from tests.engine.conftest import build
from tests.engine.test_llm import GREEDY, TIE, prompts, same_until_tie
from tests.models import zoo

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Calls(DecodeGraphs):
    """Steps that are computed when they are asked for."""

    def _capture(self) -> None:
        for size in self.buckets:
            run = partial(self._run, StaticView(self.pool, self._slots[:size]))
            self._replays[size] = torch.inference_mode()(run)


def with_calls(model: CausalLM, slots: int = 4, blocks: int = 16, **options) -> LLM:
    llm = LLM(model, max_seqs=slots, **options)
    llm.graphs = Calls(model, model.new_paged_cache(slots, blocks, llm.max_model_len))
    return llm


def tokens(outs: list[Output]) -> list[list[int]]:
    return [c.token_ids for o in outs for c in o.completions]


def assert_idle(llm: LLM) -> None:
    assert llm.graphs is not None
    pool = llm.graphs.pool
    held = llm.engine().gauges()
    assert held.blocks_free + held.blocks_cached == pool.blocks
    assert held.slots_free + held.slots_cached == pool.slots
    llm.engine().forget()
    assert (pool.slots_free, pool.blocks_free) == (pool.slots, pool.blocks)
    assert pool.mtp is None or pool.mtp.blocks_free == pool.blocks
    assert not pool.lengths[-1]


@pytest.mark.parametrize("speculate", [0, 2])
def test_answers_are_those_of_dense_caches(model: CausalLM, speculate: int, reference) -> None:
    """11 ragged prompts, 4 at a time, some in chunks of 7: greedy equals whole passes, draws equal those without graphs."""
    speculate = speculate if model.has_mtp else 0
    llm = with_calls(model, max_step_tokens=7, speculate=speculate)
    asked = prompts(11)
    for prompt, out in zip(asked, llm.generate(asked, GREEDY), strict=True):
        want, gaps = reference(model, prompt, 13)
        assert same_until_tie(out.completions[0].token_ids, want, gaps)
    assert_idle(llm)
    drawn = SamplingParams(n=2, seed=11, max_tokens=9, temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    plain = LLM(model, max_seqs=4, speculate=0).generate(asked[:5], [drawn, GREEDY, drawn, drawn, GREEDY])
    assert tokens(llm.generate(asked[:5], [drawn, GREEDY, drawn, drawn, GREEDY])) == tokens(plain)
    assert_idle(llm)
    if not speculate:
        assert sum(llm.graphs.replays.values()) > 20


def test_what_ends_early_gives_everything_back() -> None:
    """A stream that is closed, a cache that is too small, logits that are not finite."""
    model = build("mtp")
    llm = with_calls(model, blocks=8)
    stream = llm.generate(prompts(6), GREEDY, stream=True)
    for _ in range(5):
        next(stream)
    second = llm.generate(prompts(2), GREEDY)
    stream.close()
    assert tokens(second) == tokens(llm.generate(prompts(2), GREEDY))
    assert_idle(llm)
    assert len(llm.generate([[5] * 130] * 4, GREEDY)) == 4
    assert_idle(llm)
    broken = build("hybrid")
    with torch.no_grad():
        broken.head.weight[17] = math.inf
    llm = with_calls(broken)
    out = llm.generate([[3, 4]] * 3, GREEDY)[2].completions[0]
    assert (out.finish_reason, out.token_ids) == ("error", [])
    assert_idle(llm)


def test_a_batch_that_stays_needs_no_uploads() -> None:
    """Tokens and slots are written when rows change, not in every step."""
    llm = with_calls(build("hybrid"))
    filled = []
    graphs = llm.graphs
    assert graphs is not None
    step = graphs.step
    graphs.step = lambda rows, given=None: filled.append(given is not None) or step(rows, given)
    llm.generate(prompts(3), GREEDY)
    assert filled == [True] + [False] * 12
    assert graphs.replays == {1: 0, 2: 0, 4: 13}


def test_weights_that_change_reach_the_graphs() -> None:
    """In place: what is derived from them keeps its memory. Elsewhere: the graphs are given up."""
    model = build("hybrid")
    llm = with_calls(model)
    llm.generate(prompts(2), GREEDY)
    mixers = [m for m in model.modules() if isinstance(m, Mamba)]
    held = [m.held_rates() for m in mixers]
    with torch.no_grad():
        for m in mixers:
            m.A_log.add_(0.5)
    graphs = llm.graphs
    assert graphs is not None
    assert graphs.refresh()
    for m, rates in zip(mixers, held, strict=True):
        torch.testing.assert_close(rates, -m.A_log.exp(), atol=0, rtol=1e-6)
        assert m.held_rates() is rates
    with torch.no_grad():
        weights = {name: t * 1.5 for name, t in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    got = tokens(llm.generate(prompts(3), GREEDY))
    assert llm.graphs is None
    assert got == tokens(LLM(model, graphs=False).generate(prompts(3), GREEDY))


def test_samples_that_do_not_fit_take_turns() -> None:
    """A prompt fits the cache, its copies for further samples do not: the same answers, one after another."""
    model, params = build("hybrid"), SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=2)
    llm = with_calls(model, blocks=3)
    assert tokens(llm.generate([5] * 70, params)) == tokens(LLM(model).generate([5] * 70, params))
    assert_idle(llm)


def test_buckets_and_obstacles() -> None:
    """Buckets hold all slots; on a CPU nothing is captured."""
    assert buckets_for(1) == (1,)
    assert buckets_for(16) == (1, 2, 4, 8, 16)
    assert buckets_for(50) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert buckets_for(700)[-2:] == (512, 700)
    model = build("hybrid")
    assert obstacle(model) == "the model is not on a CUDA device"
    llm = LLM(model, state_dtype="bfloat16")
    llm.generate([1, 2], GREEDY)
    assert llm.graphs is None
    with pytest.raises(
        RequestError, match='"float16-sr" works in captured steps alone: the model is not on a CUDA device'
    ):
        LLM(model, state_dtype="float16-sr")
    with pytest.raises(RequestError, match='state_dtype = "int8"'):
        LLM(model, state_dtype="int8")
    with pytest.raises(RequestError, match="max_step_tokens = 0 must be at least 1"):
        LLM(model, max_step_tokens=0)
    with pytest.raises(RequestError, match='speculate = some must be "auto" or a number'):
        LLM(model, speculate="some")  # pyright: ignore[reportArgumentType]  what a user may write


def captured(model: CausalLM) -> CausalLM:
    """The model on the device, or skip where one of its kernels is missing."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model.to("cuda")
    if (why := obstacle(model)) is not None:
        pytest.skip(why)
    return model


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_graphs_equal_single_calls_and_the_cpu(name: str) -> None:
    """fp32, every kind: ragged prompts, three rows in a bucket of four, blocks and slots of nobody poisoned."""
    model, on_cpu = captured(zoo.build(name)), zoo.build(name)
    asked = [[t % model.config.vocab for t in prompt] for prompt in prompts(7)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    eager = LLM(model, max_seqs=3, speculate=0, graphs=False, max_step_tokens=11).generate(asked, params)
    llm = LLM(model, max_seqs=3, speculate=0, max_step_tokens=11, prefix_cache=False)
    llm.generate(asked[:1], params)
    assert llm.graphs is not None
    pool = llm.graphs.pool
    for arena in pool.arenas:
        arena.fill_(math.nan)
    pool.states.ssm.fill_(math.nan)
    pool.states.conv.fill_(math.nan)
    graphs = llm.generate(asked, params)
    assert_idle(llm)
    for prompt, a, b in zip(asked, tokens(eager), tokens(graphs), strict=True):
        with torch.no_grad():
            logits = on_cpu(torch.tensor([prompt + b])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        gaps, want = (best[:, 0] - best[:, 1]).tolist(), logits.argmax(-1).tolist()
        # kernels sum in another order than the CPU
        clear = [gap if gap > 100 * TIE else 0.0 for gap in gaps]
        assert same_until_tie(b, want, clear)
        assert same_until_tie(a, b, clear)
    # rows of the padding wrote nothing
    for arena in pool.arenas:
        assert arena[:, 0].isnan().all()


@pytest.mark.gpu
@cuda
def test_buckets_agree_and_drafts_mix_with_replays() -> None:
    """The same rows in any bucket; an engine that drafts in some steps."""
    model = captured(build("mtp"))
    asked = prompts(9)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    want = tokens(LLM(model, max_seqs=9, speculate=0).generate(asked, params))
    for options in ({"max_seqs": 2}, {"max_seqs": 5, "speculate": "auto"}, {"max_seqs": 9, "speculate": 3}):
        got = tokens(LLM(model, **{"speculate": 0, **options}).generate(asked, params))
        same = sum(a == b for a, b in zip(got, want, strict=True))
        # two best logits may be as good as equal
        assert same >= 8


@pytest.mark.gpu
@cuda
def test_replays_follow_a_trained_model() -> None:
    """Weights changed in place between two calls, decay rates above all, and weights that were replaced."""
    model = captured(build("hybrid"))
    llm = LLM(model, max_seqs=3, speculate=0)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm.generate(prompts(3), params)
    for assign in (False, True):
        with torch.no_grad():
            weights = {name: t * 1.5 for name, t in model.state_dict().items()}
        model.load_state_dict(weights, assign=assign)
        want = tokens(LLM(model, max_seqs=3, speculate=0, graphs=False).generate(prompts(3), params))
        assert tokens(llm.generate(prompts(3), params)) == want
        assert llm.graphs is not None


@pytest.mark.gpu
@cuda
def test_memory_is_given_before_the_first_step() -> None:
    """After capture, prefill in chunks and decode allocate no more than activations; the pool is bounded by free memory."""
    model = captured(build("hybrid").bfloat16())
    llm = LLM(model, max_seqs=8, max_step_tokens=16)
    llm.generate([[1, 2]], GREEDY)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    llm.generate([[3] * 60] * 8, GREEDY)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**20
    with pytest.raises(ResourceError, match="lower max_model_len or max_seqs"):
        plan_pool(model, 8, 2**40)
