"""Element-wise activations by name, and the gate of a gated MLP."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU in the dtype of `x`, any shape. Paper: Primer (So et al., 2021), section 4.1. arXiv:2109.08668"""
    return backend.call("relu2", x)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of one (any) shape and dtype. Paper: SwiGLU (Shazeer, 2020), eq. 6. arXiv:2002.05202"""
    return backend.call("silu_mul", gate, up)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up for a name of `ACTIVATIONS`; gate and up (any shape)."""
    return silu_mul(gate, up) if activation == "silu" else ACTIVATIONS[activation](gate) * up


def _relu2(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReLU2.apply(x)
    return F.relu(x).square_()


class _ReLU2(torch.autograd.Function):
    """Keeps relu(x) alone: where it is zero, so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = F.relu(x)
        ctx.save_for_backward(kept)
        return kept.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return (dy * kept).mul_(2)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


backend.add("relu2", "torch", _relu2)
backend.add("relu2", "triton", "alloy.ops.triton.activation:relu2")
backend.add("silu_mul", "torch", _silu_mul)
backend.add("silu_mul", "triton", "alloy.ops.triton.activation:silu_mul")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}
