# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Attention of few queries over paged keys and values, and writing new ones: the kernels of `alloy.ops.attention`.

Keys are read once for all queries that share them: the query heads of a group times the queries of a row are the rows of
one tile. The length is split among programs whose number is fixed when the call is made, and whose shares follow from the
lengths on the device; a second kernel joins the shares in a fixed order, so that a result is the same bits each time.

H200, bf16, 8,192 tokens, keys and values a second against a copy (4.25 TB/s): 64 rows of 40 heads on 8 of 128 0.89 to 1.02,
with four queries a row 0.81 to 0.97; 64 rows of 32 on 2 0.79 to 0.88; 8 rows of 40 on 8 0.77 to 0.83; one row 0.4.

Paper: Flash-Decoding (Dao et al., 2023), pytorch.org/blog/flash-decoding; online softmax (Milakov and Gimelshein, 2018)
arXiv:1805.02867
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.attention import BLOCK
from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import num_blocks, power_of_2

# `programs` is how many the length is split for, `least` the fewest blocks of a share
tuning.register(
    "attn_decode",
    {"programs": 1056, "least": 2, "num_warps": 4, "num_stages": 2},
    {"programs": 1056, "least": 2, "num_warps": 4, "num_stages": 3},
    {"programs": 2112, "least": 4, "num_warps": 4, "num_stages": 2},
    {"programs": 528, "least": 2, "num_warps": 4, "num_stages": 4},
    {"programs": 1056, "least": 2, "num_warps": 8, "num_stages": 3},
)
MOST_SPLITS = 128
LOG2_E = 1.4426950408889634


