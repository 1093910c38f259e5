"""Paged rows give the full pass: in chunks, steps and drafts, in any slots, with blocks that others left dirty."""

import math
import random

import pytest
import torch
from torch import Tensor

from alloy.errors import RecipeError, RequestError, ResourceError
from alloy.models.base import CausalLM
from alloy.models.cache import Cache
from alloy.models.configs import HybridConfig, MambaConfig
from alloy.models.paged import BLOCK, PagedCache, PagedView, StaticView
from tests.models.zoo import CONFIGS, build, random_tokens

SEQ = 19


def run(model: CausalLM, cache: Cache, tokens: Tensor, **options) -> Tensor:
    logits = model(tokens, cache=cache, **options).logits
    assert logits is not None
    return logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def dirty(pool: PagedCache) -> PagedCache:
    """Blocks of nobody and block 0 hold NaN, as another sequence may have left them."""
    for part in (pool, pool.mtp):
        for arena in part.arenas if part is not None else []:
            arena.fill_(math.nan)
    return pool


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_chunks_steps_and_drafts_give_the_full_pass(name: str) -> None:
    """Two rows in slots 2 and 0; blocks are scattered since a third sequence came and went."""
    model, tokens = build(name), random_tokens(2, SEQ)
    whole = model(tokens).logits
    pool = dirty(model.new_paged_cache(slots=3, blocks=6, max_tokens=40))
    first = pool.open(3)
    run(model, pool.view(first), random_tokens(3, 5, seed=9))
    pool.close(first[1:])
    for cut in (1, 2, 7, SEQ - 1):
        slots = pool.open(2)
        view = pool.view(slots[::-1])
        close(torch.cat([run(model, view, tokens[:, :cut]), run(model, view, tokens[:, cut:])], 1), whole)
        pool.close(slots)
    view = pool.view(pool.open(2))
    close(torch.cat([run(model, view, tokens[:, i : i + 1]) for i in range(SEQ)], 1), whole)
    assert view.lengths.tolist() == [SEQ, SEQ]
    pool.close(view.rows)

    view = pool.view(pool.open(2))
    run(model, view, tokens[:, :3])
    held, index = torch.tensor([3, 3]), torch.arange(4)
    for accepted in ([2, 4], [0, 1], [4, 0], [1, 3]):
        counts = torch.tensor(accepted)
        right = tokens.gather(1, held[:, None] + index)
        draft = torch.where(index < counts[:, None], right, (right + 1) % model.config.vocab)
        with view.drafting():
            logits = run(model, view, draft)
        for row, count in enumerate(accepted):
            close(logits[row, :count], whole[row, held[row] : held[row] + count])
        view.accept(counts)
        held = held + counts
        assert view.lengths.tolist() == held.tolist() == [pool.held[slot] for slot in view.rows]
    close(run(model, view, tokens.gather(1, held[:, None]))[:, 0], whole[torch.arange(2), held])


@pytest.mark.parametrize("name", ["dense", "windowed", "puzzle", "qwen3", "nas"])
@torch.no_grad()
def test_long_rows_cross_blocks(name: str) -> None:
    """150 tokens, in chunks of 70 and then step by step; a ragged pair of rows computed beside each other."""
    model, tokens = build(name), random_tokens(2, 150)
    # positions of the decoders end at 128
    tokens = tokens if isinstance(model.config, HybridConfig) else tokens[:, :120]
    whole, n = model(tokens).logits, tokens.shape[1]
    pool = dirty(model.new_paged_cache(slots=2, blocks=8, max_tokens=160))
    view = pool.view(pool.open(1))
    parts = [run(model, view, tokens[:1, i : i + 35]) for i in range(0, n - 9, 35)]
    done = sum(p.shape[1] for p in parts)
    parts += [run(model, view, tokens[:1, i : i + 1]) for i in range(done, n)]
    close(torch.cat(parts, 1), whole[:1])
    other = pool.view(pool.open(1))
    run(model, other, tokens[1:, :5])
    view.select([0])
    pool.close(view.rows)
    view = pool.view(pool.open(1))
    run(model, view, tokens[:1, :61])
    view.join(other)
    # 61 and 5 tokens held; chunks of 20 with padding in one row
    documents = torch.zeros(2, 20, dtype=torch.int32)
    documents[0, 13:] = -1
    both = torch.stack([tokens[0, 61:81], tokens[1, 5:25]])
    logits = run(model, view, both, documents=documents)
    close(logits[0, :13], whole[0, 61:74])
    close(logits[1], whole[1, 5:25])
    logits = run(model, view, torch.stack([tokens[0, 74:75], tokens[1, 25:26]]))
    close(logits[:, 0], torch.stack([whole[0, 74], whole[1, 25]]))
    assert view.lengths.tolist() == [75, 26]


