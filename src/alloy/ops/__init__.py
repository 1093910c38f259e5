"""Pure tensor functions: every heavy operation of the models, behind one dispatch table (`alloy.ops.backend`)."""

from alloy.ops.activation import ACTIVATIONS
from alloy.ops.attention import attention, attn_decode, kv_append
from alloy.ops.backend import choices, explain, use_backend
from alloy.ops.conv import causal_conv1d, causal_conv1d_multi, causal_conv1d_step, conv_replay
from alloy.ops.decode import count_tokens, take_largest
from alloy.ops.linear import linear
from alloy.ops.mamba_scan import mamba_scan
from alloy.ops.mamba_step import mamba_step
from alloy.ops.moe import (
    expert_counts,
    moe_experts,
    moe_step,
    route,
    router_logits,
    sequence_balance,
    update_router_bias,
)
from alloy.ops.norm import add_rms_norm, gated_rms_norm, layer_norm_1p, rms_norm
from alloy.ops.ssd import ssd_replay, ssd_scan, ssd_step, ssd_step_multi

__all__ = [
    "ACTIVATIONS",
    "add_rms_norm",
    "attention",
    "attn_decode",
    "causal_conv1d",
    "causal_conv1d_multi",
    "causal_conv1d_step",
    "choices",
    "conv_replay",
    "count_tokens",
    "expert_counts",
    "explain",
    "gated_rms_norm",
    "kv_append",
    "layer_norm_1p",
    "linear",
    "mamba_scan",
    "mamba_step",
    "moe_experts",
    "moe_step",
    "rms_norm",
    "route",
    "router_logits",
    "sequence_balance",
    "ssd_replay",
    "ssd_scan",
    "ssd_step",
    "ssd_step_multi",
    "take_largest",
    "update_router_bias",
    "use_backend",
]
