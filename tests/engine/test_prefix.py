"""Answers with what others left in the cache are those without; nothing that is held is lost."""

import random

import pytest
import torch

from alloy.engine.core import LLM
from alloy.engine.engine import LEAST_BRANCH, Engine
from alloy.engine.prefix import PrefixCache, Snapshot
from alloy.engine.request import Output, Request, SamplingParams
from alloy.engine.speculate import DraftLength
from alloy.models.base import CausalLM
from alloy.models.paged import PagedCache, blocks_of
from tests.engine.conftest import build
from tests.engine.test_llm import same_until_tie

WORDS = [random.Random(i).choices(range(256), k=23) for i in range(4)]


def greedy(count: int) -> SamplingParams:
    """Greedy parameters for `count` tokens."""
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def small(model: CausalLM, slots: int, blocks: int, **options) -> LLM:
    """An engine whose cache has just these slots and blocks."""
    llm = LLM(model, graphs=False, **options)
    llm._new_pool = lambda: model.new_paged_cache(slots, blocks, llm.max_model_len)
    return llm


def check(engine: Engine) -> None:
    """Every block and slot is free, cached or in use, and counted by as many as hold it."""
    pool, cache = engine.pool, engine._cache
    held = engine.gauges()
    live = engine._live()
    nodes = list(cache._used) if cache is not None else []
    snapshots = [n.snapshot.slot for n in nodes if n.snapshot is not None and n.snapshot.slot >= 0]
    slots = [s.slot for s in live] + snapshots + pool._free_slots
    assert sorted(slots) == list(range(pool.slots))
    assert held.slots_cached == len(snapshots)
    for part, blocks in ((pool, "blocks"), (pool.mtp, "mtp_blocks")):
        if part is None or not part.kv:
            continue
        holders = [0] * (part.blocks + 1)
        for owned in [part._owned[s] for s in range(part.slots)] + [getattr(n, blocks) for n in nodes]:
            assert len(set(owned)) == len(owned)
            for block in owned:
                holders[block] += 1
        assert holders == part._holders
        assert sorted(part._free_blocks) == [b for b in range(1, part.blocks + 1) if not holders[b]]
    used = {b for s in live for b in pool._owned[s.slot]}
    kept = {b for n in nodes for b in n.blocks}
    assert held.blocks_cached == len(kept - used)
    assert held.blocks_free + held.blocks_cached + len(used) == pool.blocks or not pool.kv


def run(llm: LLM, requests: list[Request]) -> dict[str, list[int]]:
    """Tokens of each request, with every round checked."""
    engine, found = llm.engine(), dict[str, list[int]]()
    for request in requests:
        engine.add(request)
    while engine.busy:
        for news in engine.step():
            found.setdefault(news.id, []).extend(news.completions[0].token_ids)
        check(engine)
    return found


@pytest.mark.parametrize("length", [2, 3, 40, 63, 64, 65, 66, 128, 129])
def test_a_prompt_sent_again_computes_one_token(model: CausalLM, length: int, reference) -> None:
    """At any length from 2: all but the last token are found, and the answer is the same."""
    llm = LLM(model, max_step_tokens=48, speculate="auto" if model.has_mtp else 0)
    prompt = (WORDS[0] * 9)[:length]
    want, gaps = reference(model, prompt, 9)
    for time in range(3):
        out = llm.generate([prompt], greedy(9))[0]
        assert same_until_tie(out.completions[0].token_ids, want, gaps)
        assert out.cached_tokens == (length - 1 if time else 0)
    check(llm.engine())


def test_a_shared_beginning_is_found_by_the_third(model: CausalLM, reference) -> None:
    """The second that shares a prefix leaves a state where it parts; the next one begins there, whatever its length."""
    llm = LLM(model, speculate=0)
    system = WORDS[1] + WORDS[2][:7]
    found = []
    for tail in (WORDS[0], WORDS[2], WORDS[3][:5], [7]):
        out = llm.generate([system + tail], greedy(6))[0]
        want, gaps = reference(model, system + tail, 6)
        assert same_until_tie(out.completions[0].token_ids, want, gaps)
        found.append(out.cached_tokens)
    # without recurrent layers keys alone suffice
    second = len(system) if not llm.engine()._recurrent else 0
    assert found == [0, second, len(system), len(system)]


