# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
"""RMSNorm, RMSNorm of a gated product, and RMSNorm of a sum, forward and backward, each one pass over memory.

A program walks the rows of one group of channels, `ROWS` at a time, and holds the group in registers as a tuple of chunks,
of which only the last is masked; it reads the weight once, and the next rows are on their way to shared memory meanwhile.
The backward reads the inputs and the inverse root mean squares; each program writes its own share of the weight's gradient, and a second kernel adds the shares up: no atomics, equal bits on
repetition.

Rates: docs/performance.md (`alloy bench norm`).

Formulas: `alloy.ops.norm`.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.precision import wide
from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import accumulator, num_blocks, power_of_2, sigmoid

# elements of a chunk for each thread: 16 bytes of a 16-bit dtype
_VECTOR = 8
# channels that one warp holds in registers
_SPAN = 1280
# shared memory that a program may fill, so that two fit a multiprocessor
_SHARED = 96 * 1024
# warps: of a program, at least; warps_per_sm: of all programs, which share the rows
for _op in ("rms_norm", "add_rms_norm", "gated_rms_norm"):
    tuning.register(
        _op,
        {"warps": 1, "warps_per_sm": 16, "STAGES": 2},
        {"warps": 2, "warps_per_sm": 16, "STAGES": 2},
        {"warps": 4, "warps_per_sm": 16, "STAGES": 2},
        {"warps": 4, "warps_per_sm": 16, "STAGES": 1},
        {"warps": 4, "warps_per_sm": 32, "STAGES": 2},
        {"warps": 8, "warps_per_sm": 32, "STAGES": 2},
    )
    tuning.register(
        f"{_op}_backward",
        {"warps": 4, "warps_per_sm": 8, "STAGES": 3},
        {"warps": 4, "warps_per_sm": 8, "STAGES": 2},
        {"warps": 4, "warps_per_sm": 16, "STAGES": 2},
        {"warps": 2, "warps_per_sm": 16, "STAGES": 2},
        {"warps": 8, "warps_per_sm": 16, "STAGES": 2},
        {"warps": 1, "warps_per_sm": 16, "STAGES": 2},
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> Tensor:
    """As `alloy.ops.rms_norm`."""
    return _norm(_adjacent(x), None, weight, eps, x.shape[-1], cast_first)[0]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """As `alloy.ops.gated_rms_norm`."""
    return _norm(_adjacent(x), _adjacent(gate), weight, eps, group_size, False)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """As `alloy.ops.add_rms_norm`."""
    normed, total, _ = _add_norm(_adjacent(x), _adjacent(residual), weight, eps, cast_first)
    return normed, total


def _adjacent(x: Tensor) -> Tensor:
    """x with its channels next to each other, as they always are but in gradients that were expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("alloy::rms_norm", mutates_args=())
def _norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, group_size: int, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """The normed values, and 1 / rms as (rows, groups)."""
    y, inverse = _norm_fake(x, gate, weight, eps, group_size, cast_first)
    op = "rms_norm" if gate is None else "gated_rms_norm"
    _forward(op, x, gate, weight, y, None, inverse, eps, cast_first)
    return y, inverse


