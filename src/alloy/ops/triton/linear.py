# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Linear maps of 1 to 16 rows in 16-bit floats, as in decoding: the weight is streamed once, at the rate of memory.

One row: a program multiplies a block of the weight with the row as they come and adds up in fp32 registers, once along
its inputs at the end. More rows: the transposed product, so that the weight is the tall operand of the matrix units and
the rows, padded to 16, the other; where outputs are few the inputs are split, and a second kernel adds the parts in a fixed
order. Loads run STAGES blocks ahead through shared memory.

H200, torch 2.11 and Triton 3.6, bf16, against cuBLAS in the same run, fraction of copy bandwidth (4.23 TB/s):
    one row     4480 -> 22656  0.98 (cuBLAS 0.82)   10240 -> 4480  0.91 (0.76)   15680 -> 4480  0.95 (0.82)
                4096 -> 2688   0.66 (0.49)          2688 -> 3712   0.68 (0.46)   4480 -> 131072 1.09 (1.01)
    eight rows  4480 -> 22656  0.93 (0.90)          10240 -> 4480  0.84 (0.75)   15680 -> 4480  0.88 (0.81)
                4096 -> 2688   0.61 (0.51)          2688 -> 3712   0.57 (0.45)   4480 -> 131072 1.06 (1.00)
From 32 rows on cuBLAS is as quick or quicker.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from alloy.ops.triton import chain, tuning
from alloy.ops.triton.elementary import num_blocks

# rows of the padded operand
MOST_ROWS = 16
# programs that fill the device; splitting the inputs further costs more than it gains
ENOUGH = 480
# what the best configuration depends on: up to how many outputs
SIZES = {"narrow": 2048, "low": 6144, "middle": 12288}

tuning.register(
    "linear_one",
    {"BLOCK_N": 16, "BLOCK_K": 512, "num_warps": 4, "STAGES": 3},
    {"BLOCK_N": 8, "BLOCK_K": 1024, "num_warps": 4, "STAGES": 3},
    {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4, "STAGES": 4},
)
tuning.register(
    "linear_few",
    {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 1, "STAGES": 5},
    {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 1, "STAGES": 4},
)


@triton.jit
def _one_kernel(
    x,
    weight,
    bias,
    y,
    outputs,
    inputs,
    weight_row,
    HAS_BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < outputs
    weight += n.to(tl.int64)[:, None] * weight_row + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if CHAINED:
        gdc_wait()
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        real = start + k < inputs
        w = tl.load(weight + start, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
        row = tl.load(x + start + k, mask=real, other=0.0).to(tl.float32)
        total += w * row[None, :]
    if CHAINED:
        gdc_launch_dependents()
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _few_kernel(
    x,
    weight,
    bias,
    y,
    rows,
    outputs,
    inputs,
    x_row,
    weight_row,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    length = tl.cdiv(tl.cdiv(inputs, BLOCK_K), PARTS) * BLOCK_K
    first = part * length
    last = tl.minimum(first + length, inputs)
    weight += n.to(tl.int64)[:, None] * weight_row + k[None, :]
    x += m[None, :] * x_row + k[:, None]
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if CHAINED:
        gdc_wait()
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        real = start + k < last
        w = tl.load(weight + start, mask=(n < outputs)[:, None] & real[None, :], other=0.0)
        columns = tl.load(x + start, mask=(m < rows)[None, :] & real[:, None], other=0.0)
        total = tl.dot(w, columns, total)
    if CHAINED:
        gdc_launch_dependents()
    if HAS_BIAS and PARTS == 1:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    mask = (n < outputs)[:, None] & (m < rows)[None, :]
    y += (part * rows + m)[None, :] * outputs + n[:, None]
    tl.store(y, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _add_kernel(
    parts,
    bias,
    y,
    size,
    outputs,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + i % outputs, mask=mask, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + i, mask=mask, other=0.0)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("alloy::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    x = x.view(-1, inputs)
    rows = x.shape[0]
    size = next((name for name, most in SIZES.items() if outputs <= most), "wide")
    if rows == 1:
        config = tuning.pick("linear_one", size)
        grid = (num_blocks(outputs, config["BLOCK_N"]),)
        _one_kernel[grid](
            x,
            weight,
            bias,
            y,
            outputs,
            inputs,
            weight.stride(0),
            HAS_BIAS=bias is not None,
            **chain.options(x),
            **config,
        )
        return y
    config = tuning.pick("linear_few", size)
    blocks, parts = num_blocks(outputs, config["BLOCK_N"]), 1
    while 2 * parts * blocks <= ENOUGH and 2 * parts * config["BLOCK_K"] <= inputs:
        parts *= 2
    out = y if parts == 1 else torch.empty(parts, rows, outputs, device=x.device)
    _few_kernel[(blocks, parts)](
        x,
        weight,
        bias,
        out,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        ROWS=MOST_ROWS,
        PARTS=parts,
        HAS_BIAS=bias is not None,
        **chain.options(x),
        **config,
    )
    if parts > 1:
        _add_kernel[(num_blocks(y.numel(), 512),)](
            out, bias, y, y.numel(), outputs, PARTS=parts, HAS_BIAS=bias is not None, BLOCK=512, **chain.options(x)
        )
    return y


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `alloy.ops.linear`: a few rows that need no gradient here, all else by cuBLAS."""
    return _linear(x, weight, bias) if _is_few(x, weight, bias) else F.linear(x, weight, bias)


def _is_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain tensors of one 16-bit dtype, 1 to 16 rows, laid out for 16-byte loads, and no gradient."""
    inputs = x.shape[-1]
    return (
        0 < x.numel() <= MOST_ROWS * inputs
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
        and weight.dim() == 2
        and weight.shape[1] == inputs
        and weight.stride(1) == 1
        and inputs % 8 == weight.stride(0) % 8 == 0
        and (bias is None or bias.is_contiguous())
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
    )
