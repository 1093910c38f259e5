# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Gradients of step sizes and decays of the SSD scan, from what the heads' tokens gave (`Shares`).

Legend as in `ssd_backward_chunk`, with w_t = x_t . g_t and T = exp(l_Q):
    dl_i = sum_j K_ji L_ji d_j P_ji + E_i dy_i . S C_i - d_i w_i
    dl_Q += sum_j F_j d_j x_j . G B_j + T <S, G>
    da_t = sum_(i >= t) dl_i                                gradient of d_t A
    dd_t = w_t + A da_t, and on through clamp and softplus
"""

import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.cpu.ssd import NO_LIMIT
from alloy.ops.triton.elementary import num_blocks, power_of_2
from alloy.ops.triton.ssd_backward_chunk import Shares
from alloy.ops.triton.ssd_prep import Prep, softplus

HEADS_BLOCK = 16


def steps(
    shares: Shares, dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float],
    prep: Prep, first: int, ddt: Tensor, sums: Tensor, chunk: int,
) -> None:  # fmt: skip
    """Write the gradient of dt for the chunks of one segment, and those of A, dt_bias and D summed over each chunk.

    Args:
        shares: of the segment
        dt: (batch, seq, heads)
        A: (heads,)
        dt_bias: (heads,) or None
        dt_softplus: as in `alloy.ops.ssd_scan`
        dt_limit: as in `alloy.ops.ssd_scan`
        prep: of all tokens
        first: the segment's first chunk
        ddt: like dt, contiguous
        sums: fp32 (3, batch, all chunks, heads)
        chunk: tokens of a chunk
    """
    batch, seq, heads = dt.shape
    chunks, width = shares.flow.shape[2:]
    _steps[(chunks, num_blocks(heads, HEADS_BLOCK), batch)](
        shares.vectors, shares.flow, dt, A, dt_bias, prep.d, prep.logs, prep.segments, prep.lengths, ddt, sums,
        seq, prep.d.shape[2], heads, first, sums.shape[2], width, *dt.stride(), low=dt_limit[0], high=dt_limit[1],
        HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, LIMITED=tuple(dt_limit) != NO_LIMIT,
        HAS_DOCUMENTS=prep.segments is not None, CHUNK=chunk, HEADS=HEADS_BLOCK, ROWS=power_of_2(width),
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _steps(
    vectors_ptr, flow_ptr, dt_ptr, A_ptr, bias_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, ddt_ptr, sums_ptr,
    seq, padded, heads, first, all_chunks, width, dt_batch, dt_token, dt_head, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one chunk; grid (chunks of the segment, blocks of heads, batch)."""
    place, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunks, batches = tl.num_programs(0), tl.num_programs(2).to(tl.int64)
    chunk = first + place
    own = tl.arange(0, CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    known = head < heads
    token = chunk.to(tl.int64) * CHUNK + own
    length = seq
    if HAS_DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
    real = known[:, None] & (token < length)[None, :]

    vector = batches * heads * chunks * CHUNK
    at = vectors_ptr + ((batch * heads + head[:, None]) * chunks + place) * CHUNK + own[None, :]
    dl = tl.load(at, mask=real, other=0.0) + tl.load(at + vector, mask=real, other=0.0)
    given = tl.load(at + 2 * vector, mask=real, other=0.0)
    dd = given + tl.load(at + 3 * vector, mask=real, other=0.0)
    skipped = tl.load(at + 4 * vector, mask=real, other=0.0)
    per_token = (batch * heads + head[:, None]) * padded + token[None, :]
    d = tl.load(d_ptr + per_token, mask=real, other=0.0)
    through = tl.exp2(
        tl.load(logs_ptr + (batch * heads + head) * padded + chunk * CHUNK + CHUNK - 1, mask=known, other=0.0)
    )
    if HAS_DOCUMENTS:
        through = tl.where(tl.load(segments_ptr + batch * padded + chunk * CHUNK + CHUNK - 1) == 0, through, 0.0)
    row = tl.arange(0, ROWS)
    flow_at = flow_ptr + ((batch * heads + head[:, None]) * chunks + place) * width + row[None, :]
    flow = tl.sum(tl.load(flow_at, mask=known[:, None] & (row < width)[None, :], other=0.0), 1)

    dl -= d * dd
    total = tl.sum(dl + d * given, 1) + through * flow
    da = total[:, None] - tl.cumsum(dl, 1) + dl
    dd += tl.load(A_ptr + head, mask=known, other=0.0).to(tl.float32)[:, None] * da
    raw = tl.load(
        dt_ptr + batch * dt_batch + token[None, :] * dt_token + head[:, None] * dt_head, mask=real, other=0.0
    ).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + head, mask=known, other=0.0).to(tl.float32)[:, None]
    value = raw
    if SOFTPLUS:
        value = softplus(raw)
        dd *= 1.0 / (1.0 + tl.exp(-raw))
    if LIMITED:
        dd = tl.where((value >= low) & (value <= high), dd, 0.0)
    dd = tl.where(real, dd, 0.0)
    out = ddt_ptr + (batch * seq + token[None, :]) * heads + head[:, None]
    tl.store(out, dd.to(ddt_ptr.dtype.element_ty), mask=known[:, None] & (token < seq)[None, :])
    sums_ptr += (batch * all_chunks + chunk) * heads + head
    tl.store(sums_ptr, tl.sum(d * da, 1), mask=known)
    tl.store(sums_ptr + batches * all_chunks * heads, tl.sum(dd, 1), mask=known)
    tl.store(sums_ptr + 2 * batches * all_chunks * heads, tl.sum(skipped, 1), mask=known)
