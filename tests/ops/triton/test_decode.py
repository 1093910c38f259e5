"""The end of a decode step: kernels against plain PyTorch."""

import math

import pytest
import torch

from alloy.ops import use_backend
from alloy.ops.decode import count_tokens, take_largest

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [61, 9001])
def test_largest_of_each_row(device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    """Many ties, the largest in any block, rows that hold what is not finite, strided outputs."""
    g = torch.Generator().manual_seed(vocab)
    scores = torch.randint(-9, 9, (7, vocab), generator=g).to(device, dtype)
    scores[1, vocab - 1] = 40
    scores[2, 3] = math.nan
    scores[3, vocab // 2] = math.inf
    scores[4] = -math.inf
    results = []
    for backend in ("torch", "triton"):
        logits = torch.full((7, vocab + 3), -1.0, device=device)[:, :vocab]
        chosen, tokens = (torch.full((7, 2), -7, device=device)[:, 0] for _ in range(2))
        with use_backend(backend):
            take_largest(scores, logits, chosen, tokens)
        results.append((logits, chosen, tokens))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
    assert results[1][1].tolist()[1:5] == [vocab - 1, -1, -1, -1]


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_counts(device: torch.device, rows: int) -> None:
    """Slots in any order among padding rows."""
    slots = torch.randperm(2 * rows, generator=torch.Generator().manual_seed(rows))[:rows].to(device, torch.int32)
    slots[::3] = -1
    results = []
    for backend in ("torch", "triton"):
        lengths = torch.arange(2 * rows + 1, dtype=torch.int32, device=device)
        with use_backend(backend):
            count_tokens(lengths, slots, 2)
        results.append(lengths)
    assert torch.equal(*results)
