"""Cross entropy of a linear head that never holds fp32 logits of a whole batch.

The head and the cross entropy are one autograd function: each chunk of tokens gets its logits, its share of the loss and,
in the same pass, its gradients, so nothing of size (tokens, vocab) outlives a chunk and nothing is computed twice.

Paper: Liger Kernel (chunked head) arXiv:2410.10989.
"""

from typing import Any

import torch
from torch import Tensor

from alloy.ops import backend

IGNORE = -100
# elements of one chunk of fp32 logits: 2 MiB stay in a CPU's cache (a fifth less time than 8 MiB at 2048 ids); on a GPU 1 GiB,
# because each chunk also reads and writes the weight's whole gradient
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 28}
SMALLEST_CHUNK = 256


def linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, dtype: torch.dtype) -> Tensor:
    """Sum of cross entropies of `hidden @ weight.T` against `labels`; softmax and all sums in fp32.

    Args:
        hidden: (tokens, hidden)
        weight: (vocab, hidden)
        labels: (tokens,), int64; -100 is not counted
        chunk: tokens at a time; None picks a size that keeps a chunk of logits small
        dtype: of the matmuls

    Returns:
        scalar fp32
    """
    return backend.run("linear_ce", hidden, weight, labels, chunk, dtype)


def _linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, dtype: torch.dtype) -> Tensor:
    if chunk is None:
        elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
        chunk = max(SMALLEST_CHUNK, elements // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype, grad: bool
    ) -> Tensor:
        want_hidden, want_weight = (grad and need for need in ctx.needs_input_grad[:2])
        cast = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if want_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for x, target, rows in zip(
                hidden.split(chunk), labels.split(chunk), _ranges(len(hidden), chunk), strict=True
            ):
                x = x.to(dtype)
                logits = (x @ cast.mT).float()
                keep = target != IGNORE
                index = target.clamp_min(0).unsqueeze(1)
                shift = logits.amax(1, keepdim=True)
                picked = logits.gather(1, index) - shift
                powers = logits.sub_(shift).exp_()
                norm = powers.sum(1, keepdim=True)
                total += ((norm.log() - picked).squeeze(1) * keep).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                # softmax minus one-hot, zero where the label is ignored
                scale = keep.unsqueeze(1) / norm
                delta = powers.mul_(scale).scatter_add_(1, index, -keep.unsqueeze(1).float()).to(dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = delta @ cast
                if weight_grad is not None:
                    weight_grad += delta.mT @ x
        ctx.gradients = hidden_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.gradients
        # one backward pass only: the buffers are scaled in place and handed over
        ctx.gradients = None
        if hidden_grad is not None:
            hidden_grad.mul_(outer[0])
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(outer[0]).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _ranges(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, max(total, 1), size)]


backend.add("linear_ce", "torch", _linear_ce)
backend.add("linear_ce", "triton", "alloy.ops.triton.cross_entropy:linear_ce")
