# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""States entering chunks and their gradients, for the backward of the SSD scan.

Legend as in `alloy.ops.ssd`, and l inclusive sums of d * A inside a chunk (`Prep.logs` * ln 2), l_Q the last of them:
    forward   S <- exp(l_Q) S + sum_j exp(l_Q - l_j) d_j x_j (outer) B_j
    reversed  G <- exp(l_Q) G + sum_i exp(l_i) dy_i (outer) C_i
One program walks the chunks of one segment of the sequence with a tile of one head's state on chip in fp32, in two parts of
P0 and P1 rows: head_dim 80 is 64 + 16, so that nothing is padded. Before each chunk's update it writes the carry in the
inputs' dtype: S as it enters the chunk, G as it comes back to the chunk's end.

`starts` comes first: all segments at once from a zero state, then a sum over the segments. With their starts known, segments
can be differentiated one by one, last first, and the carries of one segment are all that is kept.
"""

import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton.elementary import num_blocks, power_of_2
from alloy.ops.triton.ssd_prep import Prep
from alloy.ops.triton.tuning import Config


def tiles(head_dim: int) -> tuple[int, int]:
    """Two powers of two of at least 16 (the second may be 0) that cover head_dim with little behind it."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(16, power_of_2(rest)) if rest > 0 else 0


def starts(
    x: Tensor, B: Tensor, prep: Prep, h0: Tensor | None, out: Tensor, first: int, rest: int, config: Config
) -> None:
    """States at the start of every segment but the first.

    Args:
        x: (batch, seq, heads, head_dim)
        B: (batch, seq, groups, state)
        prep: of x's tokens
        h0: (batch, heads, head_dim, state) or None
        out: fp32 (batch, segments - 1, heads, head_dim, state), contiguous in its last three dims
        first: chunks of the first segment
        rest: chunks of each other segment
        config: `chunk`, and of this kernel `start_tile`, `start_warps`, `start_stages`
    """
    batch, seq, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    count = out.shape[1]
    through = out.new_empty(batch, count, heads)
    tile = min(config["start_tile"], max(16, power_of_2(state)))
    p0, p1 = tiles(head_dim)
    _local[(num_blocks(state, tile) * heads, count, batch)](
        x, B, prep.d, prep.logs, prep.segments, prep.lengths, out, through,
        seq, prep.d.shape[2], heads, groups, first, rest, *x.stride()[:3], *B.stride()[:3], *out.stride()[:2],
        HEAD_DIM=head_dim, STATE=state, HAS_DOCUMENTS=prep.segments is not None,
        CHUNK=config["chunk"], P0=p0, P1=p1, TILE=tile, PRECISION=precision(x),
        num_warps=config["start_warps"], num_stages=config["start_stages"],
    )  # fmt: skip
    block = 1024
    _join[(num_blocks(head_dim * state, block), heads, batch)](
        h0, out, through, count, head_dim * state, *(h0.stride()[:2] if h0 is not None else (0, 0)), *out.stride()[:2],
        HAS_H0=h0 is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def carries(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, prep: Prep, start: Tensor | None, slope: Tensor, before: Tensor,
    after: Tensor, first: int, config: Config,
) -> None:  # fmt: skip
    """States before, and gradients of the states behind, every chunk of one segment.

    Args:
        x: (batch, seq, heads, head_dim), like dy
        dy: gradient of the scan's y
        B: (batch, seq, groups, state), like C
        C: as B
        prep: of x's tokens
        start: (batch, heads, head_dim, state), the state before the segment; None: zero
        slope: fp32, shaped like start: gradient of the state behind the segment, replaced by that of the state before it
        before: (batch, chunks, heads, head_dim, state), written; like after
        after: gradients
        first: the segment's first chunk
        config: `chunk`, and of this kernel `tile`, `warps`, `stages`, `registers`
    """
    batch, seq, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    tile = min(config["tile"], max(16, power_of_2(state)))
    p0, p1 = tiles(head_dim)
    _carries[(num_blocks(state, tile) * 2, heads, batch)](
        x, dy, B, C, prep.d, prep.logs, prep.segments, prep.lengths, start, slope, before, after,
        seq, prep.d.shape[2], heads, groups, first, before.shape[1],
        *x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3],
        *(start.stride()[:2] if start is not None else (0, 0)),
        HEAD_DIM=head_dim, STATE=state, HAS_START=start is not None, HAS_DOCUMENTS=prep.segments is not None,
        CHUNK=config["chunk"], P0=p0, P1=p1, TILE=tile, PRECISION=precision(x),
        num_warps=config["warps"], num_stages=config["stages"], maxnreg=config["registers"] or None,
    )  # fmt: skip


def precision(x: Tensor) -> str:
    """How matmuls of x (any shape) take fp32 operands; no matter for 16-bit ones."""
    return "tf32x3" if x.is_cuda else "ieee"


