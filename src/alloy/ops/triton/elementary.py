# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""What the kernels over sequences share: elementary functions at one instruction each, the dtype of sums, sizes of grids.

Triton's own exp and division handle subnormal numbers, which costs the sigmoid 7 of its 12 instructions on Hopper; these
flush them to zero. The relative error of both instructions is below 2^-22 (PTX ISA, ex2.approx and rcp.approx).
"""

import torch
import triton
import triton.language as tl

# the interpreter knows no PTX
_PTX = tl.constexpr(not triton.knobs.runtime.interpret)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What `alloy.ops.precision.wide` is to torch: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def num_blocks(size: int, block: int) -> int:
    """How many blocks cover `size`. Triton's cdiv takes microseconds on the host."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


@triton.jit
def exp2(x):
    """2^x in x's dtype, float32 or float64, any shape."""
    if _PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in x's dtype, float32 or float64, any shape."""
    below = 1.0 + exp2(x * -1.4426950408889634)
    if _PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / below