@_norm.register_fake
def _norm_fake(x, gate, weight, eps, group_size, cast_first):
    # Llama's order ends with a product in the dtype that both promote to
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype
    inverse = x.new_empty((x.numel() // x.shape[-1], x.shape[-1] // group_size), dtype=wide(x))
    return x.new_empty(x.shape, dtype=dtype), inverse


@torch.library.custom_op("alloy::rms_norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, inverse: Tensor, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    op = "rms_norm_backward" if gate is None else "gated_rms_norm_backward"
    dweight = _backward(op, dy, None, x, gate, weight, inverse, dx, None if gate is None else dgate, cast_first)
    return dx, dgate, dweight


@_norm_backward.register_fake
def _(dy, x, gate, weight, inverse, cast_first):
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), dgate, weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, weight, _, _, ctx.cast_first = inputs
    ctx.save_for_backward(x, gate, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, gate, weight, inverse = ctx.saved_tensors
    dx, dgate, dweight = _norm_backward(_adjacent(dy), x, gate, weight, inverse, ctx.cast_first)
    return dx, None if gate is None else dgate, dweight, None, None, None


_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)


@torch.library.custom_op("alloy::add_rms_norm", mutates_args=())
def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed values, the sum, and 1 / rms as (rows, 1)."""
    y, total, inverse = _add_norm_fake(x, residual, weight, eps, cast_first)
    _forward("add_rms_norm", x, residual, weight, y, total, inverse, eps, cast_first)
    return y, total, inverse


@_add_norm.register_fake
def _add_norm_fake(x, residual, weight, eps, cast_first):
    inverse = x.new_empty((x.numel() // x.shape[-1], 1), dtype=wide(x))
    return x.new_empty(x.shape), residual.new_empty(x.shape), inverse


@torch.library.custom_op("alloy::add_rms_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    dtype: torch.dtype,
    cast_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum's gradient in its own dtype, in `dtype` if that is another one, and the weight's."""
    dresidual = total.new_empty(total.shape)
    dx = total.new_empty(total.shape if dtype != total.dtype else 0, dtype=dtype)
    second = dx if dtype != total.dtype else None
    op = "add_rms_norm_backward"
    dweight = _backward(op, dy, dtotal, total, None, weight, inverse, dresidual, second, cast_first)
    return dresidual, dx, dweight


@_add_norm_backward.register_fake
def _(dy, dtotal, total, weight, inverse, dtype, cast_first):
    dx = total.new_empty(total.shape if dtype != total.dtype else 0, dtype=dtype)
    return total.new_empty(total.shape), dx, weight.new_empty(weight.shape)


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, _, ctx.cast_first = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, output[1], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate_add_norm(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    weight, total, inverse = ctx.saved_tensors
    if dy is None:
        return None if dtotal is None else dtotal.to(ctx.dtype), dtotal, None, None, None
    dtotal = None if dtotal is None else _adjacent(dtotal)
    dresidual, dx, dweight = _add_norm_backward(
        _adjacent(dy), dtotal, total, weight, inverse, ctx.dtype, ctx.cast_first
    )
    return dresidual if ctx.dtype == total.dtype else dx, dresidual, dweight, None, None


_add_norm.register_autograd(_differentiate_add_norm, setup_context=_save_add_norm)


def _rows(x: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """x as (batch, seq, width), and its strides over batch and seq."""
    if x is None:
        return None, 0, 0
    x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 3 else x[(None,) * (3 - x.dim())]
    return x, x.stride(0), x.stride(1)


@cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that programs there have several rows too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _plan(op: str, x: Tensor, groups: int) -> tuple[int, dict[str, Any]]:
    """How many programs share the rows of a group, and a kernel's constants."""
    size = x.shape[-1] // groups
    config = dict(tuning.pick(op, str(size)))
    warps = min(max(config.pop("warps"), power_of_2(num_blocks(size, _SPAN))), 32)
    chunk = min(power_of_2(size), 32 * _VECTOR * warps)
    rows = 32 * _VECTOR * warps // chunk
    programs = max(_num_sms(x.device) * config.pop("warps_per_sm") // (warps * groups), 1)
    programs = min(programs, num_blocks(x.numel() // x.shape[-1], rows))
    # rows on their way: of up to three inputs, in all stages but the one in registers
    ahead = 3 * rows * chunk * num_blocks(size, chunk) * x.element_size()
    config["STAGES"] = min(config["STAGES"], 1 + _SHARED // ahead)
    return programs, config | {
        "num_warps": warps,
        "GROUPS": groups,
        "SIZE": size,
        "CHUNK": chunk,
        "CHUNKS": num_blocks(size, chunk),
        "ROWS": rows,
        "WIDE": accumulator(x.dtype),
    }


def _forward(
    op: str,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    y: Tensor,
    total: Tensor | None,
    inverse: Tensor,
    eps: float,
    cast_first: bool,
) -> None:
    if y.numel() == 0:
        return
    rows, groups = inverse.shape
    programs, config = _plan(op, x, groups)
    seq = x.shape[-2] if x.dim() > 1 else 1
    _forward_kernel[(programs * groups,)](
        *_rows(x), *_rows(other), weight, y, total, inverse, rows, seq, programs, eps, CAST=cast_first, **config
    )


def _backward(
    op: str,
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    inverse: Tensor,
    dx: Tensor,
    second: Tensor | None,
    cast_first: bool,
) -> Tensor:
    """Write the gradients of the inputs, return the weight's."""
    if dx.numel() == 0:
        return torch.zeros_like(weight)
    rows, groups = inverse.shape
    programs, config = _plan(op, x, groups)
    shares = inverse.new_empty(programs, x.shape[-1])
    seq = x.shape[-2] if x.dim() > 1 else 1
    _backward_kernel[(programs * groups,)](
        *_rows(dy), *_rows(dtotal), *_rows(x), *_rows(gate), weight, inverse, dx, second, shares, rows, seq, programs,
        CAST=cast_first, **config,
    )  # fmt: skip
    return shares.sum(0).to(weight.dtype)


@triton.jit
def _place(x, x_batch, x_row, row, seq):
    """Pointers [ROWS, 1] to rows of x, whose rows are numbered through batch and seq."""
    return x + ((row // seq).to(tl.int64) * x_batch + (row % seq).to(tl.int64) * x_row)[:, None]


@triton.jit
def _forward_kernel(
    x, x_batch, x_row, other, other_batch, other_row, weight, y, total, inverse, rows, seq, programs, eps,
    CAST: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`other`: with `total` the residual, without it the gate."""
    group = tl.program_id(0) % GROUPS
    column = group * SIZE + tl.arange(0, CHUNK)
    weights = ()
    for i in tl.static_range(CHUNKS):
        real = i * CHUNK + tl.arange(0, CHUNK) < SIZE
        weights = weights + (tl.load(weight + column + i * CHUNK, mask=real, other=0.0),)
    for first in tl.range(tl.program_id(0) // GROUPS * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        x_place = _place(x, x_batch, x_row, row, seq) + column[None, :]
        place = row.to(tl.int64)[:, None] * (GROUPS * SIZE) + column[None, :]
        values = ()
        squares = tl.zeros((ROWS, CHUNK), WIDE)
        for i in tl.static_range(CHUNKS):
            inside = (row < rows)[:, None] & (i * CHUNK + tl.arange(0, CHUNK) < SIZE)[None, :]
            value = tl.load(x_place + i * CHUNK, mask=inside, other=0.0).to(WIDE)
            if other is not None:
                other_place = _place(other, other_batch, other_row, row, seq) + column[None, :]
                second = tl.load(other_place + i * CHUNK, mask=inside, other=0.0).to(WIDE)
                if total is not None:
                    summed = (value + second).to(total.dtype.element_ty)
                    tl.store(total + place + i * CHUNK, summed, mask=inside)
                    value = summed.to(WIDE)
                else:
                    value *= second * sigmoid(second)
            values = values + (value,)
            squares += value * value
        scale = tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)
        tl.store(inverse + row.to(tl.int64) * GROUPS + group, scale, mask=row < rows)
        for i in tl.static_range(CHUNKS):
            inside = (row < rows)[:, None] & (i * CHUNK + tl.arange(0, CHUNK) < SIZE)[None, :]
            out = values[i] * scale[:, None]
            if CAST:
                if total is not None:
                    out = out.to(total.dtype.element_ty).to(WIDE)
                else:
                    out = out.to(x.dtype.element_ty).to(WIDE)
            out *= weights[i].to(WIDE)[None, :]
            tl.store(y + place + i * CHUNK, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy, dy_batch, dy_row, dtotal, dtotal_batch, dtotal_row, x, x_batch, x_row, gate, gate_batch, gate_row,
    weight, inverse, dx, second, shares, rows, seq, programs,
    CAST: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`second`: with a gate its gradient, without one a copy of dx in another dtype."""
    group = tl.program_id(0) % GROUPS
    column = group * SIZE + tl.arange(0, CHUNK)
    weights, sums = (), ()
    for i in tl.static_range(CHUNKS):
        real = i * CHUNK + tl.arange(0, CHUNK) < SIZE
        weights = weights + (tl.load(weight + column + i * CHUNK, mask=real, other=0.0),)
        sums = sums + (tl.zeros((ROWS, CHUNK), WIDE),)
    for first in tl.range(tl.program_id(0) // GROUPS * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        dy_place = _place(dy, dy_batch, dy_row, row, seq) + column[None, :]
        x_place = _place(x, x_batch, x_row, row, seq) + column[None, :]
        place = row.to(tl.int64)[:, None] * (GROUPS * SIZE) + column[None, :]
        scale = tl.load(inverse + row.to(tl.int64) * GROUPS + group, mask=row < rows, other=0.0)[:, None]
        grads, values, gates, added = (), (), (), ()
        products = tl.zeros((ROWS, CHUNK), WIDE)
        for i in tl.static_range(CHUNKS):
            inside = (row < rows)[:, None] & (i * CHUNK + tl.arange(0, CHUNK) < SIZE)[None, :]
            grad = tl.load(dy_place + i * CHUNK, mask=inside, other=0.0)
            value = tl.load(x_place + i * CHUNK, mask=inside, other=0.0)
            grads, values = grads + (grad,), values + (value,)
            normed = value.to(WIDE) * scale
            if gate is not None:
                gate_place = _place(gate, gate_batch, gate_row, row, seq) + column[None, :]
                z = tl.load(gate_place + i * CHUNK, mask=inside, other=0.0)
                gates = gates + (z,)
                normed *= z.to(WIDE) * sigmoid(z.to(WIDE))
            if dtotal is not None:
                dtotal_place = _place(dtotal, dtotal_batch, dtotal_row, row, seq) + column[None, :]
                added = added + (tl.load(dtotal_place + i * CHUNK, mask=inside, other=0.0),)
            products += grad.to(WIDE) * weights[i].to(WIDE)[None, :] * normed
        mean = (tl.sum(products, 1) / SIZE)[:, None]
        summed = ()
        for i in tl.static_range(CHUNKS):
            inside = (row < rows)[:, None] & (i * CHUNK + tl.arange(0, CHUNK) < SIZE)[None, :]
            grad, value = grads[i].to(WIDE), values[i].to(WIDE)
            normed = value * scale
            if gate is not None:
                z = gates[i].to(WIDE)
                open = sigmoid(z)
                normed *= z * open
            if CAST:
                summed = summed + (sums[i] + grad * normed.to(x.dtype.element_ty).to(WIDE),)
            else:
                summed = summed + (sums[i] + grad * normed,)
            out = (grad * weights[i].to(WIDE)[None, :] - normed * mean) * scale
            if dtotal is not None:
                out += added[i].to(WIDE)
            if gate is not None:
                dgate = out * value * open * (1.0 + z * (1.0 - open))
                tl.store(second + place + i * CHUNK, dgate.to(second.dtype.element_ty), mask=inside)
                out *= z * open
            elif second is not None:
                tl.store(second + place + i * CHUNK, out.to(second.dtype.element_ty), mask=inside)
            tl.store(dx + place + i * CHUNK, out.to(dx.dtype.element_ty), mask=inside)
        sums = summed
    for i in tl.static_range(CHUNKS):
        real = i * CHUNK + tl.arange(0, CHUNK) < SIZE
        share = shares + (tl.program_id(0) // GROUPS).to(tl.int64) * (GROUPS * SIZE) + column + i * CHUNK
        tl.store(share, tl.sum(sums[i], 0), mask=real)
