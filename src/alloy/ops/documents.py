"""How ops read packing and padding: segment numbers that rise at each document start, and a mask of real tokens."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def as_documents(documents: Tensor | None, cu_seqlens: Tensor | None, batch: int, seq: int) -> Tensor | None:
    """The one form in which ops see packing: `documents` (batch, seq), or None for one full document a row.

    Args:
        documents: int (batch, seq); equal adjacent numbers are one document, -1 is padding, only at a row's end
        cu_seqlens: int (docs + 1,), document boundaries from 0 to seq; needs batch == 1. Checked on the CPU alone: to read
            them from a GPU would wait for it
        batch: rows of the input
        seq: its tokens a row
    """
    if cu_seqlens is None:
        if documents is not None and documents.shape != (batch, seq):
            raise ValueError(f"documents has shape {tuple(documents.shape)} but the input is ({batch}, {seq})")
        return documents
    if documents is not None:
        raise ValueError("documents and cu_seqlens are both given; pass one of them")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs batch == 1, got batch = {batch}; pass documents for several rows")
    if cu_seqlens.device.type == "cpu":
        check_cu_seqlens(cu_seqlens, seq)
    return torch.searchsorted(cu_seqlens[1:].long(), torch.arange(seq, device=cu_seqlens.device), right=True)[None]


def check_cu_seqlens(cu_seqlens: Tensor, seq: int) -> None:
    """Refuse boundaries that do not rise from 0 to `seq` (an empty document is refused too)."""
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != seq or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens = {bounds} must rise strictly from 0 to seq = {seq}")


class Packing(NamedTuple):
    """Where segments begin in rows laid one after another; padding is a segment too.

    Attributes:
        cu_seqlens: int32 (segments + 1,)
        longest: tokens of the longest segment
    """

    cu_seqlens: Tensor
    longest: int


def read_packing(documents: Tensor) -> Packing:
    """The segments of documents (batch, seq). It asks the device, so that one call should serve all layers."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = starts.flatten().nonzero()[:, 0]
    edges = torch.cat([edges, edges.new_full((1,), documents.numel())])
    return Packing(edges.to(torch.int32), int(edges.diff().max()))


def segment_ids(documents: Tensor) -> tuple[Tensor, Tensor]:
    """(segments, real), both (batch, seq): int64 numbers that rise by one at each document start, and the mask of
    tokens that are not padding. Padding continues the last segment, so a state is carried through it."""
    real = documents >= 0
    starts = torch.zeros_like(documents, dtype=torch.int64)
    starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]) & real[:, 1:]
    return starts.cumsum(1), real
