# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""Gradients inside one chunk of the SSD scan, given the state S before it and the gradient G of the state behind it.

Legend as in `alloy.ops.ssd`, and for tokens i >= j of one chunk of one head (performance.md, appendix A):
    l inclusive sums of d * A, L_ji = exp(l_i - l_j), E_i = exp(l_i), F_j = exp(l_Q - l_j)
    K_ji = x_j . dy_i, P_ji = B_j . C_i
    g_j = F_j G B_j + sum_i P_ji L_ji dy_i                  gradient of u_j = d_j x_j
    dx_j = d_j g_j + D dy_j
    dB_j = sum_heads F_j d_j G^T x_j + sum_i Z_ji C_i       Z_ji = sum_heads K_ji L_ji d_j
    dC_i = sum_heads E_i S^T dy_i + sum_j Z_ji B_j
One program walks heads of a group over one chunk: P stays on chip, and so do dB, dC and Z until their sums are complete.
For the gradients of d and l it leaves `Shares` to `ssd_backward_step`.
Matrices over two tokens are kept as [j, i] alone, so that no accumulator is transposed for a second product.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton.ssd_backward_carry import precision, rows, tiles
from alloy.ops.triton.ssd_prep import Prep

LOG2_E = tl.constexpr(1.4426950408889634)


class Shares(NamedTuple):
    """What the heads' parts of the gradients of d and l are made of, for the tokens of one segment.

    vectors: fp32 (5, batch, heads, chunks * chunk): E_i dy_i . S C_i; sum_j K_ji L_ji d_j P_ji; x_j . F_j G B_j;
        x_j . sum_i P_ji L_ji dy_i; x_j . dy_j
    flow: fp32 (batch, heads, chunks, rows), with <S, G> as the sum over the rows
    """

    vectors: Tensor
    flow: Tensor