def attn_decode(
    q: Tensor, kv: Tensor, table: Tensor, lengths: Tensor, slots: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """As `alloy.ops.attn_decode`."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _attn_decode(q, kv, table, lengths, slots, scale, window or 0)


def kv_append(kv: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """As `alloy.ops.kv_append`."""
    _kv_append(kv, k, v, table, lengths, slots)


@torch.library.custom_op("alloy::attn_decode", mutates_args=())
def _attn_decode(
    q: Tensor, kv: Tensor, table: Tensor, lengths: Tensor, slots: Tensor, scale: float, window: int
) -> Tensor:
    batch, queries, heads, head_dim = q.shape
    kv_heads = kv.shape[2]
    rows = heads // kv_heads * queries
    config = tuning.pick("attn_decode", f"{head_dim}/{rows}")
    splits = _splits(batch * kv_heads, table.shape[1], config["programs"], config["least"])
    parts = torch.empty(batch, kv_heads, splits, rows, head_dim, device=q.device, dtype=torch.float32)
    peaks = torch.empty(batch, kv_heads, splits, rows, device=q.device, dtype=torch.float32)
    y = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    shared = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "QUERIES": queries,
        "D": head_dim,
        # Triton 3.6's assembler for sm_90 misreads warp group operands of less than 128 bytes a row
        "WIDTH": max(64 if rows > 32 else 16, power_of_2(head_dim)),
        "WINDOW": window,
        "SPLITS": splits,
        "LEAST": config["least"],
        "BLOCK": BLOCK,
    }
    _share[(batch * kv_heads, splits)](
        q,
        kv,
        table,
        lengths,
        slots,
        parts,
        peaks,
        scale * LOG2_E,
        *q.stride()[:3],
        *kv.stride()[:4],
        table.stride(0),
        M=max(16, power_of_2(rows)),
        IEEE=q.dtype == torch.float32,
        # 128 rows do not fit the registers of four warps
        num_warps=config["num_warps"] if rows <= 64 else 8,
        num_stages=config["num_stages"],
        **shared,
    )
    _join[(batch * kv_heads, rows)](parts, peaks, lengths, slots, y, TALL=min(splits, 16), num_warps=4, **shared)
    return y


@_attn_decode.register_fake
def _(q: Tensor, kv: Tensor, table: Tensor, lengths: Tensor, slots: Tensor, scale: float, window: int) -> Tensor:
    return torch.empty(q.shape, device=q.device, dtype=q.dtype)


@torch.library.custom_op("alloy::kv_append", mutates_args=("kv",))
def _kv_append(kv: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, slots: Tensor) -> None:
    batch, seq, heads, head_dim = k.shape
    _append[(seq, batch)](
        kv,
        k,
        v,
        table,
        lengths,
        slots,
        *kv.stride()[:4],
        *k.stride()[:3],
        *v.stride()[:3],
        table.stride(0),
        HEADS=heads,
        D=head_dim,
        TALL=power_of_2(heads),
        WIDTH=power_of_2(head_dim),
        BLOCK=BLOCK,
        num_warps=4 if heads * head_dim > 512 else 1,
    )


def _splits(pairs: int, blocks: int, programs: int, least: int) -> int:
    """Shares of each (row, head of keys): enough for `programs`, a power of two, no more than the table could fill."""
    wanted = power_of_2(max(4, num_blocks(programs, pairs)))
    return min(wanted, MOST_SPLITS, power_of_2(num_blocks(blocks, least)))


@triton.jit
def _range(
    held, QUERIES: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """The first block that any query sees, the one after the last, and the blocks of a share."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(held - WINDOW + 1, 0) // BLOCK
    stop = (held + QUERIES + BLOCK - 1) // BLOCK
    return first, stop, tl.maximum((stop - first + SPLITS - 1) // SPLITS, LEAST)


@triton.jit
def _share(
    q,
    kv,
    table,
    lengths,
    slots,
    parts,
    peaks,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_block,
    stride_kind,
    stride_head,
    stride_token,
    stride_table,
    M: tl.constexpr,
    IEEE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax and weighted values over one share of the keys of one (row, head of keys)."""
    row, head, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    held = tl.load(lengths + slot).to(tl.int32)
    first, stop, share = _range(held, QUERIES, WINDOW, SPLITS, LEAST, BLOCK)
    begin = first + split * share
    if begin >= stop:
        return
    # row r of the tile is query r // GROUP of head r % GROUP of the group
    r, d, n = tl.arange(0, M), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    at = held + r // GROUP
    inside = d < D
    q_place = q + row.to(tl.int64) * stride_qb + (r // GROUP) * stride_qt + (head * GROUP + r % GROUP) * stride_qh
    queries = tl.load(q_place[:, None] + d[None, :], mask=(r < GROUP * QUERIES)[:, None] & inside[None, :], other=0.0)
    table += slot.to(tl.int64) * stride_table
    kv += head * stride_head
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    stop = tl.minimum(begin + share, stop)
    # one step ahead, so that loads of keys do not wait for it
    entry = tl.load(table + begin)
    for i in range(begin, stop):
        block = kv + entry.to(tl.int64) * stride_block
        entry = tl.load(table + tl.minimum(i + 1, stop - 1))
        key = i * BLOCK + n
        k = tl.load(block + n[None, :] * stride_token + d[:, None], mask=inside[:, None], other=0.0)
        # what was never written is not read: it may hold anything
        written = (key < held + QUERIES)[:, None] & inside[None, :]
        v = tl.load(block + stride_kind + n[:, None] * stride_token + d[None, :], mask=written, other=0.0)
        scores = tl.dot(queries, k, input_precision="ieee" if IEEE else "tf32") * scale
        seen = key[None, :] <= at[:, None]
        if WINDOW > 0:
            seen &= key[None, :] > at[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # a query that has seen no key yet keeps zeros
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee" if IEEE else "tf32")
        peak = higher
    place = (tl.program_id(0).to(tl.int64) * SPLITS + split) * (GROUP * QUERIES) + r
    used = r < GROUP * QUERIES
    tl.store(peaks + place, tl.where(total > 0, peak + tl.log2(total), float("-inf")), mask=used)
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(parts + place[:, None] * D + d[None, :], acc, mask=used[:, None] & inside[None, :])


@triton.jit
def _join(
    parts,
    peaks,
    lengths,
    slots,
    y,
    TALL: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shares of one query and head as one; zeros for a row without a slot."""
    row, head, r = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    d, s = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    slot = tl.load(slots + row)
    count = 0
    if slot >= 0:
        held = tl.load(lengths + slot).to(tl.int32)
        first, stop, share = _range(held, QUERIES, WINDOW, SPLITS, LEAST, BLOCK)
        count = (stop - first + share - 1) // share
    rows = GROUP * QUERIES
    start = tl.program_id(0).to(tl.int64) * SPLITS * rows + r
    heights = tl.load(peaks + start + s * rows, mask=s < count, other=float("-inf"))
    # finite without any share
    top = tl.maximum(tl.max(heights, 0), -1e38)
    total = tl.sum(tl.exp2(heights - top), 0)
    acc = tl.zeros([WIDTH], tl.float32)
    for i in range(0, count, TALL):
        t = i + tl.arange(0, TALL)
        weight = tl.exp2(tl.load(peaks + start + t * rows, mask=t < count, other=float("-inf")) - top)
        place = parts + (start + t * rows)[:, None] * D + d[None, :]
        part = tl.load(place, mask=(t < count)[:, None] & (d < D)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    acc /= tl.where(count > 0, total, 1.0)
    place = ((row * QUERIES + r // GROUP) * KV_HEADS + head) * GROUP + r % GROUP
    tl.store(y + place.to(tl.int64) * D + d, acc.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def _append(
    kv,
    k,
    v,
    table,
    lengths,
    slots,
    stride_block,
    stride_kind,
    stride_head,
    stride_token,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TALL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All heads of one token."""
    token, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    at = tl.load(lengths + slot).to(tl.int32) + token
    block = tl.load(table + slot.to(tl.int64) * stride_table + at // BLOCK).to(tl.int64)
    h, d = tl.arange(0, TALL)[:, None], tl.arange(0, WIDTH)[None, :]
    mask = (h < HEADS) & (d < D)
    to = kv + block * stride_block + (at % BLOCK) * stride_token + h * stride_head + d
    k += row.to(tl.int64) * stride_kb + token.to(tl.int64) * stride_kt
    v += row.to(tl.int64) * stride_vb + token.to(tl.int64) * stride_vt
    tl.store(to, tl.load(k + h * stride_kh + d, mask=mask).to(kv.dtype.element_ty), mask=mask)
    tl.store(to + stride_kind, tl.load(v + h * stride_vh + d, mask=mask).to(kv.dtype.element_ty), mask=mask)