def test_the_next_turn_begins_where_the_answer_ended(model: CausalLM, reference) -> None:
    """A conversation whose template keeps what was said computes only what is new."""
    llm = LLM(model, speculate=0)
    talk = list(WORDS[0])
    for turn in range(4):
        out = llm.generate([talk], greedy(7))[0]
        want, gaps = reference(model, talk, 7)
        answer = out.completions[0].token_ids
        assert same_until_tie(answer, want, gaps)
        # the answer's last token was never computed
        assert out.cached_tokens == (len(talk) - len(WORDS[1]) - 1 if turn else 0)
        talk += answer + WORDS[1]


def test_positions_that_are_asked_for_are_kept() -> None:
    """A template that drops thoughts parts right after the last user turn: the state there serves the next turn."""
    llm = LLM(build("hybrid"), speculate=0)
    system, thought, question = WORDS[0], WORDS[1], WORDS[2]
    run(llm, [Request(id="1", token_ids=[*system, 300 % 256, *thought], params=greedy(4), keep_at=[len(system)])])
    engine = llm.engine()
    engine.add(Request(id="2", token_ids=[*system, *question], params=greedy(4)))
    assert engine.step()[0].cached_tokens == len(system)


def test_salts_part_tenants() -> None:
    """One tenant cannot find out what another asked."""
    llm = LLM(build("hybrid"))
    engine = llm.engine()
    for salt, want in (("a", 0), ("a", 22), ("b", 0), ("", 0), ("b", 22)):
        engine.add(Request(id="1", token_ids=WORDS[0], params=greedy(1), salt=salt))
        assert engine.step()[0].cached_tokens == want


def test_other_weights_forget() -> None:
    """What was computed with other weights is not used again."""
    model = build("hybrid")
    llm = LLM(model)
    llm.generate([WORDS[0]], greedy(5))
    with torch.no_grad():
        model.layers[0].mixer.in_proj.weight.mul_(1.5)
    out = llm.generate([WORDS[0]], greedy(5))[0]
    assert out.cached_tokens == 0
    assert out.completions[0].token_ids == LLM(model).generate([WORDS[0]], greedy(5))[0].completions[0].token_ids


def test_switched_off_nothing_is_kept(model: CausalLM) -> None:
    """prefix_cache=False: every request computes its prompt, and the cache is empty after it; samples still share."""
    llm = LLM(model, prefix_cache=False)
    for _ in range(2):
        outs = llm.generate([WORDS[0]], SamplingParams(n=3, seed=1, max_tokens=4))
        assert outs[0].cached_tokens == 0
    held = llm.engine().gauges()
    assert (held.blocks_free, held.slots_free) == (held.blocks, held.slots)
    check(llm.engine())


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_any_mix_gives_the_answers_of_each_alone(model: CausalLM, speculate: int, seed: int, reference) -> None:
    """Shared beginnings, a cache that is too small for all, chunks, drafts, pauses, cancellation: greedy answers until a
    tie, every block and slot accounted for in every round."""
    draw = random.Random(seed)
    llm = small(
        model,
        slots=draw.randrange(4, 9),
        blocks=draw.randrange(6, 12),
        max_seqs=draw.randrange(2, 5),
        max_step_tokens=draw.choice([7, 50, 200]),
        speculate=speculate if model.has_mtp else 0,
        checkpoint_every=draw.choice([20, 1024]),
    )
    requests = []
    for i in range(24):
        words = [draw.choice(WORDS) for _ in range(draw.randrange(1, 5))]
        prompt = [token for word in words for token in word][: draw.randrange(1, 100)]
        keep = sorted({draw.randrange(1, 30) for _ in range(draw.randrange(2))})
        requests.append(
            Request(id=str(i), token_ids=prompt, params=greedy(draw.randrange(1, 30)), keep_at=keep)
        )  # fmt: skip
    engine, found, cancelled = llm.engine(), dict[str, list[int]](), set[str]()
    todo, paused = list(requests), set[str]()
    while todo or engine.busy or paused:
        while todo and draw.random() < 0.6:
            engine.add(todo.pop(0))
        if draw.random() < 0.06:
            name = str(draw.randrange(24))
            engine.cancel(name)
            cancelled.add(name)
        name = str(draw.randrange(24))
        if draw.random() < 0.1:
            engine.pause(name)
            paused.add(name)
        for name in [p for p in paused if draw.random() < 0.2]:
            engine.resume(name)
            paused.remove(name)
        for news in engine.step():
            found.setdefault(news.id, []).extend(news.completions[0].token_ids)
        check(engine)
    assert len(found.keys() | cancelled) == 24
    for request in requests:
        got = found.get(request.id, [])
        if request.id in cancelled:
            continue
        count = request.params.max_tokens or 0
        want, gaps = reference(model, list(request.token_ids), count)
        assert len(got) == count
        assert same_until_tie(got, want, gaps)
    engine.forget()
    check(engine)
    held = engine.gauges()
    assert (held.blocks_free, held.slots_free) == (held.blocks, held.slots)


