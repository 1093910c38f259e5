# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""Gradients inside one chunk of the SSD scan, given the state S before it and the gradient G of the state behind it.

Legend as in `alloy.ops.ssd`, and for tokens i >= j of one chunk of one head (performance.md, appendix A):
    l inclusive sums of d * A, L_ji = exp(l_i - l_j), E_i = exp(l_i), F_j = exp(l_Q - l_j), T = exp(l_Q)
    K_ji = x_j . dy_i, P_ji = B_j . C_i
    g_j = F_j G B_j + sum_i P_ji L_ji dy_i                  gradient of u_j = d_j x_j
    dx_j = d_j g_j + D dy_j
    dB_j = sum_heads F_j d_j G^T x_j + sum_i Z_ji C_i       Z_ji = sum_heads K_ji L_ji d_j
    dC_i = sum_heads E_i S^T dy_i + sum_j Z_ji B_j
    dl_i = sum_j K_ji L_ji d_j P_ji + E_i dy_i . S C_i - d_i x_i . g_i
    dl_Q += sum_j F_j d_j x_j . G B_j + T <S, G>
    da_t = sum_(i >= t) dl_i                                gradient of d_t A
    dd_t = x_t . g_t + A da_t
One program walks heads of a group over one chunk: P stays on chip, and so do dB, dC and Z until their sums are complete.
Matrices over two tokens are kept as [j, i] alone, so that no accumulator is transposed for a second product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.cpu.ssd import NO_LIMIT
from alloy.ops.triton.ssd_backward_carry import precision, rows, tiles
from alloy.ops.triton.ssd_prep import Prep, softplus