def gradients(
    dy: Tensor, x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, prep: Prep, before: Tensor, after: Tensor, first: int,
    dx: Tensor, dB: Tensor, dC: Tensor, parts: int, config: dict,
) -> Shares:  # fmt: skip
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
        parts: programs that share a group's heads
        config: `chunk`, `block_warps`, `block_stages`
    """
    batch, seq, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    chunk, chunks = config["chunk"], before.shape[1]
    begin, end = first * chunk, min((first + chunks) * chunk, seq)
    p0, p1 = tiles(head_dim)
    outs = (dB[:, begin:end], dC[:, begin:end])
    if parts > 1:
        parted = [x.new_empty(parts, *t.shape, dtype=torch.float32) for t in outs]
    else:
        parted = [t[None] for t in outs]
    vectors = x.new_empty(5, batch, heads, chunks * chunk, dtype=torch.float32)
    flow = x.new_empty(batch, heads, chunks, p0 + p1, dtype=torch.float32)
    _gradients[(groups * parts, chunks, batch)](
        dy, x, B, C, D, prep.d, prep.logs, prep.segments, prep.lengths, before, after, dx, *parted, vectors, flow,
        seq, prep.d.shape[2], heads, groups, first, heads // (groups * parts),
        *dy.stride()[:3], *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *parted[0].stride()[:2], vectors.stride(0),
        HEAD_DIM=head_dim, STATE=state, HAS_D=D is not None, HAS_DOCUMENTS=prep.segments is not None,
        CHUNK=chunk, P0=p0, P1=p1, N=max(16, triton.next_power_of_2(state)), PARTS=parts, PRECISION=precision(x),
        STAGES=config["block_stages"], num_warps=config["block_warps"],
    )  # fmt: skip
    if parts > 1:
        for out, shares in zip(outs, parted, strict=True):
            out.copy_(shares.sum(0))
    return Shares(vectors, flow)


@triton.jit
def _state(ptr, p, n, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, EXACT_P: tl.constexpr, EXACT_N: tl.constexpr):
    """The tile [p, n] of a (HEAD_DIM, STATE) matrix."""
    at = ptr + p[:, None] * STATE + n[None, :]
    if EXACT_P and EXACT_N:
        return tl.load(at)
    return tl.load(at, mask=(p < HEAD_DIM)[:, None] & (n < STATE)[None, :], other=0.0)


@triton.jit
def _gradients(
    dy_ptr, x_ptr, B_ptr, C_ptr, D_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, before_ptr, after_ptr,
    dx_ptr, dB_ptr, dC_ptr, vectors_ptr, flow_ptr, seq, padded, heads, groups, first, share,
    dy_batch, dy_token, dy_head, x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group,
    out_part, out_batch, vector,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk, `share` heads of a group; grid (groups * parts, chunks of the segment, batch)."""
    group, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    place, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunk = first + place
    begin = (chunk * CHUNK).to(tl.int64)
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
    if HAS_DOCUMENTS:
        segments_ptr += batch * padded + begin
        segment = tl.load(segments_ptr + own)
        final = tl.load(segments_ptr + CHUNK - 1)
        visible = visible & (segment[:, None] == segment[None, :])
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    b = rows(B_ptr, own, B_token, real, n, STATE, exact_n).to(kind)
    c = rows(C_ptr, own, C_token, real, n, STATE, exact_n).to(kind)
    product = tl.where(visible, tl.dot(b, tl.trans(c), input_precision=PRECISION), 0.0)
    crossed = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    db = tl.zeros((CHUNK, N), dtype=tl.float32)
    dc = tl.zeros((CHUNK, N), dtype=tl.float32)
    dy_ptr += batch * dy_batch + begin * dy_token
    x_ptr += batch * x_batch + begin * x_token
    d_ptr += batch * heads * padded + begin
    logs_ptr += batch * heads * padded + begin
    states = (batch * tl.num_programs(1) + place) * heads * (HEAD_DIM * STATE)
    dx_ptr += (batch * seq + begin) * heads * HEAD_DIM
    for step in tl.range(0, share, num_stages=STAGES):
        head = (group * PARTS + part) * share + step
        x_at, dy_at = x_ptr + head.to(tl.int64) * x_head, dy_ptr + head.to(tl.int64) * dy_head
        before_at = before_ptr + states + head * (HEAD_DIM * STATE)
        after_at = after_ptr + states + head * (HEAD_DIM * STATE)
        x0 = rows(x_at, own, x_token, real, q0, HEAD_DIM, exact0)
        y0 = rows(dy_at, own, dy_token, real, q0, HEAD_DIM, exact0).to(kind)
        s0 = _state(before_at, q0, n, HEAD_DIM, STATE, exact0, exact_n)
        g0 = _state(after_at, q0, n, HEAD_DIM, STATE, exact0, exact_n)
        if P1 > 0:
            x1 = rows(x_at, own, x_token, real, q1, HEAD_DIM, exact)
            y1 = rows(dy_at, own, dy_token, real, q1, HEAD_DIM, exact).to(kind)
            s1 = _state(before_at, q1, n, HEAD_DIM, STATE, exact, exact_n)
            g1 = _state(after_at, q1, n, HEAD_DIM, STATE, exact, exact_n)
        d = tl.load(d_ptr + head.to(tl.int64) * padded + own)
        logs = tl.load(logs_ptr + head.to(tl.int64) * padded + own) * LOG2_E
        total = tl.load(logs_ptr + head.to(tl.int64) * padded + CHUNK - 1) * LOG2_E
        into, onto = tl.exp2(logs), tl.exp2(total - logs)
        if HAS_DOCUMENTS:
            into = tl.where(segment == 0, into, 0.0)
            onto = tl.where(segment == final, onto, 0.0)
        # never positive; what is not visible is masked in `product` and, after the loop, in `crossed`
        decay = tl.exp2(tl.minimum(logs[None, :] - logs[:, None], 0.0))
        vectors_at = vectors_ptr + ((batch * heads + head) * tl.num_programs(1) + place) * CHUNK + own
        flow_at = flow_ptr + ((batch * heads + head) * tl.num_programs(1) + place) * (P0 + P1)

        # what the state before the chunk gave
        dc = tl.dot((y0 * into[:, None]).to(kind), s0, dc, input_precision=PRECISION)
        read = tl.sum(tl.dot(c, tl.trans(s0), input_precision=PRECISION) * y0, 1)
        tl.store(flow_at + q0, tl.sum(s0.to(tl.float32) * g0.to(tl.float32), 1))
        if P1 > 0:
            dc = tl.dot((y1 * into[:, None]).to(kind), s1, dc, input_precision=PRECISION)
            read += tl.sum(tl.dot(c, tl.trans(s1), input_precision=PRECISION) * y1, 1)
            tl.store(flow_at + q1, tl.sum(s1.to(tl.float32) * g1.to(tl.float32), 1))
        tl.store(vectors_at, read * into)

        # what tokens of the chunk gave each other
        inner = tl.dot(x0, tl.trans(y0), input_precision=PRECISION)
        if P1 > 0:
            inner = tl.dot(x1, tl.trans(y1), inner, input_precision=PRECISION)
        inner *= d[:, None]
        crossed += inner * decay
        mixed = (product * decay).to(kind)
        # of the rounded numbers, as in x . g: the gradient of l is a difference of the two, in which most of them cancel
        tl.store(vectors_at + vector, tl.sum(inner * mixed, 0))

        # what the chunk gives to the state behind it, and g
        scale = d * onto
        db = tl.dot((x0 * scale[:, None]).to(kind), g0, db, input_precision=PRECISION)
        # the two dots are not added before they are scaled: Triton gives dots in a row to half of the warps each
        far0 = tl.dot(b, tl.trans(g0), input_precision=PRECISION)
        near0 = tl.dot(mixed, y0, input_precision=PRECISION)
        given = tl.sum(far0 * x0, 1)
        kept = tl.sum(near0 * x0, 1)
        grad0 = far0 * scale[:, None] + near0 * d[:, None]
        if HAS_D:
            skip = tl.load(D_ptr + head).to(tl.float32)
            grad0 += skip * y0
            skipped = tl.sum(x0.to(tl.float32) * y0, 1)
        at = dx_ptr + head * HEAD_DIM + own[:, None] * (heads * HEAD_DIM)
        tl.store(at + q0[None, :], grad0.to(kind), mask=written[:, None] & (q0 < HEAD_DIM)[None, :])
        if P1 > 0:
            db = tl.dot((x1 * scale[:, None]).to(kind), g1, db, input_precision=PRECISION)
            far1 = tl.dot(b, tl.trans(g1), input_precision=PRECISION)
            near1 = tl.dot(mixed, y1, input_precision=PRECISION)
            given += tl.sum(far1 * x1, 1)
            kept += tl.sum(near1 * x1, 1)
            grad1 = far1 * scale[:, None] + near1 * d[:, None]
            if HAS_D:
                grad1 += skip * y1
                skipped += tl.sum(x1.to(tl.float32) * y1, 1)
            tl.store(at + q1[None, :], grad1.to(kind), mask=written[:, None] & (q1 < HEAD_DIM)[None, :])
        tl.store(vectors_at + 2 * vector, given * onto)
        tl.store(vectors_at + 3 * vector, kept)
        if HAS_D:
            tl.store(vectors_at + 4 * vector, skipped)

    # what the group's heads share
    crossed = tl.where(visible, crossed, 0.0).to(kind)
    db = tl.dot(crossed, c, db, input_precision=PRECISION)
    dc += tl.trans(tl.dot(tl.trans(b), crossed, input_precision=PRECISION))
    out = part * out_part + batch * out_batch + place.to(tl.int64) * CHUNK * groups * STATE + group * STATE
    out += own[:, None] * (groups * STATE) + n[None, :]
    mask = written[:, None] & (n < STATE)[None, :]
    tl.store(dB_ptr + out, db.to(dB_ptr.dtype.element_ty), mask=mask)
    tl.store(dC_ptr + out, dc.to(dC_ptr.dtype.element_ty), mask=mask)