@triton.jit
def rows(ptr, row, stride, real, p, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """The tile [row, p] of a matrix of WIDTH columns; 0 where the row is not real."""
    mask = real[:, None]
    if not EXACT:
        mask = mask & (p < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * stride + p[None, :], mask=mask, other=0.0)


@triton.jit
def _places(n, p, STATE: tl.constexpr):
    """Where a tile of a state lies in (head_dim, STATE): [n, p], or [p, n] for less than 64 rows p.

    A tile of less than 64 columns would be an operand of wgmma whose descriptors ptxas 12.8 (Triton 3.6) computes from
    registers that nothing wrote; less than 64 rows are multiplied by mma.sync instead."""
    return p[:, None] * STATE + n[None, :] if p.shape[0] < 64 else p[None, :] * STATE + n[:, None]


@triton.jit
def _inside(n, p, HEAD_DIM: tl.constexpr, STATE: tl.constexpr):
    """Which of `_places` are there."""
    if p.shape[0] < 64:
        inside = (p < HEAD_DIM)[:, None] & (n < STATE)[None, :]
    else:
        inside = (p < HEAD_DIM)[None, :] & (n < STATE)[:, None]
    return inside


@triton.jit
def _zeros(TILE: tl.constexpr, P: tl.constexpr):
    """A tile for `_places`."""
    return tl.zeros((P, TILE), dtype=tl.float32) if P < 64 else tl.zeros((TILE, P), dtype=tl.float32)


@triton.jit
def _save(ptr, acc, n, p, HEAD_DIM: tl.constexpr, STATE: tl.constexpr):
    """Write a tile of a state."""
    tl.store(ptr + _places(n, p, STATE), acc.to(ptr.dtype.element_ty), mask=_inside(n, p, HEAD_DIM, STATE))


@triton.jit
def _read(ptr, n, p, HEAD_DIM: tl.constexpr, STATE: tl.constexpr):
    """A tile of a state in fp32."""
    return tl.load(ptr + _places(n, p, STATE), mask=_inside(n, p, HEAD_DIM, STATE), other=0.0).to(tl.float32)


@triton.jit
def _update(acc, x, weight, gate, through, P: tl.constexpr, PRECISION: tl.constexpr):
    """through * acc + sum over tokens of weight * x (outer) gate."""
    u = (x * weight[:, None]).to(gate.dtype)
    if P < 64:
        acc = tl.dot(tl.trans(u), gate, acc * through, input_precision=PRECISION)
    else:
        acc = tl.dot(tl.trans(gate), u, acc * through, input_precision=PRECISION)
    return acc


@triton.jit
def _walk(
    acc0, acc1, v_ptr, w_ptr, d_ptr, logs_ptr, segments_ptr, out_ptr, out_chunk, v_token, w_token, first, count, length, n,
    REVERSED: tl.constexpr, SAVE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr, CHUNK: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry acc0, acc1 (tiles of one state) over `count` chunks: v, w are x, B forward and dy, C reversed.

    Returns them and the product of the chunks' decays."""
    own = tl.arange(0, CHUNK)
    q0, q1 = tl.arange(0, P0), P0 + tl.arange(0, P1 if P1 > 0 else 16)
    exact: tl.constexpr = P0 + P1 == HEAD_DIM
    kind = v_ptr.dtype.element_ty
    total = 1.0
    for step in tl.range(count):
        place = count - 1 - step if REVERSED else step
        chunk = first + place
        if SAVE:
            at = out_ptr + tl.cast(place, tl.int64) * out_chunk
            _save(at, acc0, n, q0, HEAD_DIM, STATE)
            if P1 > 0:
                _save(at, acc1, n, q1, HEAD_DIM, STATE)
        begin = chunk * CHUNK
        real = begin + own < length
        logs = tl.load(logs_ptr + begin + own)
        last = tl.load(logs_ptr + begin + CHUNK - 1)
        through = tl.exp2(last)
        weight = tl.exp2(logs) if REVERSED else tl.exp2(last - logs) * tl.load(d_ptr + begin + own)
        if HAS_DOCUMENTS:
            segment = tl.load(segments_ptr + begin + own)
            end = tl.load(segments_ptr + begin + CHUNK - 1)
            through = tl.where(end == 0, through, 0.0)
            weight = tl.where(segment == (0 if REVERSED else end), weight, 0.0)
        v = v_ptr + tl.cast(begin, tl.int64) * v_token
        w = w_ptr + tl.cast(begin, tl.int64) * w_token
        gate = rows(w, own, w_token, real, n, STATE, False).to(kind)
        x0 = rows(v, own, v_token, real, q0, HEAD_DIM, exact or P1 > 0)
        acc0 = _update(acc0, x0, weight, gate, through, P0, PRECISION)
        if P1 > 0:
            x1 = rows(v, own, v_token, real, q1, HEAD_DIM, exact)
            acc1 = _update(acc1, x1, weight, gate, through, P1, PRECISION)
        total *= through
    return acc0, acc1, total


@triton.jit
def _local(
    x_ptr, B_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, out_ptr, through_ptr,
    seq, padded, heads, groups, first, rest, x_batch, x_token, x_head, B_batch, B_token, B_group, out_batch, out_segment,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one segment adds to the state behind it; grid (heads * tiles, segments - 1, batch)."""
    head, tile = tl.program_id(0) // ((STATE + TILE - 1) // TILE), tl.program_id(0) % ((STATE + TILE - 1) // TILE)
    segment, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tile * TILE + tl.arange(0, TILE)
    length = seq
    if HAS_DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
    begin = tl.where(segment == 0, 0, first + (segment - 1) * rest)
    count = tl.where(segment == 0, first, rest)
    acc0 = _zeros(TILE, P0)
    acc1 = _zeros(TILE, P1 if P1 > 0 else 16)
    per_head = (batch * heads + head) * padded
    acc0, acc1, total = _walk(
        acc0, acc1, x_ptr + batch * x_batch + head.to(tl.int64) * x_head,
        B_ptr + batch * B_batch + (head // (heads // groups)) * B_group,
        d_ptr + per_head, logs_ptr + per_head, segments_ptr + batch * padded if HAS_DOCUMENTS else segments_ptr,
        out_ptr, 0, x_token, B_token, begin, count, length, n,
        False, False, HAS_DOCUMENTS, HEAD_DIM, STATE, CHUNK, P0, P1, PRECISION,
    )  # fmt: skip
    out = out_ptr + batch * out_batch + segment.to(tl.int64) * out_segment + head * (HEAD_DIM * STATE)
    _save(out, acc0, n, tl.arange(0, P0), HEAD_DIM, STATE)
    if P1 > 0:
        _save(out, acc1, n, P0 + tl.arange(0, P1), HEAD_DIM, STATE)
    if tile == 0:
        tl.store(through_ptr + (batch * tl.num_programs(1) + segment) * heads + head, total)


@triton.jit
def _join(
    h0_ptr, out_ptr, through_ptr, count, size, h0_batch, h0_head, out_batch, out_segment,
    HAS_H0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what segments add into the states behind them; grid (blocks of a state, heads, batch)."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_H0:
        state = tl.load(h0_ptr + batch * h0_batch + head * h0_head + place, mask=inside, other=0.0).to(tl.float32)
    at = out_ptr + batch * out_batch + head * size + place
    for segment in tl.range(count):
        through = tl.load(through_ptr + (batch * count + segment) * heads + head)
        state = through * state + tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        at += out_segment


@triton.jit
def _carries(
    x_ptr, dy_ptr, B_ptr, C_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, start_ptr, slope_ptr, before_ptr, after_ptr,
    seq, padded, heads, groups, first, count, x_batch, x_token, x_head, dy_batch, dy_token, dy_head,
    B_batch, B_token, B_group, C_batch, C_token, C_group, start_batch, start_head,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_START: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one head's carry over a segment; grid (tiles * 2 directions, heads, batch)."""
    tile, is_reversed = tl.program_id(0) // 2, tl.program_id(0) % 2
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    n, p0, p1 = tile * TILE + tl.arange(0, TILE), tl.arange(0, P0), P0 + tl.arange(0, P1 if P1 > 0 else 16)
    length = seq
    if HAS_DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
        segments_ptr += batch * padded
    per_head = (batch * heads + head) * padded
    out_chunk = heads * (HEAD_DIM * STATE)
    out = batch * count * out_chunk + head * (HEAD_DIM * STATE)
    if is_reversed == 0:
        acc0 = _zeros(TILE, P0)
        acc1 = _zeros(TILE, P1 if P1 > 0 else 16)
        if HAS_START:
            start = start_ptr + batch * start_batch + head * start_head
            acc0 = _read(start, n, p0, HEAD_DIM, STATE)
            if P1 > 0:
                acc1 = _read(start, n, p1, HEAD_DIM, STATE)
        _walk(
            acc0, acc1, x_ptr + batch * x_batch + head.to(tl.int64) * x_head, B_ptr + batch * B_batch + group * B_group,
            d_ptr + per_head, logs_ptr + per_head, segments_ptr, before_ptr + out, out_chunk, x_token, B_token,
            first, count, length, n, False, True, HAS_DOCUMENTS, HEAD_DIM, STATE, CHUNK, P0, P1, PRECISION,
        )  # fmt: skip
    else:
        slope = slope_ptr + (batch * heads + head) * (HEAD_DIM * STATE)
        acc0 = _read(slope, n, p0, HEAD_DIM, STATE)
        acc1 = _zeros(TILE, P1 if P1 > 0 else 16)
        if P1 > 0:
            acc1 = _read(slope, n, p1, HEAD_DIM, STATE)
        acc0, acc1, _ = _walk(
            acc0, acc1, dy_ptr + batch * dy_batch + head.to(tl.int64) * dy_head,
            C_ptr + batch * C_batch + group * C_group,
            d_ptr + per_head, logs_ptr + per_head, segments_ptr, after_ptr + out, out_chunk, dy_token, C_token,
            first, count, length, n, True, True, HAS_DOCUMENTS, HEAD_DIM, STATE, CHUNK, P0, P1, PRECISION,
        )  # fmt: skip
        _save(slope, acc0, n, p0, HEAD_DIM, STATE)
        if P1 > 0:
            _save(slope, acc1, n, p1, HEAD_DIM, STATE)
