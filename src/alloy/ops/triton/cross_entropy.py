# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Cross entropy of a linear head, a chunk of tokens at a time, with the gradients in the same pass.

A chunk's logits come from a matmul in the inputs' dtype. One kernel reads each row twice, the second time from the L2, and
leaves softmax - onehot in its place, so that two more matmuls give the gradients; softmax and sums are in fp32 registers.
Nothing of (tokens, vocab) is ever in fp32 and nothing outlives its chunk. Sums over chunks and rows have a fixed order.

Rates: docs/performance.md (`alloy bench linear-ce`).

Formulas: `alloy.ops.cross_entropy`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import accumulator, exp2, num_blocks

tuning.register(
    "linear_ce",
    {"BLOCK": 4096, "UNROLL": 4, "num_warps": 16, "STAGES": 1},
    {"BLOCK": 4096, "UNROLL": 2, "num_warps": 16, "STAGES": 1},
    {"BLOCK": 4096, "UNROLL": 1, "num_warps": 16, "STAGES": 3},
    {"BLOCK": 8192, "UNROLL": 2, "num_warps": 32, "STAGES": 1},
    {"BLOCK": 2048, "UNROLL": 4, "num_warps": 8, "STAGES": 1},
    {"BLOCK": 2048, "UNROLL": 2, "num_warps": 8, "STAGES": 3},
)
# logits of a chunk: 1 GiB in 16 bits. Each chunk but the first reads and writes the weight's fp32 gradient once more; a
# single chunk needs none, which pays for twice the logits
_CHUNK_ELEMENTS = 1 << 29
_SMALLEST_CHUNK = 256


def linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, dtype: torch.dtype) -> Tensor:
    """As `alloy.ops.cross_entropy.linear_ce`."""
    if chunk is None:
        chunk = max(_CHUNK_ELEMENTS // weight.shape[0], _SMALLEST_CHUNK)
        chunk = len(hidden) if len(hidden) <= 2 * chunk else chunk
    grad = torch.is_grad_enabled()
    want = grad and hidden.requires_grad, grad and weight.requires_grad
    return _linear_ce(hidden, weight, labels, chunk, dtype, *want)[0]


@torch.library.custom_op("alloy::linear_ce", mutates_args=())
def _linear_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    dtype: torch.dtype,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden and weight for an outer gradient of 1."""
    tokens, vocab = len(hidden), len(weight)
    dhidden, dweight = hidden.new_empty(hidden.shape if want_hidden else 0), None
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    cast, inputs, labels = weight.to(dtype), hidden.to(dtype), labels.contiguous()
    # chunks are added up in fp32, whatever the weight's dtype
    total_dtype = weight.dtype if chunk >= tokens else torch.float32
    logits = torch.empty(min(chunk, tokens), vocab, dtype=dtype, device=hidden.device)
    config = tuning.pick("linear_ce", f"{vocab}")
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        x, delta = inputs[rows], logits[: rows.stop - start]
        torch.mm(x, cast.t(), out=delta)
        _kernel[(len(delta),)](
            delta, labels[rows], losses[rows], vocab, delta.stride(0),
            GRAD=want_hidden or want_weight, WIDE=accumulator(dtype), **config,
        )  # fmt: skip
        if want_hidden and dhidden.dtype == dtype:
            torch.mm(delta, cast, out=dhidden[rows])
        elif want_hidden:
            dhidden[rows] = delta @ cast
        if want_weight:
            dweight = _add_product(dweight, delta.t(), x, total_dtype)
    if dweight is None:
        dweight = weight.new_zeros(weight.shape if want_weight else 0)
    return losses.sum(), dhidden, dweight.to(weight.dtype)


@_linear_ce.register_fake
def _(hidden, weight, labels, chunk, dtype, want_hidden, want_weight):
    dhidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    dweight = weight.new_empty(weight.shape if want_weight else 0)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


@torch.library.custom_op("alloy::linear_ce_scale", mutates_args=("grad",))
def _scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, a scalar that torch would round to grad's dtype first."""
    block = 4096
    if grad.numel():
        _scale_kernel[(num_blocks(grad.numel(), block),)](grad, factor, grad.numel(), BLOCK=block)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.want = inputs[5:]


def _differentiate(ctx: Any, outer: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    # one backward pass only: the gradients made in the forward are scaled in place and handed over
    grads = ctx.saved_tensors
    for grad in grads:
        _scale(grad, outer)
    return *(grad if want else None for grad, want in zip(grads, ctx.want, strict=True)), None, None, None, None, None


_linear_ce.register_autograd(_differentiate, setup_context=_save)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total (n, m) + a (n, k) b (k, m) in `dtype`, in place; on a GPU fp32 sums of 16-bit products leave the matmul as fp32."""
    if total is None and a.dtype == dtype:
        return a @ b
    if total is None:
        total = a.new_zeros(a.shape[0], b.shape[1], dtype=dtype)
    if a.dtype == dtype:
        return total.addmm_(a, b)
    if a.is_cuda and a.element_size() == 2 and dtype == torch.float32:
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    return total.add_(a @ b)


@triton.jit
def _scale_kernel(grad, factor, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(grad + place, mask=place < size, other=0.0)
    tl.store(grad + place, (value * tl.load(factor)).to(value.dtype), mask=place < size)


@triton.jit
def _kernel(
    logits, labels, losses, vocab, stride,
    GRAD: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and softmax - onehot in place of its logits; both zero where the label is negative."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    logits += row.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    # base 2: log2(e) * logit
    peak = tl.full((BLOCK,), -1.0e30, WIDE)
    total = tl.zeros((BLOCK,), WIDE)
    for start in tl.range(0, vocab, BLOCK * UNROLL, num_stages=STAGES):
        values, before = (), peak
        for i in tl.static_range(UNROLL):
            c = start + i * BLOCK + column
            value = tl.load(logits + c, mask=c < vocab, other=float("-inf")).to(WIDE) * 1.4426950408889634
            values, peak = values + (value,), tl.maximum(peak, value)
        total *= exp2(before - peak)
        for i in tl.static_range(UNROLL):
            total += exp2(values[i] - peak)
    # read before the reduction's barrier, written after it; an id outside the vocabulary makes the loss NaN
    picked = tl.load(logits + tl.maximum(label, 0), mask=label < vocab, other=float("nan")).to(WIDE)
    top = tl.max(peak, 0)
    norm = tl.sum(total * exp2(peak - top), 0)
    real = label >= 0
    tl.store(losses + row, tl.where(real, (top + tl.log2(norm)) * 0.6931471805599453 - picked, 0.0))
    if GRAD:
        shift = top + tl.log2(norm)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            c = start + column
            value = tl.load(logits + c, mask=c < vocab, other=0.0).to(WIDE)
            power = exp2(value * 1.4426950408889634 - shift)
            delta = tl.where(real, power - tl.where(c == label, 1.0, 0.0), 0.0)
            tl.store(logits + c, delta.to(logits.dtype.element_ty), mask=c < vocab)
