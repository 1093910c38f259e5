# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Experts of a few tokens: every (token, expert) pair streams its expert's weights once; nothing is sorted.

Two launches. The first gives each pair's hidden values; the second sums each token's pairs in fp32, so that it needs
neither atomics nor a third. A shared expert, which every token takes with weight 1, rides along in both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import num_blocks
from alloy.ops.triton.moe_gemm import act

# beyond these, tokens share so many experts that sorting them and reading each expert once wins
FEW_TOKENS = 2

tuning.register(
    "moe_pairs_up",
    {"BN": 4, "BK": 512, "num_warps": 2},
    {"BN": 8, "BK": 256, "num_warps": 4},
    {"BN": 4, "BK": 256, "num_warps": 1},
    {"BN": 4, "BK": 256, "num_warps": 2},
    {"BN": 8, "BK": 512, "num_warps": 4},
)
tuning.register(
    "moe_pairs_down",
    {"BN": 4, "BK": 512, "num_warps": 2},
    {"BN": 2, "BK": 512, "num_warps": 1},
    {"BN": 2, "BK": 512, "num_warps": 2},
    {"BN": 4, "BK": 512, "num_warps": 4},
    {"BN": 2, "BK": 256, "num_warps": 1},
    {"BN": 1, "BK": 2048, "num_warps": 4},
)


def pairs_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    activation: str,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """As `alloy.ops.moe_experts`, plus the expert shared_up (shared_ffn, width), shared_down (width, shared_ffn) if given."""
    chosen = chosen.contiguous()
    hidden, shared = pairs_up(x, chosen, up, gate, activation, shared_up, shared_gate)
    return pairs_down(hidden, chosen, weights, down, shared, shared_down)


def pairs_up(
    x: Tensor,
    chosen: Tensor,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
    shared_up: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hidden values fp32 of each pair (tokens * top_k, ffn) and of the shared expert (tokens, shared_ffn)."""
    tokens, top_k = chosen.shape
    _, ffn, width = up.shape
    config = tuning.pick("moe_pairs_up", f"{ffn}x{width}-{tokens}")
    out = torch.empty(tokens * top_k, ffn, dtype=torch.float32, device=x.device)
    shared_ffn = 0 if shared_up is None else shared_up.shape[0]
    shared = None if shared_up is None else out.new_empty(tokens, shared_ffn)
    bn = config["BN"]
    grid = (tokens * (top_k * num_blocks(ffn, bn) + num_blocks(shared_ffn, bn)),)
    pairs_up_kernel[grid](
        x,
        chosen,
        up,
        gate,
        out,
        shared_up,
        shared_gate,
        shared,
        x.stride(0),
        tokens,
        ffn,
        shared_ffn,
        TOP_K=top_k,
        D=width,
        ACTIVATION=activation,
        **config,
    )
    return out, shared


def pairs_down(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    down: Tensor,
    shared: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """Sum of each token's pairs of hidden (tokens * top_k, ffn) through `down`, weighted, and of shared: (tokens, width)."""
    tokens, top_k = chosen.shape
    _, width, ffn = down.shape
    config = tuning.pick("moe_pairs_down", f"{width}x{ffn}-{tokens}")
    out = down.new_empty(tokens, width)
    shared_ffn = 0 if shared is None else shared.shape[1]
    grid = (num_blocks(width, config["BN"]), tokens)
    pairs_down_kernel[grid](
        hidden,
        chosen,
        weights.contiguous(),
        down,
        shared,
        shared_down,
        out,
        width,
        TOP_K=top_k,
        F=ffn,
        SHARED=shared_ffn,
        PARTS=num_blocks(shared_ffn, ffn),
        **config,
    )
    return out


@triton.jit
def pairs_up_kernel(
    x,
    chosen,
    up,
    gate,
    out,
    shared_up,
    shared_gate,
    shared,
    stride_x,
    tokens,
    F,
    shared_F,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN rows of one pair's expert, or of the shared expert for one token; these come last."""
    program = tl.program_id(0)
    stretches = tl.cdiv(F, BN)
    pairs = tokens * TOP_K
    pair = program // stretches
    token = pair // TOP_K
    first = program % stretches * BN
    rows = F
    matrix = tl.load(chosen + pair, mask=pair < pairs, other=0) * F * D
    up += matrix
    if gate is not None:
        gate += matrix
    out += pair * F
    if shared_up is not None:  # noqa: SIM102 (the first is decided when it is compiled)
        if pair >= pairs:
            program -= pairs * stretches
            stretches = tl.cdiv(shared_F, BN)
            token = program // stretches
            first = program % stretches * BN
            rows = shared_F
            up = shared_up
            if gate is not None:
                gate = shared_gate
            out = shared + token * shared_F
    n = first + tl.arange(0, BN)
    base = n[:, None] * D
    acc = tl.zeros((BN, BK), tl.float32)
    acc_gate = tl.zeros((BN, BK), tl.float32)
    for k in tl.static_range(0, D, BK):
        at = k + tl.arange(0, BK)
        inside = (n < rows)[:, None] & (at < D)[None, :]
        value = tl.load(x + token * stride_x + at, mask=at < D, other=0).to(tl.float32)[None, :]
        opened = tl.load(up + base + at[None, :], mask=inside, other=0, eviction_policy="evict_first")
        acc += opened.to(tl.float32) * value
        if gate is not None:
            opened = tl.load(gate + base + at[None, :], mask=inside, other=0, eviction_policy="evict_first")
            acc_gate += opened.to(tl.float32) * value
    hidden = tl.sum(acc, 1)
    if gate is not None:
        hidden *= act(tl.sum(acc_gate, 1), ACTIVATION)
    else:
        hidden = act(hidden, ACTIVATION)
    tl.store(out + n, hidden, mask=n < rows)


@triton.jit
def pairs_down_kernel(
    hidden,
    chosen,
    weights,
    down,
    shared,
    shared_down,
    out,
    D,
    TOP_K: tl.constexpr,
    F: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN outputs of one token; the loads of a step are of all its experts, the shared one cut in `PARTS`."""
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
        for j in tl.static_range(PARTS):
            column = j * F + at
            real = (at < F) & (column < SHARED)
            value = tl.load(shared + token * SHARED + column, mask=real, other=0)
            matrix = shared_down + n[:, None] * SHARED + column[None, :]
            inside_shared = (n < D)[:, None] & real[None, :]
            loaded = tl.load(matrix, mask=inside_shared, other=0, eviction_policy="evict_first")
            acc += loaded.to(tl.float32) * value[None, :]
    tl.store(out + token * D + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=n < D)
