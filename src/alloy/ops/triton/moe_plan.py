# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Token-expert pairs in the order of their experts: a counting sort, the rows it moves, and the sum back over tokens.

A pair is (token, its j-th expert), numbered token * top_k + j. Sorted stably by expert, the pairs of expert e are the rows
[starts[e], starts[e + 1]). A matrix product takes them in blocks of at most `block` rows that never span two experts.
Sizes follow from shapes alone: the block table has room for the most blocks there can be, and the device knows how many
there are. Nothing is synchronised, counted by atomics or left to chance, so that results repeat bit by bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton.elementary import num_blocks, power_of_2

# most programs that share a sort, pairs below which one program does it alone
_PROGRAMS = 128
_ALONE = 512
# rows that a program of `gather` moves
_ROWS = 4


class Plan(NamedTuple):
    """Where pairs lie, all int32: as tensors, so that it can be an output of an op.

    `order` (rows,): the pair of each row, -1 where rows fill up an expert's share to a multiple of `align`; `place`
    (pairs,): the row of each pair; `starts` (experts + 1,): the first row of each expert; `block_starts` (experts + 1,):
    its first block; `blocks` (room,): the expert of each block. Without alignment rows are as many as pairs.
    """

    order: Tensor
    place: Tensor
    starts: Tensor
    block_starts: Tensor
    blocks: Tensor


