# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportMissingModuleSource=false
"""Gradients inside one chunk of the SSD scan, given the state S before it and the gradient G of the state behind it.

Legend as in `alloy.ops.ssd`, and for tokens i >= j of one chunk of one head (performance.md, appendix A):
    l inclusive sums of d * A, L_ji = exp(l_i - l_j), E_i = exp(l_i), F_j = exp(l_Q - l_j)
    K_ji = x_j . dy_i, P_ji = B_j . C_i
    g_j = F_j G B_j + sum_i P_ji L_ji dy_i                  gradient of u_j = d_j x_j
    dx_j = d_j g_j + D dy_j
    dB_j = sum_heads F_j d_j G^T x_j + sum_i Z_ji C_i       Z_ji = sum_heads K_ji L_ji d_j
    dC_i = sum_heads E_i S^T dy_i + sum_j Z_ji B_j
A program walks heads of a group over one chunk, so that sums over heads stay on chip until they are complete: `_tokens` keeps P
and Z and writes dx and Z, `_sums` keeps dB and dC and adds Z's part at the end. Together they would not fit the registers.
Matrices over two tokens are kept as [j, i] alone: no accumulator is transposed for a second product.
For the gradients of d and l both leave `Shares` to `ssd_backward_step`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton.elementary import power_of_2
from alloy.ops.triton.ssd_backward_carry import precision, rows, tiles
from alloy.ops.triton.ssd_prep import Prep
from alloy.ops.triton.tuning import Config


class Shares(NamedTuple):
    """What the kernels of one segment leave to each other: of what the gradients of d and l are made, and Z.

    vectors: fp32 (5, batch, heads, chunks * chunk): E_i dy_i . S C_i; sum_j K_ji L_ji d_j P_ji; x_j . F_j G B_j;
        x_j . sum_i P_ji L_ji dy_i; x_j . dy_j
    flow: fp32 (batch, heads, chunks, rows), with <S, G> as the sum over the rows
    crossed: (batch, chunks, groups * parts, chunk, chunk), Z
    """

    vectors: Tensor
    flow: Tensor
    crossed: Tensor


def shares(x: Tensor, groups: int, chunks: int, parts: int, chunk: int) -> Shares:
    """Room for the shares of `chunks` chunks of x (batch, seq, heads, head_dim)."""
    batch, _, heads, head_dim = x.shape
    return Shares(
        x.new_empty(5, batch, heads, chunks * chunk, dtype=torch.float32),
        x.new_empty(batch, heads, chunks, sum(tiles(head_dim)), dtype=torch.float32),
        x.new_empty(batch, chunks, groups * parts, chunk, chunk),
    )


def gradients(
    dy: Tensor, x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, prep: Prep, before: Tensor, after: Tensor, first: int,
    dx: Tensor, dB: Tensor, dC: Tensor, left: Shares, parts: int, config: Config,
) -> None:  # fmt: skip
    """Write the gradients of x, B and C for the chunks of one segment.

    Args:
        dy: like x
        x: (batch, seq, heads, head_dim)
        B: (batch, seq, groups, state)
        C: (batch, seq, groups, state)
        D: (heads,) or None
        prep: of all tokens
        before: (batch, chunks, heads, head_dim, state), S of each chunk of the segment
        after: like before, G
        first: the segment's first chunk
        dx: like x, contiguous
        dB: like B, contiguous
        dC: like C, contiguous
        left: of the segment, written
        parts: programs that share a group's heads
        config: `chunk`, `token_warps`, `token_stages`, `sum_warps`, `sum_stages`
    """
    batch, seq, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    chunk, chunks = config["chunk"], before.shape[1]
    begin, end = first * chunk, min((first + chunks) * chunk, seq)
    outs = (dB[:, begin:end], dC[:, begin:end])
    parted = [t[None] if parts == 1 else x.new_empty(parts, *t.shape, dtype=torch.float32) for t in outs]
    p0, p1 = tiles(head_dim)
    sizes = (seq, prep.d.shape[2], heads, groups, first, heads // (groups * parts))
    strides = (*dy.stride()[:3], *x.stride()[:3], *B.stride()[:3], *C.stride()[:3])
    settings = {
        "HEAD_DIM": head_dim, "STATE": state, "HAS_DOCUMENTS": prep.segments is not None, "CHUNK": chunk, "P0": p0, "P1": p1,
        "N": max(16, power_of_2(state)), "PARTS": parts, "PRECISION": precision(x),
    }  # fmt: skip
    _tokens[(groups * parts, chunks, batch)](
        dy, x, B, C, D, *prep, after, dx, left.crossed, left.vectors, *sizes, *strides, left.vectors.stride(0),
        **settings, HAS_D=D is not None, STAGES=config["token_stages"], num_warps=config["token_warps"],
    )  # fmt: skip
    _sums[(groups * parts * 2, chunks, batch)](
        dy, x, B, C, *prep, before, after, left.crossed, *parted, left.vectors, left.flow, *sizes, *strides, *parted[0].stride()[:2],
        **settings, STAGES=config["sum_stages"], num_warps=config["sum_warps"],
    )  # fmt: skip
    if parts > 1:
        for out, part in zip(outs, parted, strict=True):
            out.copy_(part.sum(0))


@triton.jit
def _state(ptr, p, n, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, EXACT_P: tl.constexpr, EXACT_N: tl.constexpr):
    """The tile [p, n] of a (HEAD_DIM, STATE) matrix."""
    at = ptr + p[:, None] * STATE + n[None, :]
    if EXACT_P and EXACT_N:
        return tl.load(at)
    return tl.load(at, mask=(p < HEAD_DIM)[:, None] & (n < STATE)[None, :], other=0.0)


@triton.jit
def _tokens(
    dy_ptr, x_ptr, B_ptr, C_ptr, D_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, after_ptr,
    dx_ptr, crossed_ptr, vectors_ptr, seq, padded, heads, groups, first, share,
    dy_batch, dy_token, dy_head, x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group, vector,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and Z of one chunk, `share` heads of a group; grid (groups * parts, chunks of the segment, batch)."""
    group = tl.program_id(0) // PARTS
    place, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = ((first + place) * CHUNK).to(tl.int64)
    own, n = tl.arange(0, CHUNK), tl.arange(0, N)
    q0, q1 = tl.arange(0, P0), P0 + tl.arange(0, P1 if P1 > 0 else 16)
    exact: tl.constexpr = P0 + P1 == HEAD_DIM
    exact0: tl.constexpr = exact or P1 > 0
    exact_n: tl.constexpr = N == STATE
    kind = x_ptr.dtype.element_ty
    length = seq
    if HAS_DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
    written = begin + own < seq
    real = begin + own < length
    visible = own[:, None] <= own[None, :]
    same = own[:, None] == own[None, :]
    if HAS_DOCUMENTS:
        segments_ptr += batch * padded + begin
        segment = tl.load(segments_ptr + own)
        final = tl.load(segments_ptr + CHUNK - 1)
        visible = visible & (segment[:, None] == segment[None, :])
    b = rows(B_ptr + batch * B_batch + begin * B_token + group * B_group, own, B_token, real, n, STATE, exact_n).to(
        kind
    )
    c = rows(C_ptr + batch * C_batch + begin * C_token + group * C_group, own, C_token, real, n, STATE, exact_n).to(
        kind
    )
    product = tl.where(visible, tl.dot(b, tl.trans(c), input_precision=PRECISION), 0.0)
    crossed = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    dy_ptr += batch * dy_batch + begin * dy_token
    x_ptr += batch * x_batch + begin * x_token
    d_ptr += batch * heads * padded + begin
    logs_ptr += batch * heads * padded + begin
    after_ptr += (batch * tl.num_programs(1) + place) * heads * (HEAD_DIM * STATE)
    dx_ptr += (batch * seq + begin) * heads * HEAD_DIM
    for step in tl.range(0, share, num_stages=STAGES):
        head = tl.program_id(0) * share + step
        x_at, dy_at = x_ptr + head.to(tl.int64) * x_head, dy_ptr + head.to(tl.int64) * dy_head
        x0 = rows(x_at, own, x_token, real, q0, HEAD_DIM, exact0)
        y0 = rows(dy_at, own, dy_token, real, q0, HEAD_DIM, exact0).to(kind)
        g0 = _state(after_ptr + head * (HEAD_DIM * STATE), q0, n, HEAD_DIM, STATE, exact0, exact_n)
        if P1 > 0:
            x1 = rows(x_at, own, x_token, real, q1, HEAD_DIM, exact)
            y1 = rows(dy_at, own, dy_token, real, q1, HEAD_DIM, exact).to(kind)
            g1 = _state(after_ptr + head * (HEAD_DIM * STATE), q1, n, HEAD_DIM, STATE, exact, exact_n)
        d = tl.load(d_ptr + head.to(tl.int64) * padded + own)
        logs = tl.load(logs_ptr + head.to(tl.int64) * padded + own)
        onto = tl.exp2(tl.load(logs_ptr + head.to(tl.int64) * padded + CHUNK - 1) - logs)
        if HAS_DOCUMENTS:
            onto = tl.where(segment == final, onto, 0.0)
        vectors_at = vectors_ptr + ((batch * heads + head) * tl.num_programs(1) + place) * CHUNK + own

        inner = tl.dot(x0, tl.trans(y0), input_precision=PRECISION)
        if P1 > 0:
            inner = tl.dot(x1, tl.trans(y1), inner, input_precision=PRECISION)
        if HAS_D:
            tl.store(vectors_at + 4 * vector, tl.sum(tl.where(same, inner, 0.0), 1))
        # never positive; what is not visible is masked in `product` and, after the loop, in `crossed`
        decay = tl.exp2(tl.minimum(logs[None, :] - logs[:, None], 0.0))
        inner *= decay
        crossed += inner * d[:, None]
        decay *= product
        # the gradient of l is a difference of these two sums, in which most terms cancel: they must be of the same numbers
        inner *= product
        tl.store(vectors_at + 3 * vector, tl.sum(inner, 1))
        tl.store(vectors_at + vector, tl.sum(inner * d[:, None], 0))
        mixed = decay * d[:, None]
        if HAS_D:
            mixed = tl.where(same, mixed + tl.load(D_ptr + head).to(tl.float32), mixed)
        mixed = mixed.to(kind)

        at = dx_ptr + head * HEAD_DIM + own[:, None] * (heads * HEAD_DIM)
        grad0 = tl.dot(b, tl.trans(g0), input_precision=PRECISION) * onto[:, None]
        given = tl.sum(grad0 * x0, 1)
        grad0 = tl.dot(mixed, y0, grad0 * d[:, None], input_precision=PRECISION)
        tl.store(at + q0[None, :], grad0.to(kind), mask=written[:, None] & (q0 < HEAD_DIM)[None, :])
        if P1 > 0:
            grad1 = tl.dot(b, tl.trans(g1), input_precision=PRECISION) * onto[:, None]
            given += tl.sum(grad1 * x1, 1)
            grad1 = tl.dot(mixed, y1, grad1 * d[:, None], input_precision=PRECISION)
            tl.store(at + q1[None, :], grad1.to(kind), mask=written[:, None] & (q1 < HEAD_DIM)[None, :])
        tl.store(vectors_at + 2 * vector, given)
    out = crossed_ptr + ((batch * tl.num_programs(1) + place) * tl.num_programs(0) + tl.program_id(0)) * CHUNK * CHUNK
    tl.store(out + own[:, None] * CHUNK + own[None, :], tl.where(visible, crossed, 0.0).to(kind))


