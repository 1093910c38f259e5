"""Whole models with random weights: a training step.

Floors: training, the operations of `models.sizes` three times at the bf16 rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import Outputs, Problem, Size
from alloy.losses.lm import linear_cross_entropy
from alloy.models import sizes
from alloy.models.base import CausalLM
from alloy.models.configs import HybridConfig
from alloy.models.presets import preset
from alloy.models.registry import build
from alloy.train.optim import Optimizers
from alloy.train.precision import Precision, compute_in

# 1.046 B parameters: 12 Mamba-2, 12 MLP and 2 attention layers (performance.md, section 9.4)
HYBRID_1B = HybridConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-",
    vocab=65_536,
    hidden=2048,
    ffn=8192,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    ssm_heads=64,
    ssm_head_dim=64,
    ssm_state=128,
    ssm_groups=8,
    # transformers floors dt at this value in training
    time_step_min=1e-9,
)
ROWS, SEQ = 4, 4096


@dataclass
class Training:
    """A model in training, what steps it, and tokens (rows, seq + 1)."""

    model: CausalLM
    optimizer: Optimizers | torch.optim.Optimizer
    tokens: Tensor
    precision: Precision
    # transformers' model, once it has taken the place of ours
    peer: Any = None


def training(size: Size) -> Iterator[Problem]:
    """One step over 16,384 tokens: bf16 parameters and AdamW states, then fp32 ones under autocast."""
    config = preset("tiny-dense") if size == "tiny" else HYBRID_1B
    rows, seq = (2, 33) if size == "tiny" else (ROWS, SEQ)
    formats: dict[str, tuple[Precision, torch.dtype]] = {
        "bf16 parameters": ("fp32", torch.bfloat16),
        "fp32 parameters": ("bf16", torch.float32),
    }
    for label, (precision, dtype) in formats.items():
        yield Problem(
            f"{rows} x {seq}, {label}",
            partial(draw_training, config, dtype, precision, rows, seq),
            train,
            loss_in_fp32,
            peers={"transformers": train_transformers} if dtype == torch.bfloat16 else {},
            # parameters, gradients and two moments are read and written
            bytes=8.0 * dtype.itemsize * sizes.parameters(config),
            flops=3.0 * rows * seq * sizes.flops_per_token(config, seq),
            tolerance=1e-2,
            tokens=rows * seq,
            holds_inputs=True,
        )


def draw_training(config: Any, dtype: torch.dtype, precision: Precision, rows: int, seq: int) -> Training:
    model = build(config, torch.get_default_device(), dtype).train()
    tokens = torch.randint(0, config.vocab, (rows, seq + 1))
    return Training(model, Optimizers(model, "adamw", lr=1e-4), tokens, precision)


def train(i: Training) -> Outputs:
    """One optimizer step; the loss before it."""
    with compute_in(i.precision, i.tokens.device):
        hidden = i.model(i.tokens[:, :-1], logits=None).last_hidden
        loss = linear_cross_entropy(hidden, i.model.head.weight, i.tokens[:, 1:]) / i.tokens[:, 1:].numel()
    loss.backward()
    nn.utils.clip_grad_norm_(i.model.parameters(), 1.0)
    i.optimizer.step()
    return {"loss": loss.detach()}


def loss_in_fp32(i: Training) -> Outputs:
    """The loss of the same weights in fp32 by the readable ops, row by row."""
    model = i.model.float()
    with ops.use_backend("torch"), torch.no_grad():
        sums = [
            linear_cross_entropy(model(row[None, :-1], logits=None).last_hidden, model.head.weight, row[None, 1:])
            for row in i.tokens
        ]
    return {"loss": torch.stack(sums).sum() / i.tokens[:, 1:].numel()}


def train_transformers(i: Training) -> Outputs:
    """The same step by transformers' model, which takes the place of ours; logits in one piece, as its users have them."""
    if i.peer is None:
        i.peer = peers.transformers_model(i.model).train()
        i.model.to("meta")
        i.optimizer = torch.optim.AdamW(i.peer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    logits = i.peer(input_ids=i.tokens[:, :-1], use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), i.tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(i.peer.parameters(), 1.0)
    i.optimizer.step()
    i.optimizer.zero_grad()
    return {"loss": loss.detach()}
