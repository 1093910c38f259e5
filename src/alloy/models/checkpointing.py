"""Activation checkpointing of a block: what of it is kept for the backward pass and what is computed again.

"selective" keeps the results of matmuls and attention, which cost the most to compute, and recomputes everything between
them: norms, activations, the convolution and the scan, whose cost is that of reading its inputs (performance.md, Appendix A).
"full" keeps the block's input alone.

Paper: Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al., 2022). arXiv:2205.05198
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from alloy.models.configs import Checkpointing

Result = TypeVar("Result")

# by name: ops of devices and kernels that are not there are never imported
PRODUCTS = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten._grouped_mm.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._flash_attention_forward.default",
        "mkldnn._linear_pointwise.default",
        "alloy.moe_experts_kept.default",
    }
)


def run_block(mode: Checkpointing, block: Callable[..., Result], *args: object) -> Result:
    """block(*args), of whose activations the backward pass finds what `mode` keeps."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    contexts = _keep_products if mode == "selective" else noop_context_fn
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep_products() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op) in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
