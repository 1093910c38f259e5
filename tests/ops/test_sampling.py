"""Sampling against counting, sorting and hand-made cases."""

import pytest
import torch

from alloy.ops.sampling import (
    accept_greedy,
    apply_penalties,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    greedy,
    sample,
    speculative_accept,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


def test_penalties_by_hand() -> None:
    """Repetition looks at prompt and output; presence and frequency at the output; rows have their own settings."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]])
    prompt = torch.tensor([[True, False, False, False], [False, False, False, False]])
    counts = torch.tensor([[0, 1, 3, 0], [0, 1, 0, 2]])
    got = apply_penalties(
        logits,
        prompt,
        counts,
        presence=torch.tensor([0.5, 0.0]),
        frequency=torch.tensor([0.25, 0.0]),
        repetition=torch.tensor([2.0, 1.0]),
    )
    torch.testing.assert_close(got[0], torch.tensor([1.0, -4.75, -0.75, 0.5]))
    assert torch.equal(got[1], logits[1])
    assert torch.equal(apply_penalties(logits, prompt, counts), logits)


def test_temperature_zero_leaves_the_row() -> None:
    """Greedy rows share a batch with others."""
    logits = draw(2, 5)
    got = apply_temperature(logits, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(got, torch.stack([logits[0] * 2, logits[1]]))


def test_top_k_keeps_the_largest() -> None:
    """Per row; 0 and -1 keep all; ties with the last one stay; more than the vocabulary is all."""
    logits = draw(5, 17)
    got = kept(filter_top_k(logits, torch.tensor([1, 3, 0, -1, 99])))
    for row, k in enumerate([1, 3, 17, 17, 17]):
        assert got[row] == set(logits[row].argsort(descending=True)[:k].tolist())
    assert kept(filter_top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == [{0, 1, 2}]


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float) -> None:
    """By adding up sorted probabilities; at least one token, all at p = 1."""
    logits = draw(4, 17)
    for row, got in enumerate(kept(filter_top_p(logits, p))):
        probs = logits[row].double().softmax(0)
        want, total = set(), 0.0
        for token in probs.argsort(descending=True).tolist():
            want.add(token)
            total += float(probs[token])
            if total >= p and p < 1:
                break
        assert got == want


def test_min_p_is_relative_to_the_likeliest() -> None:
    """0 keeps all, 1 only the likeliest."""
    logits = draw(4, 17)
    probs = logits.softmax(-1)
    for row, got in enumerate(kept(filter_min_p(logits, 0.2))):
        assert got == {t for t in range(17) if probs[row, t] >= 0.2 * probs[row].max()}
    assert kept(filter_min_p(logits, 0.0)) == [set(range(17))] * 4
    assert kept(filter_min_p(logits, 1.0)) == [{int(row.argmax())} for row in logits]


def test_greedy_takes_the_lowest_of_equals() -> None:
    """Also with -inf around."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [-torch.inf, -torch.inf, 0.0, 0.0]])
    assert greedy(logits).tolist() == [1, 2]
    assert greedy(logits[0]).tolist() == 1


def test_sample_inverts_the_distribution() -> None:
    """Uniform numbers at the borders; tokens of probability zero are never drawn, whatever the rounding."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for u, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999999999, 3), (1.0, 3)]:
        assert sample(probs, uniform=torch.tensor([u], dtype=torch.float64)).item() == token
    unnormalised = sample(probs * 8, uniform=torch.tensor([0.24]))
    assert unnormalised.item() == 1


def test_sample_frequencies_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws from a seeded generator."""
    probs = draw(1, 7).softmax(-1)
    drawn = sample(probs.expand(20_000, -1), generator=torch.Generator().manual_seed(3))
    expected = probs[0] * 20_000
    chi = ((drawn.bincount(minlength=7) - expected) ** 2 / expected).sum()
    assert chi < 22.5  # 99.9% quantile of 6 degrees of freedom


def test_greedy_acceptance_stops_at_the_first_difference() -> None:
    """A later agreement does not count."""
    drafts = torch.tensor([[5, 6, 7], [5, 9, 7], [1, 6, 7], [5, 6, 7]])
    targets = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 0, 8]])
    assert accept_greedy(drafts, targets).tolist() == [3, 1, 0, 2]


def test_rejection_sampling_has_the_target_distribution() -> None:
    """First token, and pairs of the first two, over 40,000 rows; drafts come from another distribution."""
    rows, vocab = 40_000, 4
    g = torch.Generator().manual_seed(11)
    q = draw(2, vocab, seed=1).softmax(-1)
    p = draw(3, vocab, seed=2).softmax(-1)
    drafts = torch.stack([torch.multinomial(q[i], rows, replacement=True, generator=g) for i in range(2)], dim=1)
    counts, following = speculative_accept(
        drafts,
        q.expand(rows, -1, -1),
        p.expand(rows, -1, -1),
        torch.rand(rows, 2, generator=g),
        torch.rand(rows, generator=g),
    )
    first = torch.where(counts > 0, drafts[:, 0], following)
    expected = p[0] * rows
    assert ((first.bincount(minlength=vocab) - expected) ** 2 / expected).sum() < 16.3  # 99.9%, 3 degrees
    second = torch.where(counts > 1, drafts[:, 1], following)[counts > 0]
    expected = p[1] * len(second)
    assert ((second.bincount(minlength=vocab) - expected) ** 2 / expected).sum() < 16.3
    third = following[counts == 2]
    expected = p[2] * len(third)
    assert ((third.bincount(minlength=vocab) - expected) ** 2 / expected).sum() < 16.3


def test_rejection_sampling_of_the_same_distribution_accepts_all() -> None:
    """p = q: nothing is refused, also for one-hot drafts."""
    q = torch.eye(5)[torch.tensor([[3, 1]])]
    p = torch.cat([q, torch.eye(5)[torch.tensor([[4]])]], dim=1)
    counts, following = speculative_accept(torch.tensor([[3, 1]]), q, p, torch.full((1, 2), 0.999), torch.tensor([0.5]))
    assert counts.item() == 2
    assert following.item() == 4
