"""Causal attention with grouped keys and values, with or without a cache.

Paper: GQA (Ainslie et al., 2023). arXiv:2305.13245
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
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
    return backend.run("attention", q, k, v, scale, documents, lengths, window)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    documents: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
) -> Tensor:
    seq, total = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is not None and window >= total:
        window = None
    segments = real = None
    if documents is not None:
        segments, real = segment_ids(documents)
        if lengths is None:
            # a masked weight is 0, and 0 times what padding holds must be 0
            k, v = (torch.where(real[:, None, :, None], t, 0) for t in (k, v))
            q = torch.where(real[:, None, :, None], q, 0)
    if lengths is not None and _uniform(lengths, total - seq):
        if seq == 1 and window is None:
            return _blank(_one_query(q, k, v, scale), real)
        if total == seq:
            lengths = None
    if lengths is None and segments is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    key = torch.arange(total, device=q.device)
    query = torch.arange(seq, device=q.device)[None, :, None]
    if lengths is not None:
        query = query + lengths[:, None, None]
    seen = key <= query  # (batch or 1, seq, total)
    if window is not None:
        seen = seen & (key > query - window)
    if segments is not None and lengths is None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped)
    return _blank(y, real)


def _uniform(lengths: Tensor, held: int) -> bool:
    """Whether every row holds `held` keys; only asked where looking costs no synchronisation."""
    return lengths.device.type == "cpu" and bool((lengths == held).all())


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """One query a row that sees all keys: the heads of a group become the queries of one head, nothing is expanded."""
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(folded, k, v, scale=scale).reshape(q.shape)


def _blank(y: Tensor, real: Tensor | None) -> Tensor:
    return y if real is None else torch.where(real[:, None, :, None], y, 0)


backend.add("attention", "torch", _attention)
