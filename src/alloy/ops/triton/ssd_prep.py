# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""What every pass of the SSD scan reads: step sizes and decays of each chunk, document boundaries, and C B^T.

Legend as in `alloy.ops.ssd`: d step sizes, A decay rates, B and C projections of a group. Sequences are filled up to whole
chunks; the tokens behind the end have d = 0, so that they neither add to a state nor let it decay.

Paper: Mamba-2 (Dao and Gu, 2024), section 6. arXiv:2405.21060
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.cpu.ssd import NO_LIMIT
from alloy.ops.triton.elementary import num_blocks

HEADS_BLOCK = 32


class Prep(NamedTuple):
    """Per token, for chunks of the size that `prepare` was given.

    d: fp32 (batch, heads, chunks * chunk), step sizes; 0 for padding and behind the end
    logs: fp32, like d, inclusive sums of d * A / ln 2 from the chunk's first token on: 2^logs is the decay. The factor is
        in them already because a product that a compiler joins to a difference of two logs leaves the rounding of one
    segments: int32 (batch, chunks * chunk) or None without documents: the number of document starts in this chunk up to
        and with this token. 0: the carry into the chunk is of this token's document. Two tokens of a chunk are of one
        document where they are equal. Padding and what lies behind the end continue the last document.
    lengths: int32 (batch,) or None without documents: the real tokens of each row; what lies behind is never read
    """

    d: Tensor
    logs: Tensor
    segments: Tensor | None
    lengths: Tensor | None


def prepare(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    documents: Tensor | None,
    chunk: int,
) -> Prep:
    """Step sizes and decays of every head in one pass over dt.

    Args:
        dt: (batch, seq, heads), any strides
        A: (heads,)
        dt_bias: (heads,)
        dt_softplus: as in `alloy.ops.ssd_scan`
        dt_limit: as in `alloy.ops.ssd_scan`
        documents: int (batch, seq)
        chunk: tokens of a chunk, a power of two
    """
    batch, seq, heads = dt.shape
    chunks = num_blocks(seq, chunk)
    d = dt.new_empty(batch, heads, chunks * chunk, dtype=torch.float32)
    logs = torch.empty_like(d)
    segments = lengths = None
    if documents is not None:
        segments = dt.new_empty(batch, chunks * chunk, dtype=torch.int32)
        lengths = dt.new_empty(batch, dtype=torch.int32)
    _prepare[(chunks, num_blocks(heads, HEADS_BLOCK), batch)](
        dt, A, dt_bias, documents, d, logs, segments, lengths,
        seq, heads, *dt.stride(), *(documents.stride() if documents is not None else (0, 0)),
        low=dt_limit[0], high=dt_limit[1],
        HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, LIMITED=tuple(dt_limit) != NO_LIMIT,
        HAS_DOCUMENTS=documents is not None, CHUNK=chunk, HEADS=HEADS_BLOCK,
    )  # fmt: skip
    return Prep(d, logs, segments, lengths)


