"""The end of a decode step in plain PyTorch; kernels are compared with it in tests/ops/triton/test_decode.py."""

import math

import torch

from alloy.ops.decode import count_tokens, take_largest


def test_the_first_of_the_largest_and_no_choice_from_what_is_not_finite() -> None:
    """Ties go to the lowest id; NaN, infinity and a row of -inf give -1 and token 0."""
    scores = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0, math.nan, 9, 1], [0, 1, math.inf, 2], [-math.inf] * 4])
    logits, chosen, tokens = torch.empty(4, 4), torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int64)
    take_largest(scores.bfloat16(), logits, chosen, tokens)
    torch.testing.assert_close(logits, scores, equal_nan=True)
    assert chosen.tolist() == [1, -1, -1, -1]
    assert tokens.tolist() == [1, 0, 0, 0]


def test_rows_without_a_slot_count_nothing() -> None:
    """The last entry, which -1 would name, stays as it was."""
    lengths = torch.tensor([4, 5, 6, 0], dtype=torch.int32)
    count_tokens(lengths, torch.tensor([2, -1, 0, -1], dtype=torch.int32), 3)
    assert lengths.tolist() == [7, 5, 9, 0]
