"""Transformer decoders with attention and MLP in one layer: Llama, Qwen3, Qwen3-MoE, Nemotron-4, nemotron-nas.

h = h + attention(norm(h)); h = h + mlp(norm(h)), either of which may be missing (nemotron-nas: no weights, no norm, no
step). Which norm, rotary positions, activation and widths come from the config, layer by layer.

Papers: Llama 3 arXiv:2407.21783, Qwen3 arXiv:2505.09388, Nemotron-4 arXiv:2402.16819, Llama-Nemotron arXiv:2505.00949.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from alloy.errors import RequestError
from alloy.models.base import CausalLM, Layout, RouterStats
from alloy.models.blocks import MLP, Attention, Embedding, LayerNorm1P, Linear, Norm, RMSNorm, Rotary
from alloy.models.cache import Cache
from alloy.models.configs import (
    AttentionConfig,
    DecoderConfig,
    DecoderLayerConfig,
    LinearConfig,
    Mixer,
    MLPConfig,
    MoEConfig,
    RopeConfig,
)
from alloy.models.moe import MoE


class LinearBlock(nn.Module):
    """A square linear map in the place of attention or MLP."""

    def __init__(
        self, config: LinearConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.linear = Linear(config.hidden, config.hidden, config.bias, residual=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, layout: Layout | None = None, cache: Cache | None = None) -> Tensor:
        """x (batch, seq, hidden) -> the same shape; neither layout nor cache matters."""
        return self.linear(x)


FEED_FORWARD: dict[type, Callable[..., nn.Module]] = {MLPConfig: MLP, MoEConfig: MoE, LinearConfig: LinearBlock}


class DecoderLayer(nn.Module):
    """Attention and MLP with a norm and a residual each; either may be one linear map, or missing, which changes nothing."""

    def __init__(
        self,
        config: DecoderLayerConfig,
        model: DecoderConfig,
        layer: int,
        rotary: Rotary | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.attention is not None:
            self.attention_norm = _norm(model, device, dtype)
            self.attention = (
                LinearBlock(config.attention, device, dtype)
                if isinstance(config.attention, LinearConfig)
                else Attention(config.attention, layer, rotary, device, dtype)
            )
        if config.mlp is not None:
            self.mlp_norm = _norm(model, device, dtype)
            self.mlp = FEED_FORWARD[type(config.mlp)](config.mlp, device, dtype)
        self.has_attention = config.attention is not None
        self.has_mlp = config.mlp is not None
        self.is_routed = isinstance(config.mlp, MoEConfig)

    def forward(
        self, residual: Tensor, delta: Tensor | None, layout: Layout, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        """See `Layer`: residual and delta (batch, seq, hidden)."""
        stats = None
        if self.has_attention:
            normed, residual = self.attention_norm.add(delta, residual)
            delta = self.attention(normed, layout, cache)
        if self.has_mlp:
            normed, residual = self.mlp_norm.add(delta, residual)
            if self.is_routed:
                delta, stats = self.mlp(normed, layout)
            else:
                delta = self.mlp(normed)
        return residual, delta, stats


class DecoderLM(CausalLM):
    """Every model of `DecoderConfig`."""

    config: DecoderConfig

    def __init__(
        self, config: DecoderConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        rotaries: dict[tuple[RopeConfig, int], Rotary] = {}
        self.embed = Embedding(config.vocab, config.hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config, i, _rotary(layer.attention, rotaries), device, dtype)
            for i, layer in enumerate(config.resolved)
        )
        self.norm = _norm(config, device, dtype)
        self.head = Linear(config.hidden, config.vocab, device=device, dtype=dtype)
        self.finish()

    def cached_mixers(self) -> tuple[Sequence[Mixer | None], Sequence[Mixer | None]]:
        """See `CausalLM.cached_mixers`; layers without attention take no room."""
        return [layer.attention for layer in self.config.resolved], ()

    def check_layout(self, layout: Layout) -> None:
        """Refuse also positions that rotary embedding was not trained for, unless it is scaled."""
        super().check_layout(layout)
        limit, rope = self.config.max_positions, self.config.rope
        # the bound known without asking the device comes first
        if rope.scaling == "none" and layout.bound > limit and int(layout.positions.max()) >= limit:
            raise RequestError(
                f"position {int(layout.positions.max())} is beyond max_positions = {limit} of this {self.config.kind} "
                "model, whose rotary embedding has no scaling; shorten the input or set rope scaling"
            )


def _norm(config: DecoderConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> Norm:
    if config.norm == "layer1p":
        return LayerNorm1P(config.hidden, config.norm_eps, device, dtype)
    return RMSNorm(config.hidden, config.norm_eps, cast_first=True, device=device, dtype=dtype)


def _rotary(
    attention: AttentionConfig | LinearConfig | None, known: dict[tuple[RopeConfig, int], Rotary]
) -> Rotary | None:
    """One table of angles for all layers that rotate alike."""
    if not isinstance(attention, AttentionConfig) or attention.rope is None:
        return None
    key = attention.rope, attention.head_dim
    if key not in known:
        known[key] = Rotary(*key)
    return known[key]
