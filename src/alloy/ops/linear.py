"""The linear map. CPU cores have a path of their own, see `ops/cpu/linear.py`."""

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
    return backend.resolve("linear", x.device.type)(x, weight, bias)


backend.add("linear", "torch", F.linear)
backend.add("linear", "cpu", cpu.linear)
