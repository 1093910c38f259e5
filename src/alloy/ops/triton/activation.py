# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Squared ReLU and the SiLU gate, forward and backward, each one pass over memory.

Squared ReLU keeps only its result, which the matmul after it keeps anyway: 2 relu(x) = 2 sqrt(y). Each program takes
`BLOCK` elements of one row; a contiguous tensor is one row.

Why not in the epilogue of the matmul before: one pass over the (tokens, ffn) result takes 4 bytes an element and the matmul
2 x hidden operations, so on an H200 (4.2 TB/s, 700 TFLOP/s in bf16) the pass is 16% of the matmul at hidden 2048 and 7% at
4480. That is about what a matmul in Triton loses to cuBLAS there, and training wants x or y written in any case.

H200, bf16, 16,384 x 15,680: all four at the rate of a copy (0.99 or more of 4.25 TB/s).

Formulas: `alloy.ops.activation`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import accumulator, num_blocks, sigmoid

for _op in ("relu2", "relu2_backward", "silu_mul", "silu_mul_backward"):
    tuning.register(
        _op,
        {"BLOCK": 1024, "num_warps": 4},
        {"BLOCK": 2048, "num_warps": 4},
        {"BLOCK": 4096, "num_warps": 4},
        {"BLOCK": 4096, "num_warps": 8},
        {"BLOCK": 1024, "num_warps": 2},
        {"BLOCK": 512, "num_warps": 2},
    )


def relu2(x: Tensor) -> Tensor:
    """As `alloy.ops.activation.relu2`."""
    return _relu2(_adjacent(x))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `alloy.ops.activation.silu_mul`."""
    return _silu_mul(_adjacent(gate), _adjacent(up))


def _adjacent(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as it always is but in gradients that were expanded."""
    return x if x.dim() and x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("alloy::relu2", mutates_args=())
def _relu2(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    _launch("relu2", _relu2_kernel, (x,), (y,))
    return y


@torch.library.custom_op("alloy::relu2_backward", mutates_args=())
def _relu2_backward(dy: Tensor, y: Tensor) -> Tensor:
    dx = y.new_empty(y.shape)
    _launch("relu2_backward", _relu2_backward_kernel, (dy, y), (dx,))
    return dx


@torch.library.custom_op("alloy::silu_mul", mutates_args=())
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    _launch("silu_mul", _silu_mul_kernel, (gate, up), (y,))
    return y


@torch.library.custom_op("alloy::silu_mul_backward", mutates_args=())
def _silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch("silu_mul_backward", _silu_mul_backward_kernel, (dy, gate, up), (dgate, dup))
    return dgate, dup


@_relu2.register_fake
def _(x):
    return x.new_empty(x.shape)


@_relu2_backward.register_fake
def _(dy, y):
    return y.new_empty(y.shape)


@_silu_mul.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@_silu_mul_backward.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_output(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_relu2.register_autograd(lambda ctx, dy: _relu2_backward(_adjacent(dy), *ctx.saved_tensors), setup_context=_save_output)
_silu_mul.register_autograd(
    lambda ctx, dy: _silu_mul_backward(_adjacent(dy), *ctx.saved_tensors), setup_context=_save_inputs
)


def _launch(op: str, kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Run an element-wise kernel; outputs are contiguous, rows of inputs are where their strides say."""
    shape = inputs[0].shape
    if not outputs[0].numel():
        return
    if all(t.is_contiguous() for t in inputs):
        rows, seq, width = 1, 1, outputs[0].numel()
        places = [(t, 0, 0) for t in inputs]
    else:
        rows, seq, width = outputs[0].numel() // shape[-1], shape[-2] if len(shape) > 1 else 1, shape[-1]
        views = [t.reshape(-1, *shape[-2:]) if t.dim() > 3 else t[(None,) * (3 - t.dim())] for t in inputs]
        places = [(t, t.stride(0), t.stride(1)) for t in views]
    config = tuning.pick(op, f"{inputs[0].element_size() * 8}")
    blocks = num_blocks(width, config["BLOCK"])
    kernel[(rows * blocks,)](
        *(value for place in places for value in place),
        *outputs,
        seq,
        width,
        blocks,
        WIDE=accumulator(inputs[0].dtype),
        **config,
    )


@triton.jit
def _load(x, x_batch, x_row, seq, width, blocks, BLOCK: tl.constexpr):
    """This program's elements of x [BLOCK]."""
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x += (row // seq).to(tl.int64) * x_batch + (row % seq).to(tl.int64) * x_row
    return tl.load(x + column, mask=column < width, other=0.0)


@triton.jit
def _store(y, value, width, blocks, BLOCK: tl.constexpr):
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y += (tl.program_id(0) // blocks).to(tl.int64) * width
    tl.store(y + column, value.to(y.dtype.element_ty), mask=column < width)


@triton.jit
def _relu2_kernel(x, x_batch, x_row, y, seq, width, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    value = tl.maximum(_load(x, x_batch, x_row, seq, width, blocks, BLOCK).to(WIDE), 0.0, tl.PropagateNan.ALL)
    _store(y, value * value, width, blocks, BLOCK)


@triton.jit
def _relu2_backward_kernel(
    dy, dy_batch, dy_row, y, y_batch, y_row, dx, seq, width, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    grad = _load(dy, dy_batch, dy_row, seq, width, blocks, BLOCK).to(WIDE)
    value = _load(y, y_batch, y_row, seq, width, blocks, BLOCK).to(WIDE)
    _store(dx, grad * 2.0 * tl.sqrt(value), width, blocks, BLOCK)


@triton.jit
def _silu_mul_kernel(
    gate, gate_batch, gate_row, up, up_batch, up_row, y, seq, width, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    z = _load(gate, gate_batch, gate_row, seq, width, blocks, BLOCK).to(WIDE)
    value = _load(up, up_batch, up_row, seq, width, blocks, BLOCK).to(WIDE)
    _store(y, z * sigmoid(z) * value, width, blocks, BLOCK)


@triton.jit
def _silu_mul_backward_kernel(
    dy, dy_batch, dy_row, gate, gate_batch, gate_row, up, up_batch, up_row, dgate, dup, seq, width, blocks,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    grad = _load(dy, dy_batch, dy_row, seq, width, blocks, BLOCK).to(WIDE)
    z = _load(gate, gate_batch, gate_row, seq, width, blocks, BLOCK).to(WIDE)
    value = _load(up, up_batch, up_row, seq, width, blocks, BLOCK).to(WIDE)
    open = sigmoid(z)
    _store(dup, grad * z * open, width, blocks, BLOCK)
    _store(dgate, grad * value * open * (1.0 + z * (1.0 - open)), width, blocks, BLOCK)
