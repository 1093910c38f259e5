"""Number formats of a run: fp32, or bf16 autocast over fp32 parameters.

Under autocast matmuls run in bf16; the modules themselves keep norms' statistics, the SSD's state and dt, the router and the
losses in fp32. Parameters, gradients and optimizer state are fp32 in both.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context in which forward passes compute in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
