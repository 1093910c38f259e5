"""Norms against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from alloy.ops import add_rms_norm, gated_rms_norm, layer_norm_1p, rms_norm, use_backend
from alloy.ops.cpu.norm import FEW_ROWS

BACKENDS = ("torch", "cpu")


def draw(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def formula(x: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
    """Group by group."""
    u = x * gate / (1 + torch.exp(-gate))
    parts = []
    for start in range(0, x.shape[-1], size):
        group = u[..., start : start + size]
        parts.append(group / torch.sqrt((group**2).sum(-1, keepdim=True) / size + eps))
    return torch.cat(parts, dim=-1) * weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 5, 15])
def test_gated_rms_norm_equals_its_formula(size: int, backend: str) -> None:
    """Values and gradients in every grouping."""
    inputs = x, gate, weight = draw(2, 7, 15), draw(2, 7, 15), draw(15)
    with use_backend(backend):
        y = gated_rms_norm(x, gate, weight, 1e-3, size)
        want = formula(x, gate, weight, 1e-3, size)
        torch.testing.assert_close(y, want)
        g = draw(2, 7, 15).detach() + 1
        for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 1e-3, size), inputs, fast_mode=True)
        with torch.no_grad():
            torch.testing.assert_close(gated_rms_norm(x, gate, weight, 1e-3, size), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast_first", [False, True])
def test_rms_norm_equals_its_formula(cast_first: bool, backend: str) -> None:
    """Values and gradients; in float64 both variants are one."""
    inputs = x, weight = draw(3, 5, 14), draw(14)
    with use_backend(backend):
        y = rms_norm(x, weight, 1e-3, cast_first)
        want = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3) * weight
        torch.testing.assert_close(y, want)
        g = draw(3, 5, 14).detach() * 2 + 1
        for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(rms_norm(x, weight, 1e-3, cast_first), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_rounded_where_each_variant_says(backend: str) -> None:
    """Nemotron: once, after the weight. Llama: before the weight, and again after it."""
    x, weight = draw(2, 9, 33).detach().bfloat16(), draw(33).detach().bfloat16()
    normed = x.float() / torch.sqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    with use_backend(backend):
        once = rms_norm(x, weight, 1e-5)
        twice = rms_norm(x, weight, 1e-5, cast_first=True)
        assert once.dtype == twice.dtype == torch.bfloat16
        assert (once == (normed * weight.float()).bfloat16()).float().mean() > 0.99
        assert (twice == weight * normed.bfloat16()).float().mean() > 0.99
        gate = draw(2, 9, 33).detach().bfloat16() + 1
        gated = gated_rms_norm(x, gate, weight, 1e-5, 11)
        want = formula(x.double(), gate.double(), weight.double(), 1e-5, 11)
    assert gated.dtype == torch.bfloat16
    torch.testing.assert_close(gated.double(), want, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_zeros_and_of_strided_views(backend: str) -> None:
    """Zero rows give zero and finite gradients; a view into a wider array is read as it is."""
    wide = draw(2, 5, 40)
    weight = torch.ones(12, dtype=torch.float64)
    with use_backend(backend):
        torch.testing.assert_close(
            rms_norm(wide[..., 3:15], weight, 1e-5), rms_norm(wide[..., 3:15].contiguous(), weight, 1e-5)
        )
        zeros = torch.zeros(1, 3, 12, dtype=torch.float64, requires_grad=True)
        y = rms_norm(zeros, weight, 1e-5) + gated_rms_norm(zeros, zeros, weight, 1e-5, 4)
        (gradient,) = torch.autograd.grad(y.sum(), zeros)
    assert not y.any()
    assert gradient.isfinite().all()


def test_layer_norm_1p_adds_one_to_the_weight() -> None:
    """Nemotron-4's norm: weights near zero scale by one."""
    x, weight, bias = draw(2, 5, 9), draw(9), draw(9)
    centred = x - x.mean(-1, keepdim=True)
    want = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * (1 + weight) + bias
    torch.testing.assert_close(layer_norm_1p(x, weight, bias, 1e-5), want)
    assert layer_norm_1p(x.bfloat16(), weight.float(), bias.float(), 1e-5).dtype == torch.bfloat16


def test_gated_rms_norm_refuses_groups_that_do_not_divide() -> None:
    """Both numbers are in the message."""
    with pytest.raises(ValueError, match="width 10 is not a multiple of group_size = 4"):
        gated_rms_norm(torch.zeros(1, 10), torch.zeros(1, 10), torch.zeros(10), 1e-5, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS + 1])
@pytest.mark.parametrize("cast_first", [False, True])
def test_sum_and_norm(backend: str, rows: int, cast_first: bool) -> None:
    """The sum in the residual's dtype and its norm, for few rows, which a CPU has a path for, and for more."""
    x, residual, weight = (t.detach() for t in (draw(rows, 24), draw(1, rows, 24)[0], draw(24)))
    total = x + residual
    want = total / torch.sqrt((total**2).mean(-1, keepdim=True) + 1e-5) * weight
    with use_backend(backend), torch.no_grad():
        normed, kept = add_rms_norm(x.float(), residual.float(), weight.float(), 1e-5, cast_first)
        torch.testing.assert_close(normed, want.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept, total.float())
        normed, kept = add_rms_norm(x.bfloat16(), residual.float(), weight.bfloat16(), 1e-5, cast_first)
        assert (normed.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(normed.double(), want, rtol=3e-2, atol=3e-2)
