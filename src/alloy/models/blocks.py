"""Attention, dense MLP, rotary positions, norms and linears: the parts that all decoders share.

Weights are left uninitialised on construction (`init_weights` or a loader fills them), so that building on the meta
device is instant and a load draws no random numbers.

Papers: RoPE arXiv:2104.09864; GQA arXiv:2305.13245; squared ReLU arXiv:2109.08668; Llama 3.1 frequency scaling
arXiv:2407.21783; LayerNorm1P Nemotron-4 arXiv:2402.16819.
"""

import math

import torch
from torch import Tensor, nn

from alloy.models.base import InitPlan, Layout
from alloy.models.cache import Cache
from alloy.models.configs import AttentionConfig, MLPConfig, RopeConfig
from alloy.ops.activation import ACTIVATIONS, gated
from alloy.ops.attention import attention
from alloy.ops.linear import linear
from alloy.ops.norm import add_rms_norm, layer_norm_1p, rms_norm


class Linear(nn.Linear):
    """nn.Linear without its own initialisation; `residual`: it writes to the residual stream and starts smaller."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = False,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, device=device, dtype=dtype)
        self.residual = residual

    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., inputs) -> (..., outputs)."""
        return linear(input, self.weight, self.bias)

    def draw_weights(self, plan: InitPlan) -> None:
        """Normal weights, zero bias."""
        plan.normal(self.weight, self.residual)
        if self.bias is not None:
            self.bias.zero_()


class Embedding(nn.Embedding):
    """nn.Embedding without its own initialisation."""

    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""

    def draw_weights(self, plan: InitPlan) -> None:
        """Normal weights."""
        plan.normal(self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with fp32 statistics; `cast_first` is Llama's order (cast, then weight)."""

    def __init__(
        self,
        width: int,
        eps: float,
        cast_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.eps = eps
        self.cast_first = cast_first

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape in the weight's dtype."""
        return rms_norm(x, self.weight, self.eps, self.cast_first).to(self.weight.dtype)

    def add(self, delta: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """delta and residual (..., width) -> (norm of their sum, the sum); no delta: the sum is the residual."""
        if delta is not None and delta.dtype == self.weight.dtype:
            return add_rms_norm(delta, residual, self.weight, self.eps, self.cast_first)
        total = residual if delta is None else residual + delta
        return self(total), total

    def draw_weights(self, plan: InitPlan) -> None:
        """Ones."""
        self.weight.fill_(1.0)


class LayerNorm1P(nn.Module):
    """LayerNorm whose stored weight is gamma - 1 (Nemotron-4, hybrid-models.md section 10)."""

    def __init__(
        self, width: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        return layer_norm_1p(x, self.weight, self.bias, self.eps)

    def add(self, delta: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """delta and residual (..., width) -> (norm of their sum, the sum); no delta: the sum is the residual."""
        total = residual if delta is None else residual + delta
        return self(total), total

    def draw_weights(self, plan: InitPlan) -> None:
        """Zeros, so that gamma is 1; transformers starts gamma at 2."""
        self.weight.fill_(1.0 if plan.style == "transformers" else 0.0)
        self.bias.zero_()


Norm = RMSNorm | LayerNorm1P


class Rotary:
    """Rotary position embedding in the rotate-half layout, computed in fp32 once per call and shared by all layers.

    Not a module: it has no weights, and a change of the model's dtype must not touch the frequencies.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config = config
        self.width = int(head_dim * config.partial)
        self._frequencies: Tensor | None = None

    def frequencies(self, device: torch.device) -> Tensor:
        """(width / 2,) fp32: radians per position; "llama3" stretches wavelengths beyond the original context."""
        if self._frequencies is not None and self._frequencies.device == device:
            return self._frequencies
        config = self.config
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=device) / self.width
        frequencies = config.theta**-exponent
        if config.scaling == "linear":
            frequencies = frequencies / config.factor
        elif config.scaling == "llama3":
            # turns a frequency makes within the original context: few turns are slowed down, many are kept
            turns = config.original_max_positions * frequencies / (2 * math.pi)
            blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
            blend = blend.clamp(0, 1)
            frequencies = (1 - blend) * frequencies / config.factor + blend * frequencies
        self._frequencies = frequencies
        return frequencies

    def tables(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (batch or 1, seq, 1, width) in `dtype`, for the positions of `layout`; sin's first half negated."""
        key = id(self)
        if key not in layout.rotations:
            angle = layout.positions[..., None].float() * self.frequencies(layout.tokens.device)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            layout.rotations[key] = torch.cat([cos, cos], -1)[:, :, None], torch.cat([-sin, sin], -1)[:, :, None]
        return layout.rotations[key]

    def rotate(self, x: Tensor, layout: Layout) -> Tensor:
        """Rotate the first `width` channels of x (batch, seq, heads, head_dim)."""
        cos, sin = self.tables(layout, x.dtype)
        part = x[..., : self.width]
        rotated = part * cos + part.roll(self.width // 2, -1) * sin
        return rotated if self.width == x.shape[-1] else torch.cat([rotated, x[..., self.width :]], -1)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values; `layer` is its index in the cache."""

    def __init__(
        self,
        config: AttentionConfig,
        layer: int,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.rotary = rotary
        width, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.q_proj = Linear(config.hidden, width, config.bias, device=device, dtype=dtype)
        self.k_proj = Linear(config.hidden, narrow, config.bias, device=device, dtype=dtype)
        self.v_proj = Linear(config.hidden, narrow, config.bias, device=device, dtype=dtype)
        self.o_proj = Linear(width, config.hidden, out_bias, residual=True, device=device, dtype=dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, cast_first=True, device=device, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, cast_first=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """x (batch, seq, hidden) -> the same shape."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, layout), self.rotary.rotate(k, layout)
        # (batch, heads, seq, head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is None:
            y = attention(q, k, v, documents=layout.blocks, window=self.config.window, packing=layout.packing)
        else:
            y = cache.attend(self.layer, q, k, v, self.config.window)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated."""

    def __init__(
        self, config: MLPConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = Linear(config.hidden, config.ffn, config.bias, device=device, dtype=dtype)
        if config.gated:
            self.gate_proj = Linear(config.hidden, config.ffn, config.bias, device=device, dtype=dtype)
        self.down_proj = Linear(config.ffn, config.hidden, config.bias, residual=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> the same shape."""
        if self.config.gated:
            return self.down_proj(gated(self.config.activation, self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(self.activation(self.up_proj(x)))
