"""Kernels of a step that follow one another closely: the next one is brought onto the device while the last still runs.

A chained kernel calls `gdc_wait` before it reads what the kernel before it may have written, and writes nothing earlier;
it calls `gdc_launch_dependents` when its own work is under way. Both do nothing where the neighbour is not chained.
Source: CUDA programming guide, programmatic dependent launch; compute capability 9.0 and newer.
"""

from torch import Tensor

from alloy.ops.triton import tuning


def options(x: Tensor) -> dict[str, bool]:
    """What a launch of a kernel with the constant CHAINED is given, for kernels that run where x (any shape) is."""
    if x.is_cuda and tuning.arch() != "sm_80":
        return {"CHAINED": True, "launch_pdl": True}
    return {"CHAINED": False}
