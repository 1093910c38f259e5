"""What a laptop does: the scan of a small Mamba layer, and training steps of small hybrids, in fp32.

Floors: the scan's operations (`cases.ssd`) and the models' (`models.sizes`, three times) at the rate of an fp32 product.
"""

from collections.abc import Iterator
from functools import partial

import torch

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import Problem, Size
from alloy.bench.cases.gradients import Inputs, gradients, in_float64, value
from alloy.bench.cases.model import draw_training, loss_in_fp32, train, train_transformers
from alloy.bench.cases.ssd import NAMES, Shape
from alloy.models import sizes
from alloy.models.configs import HybridConfig

SHAPE = Shape(8, 64, 64, 1)
# (rows, seq) of the scan and of a training step
SCAN, STEP = (1, 4096), (8, 256)
WIDTHS = {"1M": 128, "3M": 192, "10M": 448}


def problems(size: Size) -> Iterator[Problem]:
    """The scan, forward and with backward; then a training step of three sizes."""
    rows, seq = {"full": SCAN, "quick": (1, 1024), "tiny": (2, 40)}[size]
    for label, make, factor in (("fwd", value, 1), ("fwd+bwd", gradients, 3)):
        yield Problem(
            f"ssd_scan {rows} x {seq} {label}",
            partial(_draw, rows, seq),
            make(_scan, NAMES),
            in_float64(make(peers.plain(_scan), NAMES)),
            peers={"torch": make(peers.plain(_scan), NAMES)},
            bytes=factor * 2 * rows * seq * SHAPE.token_bytes,
            flops=factor * rows * seq * SHAPE.token_flops,
            compute="float32",
            tolerance=1e-5,
            gradient_tolerance=1e-4,
            tokens=rows * seq,
        )
    rows, seq = (2, 33) if size == "tiny" else STEP
    for label in {"full": WIDTHS, "quick": ["1M"], "tiny": ["1M"]}[size]:
        config = hybrid(WIDTHS[label])
        yield Problem(
            f"train {label} hybrid, {rows} x {seq}",
            partial(draw_training, config, torch.float32, "fp32", rows, seq),
            train,
            loss_in_fp32,
            peers={"transformers": train_transformers},
            bytes=8.0 * 4 * sizes.parameters(config),
            flops=3.0 * rows * seq * sizes.flops_per_token(config, seq),
            compute="float32",
            tolerance=1e-4,
            tokens=rows * seq,
            holds_inputs=True,
        )


def hybrid(hidden: int) -> HybridConfig:
    """Three Mamba layers, an attention layer and three MLPs, tied to a vocabulary of 2048."""
    return HybridConfig(
        pattern="M-M-*-M-",
        vocab=2048,
        hidden=hidden,
        ffn=4 * hidden,
        num_heads=hidden // 32,
        num_kv_heads=hidden // 64,
        head_dim=32,
        ssm_heads=2 * hidden // 64,
        ssm_head_dim=64,
        ssm_state=64,
        ssm_groups=1,
        chunk=64,
        tie_embeddings=True,
        time_step_min=1e-9,
    )


def _draw(rows: int, seq: int) -> Inputs:
    heads, head_dim, state, groups = SHAPE
    return {
        "x": torch.randn(rows, seq, heads, head_dim),
        "dt": torch.randn(rows, seq, heads),
        "A": -torch.empty(heads).uniform_(1, 16),
        "B": torch.randn(rows, seq, groups, state),
        "C": torch.randn(rows, seq, groups, state),
        "D": torch.rand(heads) + 0.5,
        "dt_bias": torch.empty(heads).uniform_(-7, -2.3),
        "dy": torch.randn(rows, seq, heads, head_dim),
    }


def _scan(*tensors: torch.Tensor) -> torch.Tensor:
    *given, dt_bias = tensors
    y = ops.ssd_scan(*given, dt_bias=dt_bias)
    assert isinstance(y, torch.Tensor), "no state was asked for"
    return y
