"""Linear maps in fp32 on CPU cores: oneDNN for many rows, for few a loop of our own or parts of the weight as a batch.

`F.linear` calls MKL, which leaves half of an AVX-512 core unused on some processors; oneDNN, which torch ships and calls
for other dtypes, does not. Measured on one AMD EPYC core with torch 2.13, 512 x 512 x 2576: 83 GFLOP/s against 206. One
row (decode) reads weights at 12 to 18 GB/s, as a batch of eight at 22 to 28, where a sum over a large buffer reaches 37.
Both copy the weight into an order of their own at each call, which for few rows takes longer than the products; the loop in
`compiled.py` does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from alloy.ops.cpu.compiled import Loop, few_rows

HAS_ONEDNN = torch.backends.mkldnn.is_available()
# below these many products oneDNN's call costs more than it saves, and below these many weights (which then lie in the
# processor's cache) so does splitting them
FEW_PRODUCTS, FEW_WEIGHTS = 1 << 20, 1 << 17
# parts of the weight for few rows
PARTS = 8
# up to this many rows, and numbers of input in all of them, a batched product of parts beats oneDNN
FEW_ROWS, FEW_INPUTS = 4, 4096
# up to this many rows the compiled loop beats both, and up to so many more where the weights are few
LOOP_ROWS, LOOP_ROWS_OF_FEW = 8, 24


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `alloy.ops.linear`."""
    if not HAS_ONEDNN or not is_plain(x, weight) or x.numel() == 0 or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if 1 < rows <= LOOP_ROWS_OF_FEW and _suits_loop(rows, x, weight) and (loop := few_rows()) is not None:
        return _looped(loop, x, weight, bias)
    is_small = rows == 1 or (rows <= FEW_ROWS and x.numel() <= FEW_INPUTS)
    if is_small and weight.numel() >= FEW_WEIGHTS and outputs % PARTS == 0 and weight.is_contiguous():
        return _in_parts(x, weight, bias)
    return F.linear(x, weight, bias) if rows * weight.numel() < FEW_PRODUCTS else _product(x, weight, bias)


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """x (..., inputs) and weight (..., inputs) in fp32, without autocast or a subclass, which know better what a product means."""
    return (
        x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product; any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _suits_loop(rows: int, x: Tensor, weight: Tensor) -> bool:
    """Whether one core computes the product soonest, and nothing but numbers is wanted of it."""
    has_few = weight.numel() < FEW_WEIGHTS
    return (
        (has_few or (rows <= LOOP_ROWS and torch.get_num_threads() == 1))
        # gradients, also forward ones, and transforms do not see what has no operation
        and torch.is_inference_mode_enabled()
        and weight.is_contiguous()
    )


def _looped(loop: Loop, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., inputs) with few rows: the compiled loop."""
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    loop(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // inputs, outputs, inputs)
    return y if bias is None else y.add_(bias)


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., inputs) with few rows: parts of the weight as a batch of products."""
    outputs, inputs = weight.shape
    columns = x.reshape(-1, inputs).t().expand(PARTS, -1, -1)  # (parts, inputs, rows)
    y = torch.bmm(weight.view(PARTS, -1, inputs), columns)  # (parts, outputs / parts, rows)
    if y.shape[2] > 1:
        y = y.view(outputs, -1).t().contiguous()
    y = y.view(*x.shape[:-1], outputs)
    return y if bias is None else y + bias


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x for grad (rows, outputs) and x (rows, inputs), the wider one as the weight of the product."""
    if grad.shape[1] > x.shape[1]:
        return _product(x.t(), grad.t(), None).t()
    return _product(grad.t(), x.t(), None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        needs = ctx.needs_input_grad  # pyright: ignore[reportAttributeAccessIssue]
        grad = grads[0].reshape(-1, weight.shape[0]).contiguous()  # (rows, outputs)
        grad_x = _product(grad, weight.t(), None).view(x.shape) if needs[0] else None
        grad_weight = _outer(grad, x.reshape(-1, weight.shape[1])) if needs[1] else None
        return grad_x, grad_weight, grad.sum(0) if needs[2] else None
