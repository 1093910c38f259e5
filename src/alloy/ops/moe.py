"""Mixture of experts: choosing experts, running them, and keeping them balanced.

Papers: DeepSeek-V3 (2024), section 2.1.2. arXiv:2412.19437; aux-loss-free balancing (Wang et al., 2024). arXiv:2408.15664
"""

from typing import Literal

import torch
from torch import Tensor

from alloy.ops import backend
from alloy.ops.activation import ACTIVATIONS
from alloy.ops.cpu import moe as cpu
from alloy.ops.linear import linear
from alloy.ops.precision import wide


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    scoring: Literal["sigmoid", "softmax"] = "sigmoid",
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose `top_k` experts of each token by score + bias; the weights are the scores alone.

    Args:
        logits: (tokens, experts)
        bias: fp32 (experts,), steers the choice and carries no gradient
        top_k: experts of a token
        scoring: how logits become scores
        num_groups: experts are split into this many equal groups; a group counts as much as its two best choices
        top_groups: groups that may be chosen from
        normalize: divide the weights of a token by their sum
        scale: factor of the weights

    Returns:
        chosen int64 (tokens, top_k), weights fp32 (tokens, top_k), scores fp32 (tokens, experts)
    """
    num_experts = logits.shape[1]
    if num_experts % num_groups:
        raise ValueError(f"route: num_experts = {num_experts} is not a multiple of num_groups = {num_groups}")
    size = num_experts // num_groups
    if num_groups > 1 and size < 2:
        raise ValueError(f"route: {num_groups} groups of {size} expert; a group needs at least 2")
    if top_groups > num_groups:
        raise ValueError(f"route: top_groups = {top_groups} is more than num_groups = {num_groups}")
    if top_k > size * top_groups:
        raise ValueError(f"route: top_k = {top_k} is more than the {size * top_groups} experts that may be chosen")
    return backend.run("moe_route", logits, bias, top_k, scoring, num_groups, top_groups, normalize, scale)


def moe_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    activation: str = "relu2",
) -> Tensor:
    """sum_k weight_k * down_e(act(up_e x)), or down_e(act(gate_e x) * up_e x) with `gate`; e = chosen[:, k].

    Args:
        x: (tokens, width)
        chosen: int64 (tokens, top_k)
        weights: (tokens, top_k)
        up: (experts, ffn, width)
        down: (experts, width, ffn)
        gate: (experts, ffn, width)
        activation: a name of `ACTIVATIONS`

    Returns:
        (tokens, width) in x's dtype; the sum over experts is in fp32, cast once
    """
    inputs, up, down, gate = backend.autocast(x, up, down, gate)
    return backend.run("moe_experts", inputs, chosen, weights, up, down, gate, activation).to(x.dtype)


def moe_step(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    shared_up: Tensor,
    shared_down: Tensor,
    shared_gate: Tensor | None,
    activation: str = "relu2",
) -> Tensor:
    """`moe_experts` plus a shared expert that every token takes with weight 1, without gradients: for decoding.

    Args:
        x: (tokens, width)
        chosen: int64 (tokens, top_k)
        weights: (tokens, top_k)
        up: (experts, ffn, width)
        down: (experts, width, ffn)
        gate: (experts, ffn, width)
        shared_up: (shared_ffn, width)
        shared_down: (width, shared_ffn)
        shared_gate: (shared_ffn, width), with `gate`
        activation: a name of `ACTIVATIONS`

    Returns:
        (tokens, width) in x's dtype
    """
    given = backend.autocast(x, up, down, gate, shared_up, shared_down, shared_gate)
    return backend.run("moe_step", given[0], chosen, weights, *given[1:], activation).to(x.dtype)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (tokens, width) times the router's matrix (experts, width), in fp32 whatever they are: (tokens, experts)."""
    return backend.run("router_logits", x, weight)


