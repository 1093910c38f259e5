"""Causal attention with grouped keys and values, with or without a cache.

Paper: GQA (Ainslie et al., 2023). arXiv:2305.13245
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.cpu import attention as cpu
from alloy.ops.documents import segment_ids


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    documents: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
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
        lengths: int64 (batch,), keys held before these queries; keys past a row's own must be finite
        window: keys that a query sees, itself included; None: all

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
    q, k, v = backend.autocast(q, k, v)
    if lengths is None:
        return backend.run("attn_prefill", q, k, v, scale, documents, window)
    return backend.run("attn_decode", q, k, v, scale, documents, lengths, window)


def _attn_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, documents: Tensor | None, window: int | None
) -> Tensor:
    """Reference: SDPA, with a mask only where packing or a window needs one."""
    grouped = q.shape[1] != k.shape[1]
    if documents is None and (window is None or window >= q.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    at = torch.arange(q.shape[2], device=q.device)
    seen = _within(at, at[:, None], window)
    real = None
    if documents is not None:
        segments, real = segment_ids(documents)
        # a masked weight is 0, and 0 times what padding holds must be 0
        q, k, v = (torch.where(real[:, None, :, None], t, 0) for t in (q, k, v))
        seen = (seen & (segments[:, :, None] == segments[:, None, :]))[:, None]
    return _blank(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped), real)


def _attn_prefill_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, documents: Tensor | None, window: int | None
) -> Tensor:
    """Narrow dtypes stay with SDPA, whose CPU kernel has matmuls for them."""
    fn = cpu.attn_prefill if q.dtype in (torch.float32, torch.float64) else _attn_prefill
    return fn(q, k, v, scale, documents, window)


def _attn_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    documents: Tensor | None,
    lengths: Tensor,
    window: int | None,
) -> Tensor:
    seq, total = q.shape[2], k.shape[2]
    real = None if documents is None else documents >= 0
    if lengths.device.type == "cpu" and bool((lengths == total - seq).all()):
        if total == seq:
            return _blank(backend.run("attn_prefill", q, k, v, scale, None, window), real)
        if seq == 1 and (window is None or window >= total):
            # the heads of a group become the queries of one head: no mask, nothing expanded
            folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            return _blank(F.scaled_dot_product_attention(folded, k, v, scale=scale).reshape(q.shape), real)
    query = torch.arange(seq, device=q.device)[None, :, None] + lengths[:, None, None]
    seen = _within(torch.arange(total, device=q.device), query, window)[:, None]
    grouped = q.shape[1] != k.shape[1]
    return _blank(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped), real)


def _within(key: Tensor, query: Tensor, window: int | None) -> Tensor:
    """Whether each query, a position (..., seq, 1), sees each key, a position (total,)."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _blank(y: Tensor, real: Tensor | None) -> Tensor:
    """y (batch, heads, seq, head_dim) with zeros where `real` (batch, seq) is false."""
    return y if real is None else torch.where(real[:, None, :, None], y, 0)


backend.add("attn_prefill", "torch", _attn_prefill)
backend.add("attn_prefill", "cpu", _attn_prefill_cpu)
backend.add("attn_decode", "torch", _attn_decode)