def empty_plan(chosen: Tensor, num_experts: int, block: int, align: int) -> Plan:
    """A plan's tensors, unwritten, for chosen (tokens, top_k)."""
    pairs = chosen.numel()
    most = min(pairs, num_experts)
    rows = pairs + most * (align - 1)
    sizes = (rows, pairs, num_experts + 1, num_experts + 1, rows // block + most)
    return Plan(*(torch.empty(n, dtype=torch.int32, device=chosen.device) for n in sizes))


def make_plan(chosen: Tensor, num_experts: int, block: int, align: int = 1) -> Plan:
    """Sort the pairs of chosen int64 (tokens, top_k), each in [0, num_experts), with blocks of `block` rows."""
    plan = empty_plan(chosen, num_experts, block, align)
    if align > 1:
        plan.order.fill_(-1)
    pairs, width = chosen.numel(), power_of_2(num_experts)
    programs = 1 if pairs <= _ALONE else min(_PROGRAMS, num_blocks(pairs, _ALONE))
    # one program has a multiprocessor to itself
    num_warps = 8 if programs == 1 else 4
    step = max(16, 2048 * num_warps // width)
    share = num_blocks(num_blocks(pairs, programs), step) * step
    counts = torch.empty(programs, width, dtype=torch.int32, device=chosen.device)
    sizes = {"WIDTH": width, "STEP": step, "num_warps": num_warps}
    if programs > 1:
        count_kernel[(programs,)](chosen, counts, pairs, share, **sizes)
    place_kernel[(programs,)](
        chosen,
        counts,
        *plan,
        pairs,
        share,
        programs,
        num_experts,
        plan.blocks.numel(),
        BLOCK=block,
        ALIGN=align,
        **sizes,
    )
    return plan


def gather(x: Tensor, plan: Plan, top_k: int) -> Tensor:
    """x (tokens, width) as the rows of a plan: (rows, width), zero where a row has no pair."""
    out = x.new_empty(plan.order.numel(), x.shape[1])
    width = min(1024, power_of_2(x.shape[1]))
    grid = (num_blocks(out.shape[1], width) * num_blocks(out.shape[0], _ROWS),)
    gather_kernel[grid](x, plan.order, out, *out.shape, x.stride(0), top_k, ROWS=_ROWS, WIDTH=width)
    return out


def combine(
    rows: Tensor,
    plan: Plan,
    weights: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    more: Tensor | None = None,
) -> Tensor:
    """Sum of each token's rows (rows, width), times weights (tokens, top_k) if given, and of its rows of `more`: (tokens, width).

    `shape` is (tokens, top_k).
    """
    tokens, top_k = shape
    out = torch.empty(tokens, rows.shape[1], dtype=dtype, device=rows.device)
    width = min(1024, power_of_2(rows.shape[1]))
    grid = (num_blocks(rows.shape[1], width) * tokens,)
    combine_kernel[grid](rows, more, plan.place, weights, out, rows.shape[1], TOP_K=top_k, WIDTH=width)
    return out


@triton.jit
def count_kernel(chosen, counts, pairs, share, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """How many of each program's `share` pairs go to each expert."""
    program = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for first in range(program * share, (program + 1) * share, STEP):
        pair = first + tl.arange(0, STEP)
        expert = tl.load(chosen + pair, mask=pair < pairs, other=-1).to(tl.int32)
        total += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts + program * WIDTH + experts, total)


@triton.jit
def place_kernel(
    chosen,
    counts,
    order,
    place,
    starts,
    block_starts,
    blocks,
    pairs,
    share,
    programs,
    num_experts,
    room,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """The rows of each program's pairs: after all pairs of earlier experts and this expert's pairs of earlier programs."""
    program = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    row = tl.zeros((WIDTH,), tl.int32)
    if programs == 1:
        for first in range(0, pairs, STEP):
            pair = first + tl.arange(0, STEP)
            expert = tl.load(chosen + pair, mask=pair < pairs, other=-1).to(tl.int32)
            total += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    else:
        for first in range(0, programs, STEP):
            other = (first + tl.arange(0, STEP))[:, None]
            count = tl.load(counts + other * WIDTH + experts[None, :], mask=other < programs, other=0)
            total += tl.sum(count, 0)
            row += tl.sum(tl.where(other < program, count, 0), 0)
    total = (total + ALIGN - 1) // ALIGN * ALIGN
    row += tl.cumsum(total, 0) - total
    num_blocks = (total + BLOCK - 1) // BLOCK
    block_ends = tl.cumsum(num_blocks, 0)
    if program == 0:
        ends = tl.cumsum(total, 0)
        real = experts < num_experts
        tl.store(starts + experts, ends - total, mask=real)
        tl.store(starts + experts + 1, ends, mask=experts == num_experts - 1)
        tl.store(block_starts + experts, block_ends - num_blocks, mask=real)
        tl.store(block_starts + experts + 1, block_ends, mask=experts == num_experts - 1)
    for first in range(program * STEP, room, programs * STEP):
        block = first + tl.arange(0, STEP)
        expert = tl.sum((block[:, None] >= block_ends[None, :]).to(tl.int32), 1)
        tl.store(blocks + block, expert, mask=block < room)
    for first in range(program * share, (program + 1) * share, STEP):
        pair = first + tl.arange(0, STEP)
        expert = tl.load(chosen + pair, mask=pair < pairs, other=-1).to(tl.int32)
        hit = (expert[:, None] == experts[None, :]).to(tl.int32)
        at = tl.sum(hit * (row[None, :] + tl.cumsum(hit, 0) - 1), 1)
        tl.store(order + at, pair, mask=pair < pairs)
        tl.store(place + pair, at, mask=pair < pairs)
        row += tl.sum(hit, 0)


@triton.jit
def gather_kernel(x, order, out, rows, width, stride_x, top_k, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One stretch of a few rows."""
    stretches = tl.cdiv(width, WIDTH)
    row = tl.program_id(0) // stretches * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0) % stretches * WIDTH + tl.arange(0, WIDTH)
    pair = tl.load(order + row, mask=row < rows, other=-1)
    token = (pair // top_k).to(tl.int64)
    inside = (at < width)[None, :]
    value = tl.load(x + token[:, None] * stride_x + at[None, :], mask=inside & (pair >= 0)[:, None], other=0)
    inside = inside & (row < rows)[:, None]
    tl.store(out + row.to(tl.int64)[:, None] * width + at[None, :], value, mask=inside)


@triton.jit
def combine_kernel(rows, more, place, weights, out, width, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """One stretch of one token, whose rows are summed in fp32."""
    stretches = tl.cdiv(width, WIDTH)
    token = tl.program_id(0) // stretches
    at = tl.program_id(0) % stretches * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    total = tl.zeros((WIDTH,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + j).to(tl.int64)
        value = tl.load(rows + row * width + at, mask=inside, other=0).to(tl.float32)
        if more is not None:
            value += tl.load(more + row * width + at, mask=inside, other=0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * TOP_K + j).to(tl.float32)
        total += value
    tl.store(out + token.to(tl.int64) * width + at, total.to(out.dtype.element_ty), mask=inside)
