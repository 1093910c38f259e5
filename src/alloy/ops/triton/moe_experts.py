# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Routed experts on the GPU: few tokens stream the weights of their experts, many are sorted and multiplied in blocks.

Reference, formulas and papers: `alloy.ops.moe`. The backward keeps what entered the activation, and never makes the
unweighted outputs of pairs: a routing weight's gradient is dot(hidden, down^T dy), from a product that is needed anyway.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import moe as reference
from alloy.ops.activation import ACTIVATIONS
from alloy.ops.triton.moe_gemm import align_rows, block_rows, hidden_gradients, product, up_product, weight_gradient
from alloy.ops.triton.moe_pairs import FEW_TOKENS, pairs_experts
from alloy.ops.triton.moe_plan import Plan, combine, empty_plan, gather, make_plan


def moe_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    """As `alloy.ops.moe_experts`."""
    if x.dtype == torch.float64:
        # for checks only
        return reference.experts(x, chosen, weights, up, down, gate, activation)
    _check(x, up, down, gate, activation)
    if x.shape[0] == 0:
        return x * weights.sum(1, keepdim=True).to(x.dtype)
    step = 16 // x.element_size()
    if up.shape[1] % step or up.shape[2] % step:
        # zeros up to whole 16 bytes change nothing: every activation of 0 is 0
        wide_gate = None if gate is None else _pad(gate, step)
        wide_x = F.pad(x, (0, -x.shape[1] % step))
        y = moe_experts(wide_x, chosen, weights, _pad(up, step), _pad(down, step), wide_gate, activation)
        return y[:, : x.shape[1]]
    given = (x, weights, up, down, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _experts_kept(x, chosen, weights, up, down, gate, activation)[0]
    return _experts(x, chosen, weights, up, down, gate, activation)


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
    activation: str,
) -> Tensor:
    """As `alloy.ops.moe_step`: two launches for few tokens."""
    shared = (shared_up, shared_down, shared_gate)
    few = 0 < x.shape[0] <= FEW_TOKENS and x.dtype != torch.float64
    if not few or not all(t is None or t.is_contiguous() for t in shared):
        return reference.step(x, chosen, weights, up, down, gate, *shared, activation)
    _check(x, up, down, gate, activation)
    return _step(x, chosen, weights, up, down, gate, *shared, activation)


def _pad(matrices: Tensor, step: int) -> Tensor:
    """Rows and columns up to multiples of `step`."""
    return F.pad(matrices, (0, -matrices.shape[2] % step, 0, -matrices.shape[1] % step))


def _check(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str) -> None:
    experts, ffn, width = up.shape
    if activation not in ACTIVATIONS:
        raise ValueError(f'moe_experts: activation = "{activation}"; known: {", ".join(ACTIVATIONS)}')
    if x.stride(-1) != 1:
        raise ValueError(f"moe_experts: x has strides {x.stride()}; its last dimension must be contiguous")
    shapes = {"up": (experts, ffn, width), "down": (experts, width, ffn), "gate": (experts, ffn, width)}
    for name, t in (("up", up), ("down", down), ("gate", gate)):
        if t is not None and (t.shape != shapes[name] or t.dtype != x.dtype or not t.is_contiguous()):
            raise ValueError(
                f"moe_experts: {name} is {tuple(t.shape)} {t.dtype}, strides {t.stride()}; "
                f"needs {shapes[name]} {x.dtype}, contiguous"
            )


