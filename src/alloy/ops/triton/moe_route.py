# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Choosing experts in one launch: scores, the choice within the best groups, and the weights, one program a token.

Reference and papers: `alloy.ops.moe.route`. Of equal choices the lowest id is taken; what is NaN is taken last.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops import moe as reference
from alloy.ops.triton.elementary import power_of_2

# the least choice of a real expert: what lies below it (NaN too) counts as this, and what was taken or dropped as less
_WORST = tl.constexpr(-3.0e38)


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `alloy.ops.route`."""
    if logits.dtype == torch.float64:
        # for checks only
        return reference.choose(logits, bias, top_k, scoring, num_groups, top_groups, normalize, scale)
    return _route(logits, bias, top_k, scoring, num_groups, top_groups, normalize, scale)


@torch.library.custom_op("alloy::moe_route", mutates_args=())
def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    scores = logits.new_empty(tokens, experts, dtype=torch.float32)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            bias,
            chosen,
            weights,
            scores,
            logits.stride(0),
            scale,
            TOP_K=top_k,
            DEEP=power_of_2(top_k),
            SOFTMAX=scoring == "softmax",
            GROUPS=num_groups,
            TOP_GROUPS=top_groups,
            SIZE=experts // num_groups,
            NORMALIZE=normalize,
            ROWS=power_of_2(num_groups),
            COLS=power_of_2(experts // num_groups),
            num_warps=1,
        )
    return chosen, weights, scores


@_route.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens, top_k, dtype=torch.float32),
        logits.new_empty(logits.shape, dtype=torch.float32),
    )


@torch.library.custom_op("alloy::moe_route_backward", mutates_args=())
def _route_backward(
    dweights: Tensor | None,
    dscores: Tensor | None,
    chosen: Tensor,
    scores: Tensor,
    scoring: str,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of logits (tokens, experts), in their `dtype`."""
    tokens, experts = scores.shape
    top_k = chosen.shape[1]
    out = torch.empty_like(scores, dtype=dtype)
    if tokens:
        route_backward_kernel[(tokens,)](
            None if dweights is None else dweights.contiguous(),
            None if dscores is None else dscores.contiguous(),
            chosen,
            scores,
            out,
            experts,
            scale,
            TOP_K=top_k,
            DEEP=power_of_2(top_k),
            SOFTMAX=scoring == "softmax",
            NORMALIZE=normalize,
            COLS=power_of_2(experts),
            num_warps=1,
        )
    return out


@_route_backward.register_fake
def _(
    dweights: Tensor | None,
    dscores: Tensor | None,
    chosen: Tensor,
    scores: Tensor,
    scoring: str,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(scores, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, scoring, _, _, normalize, scale = inputs
    chosen, _, scores = output
    ctx.save_for_backward(chosen, scores)
    ctx.options = (scoring, normalize, scale, logits.dtype)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dchosen: Tensor | None, dweights: Tensor | None, dscores: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dweights is None and dscores is None:
        return (None,) * 8
    return _route_backward(dweights, dscores, *ctx.saved_tensors, *ctx.options), *(None,) * 7


_route.register_autograd(_backward, setup_context=_setup)


@triton.jit
def route_kernel(
    logits,
    bias,
    chosen,
    weights,
    scores,
    stride_logits,
    scale,
    TOP_K: tl.constexpr,
    DEEP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One token; its experts are a matrix of groups (ROWS, COLS)."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, ROWS)[:, None]
    member = tl.arange(0, COLS)[None, :]
    real = (group < GROUPS) & (member < SIZE)
    expert = group * SIZE + member
    x = tl.load(logits + token * stride_logits + expert, mask=real, other=-float("inf")).to(tl.float32)
    if SOFTMAX:
        x = tl.exp(x - tl.max(tl.max(x, 1), 0))
        score = x / tl.sum(tl.sum(x, 1), 0)
    else:
        score = 1 / (1 + tl.exp(-x))
    tl.store(scores + token * (GROUPS * SIZE) + expert, score, mask=real)
    choice = score
    if bias is not None:
        choice += tl.load(bias + expert, mask=real, other=0)
    choice = tl.where(real, tl.where(choice > _WORST, choice, _WORST), -float("inf"))
    if TOP_GROUPS < GROUPS:
        best = tl.max(choice, 1, keep_dims=True)
        first = tl.min(tl.where(choice == best, member, COLS), 1, keep_dims=True)
        worth = best + tl.max(tl.where(member == first, -float("inf"), choice), 1, keep_dims=True)
        worth = tl.where(group < GROUPS, tl.where(worth > _WORST, worth, _WORST), -float("inf"))
        kept = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            taken = tl.min(tl.where(worth == tl.max(worth, 0, keep_dims=True), group, ROWS), 0, keep_dims=True)
            kept = kept | (group == taken)
            worth = tl.where(group == taken, -float("inf"), worth)
        choice = tl.where(kept, choice, -float("inf"))
    j = tl.arange(0, DEEP)
    ids = tl.zeros((DEEP,), tl.int32)
    picked = tl.zeros((DEEP,), tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(tl.max(choice, 1), 0)
        taken = tl.min(tl.min(tl.where(choice == best, expert, ROWS * COLS), 1), 0)
        hit = expert == taken
        ids = tl.where(j == i, taken, ids)
        picked = tl.where(j == i, tl.sum(tl.sum(tl.where(hit & real, score, 0), 1), 0), picked)
        choice = tl.where(hit, -float("inf"), choice)
    if NORMALIZE:
        picked = picked / (tl.sum(picked, 0) + 1e-20)
    tl.store(chosen + token * TOP_K + j, ids.to(tl.int64), mask=j < TOP_K)
    tl.store(weights + token * TOP_K + j, picked * scale, mask=j < TOP_K)


@triton.jit
def route_backward_kernel(
    dweights,
    dscores,
    chosen,
    scores,
    out,
    experts,
    scale,
    TOP_K: tl.constexpr,
    DEEP: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COLS: tl.constexpr,
):
    """One token: the weights' gradient goes to the scores of the chosen, then all scores' to the logits."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, COLS)
    real = expert < experts
    score = tl.load(scores + token * experts + expert, mask=real, other=0)
    gradient = tl.zeros((COLS,), tl.float32)
    if dscores is not None:
        gradient += tl.load(dscores + token * experts + expert, mask=real, other=0)
    if dweights is not None:
        j = tl.arange(0, DEEP)
        ids = tl.load(chosen + token * TOP_K + j, mask=j < TOP_K, other=0)
        picked = tl.load(scores + token * experts + ids, mask=j < TOP_K, other=0)
        each = tl.load(dweights + token * TOP_K + j, mask=j < TOP_K, other=0).to(tl.float32) * scale
        total = tl.sum(picked, 0) + 1e-20
        shared = 0.0
        if NORMALIZE:
            shared = tl.sum(each * picked, 0) / (total * total)
        for i in tl.static_range(TOP_K):
            taken = tl.load(chosen + token * TOP_K + i)
            value = tl.load(dweights + token * TOP_K + i).to(tl.float32) * scale
            if NORMALIZE:
                value = value / total - shared
            gradient += tl.where(expert == taken, value, 0)
    if SOFTMAX:
        gradient = score * (gradient - tl.sum(tl.where(real, gradient * score, 0), 0))
    else:
        gradient = gradient * score * (1 - score)
    tl.store(out + token * experts + expert, gradient.to(out.dtype.element_ty), mask=real)
