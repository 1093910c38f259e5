"""The routed experts of a MoE layer: sum_k weight_k down_e(relu(up_e x)^2) with e = chosen_k.

The floor counts the weights of the experts that are hit once (draws are independent, so E (1 - (1 - k/E)^T)
of them in the mean), x and y, and 4 F D operations a token and expert; with backward three times the operations and the weights' gradients too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import Problem, Size
from alloy.bench.cases.gradients import Inputs, gradients, in_float64, value


class Shape(NamedTuple):
    """Sizes of a MoE layer."""

    num_experts: int
    top_k: int
    width: int
    ffn: int


SHAPES = {"Nano-30B": Shape(128, 6, 2688, 1856), "Super": Shape(512, 22, 1024, 2688)}
TINY = {"tiny": Shape(5, 2, 24, 16)}
NAMES = ("x", "chosen", "weights", "up", "down")
EXPERTS: dict[str, Callable[..., Tensor]] = {
    f"transformers/{name}": peers.transformers_experts(name) for name in ("eager", "batched_mm", "grouped_mm")
}
# at most so many tokens are timed in a graph
FEW_TOKENS = 64
TRAINED = {"full": 16384, "quick": 4096, "tiny": 7}


def problems(size: Size) -> Iterator[Problem]:
    """Forward for few to many tokens, and forward with backward."""
    counts = {"full": (1, 8, 64, 512, 4096, 32768), "quick": (1, 64, 4096), "tiny": (3, 7)}[size]
    shapes = TINY if size == "tiny" else SHAPES
    for label, shape in shapes.items():
        for tokens in counts:
            yield Problem(
                f"{label} {tokens} tokens",
                partial(draw, shape, tokens),
                value(ops.moe_experts, NAMES),
                in_float64(value(peers.plain(ops.moe_experts), NAMES)),
                peers={name: value(run, NAMES) for name, run in _peers(tokens).items()},
                bytes=2 * (_hit(shape, tokens) * 2 * shape.ffn * shape.width + 2 * tokens * shape.width),
                flops=tokens * shape.top_k * 4 * shape.ffn * shape.width,
                in_graph=tokens <= FEW_TOKENS,
            )
    label, shape = next(iter(shapes.items()))
    tokens = TRAINED[size]
    yield Problem(
        f"{label} {tokens} tokens fwd+bwd",
        partial(draw, shape, tokens),
        gradients(ops.moe_experts, NAMES, fixed=("chosen",)),
        in_float64(gradients(peers.plain(ops.moe_experts), NAMES, fixed=("chosen",))),
        peers={name: gradients(run, NAMES, fixed=("chosen",)) for name, run in _peers(tokens).items()},
        bytes=2 * (3 * shape.num_experts * 2 * shape.ffn * shape.width + 5 * tokens * shape.width),
        flops=3 * tokens * shape.top_k * 4 * shape.ffn * shape.width,
    )


def draw(shape: Shape, tokens: int) -> Inputs:
    """Tokens, random experts of each, and weights."""
    num_experts, top_k, width, ffn = shape
    chosen, weights, _ = ops.route(torch.randn(tokens, num_experts), None, top_k, scale=2.5)
    return {
        "x": torch.randn(tokens, width, dtype=torch.bfloat16),
        "chosen": chosen,
        "weights": weights,
        "up": torch.randn(num_experts, ffn, width, dtype=torch.bfloat16) / width**0.5,
        "down": torch.randn(num_experts, width, ffn, dtype=torch.bfloat16) / ffn**0.5,
        "dy": torch.randn(tokens, width, dtype=torch.bfloat16),
    }


def _hit(shape: Shape, tokens: int) -> float:
    """Experts that at least one of `tokens` chose, in the mean."""
    return shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)


def _peers(tokens: int) -> dict[str, Callable[..., Tensor]]:
    """eager waits for the device at every expert, so no graph holds it; batched_mm copies the weights of every token."""
    left_out = "transformers/eager" if tokens <= FEW_TOKENS else "transformers/batched_mm"
    return {name: run for name, run in EXPERTS.items() if name != left_out}
