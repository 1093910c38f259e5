"""Output head and cross entropy, forward and backward: the sum of losses, and the gradients of hidden states and head.

The floor is three products (logits, and both gradients) of 2 T D V operations.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from alloy.bench import peers
from alloy.bench.case import Outputs, Problem, Size
from alloy.bench.cases.gradients import Inputs, in_float64
from alloy.losses.lm import linear_cross_entropy

# label -> (tokens, hidden, vocabulary)
SHAPES = {"1B 16k x 65k": (16384, 2048, 65536), "Nano-9B 8k x 131k": (8192, 4480, 131072)}


def problems(size: Size) -> Iterator[Problem]:
    """The 1.05 B model's head and Nano-9B's."""
    shapes = {"tiny": (9, 24, 40)} if size == "tiny" else SHAPES
    for label, (tokens, hidden, vocab) in shapes.items():
        yield Problem(
            label,
            partial(_draw, tokens, hidden, vocab),
            partial(_training, linear_cross_entropy),
            in_float64(partial(_training, peers.torch_linear_cross_entropy)),
            peers={
                "liger": partial(_training, peers.liger_linear_cross_entropy),
                "torch": partial(_training, peers.torch_linear_cross_entropy),
            },
            bytes=2 * 2 * hidden * (tokens + vocab),
            flops=6 * tokens * hidden * vocab,
            tokens=tokens,
        )


def _draw(tokens: int, hidden: int, vocab: int) -> Inputs:
    """Logits of about unit variance; every eighth label is ignored."""
    labels = torch.randint(0, vocab, (tokens,))
    labels[::8] = -100
    return {
        "hidden": torch.randn(tokens, hidden, dtype=torch.bfloat16),
        "weight": torch.randn(vocab, hidden, dtype=torch.bfloat16) / hidden**0.5,
        "labels": labels,
    }


def _training(op: Callable[..., Tensor], i: Inputs) -> Outputs:
    hidden, weight = (i[name].detach().requires_grad_() for name in ("hidden", "weight"))
    loss = op(hidden, weight, i["labels"])
    dhidden, dweight = torch.autograd.grad(loss, [hidden, weight])
    return {"loss": loss, "dhidden": dhidden, "dweight": dweight}