def products(B: Tensor, C: Tensor, chunk: int, lengths: Tensor | None = None) -> Tensor:
    """C B^T of every chunk and group, shared by the group's heads.

    Args:
        B: (batch, seq, groups, state), last stride 1
        C: (batch, seq, groups, state), last stride 1
        chunk: tokens of a chunk, a power of two
        lengths: `Prep.lengths`

    Returns:
        (batch, groups, chunks, chunk, chunk) in B's dtype, fp32 for fp16, whose range ends at 65,504, with
        [i, j] = C_i . B_j; 0 where i or j is behind the end
    """
    batch, seq, groups, state = B.shape
    chunks = num_blocks(seq, chunk)
    out = B.new_empty(batch, groups, chunks, chunk, chunk, dtype=torch.float32 if B.dtype == torch.float16 else B.dtype)
    block = narrowest(B.dtype)
    _products[(chunks, groups, batch)](
        B, C, out, lengths, seq, state, *B.stride()[:3], *C.stride()[:3],
        HAS_LENGTHS=lengths is not None, CHUNK=chunk, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def narrowest(dtype: torch.dtype) -> int:
    """Columns that an operand of a matrix product must have, filled with zeros: 128 bytes a row.

    The ptxas 12.8 of Triton 3.6 miscompiles the shared memory addresses of narrower operands of wgmma (12.9 does not): the
    64-bit sum of an address and the bits that stand for rows of 32 or 64 bytes reads a register that was never written."""
    return 128 // dtype.itemsize


@triton.jit
def _prepare(
    dt_ptr, A_ptr, bias_ptr, documents_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr,
    seq, heads, dt_batch, dt_token, dt_head, doc_batch, doc_token, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One chunk of HEADS heads; grid (chunks, blocks of heads, batch)."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = token < seq
    real = inside
    if HAS_DOCUMENTS:
        row = documents_ptr + batch * doc_batch
        own = tl.load(row + token.to(tl.int64) * doc_token, mask=inside, other=-1)
        before = tl.load(row + (token - 1).to(tl.int64) * doc_token, mask=inside & (token > 0), other=-1)
        real = own >= 0
        if tl.program_id(1) == 0:
            starts = (real & (own != before) & (token > 0)).to(tl.int32)
            padded = tl.num_programs(0) * CHUNK
            tl.store(segments_ptr + batch * padded + token, tl.cumsum(starts, 0))
            # padding is only at a row's end, so that one token of the row is its first, or there is none
            first = inside & (own < 0) & ((before >= 0) | (token == 0))
            tl.store(lengths_ptr + batch + token * 0, token, mask=first)
            tl.store(lengths_ptr + batch + token * 0, seq, mask=real & (token == seq - 1))
    at = dt_ptr + batch * dt_batch + token.to(tl.int64)[:, None] * dt_token + head[None, :] * dt_head
    known = head < heads
    d = tl.load(at, mask=real[:, None] & known[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        d += tl.load(bias_ptr + head, mask=known, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        d = softplus(d)
    if LIMITED:
        d = tl.clamp(d, low, high, propagate_nan=tl.PropagateNan.ALL)
    d = tl.where(real[:, None], d, 0.0)
    A = tl.load(A_ptr + head, mask=known, other=0.0).to(tl.float64) * 1.4426950408889634
    # long steps: a scan in float32 rounds each sum another way, and a decay is the difference of two sums
    logs = tl.cumsum(d.to(tl.float64) * A[None, :], 0).to(tl.float32)
    padded = tl.num_programs(0).to(tl.int64) * CHUNK
    out = (batch * heads + head[None, :]) * padded + token[:, None]
    tl.store(d_ptr + out, d, mask=known[None, :])
    tl.store(logs_ptr + out, logs, mask=known[None, :])


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to the last bits also where exp(x) is small; x itself above 20, as torch has it."""
    grown = tl.exp(tl.minimum(x, 20.0))
    total = 1.0 + grown
    # the rounding of the sum divides out
    small = tl.where(total == 1.0, grown, grown * tl.log(total) / tl.where(total == 1.0, 1.0, total - 1.0))
    return tl.where(x <= 20.0, small, x)


@triton.jit
def _products(
    B_ptr, C_ptr, out_ptr, lengths_ptr, seq, state, B_batch, B_token, B_group, C_batch, C_token, C_group,
    HAS_LENGTHS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one group; grid (chunks, groups, batch)."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = tl.arange(0, CHUNK)
    token = (chunk * CHUNK + own).to(tl.int64)
    length = seq
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + batch)
    real = token < length
    B_row = B_ptr + batch * B_batch + group * B_group + token * B_token
    C_row = C_ptr + batch * C_batch + group * C_group + token * C_token
    acc = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    for start in range(0, state, BLOCK):
        n = start + tl.arange(0, BLOCK)
        used = n < state
        c = tl.load(C_row[:, None] + n[None, :], mask=real[:, None] & used[None, :], other=0.0)
        b = tl.load(B_row[None, :] + n[:, None], mask=real[None, :] & used[:, None], other=0.0)
        acc = tl.dot(c, b, acc, input_precision="ieee")
    at = ((batch * tl.num_programs(1) + group) * tl.num_programs(0) + chunk) * CHUNK * CHUNK
    tl.store(out_ptr + at + own[:, None] * CHUNK + own[None, :], acc.to(out_ptr.dtype.element_ty))
