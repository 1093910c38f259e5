# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""Which ptxas turns kernels into machine code.

Triton 3.6 brings two: 12.8 for GPUs up to Hopper and 12.9 for Blackwell. The first miscompiles wgmma (Hopper's matrix product)
where an operand in shared memory has rows of 32 or 64 bytes: the 64-bit sum of its address and the bits that name such rows
reads a register that was never written, and the product reads other memory or fails. 12.9 compiles the same PTX correctly.
"""

from functools import cache

import torch
import triton


@cache
def narrow_operands() -> bool:
    """Whether operands may have rows under 128 bytes. Where only Triton's own choice forbids it, the newer ptxas is chosen."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return True
    tools = triton.knobs.nvidia
    newer = getattr(tools, "ptxas_blackwell", None)
    if _version(tools.ptxas) < (12, 9) and newer is not None and _version(newer) >= (12, 9):
        from triton.backends.nvidia import compiler

        tools.ptxas = newer.path
        # both remember the version, which is a part of the name of compiled kernels on disk
        compiler.get_ptxas_version.cache_clear()
        compiler.CUDABackend.hash.cache_clear()
    return _version(tools.ptxas) >= (12, 9)


def narrowest(dtype: torch.dtype) -> int:
    """The fewest columns of an operand of a matrix product; what is behind the real ones is filled with zeros."""
    return 16 if narrow_operands() else 128 // dtype.itemsize


def _version(tool) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))