@torch.no_grad()
def test_a_fork_without_room_takes_nothing() -> None:
    """Two blocks are free, three copies of a sequence of one need three."""
    model = build("latent_mtp")
    pool = model.new_paged_cache(slots=4, blocks=3, max_tokens=40)
    view = pool.view(pool.open(1))
    run(model, view, random_tokens(1, 5))
    with pytest.raises(ResourceError, match="the cache is full"):
        pool.fork(view.rows[0], 3)
    assert (pool.slots_free, pool.blocks_free) == (3, 2)
    pool.reset()
    assert (pool.slots_free, pool.blocks_free) == (4, 3)
    assert pool.mtp is not None
    assert pool.mtp.blocks_free == 3
    pool.reset()
    assert pool.slots_free == 4


@pytest.mark.parametrize("name", ["latent_mtp", "puzzle", "qwen3"])
@torch.no_grad()
def test_rows_fork_and_leave(name: str) -> None:
    """A row named twice goes on as two sequences; slots and blocks of rows that left are given back, all of them."""
    model, tokens = build(name), random_tokens(3, SEQ)
    whole = model(tokens).logits
    pool = dirty(model.new_paged_cache(slots=4, blocks=9, max_tokens=40))
    view = pool.view(pool.open(3))
    run(model, view, tokens[:, :6])
    view.select([2, 0, 2])
    assert len(set(view.rows)) == 3
    assert pool.slots_free == 1
    close(run(model, view, tokens[[2, 0, 1], 6:8])[:2], whole[[2, 0], 6:8])
    view.select([0])
    close(run(model, view, tokens[2:, 8:9]), whole[2:, 8:9])
    pool.close(view.rows)
    assert (pool.slots_free, pool.blocks_free) == (4, 9)
    assert pool.mtp is None or pool.mtp.blocks_free == 9


@pytest.mark.parametrize("name", ["latent_mtp", "mamba_mtp", "puzzle"])
@torch.no_grad()
def test_mtp_steps_and_rollback(name: str) -> None:
    """Drafting from true hidden states gives depth 1 of the full pass; a rollback leaves no trace."""
    model, tokens = build(name), random_tokens(2, SEQ)
    whole = model(tokens, return_mtp=1)
    pool = dirty(model.new_paged_cache(slots=2, blocks=4, max_tokens=40))
    view = pool.view(pool.open(2))
    hidden = model(tokens, cache=view).last_hidden
    parts = [model.mtp_step(tokens[:, 1:7], hidden[:, :6], view).logits]
    mtp = view.mtp
    assert mtp is not None
    mark = mtp.mark()
    draft = model.mtp_step(tokens[:, :1], hidden[:, 3:4], view, logits="last")
    model.mtp_step(tokens[:, :1], draft.last_hidden, view)
    mtp.rollback(mark)
    parts += [model.mtp_step(tokens[:, i + 1 : i + 2], hidden[:, i : i + 1], view).logits for i in range(6, 9)]
    close(torch.cat(parts, 1), whole.mtp_logits[0][:, :9])
    assert mtp.lengths.tolist() == [9, 9]