def test_preemption_happens_and_changes_nothing(model: CausalLM, reference) -> None:
    """Three long answers in a cache for one and a half: the youngest wait, and all are as alone."""
    llm = small(model, slots=4, blocks=4, max_seqs=3, speculate=0)
    prompts = [word[: 10 + i] for i, word in enumerate(WORDS[:3])]
    outs = llm.generate(prompts, greedy(100))
    assert llm.stats.preemptions > 0
    for prompt, out in zip(prompts, outs, strict=True):
        want, gaps = reference(model, prompt, 100)
        assert same_until_tie(out.completions[0].token_ids, want, gaps)


def test_a_paused_request_holds_nothing_until_it_goes_on(model: CausalLM) -> None:
    """Two samples, one paused in the middle; another request has the only place meanwhile."""
    llm = LLM(model, max_seqs=2)
    engine = llm.engine()
    params = SamplingParams(max_tokens=30, n=2, seed=5, ignore_eos=True)
    want = [c.token_ids for c in LLM(model).generate([WORDS[0]], params)[0].completions]
    got: list[list[int]] = [[], []]

    def step(*names: str) -> None:
        for news in engine.step():
            assert news.id in names
            for made in news.completions if news.id == "slow" else []:
                got[made.index] += made.token_ids

    engine.add(Request(id="slow", token_ids=WORDS[0], params=params))
    while len(got[1]) < 7:
        step("slow")
    engine.pause("slow")
    check(engine)
    assert not engine.busy
    assert engine.gauges().running == engine.gauges().waiting == 0
    engine.add(Request(id="quick", token_ids=WORDS[1], params=greedy(9)))
    while engine.busy:
        step("quick")
    engine.resume("slow")
    while engine.busy:
        step("slow")
    assert got == want
    engine.pause("slow")
    engine.resume("nobody")
    assert not engine._paused


def test_a_short_piece_beside_a_long_one_keeps_within_the_longest_sequence(model: CausalLM) -> None:
    """What is known of the first leaves two tokens to compute; as wide as the second it would be too long."""
    llm = LLM(model, max_seqs=4)
    known, new = (WORDS[0] * 6)[:130], (WORDS[1] * 7)[:140]
    alone = [LLM(model).generate([p], greedy(4))[0].completions[0].token_ids for p in ([*known, 5, 6], new)]
    llm.generate([known], greedy(4))
    assert outputs(llm.generate([[*known, 5, 6], new], greedy(4))) == alone


@pytest.mark.parametrize("wanted", [None, 2])
def test_pieces_beside_each_other_take_no_more_blocks_than_there_are(model: CausalLM, wanted: int | None) -> None:
    """Rows that are computed together are as wide as the widest; scores of a prompt come once, however often it is read."""
    draw = random.Random(0)
    prompts = [draw.choices(range(256), k=draw.randrange(20, 60)) for _ in range(12)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=wanted)
    alone = LLM(model, max_seqs=1, prefix_cache=False, speculate=0)
    want = [alone.generate([p], params)[0] for p in prompts]
    llm = small(model, slots=10, blocks=5, max_seqs=8, speculate=0)
    found = llm.generate(prompts, params)
    assert llm.stats.preemptions > 0
    assert outputs(found) == outputs(want)
    for one, other in zip(found, want, strict=True):
        assert (one.prompt_logprobs is None) == (wanted is None)
        for x, y in zip(one.prompt_logprobs or [None], other.prompt_logprobs or [None], strict=True):
            assert (x and x.token) == (y and y.token)
            assert (x and x.model) == pytest.approx(y and y.model, abs=1e-4)


