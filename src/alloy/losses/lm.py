"""Next-token and multi-token-prediction losses that never hold fp32 logits of a whole batch.

Paper: DeepSeek-V3, section 2.2 (multi-token prediction) arXiv:2412.19437
"""

import torch
from torch import Tensor

from alloy.ops.cross_entropy import IGNORE, linear_ce
from alloy.ops.documents import segment_ids


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of cross entropies of `hidden @ weight.T` against `labels`.

    Matmuls run in the autocast dtype if autocast is on, softmax and sums in fp32; the weight's gradient is added up in fp32.

    Args:
        hidden: (..., hidden)
        weight: (vocab, hidden)
        labels: (...), int64; -100 is not counted
        chunk: tokens at a time; None picks a size that keeps a chunk of logits small

    Returns:
        scalar fp32
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return linear_ce(hidden, weight, labels, chunk, dtype)


def mtp_labels(labels: Tensor, documents: Tensor, depth: int) -> Tensor:
    """Labels of MTP depth `depth`: position t is asked for token t + depth + 1, unless another document begins before it.

    Args:
        labels: (batch, seq), label of position t is token t + 1
        documents: (batch, seq)
        depth: 1 or more

    Returns:
        (batch, seq - depth)
    """
    segments, _ = segment_ids(documents)
    crosses = segments[:, depth:] != segments[:, :-depth]
    return labels[:, depth:].masked_fill(crosses, IGNORE)


def count_labels(labels: Tensor) -> int:
    """Number of labels (any shape, on the CPU) that are counted."""
    return int((labels != IGNORE).sum())