@torch.library.custom_op("alloy::moe_experts", mutates_args=())
def _experts(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    """Without gradients."""
    if x.shape[0] <= FEW_TOKENS:
        return pairs_experts(x, chosen, weights, up, down, gate, activation)
    return _forward(x, chosen, weights, up, down, gate, activation, keep=False)[0]


@_experts.register_fake
def _(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("alloy::moe_step", mutates_args=())
def _step(
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
    return pairs_experts(x, chosen, weights, up, down, gate, activation, shared_up, shared_down, shared_gate)


@_step.register_fake
def _(
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
    return x.new_empty(x.shape)


@torch.library.custom_op("alloy::moe_experts_kept", mutates_args=())
def _experts_kept(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> list[Tensor]:
    """With what the backward needs: y, up x and gate x of the sorted pairs, and the plan."""
    y, inner, opened, plan = _forward(x, chosen, weights, up, down, gate, activation, keep=True)
    return [y, inner, opened, *plan]


@_experts_kept.register_fake
def _(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, activation: str
) -> list[Tensor]:
    plan = empty_plan(chosen, up.shape[0], block_rows(chosen.numel(), up.shape[0], x.dtype), align_rows(x))
    kept = (plan.order.numel(), up.shape[1])
    return [x.new_empty(x.shape), x.new_empty(kept), x.new_empty(0 if gate is None else kept), *plan]


def _forward(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """y, up x and gate x of the sorted pairs (empty without `keep`), and the plan."""
    tokens, top_k = chosen.shape
    block = block_rows(chosen.numel(), up.shape[0], x.dtype)
    plan = make_plan(chosen.contiguous(), up.shape[0], block, align_rows(x) if keep else 1)
    hidden, inner, opened = up_product(x, plan, block, top_k, up, gate, activation, keep)
    rows = product(hidden, down, plan, block, transposed=True)
    return combine(rows, plan, weights.contiguous(), (tokens, top_k), x.dtype), inner, opened, plan


@torch.library.custom_op("alloy::moe_experts_backward", mutates_args=())
def _experts_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    kept: list[Tensor],
    activation: str,
    dx_needed: bool,
    experts_needed: bool,
) -> list[Tensor]:
    """dx, dweights, dup, ddown, dgate; empty what is not needed."""
    inner, opened, plan = kept[0], kept[1], Plan(*kept[2:])
    tokens, top_k = weights.shape
    block = block_rows(weights.numel(), up.shape[0], x.dtype)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dpairs = gather(dy, plan, top_k)
    dhidden = product(dpairs, down, plan, block, transposed=False)
    dinner, dopened, hidden, dweights = hidden_gradients(dhidden, inner, opened, weights.contiguous(), plan, activation)
    dx, dup, ddown, dgate = (x.new_empty(0) for _ in range(4))
    if experts_needed:
        ddown = weight_gradient(dpairs, hidden, plan, down)
        # the rows of x take the place of what is done with
        del dpairs, hidden
        rows = gather(x, plan, top_k)
        dup = weight_gradient(dinner, rows, plan, up)
        dgate = dgate if gate is None else weight_gradient(dopened, rows, plan, gate)
        del rows
    if dx_needed:
        rows = product(dinner, up, plan, block, transposed=False)
        more = None if gate is None else product(dopened, gate, plan, block, transposed=False)
        dx = combine(rows, plan, None, (tokens, top_k), x.dtype, more)
    return [dx, dweights, dup, ddown, dgate]


@_experts_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    kept: list[Tensor],
    activation: str,
    dx_needed: bool,
    experts_needed: bool,
) -> list[Tensor]:
    def empty(like: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(0 if like is None or not needed else like.shape)

    return [
        empty(x, dx_needed),
        weights.new_empty(weights.shape),
        empty(up, experts_needed),
        empty(down, experts_needed),
        empty(gate, experts_needed),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, weights, up, down, gate, ctx.activation = inputs
    ctx.save_for_backward(x, weights, up, down, gate, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 7
    x, weights, up, down, gate, *kept = ctx.saved_tensors
    need_x, _, _, *need_experts, _ = ctx.needs_input_grad
    dx, dweights, dup, ddown, dgate = _experts_backward(
        grads[0], x, weights, up, down, gate, kept, ctx.activation, need_x, any(need_experts)
    )
    experts = (dup, ddown, None if gate is None else dgate) if any(need_experts) else (None,) * 3
    return dx if need_x else None, None, dweights, *experts, None


_experts_kept.register_autograd(_backward, setup_context=_setup)
