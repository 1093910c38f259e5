"""The norm kernels against the reference in float64."""

import pytest
import torch
from torch import Tensor

from alloy.ops import add_rms_norm, gated_rms_norm, rms_norm, use_backend

pytest.importorskip("triton")
from alloy.ops.triton import norm, tuning  # noqa: F401  (registers the configurations)

