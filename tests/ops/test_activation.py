"""Activations against their formulas."""

import math

import pytest
import torch

from alloy.ops import ACTIVATIONS

FORMULAS = {
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_equals_its_formula(name: str) -> None:
    """Values, with and without gradients, and finite differences; the input is left as it was."""
    x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = x.detach().clone()
    want = torch.tensor([[FORMULAS[name](v) for v in row] for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), want)
    torch.testing.assert_close(ACTIVATIONS[name](x.detach()), want)
    assert torch.equal(x, before)
    assert torch.autograd.gradcheck(ACTIVATIONS[name], x)