@pytest.mark.parametrize("name", ["dense", "windowed", "moe", "llama", "nas"])
@torch.no_grad()
def test_padding_rows_touch_nothing(name: str) -> None:
    """A step over a buffer of slots, some of them -1, as a captured graph runs it: what is no row's stays as it was."""
    model, tokens = build(name), random_tokens(2, SEQ)
    whole = model(tokens).logits
    pool = dirty(model.new_paged_cache(slots=4, blocks=5, max_tokens=40))
    pool.states.ssm.fill_(math.nan)
    pool.states.conv.fill_(math.nan)
    rows = pool.open(2)
    run(model, pool.view(rows), tokens[:, :6])
    slots = torch.tensor([-1, rows[1], -1, rows[0], -1], dtype=torch.int32)
    view = StaticView(pool, slots)
    for step in range(6, 9):
        pool.reserve(rows, 1)
        given = torch.zeros(5, 1, dtype=torch.int64)
        given[[3, 1]] = tokens[:, step : step + 1]
        logits = run(model, view, given)
        pool.count(rows, 1)
        close(logits[[3, 1], 0], whole[:, step])
    idle = [slot for slot in range(4) if slot not in rows]
    assert pool.states.ssm[idle].isnan().all()
    assert pool.states.conv[idle].isnan().all()
    assert pool.lengths[[*rows, *idle, -1]].tolist() == [9, 9, 0, 0, 0]
    owned = set(pool.table[rows].flatten().tolist())
    for arena in pool.arenas:
        assert arena[:, [b for b in range(1, 6) if b not in owned]].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    """Slots, blocks and a sequence's own length run out with the numbers in the message, and nothing is lost by it."""
    model = build("llama")
    pool = model.new_paged_cache(slots=2, blocks=2, max_tokens=100)
    view = pool.view(pool.open(2))
    run(model, view, random_tokens(2, BLOCK))
    with pytest.raises(ResourceError, match="2 blocks of 64 tokens are needed, 0 of 2 are free beside 2 sequences"):
        run(model, view, random_tokens(2, 1))
    with pytest.raises(ResourceError, match="1 more sequences, but 0 of 2 slots"):
        pool.open(1)
    pool.close(view.rows[:1])
    rest = pool.view(view.rows[1:])
    run(model, rest, random_tokens(1, 8))
    with pytest.raises(RequestError, match=r"72 tokens and 60 more is longer than max_tokens = 100"):
        run(model, rest, random_tokens(1, 60))
    with pytest.raises(RecipeError, match='state_dtype = "int8"'):
        model.new_paged_cache(1, 1, 64, state_dtype="int8")


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_narrow_states_are_half_the_bytes(state_dtype: str) -> None:
    """Close results from narrow states."""
    model, tokens = build("dense"), random_tokens(2, 9)
    pools = [model.new_paged_cache(2, 2, 64, state_dtype=name) for name in (state_dtype, "float32")]
    assert pools[0].states.ssm.nbytes * 2 == pools[1].states.ssm.nbytes
    views = [pool.view(pool.open(2)) for pool in pools]
    for chunk in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7]):
        got, want = (run(model, view, chunk) for view in views)
        torch.testing.assert_close(got, want, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("name", ["puzzle", "nas"])
@torch.no_grad()
def test_any_order_of_operations_gives_the_full_pass(name: str) -> None:
    """150 random operations over sequences that come, fork, wait, draft and go: every logit as computed alone."""
    model, draw, g = build(name), random.Random(7), torch.Generator().manual_seed(7)
    pool = dirty(model.new_paged_cache(slots=5, blocks=12, max_tokens=110))
    texts: dict[int, list[int]] = {}  # slot -> tokens held

    def check(view: PagedView, given: Tensor, logits: Tensor, counts: list[int]) -> None:
        for row, slot in enumerate(view.rows):
            text = texts[slot] + given[row, : counts[row]].tolist()
            want = model(torch.tensor([text])).logits[0, len(texts[slot]) :]
            close(logits[row, : counts[row]], want)
            texts[slot] = text

    for _ in range(150):
        kind = draw.choice(
            ["open", "open", "chunk", "chunk", "step", "step", "step", "draft", "draft", "fork", "close"]
        )
        if kind == "open" and pool.slots_free:
            texts.update({slot: [] for slot in pool.open(1)})
            continue
        if not texts:
            continue
        rows = draw.sample(sorted(texts), draw.randint(1, len(texts)))
        view = pool.view(rows)
        if kind == "close" or any(len(texts[slot]) > 80 for slot in rows):
            pool.close(rows[:1])
            del texts[rows[0]]
        elif kind == "fork" and pool.slots_free and pool.blocks_free > 3:
            copies = pool.fork(rows[0], 1)
            texts.update({slot: list(texts[rows[0]]) for slot in copies})
        elif pool.blocks_free > 2 * len(rows):
            width = {"chunk": draw.randint(2, 15), "draft": draw.randint(2, 7)}.get(kind, 1)
            given = torch.randint(0, model.config.vocab, (len(rows), width), generator=g)
            if kind == "draft" and all(texts[slot] for slot in rows):
                counts = [draw.randint(0, width) for _ in rows]
                with view.drafting():
                    logits = run(model, view, given)
                view.accept(torch.tensor(counts))
                check(view, given, logits, counts)
            else:
                counts = [draw.randint(1, width) for _ in rows]
                padded = torch.arange(width) >= torch.tensor(counts)[:, None]
                documents = -padded.int() if padded.any() else None
                check(view, given, run(model, view, given, documents=documents), counts)
    assert {slot: len(text) for slot, text in texts.items()} == {slot: pool.held[slot] for slot in texts}
    pool.close(sorted(texts))
    assert (pool.slots_free, pool.blocks_free) == (5, 12)


def test_layers_round_by_seeds_of_their_own() -> None:
    """Stochastic rounding: no two layers draw the same chances, and no two steps."""
    model = build("dense")
    pool = model.new_paged_cache(2, 4, 64, state_dtype="float16-sr")
    slots = pool.open(2)
    view = pool.view(slots)
    layers = [layer for layer, mixer in enumerate(model.cached_mixers()[0]) if isinstance(mixer, MambaConfig)]
    seeds: set[int] = set()
    for _ in range(3):
        for layer in layers:
            seed = view.seed(layer)
            assert seed is not None
            seeds.add(int(seed))
        pool.advance(torch.tensor(slots), 1)
    assert len(seeds) == 3 * len(layers) > 3
