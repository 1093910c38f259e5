"""Weights of low precision in a whole model, for inference: `quantize_weights(model, "int8")`.

Every linear map, the head and the experts are replaced; embeddings, norms, convolutions, routers and the parameters of the
recurrence stay as they are. A head that is tied to the embedding becomes a matrix of its own.
"""

from typing import cast

import torch
from torch import Tensor, nn

from alloy.errors import RequestError
from alloy.models.base import CausalLM
from alloy.models.blocks import Linear
from alloy.models.moe import Experts
from alloy.ops.quant import WEIGHTS, LowWeight, Weights, lay_out, low_experts, low_linear, quantize


class LowModule(nn.Module):
    """Holds matrices of low precision, which are not parameters: they are neither moved, cast, trained nor saved."""

    matrices: list[LowWeight]

    def _apply(self, fn: object, recurse: bool = True) -> "LowModule":
        raise RequestError("a model with weights of low precision cannot be moved or cast; load it where it shall run")


class LowLinear(LowModule):
    """A `Linear` of low precision."""

    def __init__(self, source: nn.Linear, kind: Weights) -> None:
        super().__init__()
        self.weight = lay_out(quantize(source.weight, kind))
        self.bias = None if source.bias is None else source.bias.detach()
        self.matrices = [self.weight]

    def forward(self, input: Tensor) -> Tensor:
        """input (..., inputs) -> (..., outputs)."""
        return low_linear(input, self.weight, self.bias)


class LowExperts(LowModule):
    """`Experts` of low precision, one matrix an expert."""

    def __init__(self, source: Experts, kind: Weights) -> None:
        super().__init__()
        self.activation = source.activation
        self.up = [lay_out(quantize(matrix, kind)) for matrix in source.up]
        self.down = [lay_out(quantize(matrix, kind)) for matrix in source.down]
        self.gate = None if source.gate is None else [lay_out(quantize(matrix, kind)) for matrix in source.gate]
        self.matrices = [*self.up, *self.down, *(self.gate or [])]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (tokens, width), chosen and weights (tokens, top_k) -> (tokens, width)."""
        return low_experts(x, chosen, weights, self.up, self.down, self.gate, self.activation)


def parse_weights(name: str) -> Weights:
    """A name that a user gave."""
    if name not in WEIGHTS:
        known = ", ".join(f'"{kind}"' for kind in WEIGHTS)
        raise RequestError(f'weights = "{name}" is not known; use one of {known}, or leave it out')
    return cast(Weights, name)


def check_place(kind: Weights, device: torch.device) -> None:
    """Refuse a device without kernels for them."""
    if device.type != "cpu":
        raise RequestError(
            f'weights = "{kind}" are for CPUs and this is {device.type}; use device = "cpu", or dtype = "bfloat16" instead'
        )


@torch.no_grad()
def quantize_weights(model: CausalLM, kind: Weights) -> None:
    """Replace the matrices of `model` in place, one after another; each is freed before the next is made."""
    check_place(kind, model.embed.weight.device)
    if model.weights is not None:
        raise RequestError(f'the model has weights of low precision already ("{model.weights}"); load it again')
    model.weights = kind
    model.eval().requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, LowLinear(child, kind))
            elif isinstance(child, Experts):
                setattr(parent, name, LowExperts(child, kind))


def full_bytes(model: CausalLM) -> int:
    """Bytes that the model would take with all matrices in the dtype of its embedding."""
    size = model.embed.weight.element_size()
    low = [m for m in model.modules() if isinstance(m, LowModule)]
    codes = sum(matrix.codes.numel() for m in low for matrix in m.matrices)
    low_bytes = sum(matrix.nbytes for m in low for matrix in m.matrices)
    # a tied head was the embedding itself
    tied = model.embed.weight.nbytes if model.config.tie_embeddings and model.weights is not None else 0
    return weight_bytes(model) - low_bytes + codes * size - tied


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and matrices of low precision."""
    seen = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    low = sum(matrix.nbytes for m in model.modules() if isinstance(m, LowModule) for matrix in m.matrices)
    biases = sum(m.bias.nbytes for m in model.modules() if isinstance(m, LowLinear) and m.bias is not None)
    return sum(seen.values()) + low + biases
