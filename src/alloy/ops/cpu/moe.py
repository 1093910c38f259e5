"""Routed experts for CPU cores: token-expert pairs sorted by expert, one matmul an expert on slices of the weights, and a
weighted sum that reads each pair once. The backward writes each expert's gradient in its place; nothing of the size of
all experts is made but the gradients themselves.

Reference, formulas and papers: `alloy.ops.moe`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops.activation import ACTIVATIONS
from alloy.ops.cpu.linear import FEW_WEIGHTS, PARTS, is_plain, linear
from alloy.ops.precision import wide

# pairs an expert, below which reading the weights is what takes time
_FEW = 4


def moe_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    """As `alloy.ops.moe_experts`."""
    given = (x, weights, up, down, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Experts.apply(x, chosen, weights, up, down, gate, activation)
    if x.shape[0] == 1:
        return _one_token(x, chosen, weights, up, down, gate, activation)
    return _forward(Pairs(chosen, up.shape[0]), x, weights, up, down, gate, activation)[0]


class Pairs:
    """Token-expert pairs in the order of their experts."""

    def __init__(self, chosen: Tensor, num_experts: int) -> None:
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        self.order = order
        self.token = order.div(chosen.shape[1], rounding_mode="floor")  # (pairs,)
        self.place = place.view(chosen.shape)  # (tokens, top_k), where a token's pairs are
        # (expert, its slice of the pairs), for experts that were hit
        self.slices: list[tuple[int, slice]] = []
        start = 0
        for expert, count in enumerate(flat.bincount(minlength=num_experts).tolist()):
            if count:
                self.slices.append((expert, slice(start, start + count)))
            start += count

    def add_up(self, pairs: Tensor, weights: Tensor | None) -> Tensor:
        """Sum over each token's pairs (pairs, width), times weights (tokens, top_k) if given: (tokens, width), wide."""
        kind = wide(pairs)
        weights = None if weights is None else weights.to(kind)
        return F.embedding_bag(self.place, pairs.to(kind), per_sample_weights=weights, mode="sum")

    def linear(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows (pairs, inputs) through each pair's expert of weights (experts, outputs, inputs): (pairs, outputs)."""
        if len(rows) < _FEW * len(self.slices):
            return torch.cat([linear(rows[part], weights[expert]) for expert, part in self.slices])
        return self.multiply(rows, weights.transpose(1, 2))

    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """rows (pairs, k) times each pair's expert of matrices (experts, k, m): (pairs, m)."""
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        for expert, part in self.slices:
            torch.mm(rows[part], matrices[expert], out=out[part])
        return out

    def outer(self, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """Gradient of like (experts, m, k): sum over an expert's pairs of left (pairs, m) outer right (pairs, k)."""
        out = torch.empty_like(like) if len(self.slices) == like.shape[0] else torch.zeros_like(like)
        for expert, part in self.slices:
            torch.mm(left[part].T, right[part], out=out[expert])
        return out


def _one_token(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    """Decode of a single row: each weight is read once, where it lies, and nothing is sorted."""
    act = ACTIVATIONS[activation]
    experts = chosen[0].tolist()
    same = [x] * len(experts)
    inner = _each(same, experts, up)  # (top_k, ffn)
    hidden = act(inner) if gate is None else act(_each(same, experts, gate)) * inner
    y = _each(hidden.split(1), experts, down).to(wide(x))
    return torch.mm(weights.to(y.dtype), y).to(x.dtype)


def _each(rows: Sequence[Tensor], experts: Sequence[int], matrices: Tensor) -> Tensor:
    """Row i (1, inputs) through expert i of matrices (experts, outputs, inputs): (rows, outputs)."""
    outputs, inputs = matrices.shape[1:]
    if not is_plain(rows[0], matrices) or outputs % PARTS or outputs * inputs < FEW_WEIGHTS:
        return torch.cat([linear(row, matrices[expert]) for row, expert in zip(rows, experts, strict=True)])
    # as `linear` does for one row, without its questions for each
    parts = matrices.view(-1, PARTS, outputs // PARTS, inputs)
    products = [
        torch.bmm(parts[expert], row.t().expand(PARTS, -1, -1)) for row, expert in zip(rows, experts, strict=True)
    ]
    return torch.cat(products).view(len(rows), outputs)


def _forward(
    pairs: Pairs, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, up x of each pair, gate x of each pair)."""
    act = ACTIVATIONS[activation]
    rows = x.index_select(0, pairs.token)
    inner = pairs.linear(rows, up)
    opened = None if gate is None else pairs.linear(rows, gate)
    hidden = act(inner) if opened is None else act(opened) * inner
    y = pairs.add_up(pairs.linear(hidden, down), weights)
    return y.to(x.dtype), inner, opened


class _Experts(torch.autograd.Function):
    """Keeps x and the values before the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None,
        activation: str,
    ) -> Tensor:
        y, inner, opened = _forward(Pairs(chosen, up.shape[0]), x, weights, up, down, gate, activation)
        ctx.save_for_backward(x, chosen, weights, up, down, gate, inner, opened)
        ctx.activation = activation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, chosen, weights, up, down, gate, inner, opened = ctx.saved_tensors
        act = ACTIVATIONS[ctx.activation]
        pairs = Pairs(chosen, up.shape[0])
        weight = weights.flatten()[pairs.order][:, None]  # (pairs, 1)
        before = (inner if opened is None else opened).detach().requires_grad_()
        with torch.enable_grad():
            activated = act(before)
        hidden = activated.detach() if opened is None else activated.detach() * inner
        dpairs = dy.index_select(0, pairs.token)
        # the gradient of what enters `down`, before the routing weight
        dhidden = pairs.multiply(dpairs, down)
        dweights = (dhidden * hidden).sum(-1, dtype=wide(x))[pairs.place]
        dhidden.mul_(weight)
        ddown = pairs.outer(dpairs, hidden * weight.to(hidden.dtype), down)
        dinner = dhidden if opened is None else dhidden * activated.detach()
        through = dhidden if opened is None else dhidden * inner
        (dbefore,) = torch.autograd.grad(activated, before, through)
        rows = x.index_select(0, pairs.token)
        dinner = dbefore if opened is None else dinner
        drows = pairs.multiply(dinner, up)
        dup = pairs.outer(dinner, rows, up)
        dgate = None
        if gate is not None:
            drows += pairs.multiply(dbefore, gate)
            dgate = pairs.outer(dbefore, rows, gate)
        dx = pairs.add_up(drows, None).to(x.dtype)
        return dx, None, dweights.to(weights.dtype), dup, ddown, dgate, None
