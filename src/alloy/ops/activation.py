"""Element-wise activations by name."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU in the dtype of `x`, any shape. Paper: Primer (So et al., 2021), section 4.1. arXiv:2109.08668"""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": relu2,
    "silu": F.silu,
    "gelu": partial(F.gelu, approximate="none"),
    "relu": F.relu,
}