@triton.jit
def _sums(
    dy_ptr, x_ptr, B_ptr, C_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, before_ptr, after_ptr, crossed_ptr,
    dB_ptr, dC_ptr, vectors_ptr, flow_ptr, seq, padded, heads, groups, first, share,
    dy_batch, dy_token, dy_head, x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group,
    out_part, out_batch,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB or dC of one chunk, summed over `share` heads of a group; grid (groups * parts * 2, chunks of the segment, batch)."""
    walker = tl.program_id(0) // 2
    place, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = ((first + place) * CHUNK).to(tl.int64)
    chunk = batch * tl.num_programs(1) + place
    length = seq
    if HAS_DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
        segments_ptr += batch * padded + begin
    group = walker // PARTS
    states = chunk * heads * (HEAD_DIM * STATE)
    out = (
        (walker % PARTS) * out_part + batch * out_batch + (place * CHUNK).to(tl.int64) * groups * STATE + group * STATE
    )
    crossed_ptr += (chunk * (tl.num_programs(0) // 2) + walker) * CHUNK * CHUNK
    per_head = (batch * heads + walker * share) * padded + begin
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    if tl.program_id(0) % 2 == 0:
        _side(
            x_ptr + batch * x_batch + begin * x_token, x_token, x_head, after_ptr + states, before_ptr + states,
            C_ptr, C_token, d_ptr + per_head, logs_ptr + per_head, segments_ptr, crossed_ptr, dB_ptr + out, flow_ptr,
            walker, share, length - begin, seq - begin, place, batch, padded, heads, groups,
            False, HEAD_DIM, STATE, HAS_DOCUMENTS, CHUNK, P0, P1, N, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _side(
            dy_ptr + batch * dy_batch + begin * dy_token, dy_token, dy_head, before_ptr + states, before_ptr + states,
            C_ptr, C_token, d_ptr + per_head, logs_ptr + per_head, segments_ptr, crossed_ptr, dC_ptr + out, vectors_ptr,
            walker, share, length - begin, seq - begin, place, batch, padded, heads, groups,
            True, HEAD_DIM, STATE, HAS_DOCUMENTS, CHUNK, P0, P1, N, PRECISION, STAGES, B_ptr, B_token,
        )  # fmt: skip


@triton.jit
def _side(
    v_ptr, v_token, v_head, state_ptr, other_ptr, C_ptr, C_token, d_ptr, logs_ptr, segments_ptr, crossed_ptr, out_ptr, share_ptr,
    walker, share, length, written, place, batch, padded, heads, groups,
    READS: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    B_ptr=None, B_token=0,
):  # fmt: skip
    """READS: dC from dy and the states before the chunk; else dB from x and the gradients of the states behind it."""
    own, n = tl.arange(0, CHUNK), tl.arange(0, N)
    q0, q1 = tl.arange(0, P0), P0 + tl.arange(0, P1 if P1 > 0 else 16)
    exact: tl.constexpr = P0 + P1 == HEAD_DIM
    exact0: tl.constexpr = exact or P1 > 0
    exact_n: tl.constexpr = N == STATE
    kind = crossed_ptr.dtype.element_ty
    real = own < length
    if HAS_DOCUMENTS:
        segment = tl.load(segments_ptr + own)
        final = tl.load(segments_ptr + CHUNK - 1)
    c = rows(C_ptr, own, C_token, real, n, STATE, exact_n).to(kind)
    acc = tl.zeros((CHUNK, N), dtype=tl.float32)
    for step in tl.range(0, share, num_stages=STAGES):
        head = walker * share + step
        v_at = v_ptr + head.to(tl.int64) * v_head
        v0 = rows(v_at, own, v_token, real, q0, HEAD_DIM, exact0)
        m0 = _state(state_ptr + head * (HEAD_DIM * STATE), q0, n, HEAD_DIM, STATE, exact0, exact_n)
        if P1 > 0:
            v1 = rows(v_at, own, v_token, real, q1, HEAD_DIM, exact)
            m1 = _state(state_ptr + head * (HEAD_DIM * STATE), q1, n, HEAD_DIM, STATE, exact, exact_n)
        at = tl.cast(step, tl.int64) * padded
        logs = tl.load(logs_ptr + at + own)
        if READS:
            weight = tl.exp2(logs)
        else:
            weight = tl.exp2(tl.load(logs_ptr + at + CHUNK - 1) - logs) * tl.load(d_ptr + at + own)
        if HAS_DOCUMENTS:
            weight = tl.where(segment == (0 if READS else final), weight, 0.0)
        acc = tl.dot((v0 * weight[:, None]).to(kind), m0, acc, input_precision=PRECISION)
        if P1 > 0:
            acc = tl.dot((v1 * weight[:, None]).to(kind), m1, acc, input_precision=PRECISION)
        to = (batch * heads + head) * tl.num_programs(1) + place
        if READS:
            read = tl.sum(tl.dot(c, tl.trans(m0), input_precision=PRECISION) * v0, 1)
            if P1 > 0:
                read += tl.sum(tl.dot(c, tl.trans(m1), input_precision=PRECISION) * v1, 1)
            tl.store(share_ptr + to * CHUNK + own, read * weight)
        else:
            # the diagonal of S G^T: a product of matrices that stay in shared memory
            s0 = _state(other_ptr + head * (HEAD_DIM * STATE), q0, n, HEAD_DIM, STATE, exact0, exact_n)
            across = tl.dot(s0, tl.trans(m0), input_precision=PRECISION)
            tl.store(share_ptr + to * (P0 + P1) + q0, tl.sum(tl.where(q0[:, None] == q0[None, :], across, 0.0), 1))
            if P1 > 0:
                s1 = _state(other_ptr + head * (HEAD_DIM * STATE), q1, n, HEAD_DIM, STATE, exact, exact_n)
                tl.store(share_ptr + to * (P0 + P1) + q1, tl.sum(s1.to(tl.float32) * m1.to(tl.float32), 1))
    crossed = tl.load(crossed_ptr + own[:, None] * CHUNK + own[None, :])
    if READS:
        b = rows(B_ptr, own, B_token, real, n, STATE, exact_n).to(kind)
        acc = tl.dot(tl.trans(crossed), b, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(crossed, c, acc, input_precision=PRECISION)
    mask = (own < written)[:, None] & (n < STATE)[None, :]
    tl.store(out_ptr + own[:, None] * (groups * STATE) + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
