"""Causal attention with grouped keys and values: of whole rows, behind keys that are held already, and over paged keys.

Paged keys and values of a layer: kv (blocks, 2, kv_heads, BLOCK, head_dim), keys first. The token at position p of the
sequence in slot s is row p % BLOCK of block table[s, p // BLOCK].

Papers: GQA (Ainslie et al., 2023) arXiv:2305.13245; paged keys (Kwon et al., 2023) arXiv:2309.06180.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.cpu import attention as cpu
from alloy.ops.documents import Packing, segment_ids

# tokens of a block, and the most queries of a row that `attn_decode` takes
BLOCK = 64
MAX_QUERIES = 8


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    documents: Tensor | None = None,
    lengths: Tensor | int | None = None,
    window: int | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, causal; the softmax is computed in fp32.

    Without a cache total == seq. With a cache, query i of row b sees the keys j <= lengths[b] + i.

    Args:
        q: (batch, heads, seq, head_dim)
        k: (batch, kv_heads, total, head_dim)
        v: (batch, kv_heads, total, head_dim)
        scale: head_dim ** -0.5 by default
        documents: int (batch, seq); equal adjacent numbers attend to each other, -1 is padding, only at a row's end:
            never read, output 0. With `lengths` it marks padding only.
        lengths: int64 (batch,), keys held before these queries; keys past a row's own must be finite. A number: all rows
            hold that many and total == lengths + seq, which needs no mask.
        window: keys that a query sees, itself included; None: all
        packing: of `documents`; with it narrow dtypes on CUDA need no mask

    Returns:
        (batch, heads, seq, head_dim)
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"attention: heads = {heads} is not a multiple of kv_heads = {kv_heads}")
    if lengths is None and k.shape[2] != q.shape[2]:
        raise ValueError(
            f"attention: {k.shape[2]} keys for {q.shape[2]} queries; without `lengths` (a cache) they must be equally many"
        )
    if isinstance(lengths, int) and k.shape[2] != lengths + q.shape[2]:
        raise ValueError(f"attention: {k.shape[2]} keys for {lengths} held ones and {q.shape[2]} queries")
    q, k, v = backend.autocast(q, k, v)
    if lengths is None or (isinstance(lengths, int) and lengths == 0):
        return backend.run("attn_prefill", q, k, v, scale, documents, window, packing)
    return backend.run("attn_prefix", q, k, v, scale, documents, lengths, window)


@torch.no_grad()
def attn_decode(
    q: Tensor,
    kv: Tensor,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Few queries a row over paged keys and values, those of the queries themselves included (`kv_append` comes first).

    Query i of a row sees the keys j <= lengths[slot] + i.

    Args:
        q: (batch, 1 .. 8, heads, head_dim)
        kv: (blocks, 2, kv_heads, BLOCK, head_dim)
        table: int32 (slots, blocks of a sequence)
        lengths: int (slots,), tokens held before these queries
        slots: int32 (batch,), the slot of each row; -1: nothing is read, output 0
        scale: head_dim ** -0.5 by default
        window: keys that a query sees, itself included; None: all

    Returns:
        (batch, queries, heads, head_dim), contiguous
    """
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(f"attn_decode: {q.shape[1]} queries a row; it takes 1 .. {MAX_QUERIES}")
    if q.shape[2] % kv.shape[2] or q.shape[3] != kv.shape[4]:
        raise ValueError(f"attn_decode: q is {tuple(q.shape)}, which does not fit kv {tuple(kv.shape)}")
    return backend.run("attn_decode", q, kv, table, lengths, slots, scale, window)