@pytest.mark.parametrize("blocks", [5, 40])
def test_prompts_that_are_computed_together_are_padded_within_the_room(model: CausalLM, blocks: int, reference) -> None:
    """A short rest behind a long hit, and a long prompt: one call would pad the first beyond the longest sequence, and
    short prompts beside a long one into blocks that are not there."""
    llm = small(model, slots=4, blocks=blocks, max_seqs=4, max_step_tokens=512, speculate=0)
    long = [token for word in (*WORDS, WORDS[0]) for token in word][:110]
    llm.generate([long], greedy(1))
    for prompts in ([[*long, 5, 7], [*WORDS[2], *long[:87]]], [WORDS[1], WORDS[2], [*WORDS[3], *long[:60]], WORDS[0]]):
        for prompt, out in zip(prompts, llm.generate(prompts, greedy(9)), strict=True):
            want, gaps = reference(model, prompt, 9)
            assert same_until_tie(out.completions[0].token_ids, want, gaps)
    check(llm.engine())


def test_without_drafts_none_of_their_blocks_are_needed() -> None:
    """Two answers for which there is just room: a model that could draft, and does not, puts neither back."""
    llm = small(build("mtp"), slots=2, blocks=4, max_seqs=2, speculate=0, prefix_cache=False)
    llm.generate([WORDS[0], WORDS[1]], greedy(90))
    assert llm.stats.preemptions == 0


@pytest.mark.parametrize("blocks", [4, 40])
def test_what_drafts_have_not_seen_stays_within_the_room(blocks: int, reference) -> None:
    """Steps without drafts let tokens wait; rows of newcomers are padded like the one that has most of them, near the end
    of the longest sequence and where no block is left."""
    model = build("mtp", seed=1)
    llm = small(model, slots=8, blocks=blocks, max_seqs=4, max_model_len=56)
    llm._draft_length = never = DraftLength("auto")
    never.choose = lambda rows: 0
    engine, prompts = llm.engine(), [WORDS[0][:5], *([*WORDS[i], *WORDS[i - 1], *WORDS[0]][:52] for i in (1, 2, 3))]
    requests = [Request(id=str(i), token_ids=p, params=greedy(4 if i else 40)) for i, p in enumerate(prompts)]
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    engine.add(requests[0])
    for number in range(90):
        if number == 15:
            for request in requests[1:]:
                engine.add(request)
        for news in engine.step():
            found[news.id] += news.completions[0].token_ids
        check(engine)
    for request in requests:
        want, gaps = reference(model, list(request.token_ids), request.params.max_tokens)
        assert same_until_tie(found[request.id], want, gaps)


def tree(recurrent: bool = True) -> tuple[PrefixCache, PagedCache]:
    """An empty tree over an empty cache."""
    pool = build("hybrid").new_paged_cache(6, 20, 150)
    return PrefixCache(pool, recurrent), pool


def held(pool: PagedCache, count: int) -> int:
    """A slot that holds `count` tokens."""
    slot = pool.open(1)[0]
    pool.reserve([slot], count)
    pool.count([slot], count)
    return slot


def test_a_match_is_what_brute_force_finds() -> None:
    """Random insertions without states: the shared part is the longest common prefix with anything inserted."""
    draw, (cache, pool) = random.Random(5), tree(recurrent=False)
    seen: list[list[int]] = []
    for _ in range(200):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
        want = max((_common(tokens, other) for other in seen), default=0)
        match = cache.match(tokens, len(tokens))
        assert (match.shared, match.length) == (want, want)
        if len(seen) < 60:
            slot = held(pool, len(tokens))
            node = cache.insert(tokens, slot)
            assert node.end == len(tokens)
            pool.close([slot])
            seen.append(tokens)
            if pool.blocks_free < 2:
                cache.clear()
                seen.clear()
                assert pool.blocks_free == pool.blocks


