"""Number formats of a run: fp32; bf16 autocast over fp32 parameters; or everything in bf16.

Under autocast matmuls run in bf16; the modules themselves keep norms' statistics, the SSD's state and dt, the router and the
losses in fp32. Parameters, gradients and optimizer state are fp32 in "fp32" and "bf16". "bf16-pure" holds them in bf16 too
(A_log, D, dt_bias and router biases excepted): half the memory, and updates below 1/256 of a weight are lost.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "bf16-pure"]
# in which matmuls run
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-pure": torch.bfloat16}


def parameter_dtype(precision: Precision) -> torch.dtype:
    """In which parameters, gradients and optimizer state are held."""
    return torch.bfloat16 if precision == "bf16-pure" else torch.float32


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context in which forward passes compute in `precision`."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
