"""The linear map. CPU cores and few rows on GPUs have paths of their own, see `cpu/linear.py` and `triton/linear.py`."""

import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.cpu import linear as cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: (..., inputs)
        weight: (outputs, inputs)
        bias: (outputs,)

    Returns:
        (..., outputs)
    """
    return backend.call("linear", x, weight, bias)


backend.add("linear", "torch", F.linear)
backend.add("linear", "cpu", cpu.linear)
backend.add("linear", "triton", "alloy.ops.triton.linear:linear")
