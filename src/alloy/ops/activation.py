"""Element-wise activations by name."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU in the dtype of `x`, any shape. Paper: Primer (So et al., 2021), section 4.1. arXiv:2109.08668"""
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


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}
