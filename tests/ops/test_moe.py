"""Routing, experts and balancing against loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import expert_counts, moe_experts, route, sequence_balance, update_router_bias, use_backend

BACKENDS = ("torch", "cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def best(scores: Tensor, bias: Tensor, top_k: int, groups: int, top_groups: int) -> set[int]:
    """The chosen experts of one token, by sorting."""
    choice = (scores + bias).tolist()
    size = len(choice) // groups
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
    allowed = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return set(sorted(allowed, key=lambda e: -choice[e])[:top_k])


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 3), (4, 2, 5), (3, 1, 4), (2, 2, 12)])
@pytest.mark.parametrize(("normalize", "scale"), [(True, 2.5), (False, 1.0)])
def test_route_equals_a_sorted_choice(
    scoring: str, groups: int, top_groups: int, top_k: int, normalize: bool, scale: float
) -> None:
    """The bias steers the choice and is not in the weights; limited groups count their two best."""
    logits, bias = draw(9, 12), draw(12, seed=3).detach().float()
    chosen, weights, scores = route(
        logits, bias, top_k, scoring=scoring, num_groups=groups, top_groups=top_groups, normalize=normalize, scale=scale
    )
    assert chosen.dtype == torch.int64
    want = (
        1 / (1 + torch.exp(-logits))
        if scoring == "sigmoid"
        else torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    )
    torch.testing.assert_close(scores, want)
    for t in range(9):
        assert set(chosen[t].tolist()) == best(want[t], bias, top_k, groups, top_groups)
        picked = want[t][chosen[t]]
        torch.testing.assert_close(weights[t], (picked / picked.sum() if normalize else picked) * scale)
    assert torch.autograd.grad(weights[:, 0].sum(), logits)[0].any()


def test_route_is_fp32_for_bf16_logits() -> None:
    """Scores and weights do not lose bits."""
    _, weights, scores = route(draw(3, 8).detach().bfloat16(), None, 2)
    assert weights.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2, "num_groups": 5}, "num_experts = 12 is not a multiple of num_groups = 5"),
        ({"top_k": 2, "num_groups": 12}, "12 groups of 1 expert"),
        ({"top_k": 2, "num_groups": 2, "top_groups": 3}, "top_groups = 3 is more than num_groups = 2"),
        ({"top_k": 7, "num_groups": 2}, "top_k = 7 is more than the 6 experts"),
        ({"top_k": 13}, "top_k = 13 is more than the 12 experts"),
    ],
)
def test_route_refuses(options: dict[str, int], message: str) -> None:
    """Choices that cannot be made."""
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(3, 12), None, **options)


def direct(x, chosen, weights, up, down, gate, activation) -> Tensor:
    """Token by token, expert by expert."""
    act = {"relu2": lambda t: t.clamp(min=0) ** 2, "silu": lambda t: t / (1 + torch.exp(-t)), "gelu": F.gelu}[
        activation
    ]
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for j, e in enumerate(chosen[t].tolist()):
            inner = up[e] @ x[t]
            inner = act(inner) if gate is None else act(gate[e] @ x[t]) * inner
            total = total + weights[t, j] * (down[e] @ inner)
        rows.append(total)
    return torch.stack(rows) if rows else x * 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize(("gated", "activation"), [(False, "relu2"), (True, "silu"), (False, "gelu")])
def test_experts_equal_a_loop_in_values_and_gradients(tokens: int, gated: bool, activation: str, backend: str) -> None:
    """Experts that nobody chose get zero gradients; the path without gradients gives the same values."""
    x, up, down = draw(tokens, 6), draw(9, 10, 6), draw(9, 6, 10)
    gate = draw(9, 10, 6, seed=4) if gated else None
    g = torch.Generator().manual_seed(tokens)
    # expert 8 is never chosen
    chosen = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=g, dtype=torch.float64).requires_grad_()
    inputs = [t for t in (x, weights, up, down, gate) if t is not None]
    with use_backend(backend):
        y = moe_experts(x, chosen, weights, up, down, gate, activation)
        want = direct(x, chosen, weights, up, down, gate, activation)
        torch.testing.assert_close(y, want)
        direction = draw(tokens, 6, seed=7).detach()
        ours = torch.autograd.grad(y, inputs, direction)
        for a, b in zip(ours, torch.autograd.grad(want, inputs, direction), strict=True):
            torch.testing.assert_close(a, b)
        assert not ours[2][8].any()
        with torch.no_grad():
            torch.testing.assert_close(moe_experts(x, chosen, weights, up, down, gate, activation), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_in_other_dtypes(tokens: int, backend: str) -> None:
    """fp32 without gradients (the paths of decoding), bf16 and autocast keep to the loop within their rounding."""
    x, up, down = draw(tokens, 16).detach(), draw(9, 32, 16).detach() / 4, draw(9, 16, 32).detach() / 6
    chosen, weights, _ = route(draw(tokens, 9).detach(), None, 3)
    want = direct(x, chosen, weights, up, down, None, "relu2")
    with use_backend(backend):
        y = moe_experts(x.float(), chosen, weights.float(), up.float(), down.float())
        torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-4)
        narrow = moe_experts(x.bfloat16(), chosen, weights.float(), up.bfloat16(), down.bfloat16())
        assert narrow.dtype == torch.bfloat16
        assert (narrow - want).norm() / want.norm() < 2e-2
        leaves = [t.float().requires_grad_() for t in (x, up, down)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = moe_experts(leaves[0], chosen, weights.float(), leaves[1], leaves[2])
        assert y.dtype == torch.float32
        assert (y - want).norm() / want.norm() < 2e-2
        assert all(g.dtype == torch.float32 and g.any() for g in torch.autograd.grad(y.sum(), leaves))


def test_expert_counts() -> None:
    """How often each expert was chosen."""
    assert expert_counts(torch.tensor([[0, 3], [3, 1], [3, 4]]), 6).tolist() == [1, 1, 0, 3, 1, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_sequence_balance_equals_its_formula(packed: bool) -> None:
    """Document by document; padding is left out; a number that comes back is another document."""
    scores = draw(2, 7, 5).sigmoid()
    chosen = scores.topk(2, dim=-1).indices
    numbers = [[0, 0, 0, 1, 0, 0, -1], [2, 2, 2, 2, 2, 2, 2]] if packed else [[0] * 7] * 2
    parts = [(0, 0, 3), (0, 3, 4), (0, 4, 6), (1, 0, 7)] if packed else [(0, 0, 7), (1, 0, 7)]
    want = 0.0
    for b, start, stop in parts:
        length = stop - start
        p = (scores[b, start:stop] / scores[b, start:stop].sum(-1, keepdim=True)).sum(0)
        count = expert_counts(chosen[b, start:stop], 5)
        want = want + 5 / (2 * length**2) * (p * count).sum() / len(parts)
    documents = torch.tensor(numbers) if packed else None
    got = sequence_balance(scores, chosen, documents)
    torch.testing.assert_close(got, want)


def test_sequence_balance_is_one_when_balanced() -> None:
    """Equal scores and equal counts."""
    chosen = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    torch.testing.assert_close(sequence_balance(torch.full((1, 3, 6), 0.3), chosen), torch.tensor(1.0))


def test_router_bias_moves_against_the_load() -> None:
    """Up where an expert has less than the mean, down where more, not at the mean."""
    bias = torch.tensor([0.5, 0.0, -0.25])
    update_router_bias(bias, torch.tensor([9, 4, 5]), 0.125)
    assert bias.tolist() == [0.375, 0.125, -0.125]


@pytest.mark.parametrize("gated", [False, True])
def test_one_token_through_large_experts(gated: bool) -> None:
    """Experts so large that their weights are read in parts, against float64."""
    up, down = draw(5, 256, 520).detach(), draw(5, 520, 256, seed=1).detach()
    gate = draw(5, 256, 520, seed=2).detach() if gated else None
    x, weights = draw(1, 520, seed=3).detach(), draw(1, 3, seed=4).detach()
    chosen = torch.tensor([[4, 0, 2]])
    with use_backend("torch"):
        want = moe_experts(x, chosen, weights, up, down, gate)
    given = [None if t is None else t.float() for t in (up, down, gate)]
    with torch.no_grad():
        got = moe_experts(x.float(), chosen, weights.float(), *given)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4 * float(want.abs().max()))
