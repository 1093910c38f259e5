"""Model configurations. No torch here: sizes, recipes and the command line read them without loading it.

Two families cover everything: `HybridConfig` (one mixer a block: Mamba-2, attention, MLP or MoE) and `DecoderConfig`
(attention and MLP in one block: Llama, Qwen3, Nemotron-4, nemotron-nas). Both resolve to the same small mixer configs,
one per layer, from which modules are built and sizes counted, so that a per-layer override reaches every user.

Papers: Nemotron-H arXiv:2504.03624, Nemotron Nano 2 arXiv:2508.14444, Nemotron 3; Nemotron-4 340B arXiv:2406.11704;
Llama-Nemotron arXiv:2505.00949.
"""

import math
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alloy.core.recipe import Config

# the upper bound is far beyond any model, and keeps a damaged file's number within what a tensor's size can be
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Activation = Literal["relu2", "silu", "gelu", "relu"]
# how much of a block is computed again in the backward pass of training
Checkpointing = Literal["none", "selective", "full"]


class MambaConfig(Config):
    """One Mamba-2 mixer. inner = heads * head_dim; channels = inner + 2 * groups * state."""

    hidden: Positive
    heads: Positive
    head_dim: Positive
    state: Positive
    groups: Positive
    conv_kernel: Positive = 4
    chunk: Positive = 128
    conv_bias: bool = True
    proj_bias: bool = False
    # seconds-like step sizes of the state space; min, max and floor are used at initialisation only
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # run-time clamp of dt, in prefill and decode alike
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.heads % self.groups:
            raise ValueError(f"ssm_heads = {self.heads} is not a multiple of ssm_groups = {self.groups}")
        # alloy.ops.ssd.MOST_WIDTH
        if max(self.head_dim, self.state) > 256:
            raise ValueError(f"ssm_head_dim = {self.head_dim} and ssm_state = {self.state}; both must be at most 256")
        low, high = self.time_step_limit
        if low < 0 or low > high:
            raise ValueError(f"time_step_limit = [{low}, {high}]: the lower bound must be >= 0 and <= the upper")
        return self

    @property
    def inner(self) -> int:
        """Width inside the mixer: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state


class RopeConfig(Config):
    """Rotary position embedding. `scaling` "llama3" stretches low frequencies (Llama 3.1), "linear" divides positions."""

    theta: float = 10_000.0
    # share of the head that rotates (Nemotron-4: 0.5); the rest passes through
    partial: float = 1.0
    scaling: Literal["none", "llama3", "linear"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


class AttentionConfig(Config):
    """Causal attention with grouped keys and values. `rope` None: no position embedding (the hybrids)."""

    hidden: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    bias: bool = False
    # bias of the output projection when it differs from `bias` (None: the same)
    out_bias: bool | None = None
    window: Positive | None = None
    rope: RopeConfig | None = None
    # RMSNorm over the head dimension of queries and keys before RoPE (Qwen3)
    qk_norm: bool = False
    norm_eps: float = 1e-6

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        rotated = 0 if self.rope is None else int(self.head_dim * self.rope.partial)
        if rotated % 2:
            raise ValueError(f"head_dim = {self.head_dim} rotates {rotated} channels; rotary embedding needs pairs")
        return self


class MLPConfig(Config):
    """Dense MLP: down(act(up x)), or down(act(gate x) * up x) when `gated`."""

    hidden: Positive
    ffn: Positive
    activation: Activation = "relu2"
    gated: bool = False
    bias: bool = False


class MoEConfig(Config):
    """Routed MLP with shared experts; `latent` set: LatentMoE. Router "sigmoid" (Nemotron 3) or "softmax" (Qwen3-MoE)."""

    hidden: Positive
    num_experts: Positive
    top_k: Positive
    ffn: Positive
    # width of the shared MLP (0: none)
    shared_ffn: Count = 0
    latent: Positive | None = None
    activation: Activation = "relu2"
    gated: bool = False
    bias: bool = False
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    num_router_groups: Positive = 1
    top_router_groups: Positive = 1
    normalize_weights: bool = True
    router_scale: float = 1.0

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.num_experts % self.num_router_groups:
            raise ValueError(
                f"num_experts = {self.num_experts} is not a multiple of num_router_groups = {self.num_router_groups}"
            )
        if self.top_router_groups > self.num_router_groups:
            raise ValueError(
                f"top_router_groups = {self.top_router_groups} is more than num_router_groups = {self.num_router_groups}"
            )
        size = self.num_experts // self.num_router_groups
        if self.num_router_groups > 1 and size < 2:
            raise ValueError(f"router groups hold {size} expert; a group needs at least 2")
        if self.top_k > self.top_router_groups * size:
            raise ValueError(
                f"top_k = {self.top_k} is more than the {self.top_router_groups * size} experts that routing may choose from"
            )
        return self


class LinearConfig(Config):
    """One square linear map in the place of attention or MLP (nemotron-nas `replace_with_linear`)."""

    hidden: Positive
    bias: bool = False


HybridMixer = MambaConfig | AttentionConfig | MLPConfig | MoEConfig
Mixer = HybridMixer | LinearConfig
LayerKind = Literal["mamba", "attention", "mlp", "moe"]
SYMBOLS: dict[str, LayerKind] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
REFUSED_SYMBOLS = {"G": "gated delta net", "D": "sparse attention", "+": "multi-head latent attention"}


def clean_pattern(pattern: str, name: str = "pattern") -> str:
    """Strip the pipeline cuts `|` of Megatron's notation and check every symbol."""
    clean = pattern.replace("|", "")
    if not clean:
        raise ValueError(f'{name} = "{pattern}" has no layers')
    for i, symbol in enumerate(pattern, start=1):
        if symbol == "|":
            continue
        if symbol in REFUSED_SYMBOLS:
            raise ValueError(
                f'{name} = "{pattern}": "{symbol}" at position {i} is {REFUSED_SYMBOLS[symbol]}, a layer type that is not supported'
            )
        if symbol not in SYMBOLS:
            raise ValueError(
                f'{name} = "{pattern}": "{symbol}" at position {i} is not a layer. '
                "Use M (Mamba-2), * (attention), - (MLP), E (MoE)."
            )
    return clean