@torch.no_grad()
def kv_append(kv: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """Write keys and values behind the tokens that each row holds; rows whose slot is -1 write to block 0 or nowhere.

    Args:
        kv: (blocks, 2, kv_heads, BLOCK, head_dim); block 0 belongs to no sequence
        k: (batch, seq, kv_heads, head_dim)
        v: (batch, seq, kv_heads, head_dim)
        table: int32 (slots, blocks of a sequence); the last row belongs to no sequence and names block 0
        lengths: int (slots,), tokens held before these
        slots: int32 (batch,)
    """
    backend.run("kv_append", kv, k, v, table, lengths, slots)


def gather_kv(kv: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole blocks, one after another: kv (blocks, 2, kv_heads, BLOCK, head_dim), blocks int (batch, n)
    -> (batch, kv_heads, n * BLOCK, head_dim) each."""
    batch, n = blocks.shape
    if not kv.is_cuda:
        # along another dimension than the first, index_select copies all of kv before it looks
        if n == 1:
            both = kv.index_select(0, blocks.flatten())
            return both[:, 0], both[:, 1]
        # a block's keys of one head, or its values, are one piece of memory, and pieces come in the order of the result
        heads, _, width = kv.shape[2:]
        first = torch.arange(2 * heads, device=kv.device).view(2, 1, heads, 1)
        pieces = first + blocks[:, None] * (2 * heads)  # (2, batch, kv_heads, n)
        both = kv.view(-1, BLOCK * width).index_select(0, pieces.flatten()).view(2, batch, heads, n * BLOCK, width)
        return both[0], both[1]
    keys, values = (
        kv[:, i]
        .transpose(0, 1)
        .index_select(1, blocks.flatten())
        .unflatten(1, (batch, n))
        .transpose(0, 1)
        .flatten(2, 3)
        for i in range(2)
    )
    return keys, values


def _attn_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    documents: Tensor | None,
    window: int | None,
    packing: Packing | None = None,
) -> Tensor:
    """Reference: SDPA, with a mask only where packing or a window needs one."""
    grouped = q.shape[1] != k.shape[1]
    if documents is None and (window is None or window >= q.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    segments = real = None
    if documents is not None:
        segments, real = segment_ids(documents)
        # a masked weight is 0, and 0 times what padding holds must be 0
        q, k, v = (torch.where(real[:, None, :, None], t, 0) for t in (q, k, v))
    if _has_flash(q) and (documents is None or packing is not None):
        return _blank(_flash(q, k, v, scale, window, packing), real)
    at = torch.arange(q.shape[2], device=q.device)
    seen = _within(at, at[:, None], window)
    if segments is not None:
        seen = (seen & (segments[:, :, None] == segments[:, None, :]))[:, None]
    return _blank(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped), real)


def _attn_prefill_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    documents: Tensor | None,
    window: int | None,
    packing: Packing | None = None,
) -> Tensor:
    """Narrow dtypes stay with SDPA, whose CPU kernel has matmuls for them."""
    fn = cpu.attn_prefill if q.dtype in (torch.float32, torch.float64) else _attn_prefill
    return fn(q, k, v, scale, documents, window)


def _attn_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    documents: Tensor | None,
    lengths: Tensor | int,
    window: int | None,
) -> Tensor:
    seq, total = q.shape[2], k.shape[2]
    real = None if documents is None else documents >= 0
    grouped = q.shape[1] != k.shape[1]
    if isinstance(lengths, Tensor) and lengths.device.type == "cpu" and bool((lengths == total - seq).all()):
        lengths = total - seq
    if isinstance(lengths, int) and (window is None or window >= total):
        if lengths == 0:
            return _blank(backend.run("attn_prefill", q, k, v, scale, None, None), real)
        if seq == 1:
            # the heads of a group become the queries of one head: no mask, nothing expanded
            folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return _blank(F.scaled_dot_product_attention(folded, k, v, scale=scale).reshape(q.shape), real)
    if isinstance(lengths, int):
        if _has_flash(q):
            return _blank(_flash(q, k, v, scale, window, None), real)
        lengths = torch.full((1,), lengths, device=q.device)
    query = torch.arange(seq, device=q.device)[None, :, None] + lengths[:, None, None]
    seen = _within(torch.arange(total, device=q.device), query, window)[:, None]
    return _blank(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped), real)


def _has_flash(q: Tensor) -> bool:
    """Whether torch's FlashAttention computes queries like q (batch, heads, seq, head_dim)."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] % 8 == 0
        and q.shape[3] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, packing: Packing | None) -> Tensor:
    """What SDPA runs where it is asked for neither packing nor a window nor held keys, with those: no mask in memory, keys
    are not expanded. The last query sees the last key. Paper: FlashAttention-2 (Dao, 2023) arXiv:2307.08691
    """
    shape = q.shape
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bounds, longest, total = None, q.shape[1], k.shape[1]
    if packing is not None:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        bounds, longest, total = packing.cu_seqlens, packing.longest, packing.longest
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    y = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, total, 0.0, True, False, scale=scale, **sides
    )[0]
    return y.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def _attn_decode(
    q: Tensor, kv: Tensor, table: Tensor, lengths: Tensor, slots: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Reference: all keys that the table names, those out of sight masked."""
    rows, held = table[slots.long()].long(), lengths[slots.long()].long()
    keys, values = gather_kv(kv, rows)
    at = torch.arange(keys.shape[2], device=q.device)
    seen = _within(at, held[:, None, None] + torch.arange(q.shape[1], device=q.device)[None, :, None], window)
    seen &= (slots >= 0)[:, None, None]
    # a masked weight is 0, and 0 times what an unwritten place holds must be 0
    keys, values = (torch.where(seen.any(1)[:, None, :, None], t, 0) for t in (keys, values))
    grouped = q.shape[2] != kv.shape[2]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped
    )
    return torch.where((slots >= 0)[:, None, None, None], y.transpose(1, 2), 0).contiguous()


def _kv_append(kv: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """Reference; every place is written once, except block 0."""
    position = lengths[slots.long()].long()[:, None] + torch.arange(k.shape[1], device=k.device)  # (batch, seq)
    # a row that stands for nothing may count beyond its table
    blocks = table[slots.long()].long().gather(1, (position // BLOCK).clamp(max=table.shape[1] - 1))
    kv[blocks, 0, :, position % BLOCK] = k.to(kv.dtype)
    kv[blocks, 1, :, position % BLOCK] = v.to(kv.dtype)


def _within(key: Tensor, query: Tensor, window: int | None) -> Tensor:
    """Whether each query, a position (..., seq, 1), sees each key, a position (total,)."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _blank(y: Tensor, real: Tensor | None) -> Tensor:
    """y (batch, heads, seq, head_dim) with zeros where `real` (batch, seq) is false."""
    return y if real is None else torch.where(real[:, None, :, None], y, 0)


backend.add("attn_prefill", "torch", _attn_prefill)
backend.add("attn_prefill", "cpu", _attn_prefill_cpu)
backend.add("attn_prefix", "torch", _attn_prefix)
backend.add("attn_decode", "torch", _attn_decode)
backend.add("attn_decode", "triton", "alloy.ops.triton.attention:attn_decode")
backend.add("kv_append", "torch", _kv_append)
backend.add("kv_append", "triton", "alloy.ops.triton.attention:kv_append")