def test_least_recently_used_leaves_go_first() -> None:
    """Three prompts, the first used again: blocks come from the second."""
    cache, pool = tree(recurrent=False)
    for first in (1, 2, 3):
        slot = held(pool, 70)
        cache.insert([first] * 70, slot)
        pool.close([slot])
    slot = pool.open(1)[0]
    cache.begin(slot, cache.match([1] * 70, 69))
    pool.close([slot])
    cache.evict_blocks([pool.blocks_free + 2])
    assert [cache.match([first] * 70, 70).length for first in (1, 2, 3)] == [70, 0, 70]
    assert pool.blocks_free == pool.blocks - 2 * blocks_of(70)


def test_states_on_the_way_go_first_then_the_least_recently_used() -> None:
    """Three prompts with states, the first used again, and one on the way of the last."""
    cache, pool = tree()
    for first, end, kind in ((1, 30, "prompt"), (2, 30, "prompt"), (3, 30, "way"), (3, 40, "prompt")):
        slot = held(pool, end)
        cache.keep(cache.insert([first] * end, slot), Snapshot(pool.open_apart(), kind))
        pool.close([slot])
    slot = pool.open(1)[0]
    cache.begin(slot, cache.match([1] * 31, 30))
    pool.close([slot])
    left, gone = [(1, 30), (2, 30), (3, 30), (3, 40)], []
    while cache.evict_slot():
        gone += [(first, end) for first, end in left if cache.match([first] * end, end).length != end]
        left = [place for place in left if place not in gone]
    assert gone == [(3, 30), (2, 30), (3, 40), (1, 30)]
    assert pool.slots_free == pool.slots
    assert pool.blocks_free == pool.blocks


@pytest.mark.parametrize("wanted", ["asked", "answer"])
def test_states_that_no_template_uses_make_room_for_those_that_are(wanted: str) -> None:
    """Eight conversations take turns, each turn leaves three states, and twelve have room: after some turns all find theirs.

    Which of the three the next turn continues differs from template to template. In order of use alone none would be found.
    """
    pool = build("hybrid").new_paged_cache(13, 400, 300)
    cache, found = PrefixCache(pool, True), list[bool]()
    # tokens by which a turn's states are behind its beginning
    behind = {"asked": 4, "prompt": 6, "answer": 9}
    for turn in range(24):
        for chat in range(8):
            begun = 1 + 9 * turn
            while not pool.slots_free:
                assert cache.evict_slot()
            slot, salt = pool.open(1)[0], str(chat)
            match = cache.match([1] * begun, begun, salt)
            cache.begin(slot, match)
            found.append(match.length == begun - 9 + behind[wanted])
            for kind, more in behind.items():
                # what the next turn does not continue ends in a token of its own
                tokens = [1] * (begun + more - 1) + [1 if kind == wanted else 100 + turn]
                pool.reserve([slot], len(tokens) - pool.held[slot])
                pool.count([slot], len(tokens) - pool.held[slot])
                node = cache.insert(tokens, slot, salt)
                if pool.slots_free or cache.evict_slot():
                    cache.keep(node, Snapshot(pool.open_apart(), kind))
            pool.close([slot])
    assert all(found[-32:])


def test_a_beginning_of_a_few_tokens_leaves_no_state() -> None:
    """Prompts that share less than a state is worth are computed in one piece, and the third finds nothing."""
    llm = LLM(build("hybrid"))
    for common, want in ((LEAST_BRANCH - 1, 0), (LEAST_BRANCH, LEAST_BRANCH)):
        beginning = [common] * common
        outs = [llm.generate([[*beginning, tail, *WORDS[0]]], greedy(1))[0] for tail in (101, 102, 103)]
        assert [out.cached_tokens for out in outs] == [0, 0, want]


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def outputs(outs: list[Output]) -> list[list[int]]:
    """Tokens of each."""
    return [out.completions[0].token_ids for out in outs]