class LayerOverride(Config):
    """What one layer of a heterogeneous hybrid (`nemotron_h_puzzle`) changes; None keeps the model's value."""

    ffn: Positive | None = None
    ssm_state: Positive | None = None
    ssm_heads: Positive | None = None
    ssm_head_dim: Positive | None = None
    ssm_groups: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    window: Positive | None = None
    num_experts: Positive | None = None
    top_k: Positive | None = None
    expert_ffn: Positive | None = None
    shared_ffn: Count | None = None
    latent: Positive | None = None


class HybridConfig(Config):
    """The Nemotron hybrid family: every block is one mixer with its own pre-norm and residual.

    Defaults are those of transformers' NemotronHConfig where a released file may leave a field out, but for special tokens.
    """

    kind: Literal["nemotron_h", "nemotron_h_puzzle"] = "nemotron_h"
    vocab: Positive = 131_072
    hidden: Positive = 4096
    # one character a block; Megatron's "main/mtp/mtp" notation is accepted
    pattern: str
    tie_embeddings: bool = False
    max_positions: Positive = 4096
    norm_eps: float = 1e-5
    # keep the residual stream in fp32
    residual_fp32: bool = False

    num_heads: Positive = 32
    num_kv_heads: Positive = 8
    head_dim: Positive = 128
    attention_bias: bool = False
    window: Positive | None = None

    # one width, or one per `-` layer in order
    ffn: Positive | tuple[Positive, ...] = 21_504
    mlp_bias: bool = False

    ssm_heads: Positive = 128
    ssm_head_dim: Positive = 64
    ssm_state: Positive = 128
    ssm_groups: Positive = 8
    conv_kernel: Positive = 4
    chunk: Positive = 128
    conv_bias: bool = True
    ssm_bias: bool = False
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)

    num_experts: Positive = 8
    top_k: Positive = 2
    expert_ffn: Positive = 7688
    shared_ffn: Count = 7688
    latent: Positive | None = None
    num_router_groups: Positive = 1
    top_router_groups: Positive = 1
    normalize_weights: bool = True
    router_scale: float = 1.0

    # depths stored; depth 1 is applied again for further ones when mtp_repeated
    mtp_depths: Count = 0
    mtp_pattern: str = "*E"
    mtp_repeated: bool = True
    mtp_loss_scale: float = 0.3

    # None: sqrt(0.8 / hidden), which fits the published runs
    init_std: float | None = None
    # residual outputs start smaller by sqrt(number of blocks)
    rescale_residual: bool = True

    # None and (): not set, and then pretraining takes its tokenizer's
    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    layers: tuple[LayerOverride, ...] | None = None
    mtp_layers: tuple[LayerOverride, ...] | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        self._split_mtp()
        object.__setattr__(self, "pattern", clean_pattern(self.pattern))
        object.__setattr__(self, "mtp_pattern", clean_pattern(self.mtp_pattern, "mtp_pattern"))
        if isinstance(self.ffn, tuple) and len(self.ffn) not in (1, self.pattern.count("-")):
            raise ValueError(
                f"ffn lists {len(self.ffn)} widths but pattern has {self.pattern.count('-')} `-` layers; give one, or one per layer"
            )
        for name, layers, pattern in (
            ("layers", self.layers, self.pattern),
            ("mtp_layers", self.mtp_layers, self.mtp_pattern),
        ):
            if layers is not None and len(layers) != len(pattern):
                raise ValueError(f"{name} has {len(layers)} entries but its pattern has {len(pattern)} blocks")
        # builds every mixer config once, so that a bad combination is refused here
        _ = self.mixers, self.mtp_mixers
        return self

    @cached_property
    def mixers(self) -> tuple[HybridMixer, ...]:
        """One mixer config per block, overrides applied."""
        return self._resolve(self.pattern, self.layers)

    @cached_property
    def mtp_mixers(self) -> tuple[HybridMixer, ...]:
        """Mixers of one MTP depth; empty without MTP."""
        return self._resolve(self.mtp_pattern, self.mtp_layers) if self.mtp_depths else ()

    @property
    def num_layers(self) -> int:
        """Blocks, one a character of the pattern."""
        return len(self.pattern)

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.init_std if self.init_std is not None else math.sqrt(0.8 / self.hidden)

    def _split_mtp(self) -> None:
        """ "main/mtp/mtp" (Megatron) becomes pattern, mtp_pattern and mtp_depths."""
        main, *depths = self.pattern.split("/")
        if not depths:
            return
        if len({clean_pattern(depth, "mtp pattern") for depth in depths}) != 1:
            raise ValueError(f'pattern = "{self.pattern}": all MTP depths must have the same pattern')
        found: dict[str, object] = {"pattern": main, "mtp_pattern": depths[0]}
        if "mtp_depths" not in self.model_fields_set:
            found["mtp_depths"] = len(depths)
        for name, value in found.items():
            object.__setattr__(self, name, value)
        self.model_fields_set.update(found)

    def _resolve(self, pattern: str, overrides: tuple[LayerOverride, ...] | None) -> tuple[HybridMixer, ...]:
        widths = self.ffn if isinstance(self.ffn, tuple) else (self.ffn,)
        mixers: list[HybridMixer] = []
        dense = 0
        for i, symbol in enumerate(pattern):
            o = overrides[i] if overrides else LayerOverride()
            kind = SYMBOLS[symbol]
            if kind == "mamba":
                mixers.append(
                    MambaConfig(
                        hidden=self.hidden,
                        heads=o.ssm_heads or self.ssm_heads,
                        head_dim=o.ssm_head_dim or self.ssm_head_dim,
                        state=o.ssm_state or self.ssm_state,
                        groups=o.ssm_groups or self.ssm_groups,
                        conv_kernel=self.conv_kernel,
                        chunk=self.chunk,
                        conv_bias=self.conv_bias,
                        proj_bias=self.ssm_bias,
                        time_step_min=self.time_step_min,
                        time_step_max=self.time_step_max,
                        time_step_floor=self.time_step_floor,
                        time_step_limit=self.time_step_limit,
                        norm_eps=self.norm_eps,
                    )
                )
            elif kind == "attention":
                mixers.append(
                    AttentionConfig(
                        hidden=self.hidden,
                        num_heads=o.num_heads or self.num_heads,
                        num_kv_heads=o.num_kv_heads or self.num_kv_heads,
                        head_dim=o.head_dim or self.head_dim,
                        bias=self.attention_bias,
                        window=o.window if o.window is not None else self.window,
                    )
                )
            elif kind == "mlp":
                width = o.ffn or widths[dense if len(widths) > 1 else 0]
                dense += 1
                mixers.append(MLPConfig(hidden=self.hidden, ffn=width, bias=self.mlp_bias))
            else:
                mixers.append(
                    MoEConfig(
                        hidden=self.hidden,
                        num_experts=o.num_experts or self.num_experts,
                        top_k=o.top_k or self.top_k,
                        ffn=o.expert_ffn or self.expert_ffn,
                        shared_ffn=o.shared_ffn if o.shared_ffn is not None else self.shared_ffn,
                        latent=o.latent if o.latent is not None else self.latent,
                        bias=self.mlp_bias,
                        num_router_groups=self.num_router_groups,
                        top_router_groups=self.top_router_groups,
                        normalize_weights=self.normalize_weights,
                        router_scale=self.router_scale,
                    )
                )
        return tuple(mixers)


