"""Tiny random models of every kind, with odd and unequal sizes."""

import torch
from torch import Tensor

from alloy.models.base import CausalLM
from alloy.models.configs import (
    AttentionConfig,
    DecoderConfig,
    DecoderLayerConfig,
    HybridConfig,
    LayerOverride,
    LinearConfig,
    MLPConfig,
    RopeConfig,
)
from alloy.models.hybrid import HybridLM
from alloy.models.llama import DecoderLM

VOCAB = 61


def hybrid(pattern: str, **changes: object) -> HybridConfig:
    """A hybrid of width 20 whose parts all differ in size."""
    sizes: dict[str, object] = {
        "vocab": VOCAB,
        "hidden": 20,
        "pattern": pattern,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 5,
        "ffn": 33,
        "ssm_heads": 6,
        "ssm_head_dim": 7,
        "ssm_state": 9,
        "ssm_groups": 3,
        "num_experts": 6,
        "top_k": 2,
        "expert_ffn": 11,
        "shared_ffn": 13,
        "router_scale": 2.5,
        "init_std": 0.25,
    }
    return HybridConfig(**{**sizes, **changes})  # pyright: ignore[reportArgumentType]


def decoder(kind: str, **changes: object) -> DecoderConfig:
    """A decoder of width 24 with three layers."""
    sizes: dict[str, object] = {
        "kind": kind,
        "vocab": VOCAB,
        "hidden": 24,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn": 37,
        "max_positions": 128,
        "init_std": 0.25,
    }
    return DecoderConfig(**{**sizes, **changes})  # pyright: ignore[reportArgumentType]


LLAMA3 = RopeConfig(theta=500.0, scaling="llama3", factor=8.0, original_max_positions=32)


def nas() -> DecoderConfig:
    """No-op attention, no-op MLP, an identity layer, linear blocks, and widths and groups that differ."""

    def attention(num_kv_heads: int) -> AttentionConfig:
        return AttentionConfig(hidden=24, num_heads=6, num_kv_heads=num_kv_heads, head_dim=4, rope=LLAMA3)

    def mlp(ffn: int) -> MLPConfig:
        return MLPConfig(hidden=24, ffn=ffn, activation="silu", gated=True)

    layers = (
        DecoderLayerConfig(attention=attention(3), mlp=mlp(31)),
        DecoderLayerConfig(attention=None, mlp=mlp(45)),
        DecoderLayerConfig(attention=None, mlp=None),
        DecoderLayerConfig(attention=attention(1), mlp=None),
        DecoderLayerConfig(attention=LinearConfig(hidden=24), mlp=mlp(9)),
        DecoderLayerConfig(attention=attention(6), mlp=LinearConfig(hidden=24, bias=True)),
        DecoderLayerConfig(attention=attention(6), mlp=mlp(17)),
    )
    return decoder("nemotron-nas", num_layers=7, head_dim=4, rope=LLAMA3, layers=layers)


PUZZLE = hybrid(
    "ME*-M*E",
    kind="nemotron_h_puzzle",
    latent=10,
    mtp_depths=1,
    mtp_pattern="*E",
    layers=(
        LayerOverride(ssm_state=5, ssm_heads=9),
        LayerOverride(num_experts=4, top_k=3, expert_ffn=7, latent=6),
        LayerOverride(window=4, num_kv_heads=3),
        LayerOverride(ffn=19),
        LayerOverride(ssm_head_dim=4, ssm_groups=2),
        LayerOverride(num_heads=8, head_dim=3),
        LayerOverride(top_k=1, shared_ffn=9),
    ),
    mtp_layers=(LayerOverride(window=3), LayerOverride(num_experts=5, latent=8)),
)

CONFIGS: dict[str, HybridConfig | DecoderConfig] = {
    "dense": hybrid("M-M*-"),
    "one_kv_head": hybrid("M*-M", num_kv_heads=1, conv_bias=False, conv_kernel=3),
    "limits": hybrid("M-*M", time_step_limit=(0.02, 0.3)),
    "moe": hybrid("ME*E"),
    "grouped_routing": hybrid("MEM*E", num_router_groups=3, top_router_groups=2, top_k=3, normalize_weights=False),
    "latent_mtp": hybrid("MEM*E", latent=10, mtp_depths=1),
    "mamba_mtp": hybrid("M*-", mtp_depths=2, mtp_pattern="M*-", mtp_repeated=False, residual_fp32=True),
    "windowed": hybrid("M*-*", window=4),
    "puzzle": PUZZLE,
    "llama": decoder("llama", rope=LLAMA3),
    "qwen3": decoder("qwen3", qk_norm=True, tie_embeddings=True),
    "qwen3_moe": decoder("qwen3_moe", qk_norm=True, num_experts=5, top_k=2, expert_ffn=9, dense_layers=(1,)),
    "nemotron": decoder(
        "nemotron", norm="layer1p", activation="relu2", gated=False, rope=RopeConfig(partial=0.5), attention_bias=True
    ),
    "nas": nas(),
}


def build(name: str, seed: int = 0) -> CausalLM:
    """The named model with random weights, norms and biases included, in evaluation mode."""
    config = CONFIGS[name]
    model = HybridLM(config) if isinstance(config, HybridConfig) else DecoderLM(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    disturb(model, generator)
    return model.eval()


def disturb(model: CausalLM, generator: torch.Generator) -> None:
    """Move norms, biases and D away from ones and zeros, where mistakes hide."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key or key.endswith("bias") or key.endswith(".D"):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def random_tokens(batch: int, seq: int, seed: int = 1) -> Tensor:
    """(batch, seq) int64."""
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))
