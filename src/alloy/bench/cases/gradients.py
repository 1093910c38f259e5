"""Forward alone and forward with backward, for operations that take tensors and give one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alloy.bench.case import Outputs, Run

Inputs = Mapping[str, Tensor]


def value(op: Callable[..., Any], names: Sequence[str]) -> Run:
    """y of `op` given the named inputs."""

    def run(i: Inputs) -> Outputs:
        with torch.no_grad():
            return {"y": op(*(i[name] for name in names))}

    return run


def gradients(op: Callable[..., Any], names: Sequence[str], fixed: Sequence[str] = ()) -> Run:
    """y and the gradient of every named input but the `fixed`, for the gradient i["dy"] of y."""

    def run(i: Inputs) -> Outputs:
        tensors = {name: i[name] if name in fixed else i[name].detach().requires_grad_() for name in names}
        leaves = {name: tensor for name, tensor in tensors.items() if name not in fixed}
        y = op(*tensors.values())
        found = torch.autograd.grad(y, list(leaves.values()), i["dy"])
        return {"y": y, **{f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}}

    return run


def in_float64(run: Run) -> Run:
    """`run` of the floating-point inputs in float64."""
    return lambda i: run({name: t.double() if t.is_floating_point() else t for name, t in i.items()})
