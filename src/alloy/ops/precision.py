"""The dtype in which an op accumulates."""

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype for x (any shape): float32 up to float32; float64 stays float64, so that gradients can be checked in it."""
    return torch.promote_types(x.dtype, torch.float32)
