# pyright: basic, reportMissingImports=false
"""Experts of a few tokens: every (token, expert) pair streams its expert's weights once; nothing is sorted.

Two launches. The first gives each pair's hidden (pairs, ffn); the second sums each token's pairs in fp32, so that it needs
neither atomics nor a third.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.moe_gemm import act

# beyond these, tokens share so many experts that sorting them and reading each expert once wins
FEW_TOKENS = 4

tuning.register("moe_pairs_up", {"BN": 16, "BK": 128, "num_warps": 4}, {"BN": 8, "BK": 512, "num_warps": 4})
tuning.register("moe_pairs_down", {"BN": 4, "BK": 256, "num_warps": 4}, {"BN": 8, "BK": 128, "num_warps": 4})


def pairs_up(x: Tensor, chosen: Tensor, up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """Hidden of each pair, fp32 (tokens * top_k, ffn), for x (tokens, width) and chosen (tokens, top_k)."""
    _, ffn, width = up.shape
    config = dict(tuning.pick("moe_pairs_up", f"{ffn}x{width}"))
    out = torch.empty(chosen.numel(), ffn, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(ffn, config["BN"]), chosen.numel())
    pairs_up_kernel[grid](
        x, chosen.contiguous(), up, gate, out, x.stride(0), ffn, chosen.shape[1], width, ACTIVATION=activation, **config
    )
    return out


def pairs_down(hidden: Tensor, chosen: Tensor, weights: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of down hidden over each token's pairs, hidden fp32 (tokens * top_k, ffn): (tokens, width)."""
    tokens, top_k = chosen.shape
    _, width, ffn = down.shape
    config = dict(tuning.pick("moe_pairs_down", f"{width}x{ffn}"))
    out = down.new_empty(tokens, width)
    grid = (triton.cdiv(width, config["BN"]), tokens)
    pairs_down_kernel[grid](
        hidden, chosen.contiguous(), weights.contiguous(), down, out, width, top_k, ffn, **config
    )
    return out


@triton.jit
def pairs_up_kernel(
    x,
    chosen,
    up,
    gate,
    out,
    stride_x,
    F,
    top_k,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN rows of one pair's expert."""
    pair = tl.program_id(1)
    x += (pair // top_k) * stride_x
    expert = tl.load(chosen + pair)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    base = (expert * F + n[:, None]) * D
    acc = tl.zeros((BN, BK), tl.float32)
    acc_gate = tl.zeros((BN, BK), tl.float32)
    for k in tl.static_range(0, D, BK):
        at = k + tl.arange(0, BK)
        inside = (n < F)[:, None] & (at < D)[None, :]
        value = tl.load(x + at, mask=at < D, other=0).to(tl.float32)[None, :]
        acc += tl.load(up + base + at[None, :], mask=inside, other=0, eviction_policy="evict_first").to(tl.float32) * value
        if gate is not None:
            opened = tl.load(gate + base + at[None, :], mask=inside, other=0, eviction_policy="evict_first")
            acc_gate += opened.to(tl.float32) * value
    hidden = tl.sum(acc, 1)
    if gate is not None:
        hidden *= act(tl.sum(acc_gate, 1), ACTIVATION)
    else:
        hidden = act(hidden, ACTIVATION)
    tl.store(out + pair * F + n, hidden, mask=n < F)


@triton.jit
def pairs_down_kernel(
    hidden,
    chosen,
    weights,
    down,
    out,
    D,
    TOP_K: tl.constexpr,
    F: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN outputs of one token; the loads of a step are of all its experts."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, BK), tl.float32)
    for k in range(0, F, BK):
        at = k + tl.arange(0, BK)
        inside = (n < D)[:, None] & (at < F)[None, :]
        for j in tl.static_range(TOP_K):
            expert = tl.load(chosen + token * TOP_K + j)
            weight = tl.load(weights + token * TOP_K + j).to(tl.float32)
            value = tl.load(hidden + (token * TOP_K + j) * F + at, mask=at < F, other=0) * weight
            matrix = down + (expert * D + n[:, None]) * F + at[None, :]
            acc += tl.load(matrix, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32) * value[None, :]
    tl.store(out + token * D + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=n < D)