class DecoderLayerConfig(Config):
    """One transformer layer: attention and MLP (or MoE), either of which may be missing (nemotron-nas no-op) or linear."""

    attention: AttentionConfig | LinearConfig | None = None
    mlp: MLPConfig | MoEConfig | LinearConfig | None = None


class DecoderConfig(Config):
    """Transformer decoders with two residual steps a layer: Llama, Qwen3, Qwen3-MoE, Nemotron-4, nemotron-nas.

    The flat fields describe the usual layer; `layers` states every layer where they differ.
    """

    kind: Literal["llama", "qwen3", "qwen3_moe", "nemotron", "nemotron-nas"]
    vocab: Positive
    hidden: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    ffn: Positive
    activation: Activation = "silu"
    gated: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: Positive | None = None
    rope: RopeConfig = RopeConfig()
    # "rms" is Llama's (cast before the weight), "layer1p" Nemotron-4's LayerNorm with weight + 1
    norm: Literal["rms", "layer1p"] = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: Positive = 4096

    # Qwen3-MoE; `dense_layers` keep the plain MLP
    num_experts: Count = 0
    top_k: Count = 0
    expert_ffn: Count = 0
    normalize_weights: bool = True
    dense_layers: tuple[int, ...] = ()

    init_std: float | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    layers: tuple[DecoderLayerConfig, ...] | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.layers is not None and len(self.layers) != self.num_layers:
            raise ValueError(f"layers has {len(self.layers)} entries but num_layers = {self.num_layers}")
        if any(i >= self.num_layers or i < 0 for i in self.dense_layers):
            raise ValueError(f"dense_layers = {list(self.dense_layers)} names a layer outside 0..{self.num_layers - 1}")
        _ = self.resolved
        return self

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.init_std if self.init_std is not None else math.sqrt(0.8 / self.hidden)

    @cached_property
    def resolved(self) -> tuple[DecoderLayerConfig, ...]:
        """One config per layer."""
        if self.layers is not None:
            return self.layers
        attention = AttentionConfig(
            hidden=self.hidden,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            bias=self.attention_bias,
            window=self.window,
            rope=self.rope,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
        )
        dense = MLPConfig(
            hidden=self.hidden, ffn=self.ffn, activation=self.activation, gated=self.gated, bias=self.mlp_bias
        )
        routed = (
            MoEConfig(
                hidden=self.hidden,
                num_experts=self.num_experts,
                top_k=self.top_k,
                ffn=self.expert_ffn,
                activation=self.activation,
                gated=self.gated,
                router="softmax",
                normalize_weights=self.normalize_weights,
            )
            if self.num_experts
            else None
        )
        return tuple(
            DecoderLayerConfig(attention=attention, mlp=dense if routed is None or i in self.dense_layers else routed)
            for i in range(self.num_layers)
        )


ModelConfig = Annotated[HybridConfig | DecoderConfig, Field(discriminator="kind")]
