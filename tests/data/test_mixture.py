"""Mixing: exact shares, exact epochs, exact resume, the same samples for any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.mixture import Batch, Mixture, Phase, Source, WeightedChoice
from alloy.data.shards import write_shard
from alloy.data.tokens import tokenize_corpus, train_tokenizer
from alloy.errors import DataError, RecipeError

SEQ = 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of 5, 9 and 1 documents; every token id occurs once in all."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    first = 0
    for name, number in [("a", 5), ("b", 9), ("c", 1)]:
        documents = []
        for length in rng.integers(1, 40, number):
            documents.append(first + np.arange(length))
            first += int(length)
        write_shard(folder / name, documents)
    return folder


def mixture(folder, weights=(3.0, 1.0, 0.5), **options) -> Mixture:
    sources = [Source(path=str(folder / name), weight=weight) for name, weight in zip("abc", weights, strict=True)]
    return Mixture(sources, **{"seed": 7, "seq": SEQ, **options})


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "labels", "documents"))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=7).filter(any))
def test_shares_are_followed_within_one_sample(weights) -> None:
    """At every prefix each source has its share of the samples, give or take less than one."""
    choice = WeightedChoice(weights)
    shares = np.array(weights) / np.sum(weights)
    for time in range(1, 200):
        choice.next()
        assert np.abs(np.array(choice.counts) - shares * time).max() < 1 + 1e-6


def test_many_equal_sources_stay_within_one_sample() -> None:
    """A case where taking the source with the largest deficit goes wrong: shares that differ widely."""
    weights = [64, 32, 16, 8, 4, 2, 1, 1, 0.5, 0.25, 0.125, 0]
    choice = WeightedChoice(weights)
    shares = np.array(weights) / sum(weights)
    worst = 0.0
    for time in range(1, 3000):
        choice.next()
        worst = max(worst, np.abs(np.array(choice.counts) - shares * time).max())
    assert worst < 1
    assert choice.counts[-1] == 0


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_an_epoch_is_every_token_once_and_epochs_differ(folder, pack) -> None:
    """One source alone: over its rows each token occurs once; the next epoch has the same tokens in another order."""
    data = mixture(folder, (0.0, 1.0, 0.0), pack=pack)
    rows, total = data.sources[1].num_rows, data.sources[1].num_tokens
    epochs = [data.batch(rows) for _ in range(2)]
    seen = [batch.tokens[batch.documents >= 0] for batch in epochs]
    assert len(seen[0]) == total == len(seen[0].unique())
    assert torch.equal(seen[0].sort().values, seen[1].sort().values)
    assert not torch.equal(epochs[0].tokens, epochs[1].tokens)
    assert data.epochs == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_batches_have_the_promised_form(folder, pack) -> None:
    """dtypes, shapes, and labels that are the next token (ids count up inside a document)."""
    batch = mixture(folder, pack=pack).batch(6)
    assert [x.dtype for x in (batch.tokens, batch.labels, batch.documents)] == [torch.int64, torch.int64, torch.int32]
    assert batch.tokens.shape == batch.labels.shape == batch.documents.shape == (6, SEQ)
    known = batch.labels != -100
    assert known.any()
    assert torch.equal(batch.labels[known], batch.tokens[known] + 1)
    inside = (batch.documents[:, 1:] == batch.documents[:, :-1]) & (batch.documents[:, 1:] >= 0)
    assert torch.equal(batch.labels[:, :-1][inside], batch.tokens[:, 1:][inside])


def test_sources_of_one_size_are_shuffled_apart(folder) -> None:
    """The same shard twice: the two copies give their rows in different orders."""
    data = Mixture([Source(path=str(folder / "b"))] * 2, seed=7, seq=SEQ)
    batch = data.batch(2 * data.sources[0].num_rows)
    assert not torch.equal(batch.tokens[0::2], batch.tokens[1::2])


def test_seed_decides(folder) -> None:
    assert equal(mixture(folder).batch(20), mixture(folder).batch(20))
    assert not equal(mixture(folder).batch(20), mixture(folder, seed=8).batch(20))


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_resume_is_exact_with_another_number_of_ranks(folder, pack, world) -> None:
    """Stopped after 5 batches of 6 rows on one rank, continued on `world`: the same rows as without a stop."""
    straight = mixture(folder, pack=pack)
    for _ in range(5):
        straight.batch(6)
    state = straight.state()
    expected = [straight.batch(6) for _ in range(9)]
    ranks = [mixture(folder, pack=pack, rank=rank, world=world) for rank in range(world)]
    for rank in ranks:
        rank.load_state(state)
    for whole in expected:
        parts = [rank.batch(6 // world) for rank in ranks]
        for rank, part in enumerate(parts):
            mine = Batch(whole.tokens[rank::world], whole.labels[rank::world], whole.documents[rank::world])
            assert equal(part, mine)
    assert all(rank.state() == straight.state() for rank in ranks)


def test_state_is_taken_at_any_point(folder) -> None:
    """After each of many batches of odd sizes a fresh mixture continues from the saved counts."""
    straight = mixture(folder)
    for rows in (1, 5, 2, 7, 3, 11):
        straight.batch(rows)
        fresh = mixture(folder)
        fresh.load_state(straight.state())
        copy = mixture(folder)
        copy.load_state(straight.state())
        assert equal(fresh.batch(4), copy.batch(4))
        again = mixture(folder)
        again.load_state(straight.state())
        assert equal(straight.batch(3), again.batch(3))


def test_state_of_another_mixture_is_refused(folder) -> None:
    state = mixture(folder).state()
    with pytest.raises(RecipeError, match="cannot resume: data seq was 13 and is now 14"):
        mixture(folder, seq=14).load_state(state)
    with pytest.raises(RecipeError, match=r"data weights was \[3.0, 1.0, 0.5\] and is now"):
        mixture(folder, (1.0, 1.0, 1.0)).load_state(state)


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_validation_documents_never_occur_in_training(folder, pack) -> None:
    """The split is by document, kept over epochs and packings, and cut to max_tokens."""
    data = mixture(folder, (1.0, 1.0, 0.0), pack=pack, validation=0.0)
    assert data.validation_documents() == []
    sources = [Source(path=str(folder / name)) for name in "ab"]
    data = Mixture(sources, seed=7, seq=SEQ, pack=pack, validation=0.2)
    held_out = data.validation_documents()
    assert len(held_out) == 1 + 2
    batch = data.batch(3 * sum(rows.num_rows for rows in data.sources))
    trained = set(batch.tokens[batch.documents >= 0].tolist())
    assert not trained & set(np.concatenate(held_out).tolist())
    assert len(trained) == data.num_tokens
    sizes = [len(ids) for ids in held_out]
    assert sizes[2] > 3
    few = data.validation_documents(sizes[0] + sizes[1] + 3)
    assert [ids.tolist() for ids in few] == [held_out[0].tolist(), held_out[1].tolist(), held_out[2][:3].tolist()]
    with pytest.raises(RecipeError, match="keeps 1 of 1 documents"):
        mixture(folder, validation=0.2)


def test_bad_sources_are_refused(folder, tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"data.sources\[1\].weight = -1.0 .*not negative"):
        mixture(folder, (1.0, -1.0, 1.0))
    with pytest.raises(RecipeError, match="weights are finite"):
        mixture(folder, (1.0, float("nan"), 1.0))
    with pytest.raises(RecipeError, match=r"all weights in data\.sources are 0"):
        mixture(folder, (0.0, 0.0, 0.0))
    with pytest.raises(RecipeError, match=r"data.sources is empty"):
        Mixture([], seed=0, seq=8)
    with pytest.raises(DataError, match=r"does not exist. Run `alloy data tokenize` first"):
        Mixture([Source(path=str(tmp_path / "no"))], seed=0, seq=8)


def test_other_tokenizer_is_refused(tmp_path) -> None:
    """Shards of two tokenizers do not mix, nor shards and the tokenizer in use."""
    texts = ["some words of a text", "other words of a text"] * 3
    tokenizers = [train_tokenizer(texts, vocab) for vocab in (270, 275)]
    for name, tokenizer in zip("ab", tokenizers, strict=True):
        tokenize_corpus(texts, tokenizer, tmp_path / name)
    sources = [Source(path=str(tmp_path / name)) for name in "ab"]
    with pytest.raises(DataError, match=r"was tokenized with another tokenizer than .*/a"):
        Mixture(sources, seed=0, seq=8)
    with pytest.raises(DataError, match="was tokenized with another tokenizer than the tokenizer"):
        Mixture(sources[:1], seed=0, seq=8, tokenizer=tokenizers[1])
    Mixture(sources[:1], seed=0, seq=8, tokenizer=tokenizers[0]).batch(2)


PHASES = (Phase(7, (3.0, 1.0, 0.0)), Phase(12, (1.0, 1.0, 2.0)), Phase(None, (0.0, 1.0, 5.0)))


def test_phases_begin_at_their_row_and_follow_their_weights(folder) -> None:
    """Row by row: in each phase every count is within one of its share, and sources go on where they stopped."""
    data = mixture(folder, phases=PHASES)
    before, begin = np.zeros(3), 0
    for phase in PHASES:
        shares = np.array(phase.weights) / sum(phase.weights)
        rows = phase.rows or 30
        for row in range(1, rows + 1):
            data.batch(1)
            assert np.abs(np.array(data.counts) - before - shares * row).max() < 1
        before, begin = np.array(data.counts), begin + rows
    assert sum(data.counts) == begin
    # a source's rows are those of a mixture of it alone, whatever the phases
    alone = mixture(folder, (0.0, 1.0, 0.0)).batch(data.counts[1])
    again = mixture(folder, phases=PHASES).batch(begin)
    from_b = [row for row in range(begin) if again.tokens[row][again.documents[row] >= 0][0] in alone.tokens]
    assert torch.equal(again.tokens[from_b], alone.tokens)


@pytest.mark.parametrize("stop", [0, 3, 7, 8, 18, 19, 25])
def test_resume_in_and_between_phases(folder, stop) -> None:
    """Stopped anywhere, also at the last row of a phase, and continued on two ranks: the same rows."""
    straight = mixture(folder, phases=PHASES)
    if stop:
        straight.batch(stop)
    state = straight.state()
    expected = straight.batch(22)
    for rank in range(2):
        data = mixture(folder, phases=PHASES, rank=rank, world=2)
        data.load_state(state)
        part = data.batch(11)
        assert torch.equal(part.tokens, expected.tokens[rank::2])
        assert data.state() == straight.state()


def test_phases_of_another_run_are_refused(folder) -> None:
    state = mixture(folder, phases=PHASES).state()
    for other in ({}, {"phases": PHASES[:2]}):
        with pytest.raises(RecipeError, match="cannot resume: data phases was"):
            mixture(folder, **other).load_state(state)
    with pytest.raises(RecipeError, match="cannot resume: data phases was None"):
        mixture(folder, phases=PHASES).load_state(mixture(folder).state())