def expert_counts(chosen: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """Tokens routed to each expert: chosen int64 (tokens, top_k), valid bool (tokens,) or None -> int64 (num_experts,)."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    ones = torch.ones_like(chosen) if valid is None else valid.long()[:, None].expand_as(chosen)
    return counts.scatter_add_(0, chosen.flatten(), ones.flatten())


def sequence_balance(scores: Tensor, chosen: Tensor, documents: Tensor | None = None) -> Tensor:
    """Balance loss of each sequence, averaged: experts / (top_k T^2) sum_e (sum_t p_te) count_e, 1 at perfect balance.

    p are the scores divided by their sum over experts. A sequence is one document of T tokens; padding is left out.

    Args:
        scores: (batch, seq, experts)
        chosen: int64 (batch, seq, top_k)
        documents: int (batch, seq); None: each row is one sequence

    Returns:
        fp32 scalar, before any coefficient
    """
    batch, seq, num_experts = scores.shape
    p = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    hits = torch.zeros_like(p).scatter(2, chosen, 1.0)  # (batch, seq, experts)
    if documents is None:
        return (p * hits.sum(1, keepdim=True)).sum() * (num_experts / (chosen.shape[2] * seq**2 * max(batch, 1)))
    real = documents >= 0
    starts = torch.ones_like(real)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # padding is number 0; there is room for as many numbers as tokens, so that the device need not be asked
    number = (starts & real).flatten().cumsum(0) * real.flatten()
    count = p.new_zeros(batch * seq + 1, num_experts).index_add(0, number, hits.flatten(0, 1))
    length = p.new_zeros(batch * seq + 1).index_add(0, number, p.new_ones(batch * seq))
    # sums of whole numbers are exact in any order, and each token fetches its document's
    share = torch.where(real[..., None], p, 0).flatten(0, 1) * count[number] / length[number, None].square()
    return share.sum() * (num_experts / chosen.shape[2]) / number.max().clamp(min=1)


def update_router_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """One balancing step in place: bias (experts,) rises by `rate` where counts (experts,) is below its mean, falls above."""
    with torch.no_grad():
        counts = counts.to(bias.dtype)
        bias.add_(torch.sign(counts.mean() - counts), alpha=rate)


def choose(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `alloy.ops.route`, which has checked its arguments."""
    tokens, num_experts = logits.shape
    logits = logits.to(wide(logits))
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    choice = scores.detach()
    if bias is not None:
        choice = choice + bias
    if top_groups < num_groups:
        by_group = choice.view(tokens, num_groups, num_experts // num_groups)
        kept = by_group.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1, sorted=False).indices
        dropped = torch.ones(tokens, num_groups, dtype=torch.bool, device=logits.device).scatter(1, kept, False)
        choice = by_group.masked_fill(dropped[..., None], -torch.inf).view(tokens, num_experts)
    chosen = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, chosen)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * scale, scores


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    """As `alloy.ops.moe_experts`, by a loop over the experts that were hit."""
    act = ACTIVATIONS[activation]
    total = torch.zeros(x.shape, dtype=wide(x), device=x.device)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        inner = x[rows] @ up[expert].T
        inner = act(inner) if gate is None else act(x[rows] @ gate[expert].T) * inner
        total = total.index_add(0, rows, (inner @ down[expert].T).to(total.dtype) * weights[rows, place, None])
    return total.to(x.dtype)


def step(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    shared_up: Tensor,
    shared_down: Tensor,
    shared_gate: Tensor | None,
    activation: str,
) -> Tensor:
    """As `alloy.ops.moe_step`, one after the other, each by its own op."""
    y = moe_experts(x, chosen, weights, up, down, gate, activation)
    return y + shared_expert(x, shared_up, shared_down, shared_gate, activation)


def shared_expert(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """One expert of all tokens: x (tokens, width), up and gate (ffn, width), down (width, ffn) -> (tokens, width)."""
    act = ACTIVATIONS[activation]
    inner = linear(x, up)
    return linear(act(inner) if gate is None else act(linear(x, gate)) * inner, down)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """As `alloy.ops.router_logits`."""
    kind = wide(x)
    return linear(x.to(kind), weight.to(kind))


backend.add("moe_route", "torch", choose)
backend.add("moe_route", "triton", "alloy.ops.triton.moe_route:moe_route")
backend.add("moe_experts", "torch", experts)
backend.add("moe_experts", "cpu", cpu.moe_experts)
backend.add("moe_experts", "triton", "alloy.ops.triton.moe_experts:moe_experts")
backend.add("moe_step", "torch", step)
backend.add("moe_step", "triton", "alloy.ops.triton.moe_experts:moe_step")
backend.add("router_logits", "torch", logits)
backend.add("router_logits", "triton", "alloy.ops.triton.moe_logits:router_logits")