def gradients(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_limit: tuple[float, float], prep: Prep, before: Tensor, after: Tensor, first: int,
    dx: Tensor, ddt: Tensor, dB: Tensor, dC: Tensor, sums: Tensor, parts: int, config: dict,
) -> None:  # fmt: skip
    """Write every gradient of the chunks of one segment.

    Args:
        dy: like x
        x: (batch, seq, heads, head_dim)
        dt: (batch, seq, heads)
        A: (heads,)
        B: (batch, seq, groups, state)
        C: (batch, seq, groups, state)
        D: (heads,) or None
        dt_bias: (heads,) or None
        dt_softplus: as in `alloy.ops.ssd_scan`
        dt_limit: as in `alloy.ops.ssd_scan`
        prep: of all tokens
        before: (batch, chunks, heads, head_dim, state), S of each chunk of the segment
        after: like before, G
        first: the segment's first chunk
        dx: like x, contiguous
        ddt: like dt, contiguous
        dB: like B, contiguous
        dC: like C, contiguous
        sums: fp32 (3, batch, all chunks, heads), sums over a chunk of the gradients of A, dt_bias and D
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
    _gradients[(groups * parts, chunks, batch)](
        dy, x, dt, A, B, C, D, dt_bias, prep.d, prep.logs, prep.segments, prep.lengths, before, after,
        dx, ddt, *parted, sums, seq, prep.d.shape[2], heads, groups, first, heads // (groups * parts),
        *dy.stride()[:3], *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], *parted[0].stride()[:2],
        sums.shape[2], low=dt_limit[0], high=dt_limit[1],
        HEAD_DIM=head_dim, STATE=state, HAS_D=D is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
        LIMITED=tuple(dt_limit) != NO_LIMIT, HAS_DOCUMENTS=prep.segments is not None, CHUNK=chunk, P0=p0, P1=p1, N=max(16, triton.next_power_of_2(state)),
        PARTS=parts, PRECISION=precision(x), STAGES=config["block_stages"],
        num_warps=config["block_warps"],
    )  # fmt: skip
    if parts > 1:
        for out, sum_of in zip(outs, parted, strict=True):
            out.copy_(sum_of.sum(0))


@triton.jit
def _state(ptr, p, n, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, EXACT_P: tl.constexpr, EXACT_N: tl.constexpr):
    """The tile [p, n] of a (HEAD_DIM, STATE) matrix."""
    at = ptr + p[:, None] * STATE + n[None, :]
    if EXACT_P and EXACT_N:
        return tl.load(at)
    return tl.load(at, mask=(p < HEAD_DIM)[:, None] & (n < STATE)[None, :], other=0.0)


@triton.jit
def _gradients(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr,
    before_ptr, after_ptr, dx_ptr, ddt_ptr, dB_ptr, dC_ptr, sums_ptr, seq, padded, heads, groups, first, share,
    dy_batch, dy_token, dy_head, x_batch, x_token, x_head, dt_batch, dt_token, dt_head, B_batch, B_token, B_group,
    C_batch, C_token, C_group, out_part, out_batch, all_chunks, low, high,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr,
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
    is_last = own == CHUNK - 1
    if HAS_DOCUMENTS:
        segments_ptr += batch * padded + begin
        segment = tl.load(segments_ptr + own)
        final = tl.load(segments_ptr + CHUNK - 1)
        visible = visible & (segment[:, None] == segment[None, :])
    B_ptr += batch * B_batch + begin * B_token + group * B_group
    C_ptr += batch * C_batch + begin * C_token + group * C_group
    b = rows(B_ptr, own, B_token, real, n, STATE, exact_n).to(kind)
    c = rows(C_ptr, own, C_token, real, n, STATE, exact_n).to(kind)
    product = tl.dot(b, tl.trans(c), input_precision=PRECISION)
    crossed = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    db = tl.zeros((CHUNK, N), dtype=tl.float32)
    dc = tl.zeros((CHUNK, N), dtype=tl.float32)
    read = tl.zeros((CHUNK,), dtype=tl.float32)
    dy_ptr += batch * dy_batch + begin * dy_token
    x_ptr += batch * x_batch + begin * x_token
    dt_ptr += batch * dt_batch + begin * dt_token
    d_ptr += batch * heads * padded + begin
    logs_ptr += batch * heads * padded + begin
    states = (batch * tl.num_programs(1) + place) * heads * (HEAD_DIM * STATE)
    dx_ptr += (batch * seq + begin) * heads * HEAD_DIM
    ddt_ptr += (batch * seq + begin) * heads
    sums_ptr += (batch * all_chunks + chunk) * heads
    sums_size = tl.num_programs(2).to(tl.int64) * all_chunks * heads
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
        logs = tl.load(logs_ptr + head.to(tl.int64) * padded + own)
        total = tl.load(logs_ptr + head.to(tl.int64) * padded + CHUNK - 1)
        into, onto, through = tl.exp(logs), tl.exp(total - logs), tl.exp(total)
        if HAS_DOCUMENTS:
            into = tl.where(segment == 0, into, 0.0)
            onto = tl.where(segment == final, onto, 0.0)
            through = tl.where(final == 0, through, 0.0)
        decay = tl.exp(tl.where(visible, logs[None, :] - logs[:, None], float("-inf")))

        # what the state before the chunk gave
        dc = tl.dot((y0 * into[:, None]).to(kind), s0, dc, input_precision=PRECISION)
        flow = tl.sum(s0.to(tl.float32) * g0.to(tl.float32))
        if P1 > 0:
            dc = tl.dot((y1 * into[:, None]).to(kind), s1, dc, input_precision=PRECISION)
            flow += tl.sum(s1.to(tl.float32) * g1.to(tl.float32))
        # dc sums over heads: this head's part of C_i . dc_i is what it grew by
        grown = tl.sum(dc * c, 1)
        dl = grown - read
        read = grown

        # what tokens of the chunk gave each other
        inner = tl.dot(x0, tl.trans(y0), input_precision=PRECISION)
        if P1 > 0:
            inner = tl.dot(x1, tl.trans(y1), inner, input_precision=PRECISION)
        inner *= decay * d[:, None]
        crossed += inner
        dl += tl.sum(inner * product, 0)
        mixed = (product * decay).to(kind)

        # what the chunk gives to the state behind it, and g
        scale = d * onto
        db = tl.dot((x0 * scale[:, None]).to(kind), g0, db, input_precision=PRECISION)
        grad0 = tl.dot(b, tl.trans(g0), input_precision=PRECISION) * onto[:, None]
        given = tl.sum(grad0 * x0, 1)
        grad0 = tl.dot(mixed, y0, grad0, input_precision=PRECISION)
        dd = tl.sum(grad0 * x0, 1)
        grad0 *= d[:, None]
        if HAS_D:
            skip = tl.load(D_ptr + head).to(tl.float32)
            grad0 += skip * y0
            skipped = tl.sum(x0.to(tl.float32) * y0)
        at = dx_ptr + head * HEAD_DIM + own[:, None] * (heads * HEAD_DIM)
        tl.store(at + q0[None, :], grad0.to(kind), mask=written[:, None] & (q0 < HEAD_DIM)[None, :])
        if P1 > 0:
            db = tl.dot((x1 * scale[:, None]).to(kind), g1, db, input_precision=PRECISION)
            grad1 = tl.dot(b, tl.trans(g1), input_precision=PRECISION) * onto[:, None]
            given += tl.sum(grad1 * x1, 1)
            grad1 = tl.dot(mixed, y1, grad1, input_precision=PRECISION)
            dd += tl.sum(grad1 * x1, 1)
            grad1 *= d[:, None]
            if HAS_D:
                grad1 += skip * y1
                skipped += tl.sum(x1.to(tl.float32) * y1)
            tl.store(at + q1[None, :], grad1.to(kind), mask=written[:, None] & (q1 < HEAD_DIM)[None, :])

        # through the decays and step sizes
        dl -= d * dd
        dl += tl.where(is_last, through * flow + tl.sum(d * given), 0.0)
        da = tl.sum(dl) - tl.cumsum(dl, 0) + dl
        dd += tl.load(A_ptr + head).to(tl.float32) * da
        raw = tl.load(dt_ptr + own * dt_token + head * dt_head, mask=real, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + head).to(tl.float32)
        value = raw
        if SOFTPLUS:
            value = softplus(raw)
            dd *= 1.0 / (1.0 + tl.exp(-raw))
        dd = tl.where(real, dd, 0.0)
        if LIMITED:
            dd = tl.where((value >= low) & (value <= high), dd, 0.0)
        tl.store(ddt_ptr + own * heads + head, dd.to(ddt_ptr.dtype.element_ty), mask=written)
        tl.store(sums_ptr + head, tl.sum(d * da))
        if HAS_BIAS:
            tl.store(sums_ptr + sums_size + head, tl.sum(dd))
        if HAS_D:
            tl.store(sums_ptr + 2 * sums_size + head, skipped)

    # what the group's heads share
    crossed = crossed.to(kind)
    db = tl.dot(crossed, c, db, input_precision=PRECISION)
    dc += tl.trans(tl.dot(tl.trans(b), crossed, input_precision=PRECISION))
    out = part * out_part + batch * out_batch + place.to(tl.int64) * CHUNK * groups * STATE + group * STATE
    out += own[:, None] * (groups * STATE) + n[None, :]
    mask = written[:, None] & (n < STATE)[None, :]
    tl.store(dB_ptr + out, db.to(dB_ptr.dtype.element_ty), mask=mask)
    tl.store(dC_ptr + out, dc.to(dC_ptr.dtype.element_ty), mask=mask)
