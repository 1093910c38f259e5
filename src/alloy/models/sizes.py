"""Parameters, FLOPs and bytes of a model, from its configuration alone: the project's only size calculator.

Every function reads the mixer configs of single layers, so that per-layer overrides count. Numbers are exact unless a
docstring says estimate. Bytes are plain bytes; GiB is 2**30.

Paper: Nemotron-H (2025), section 2, arXiv:2504.03624; the selective state space of Mamba-2 (Dao and Gu, 2024),
arXiv:2405.21060.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from alloy.errors import RecipeError, ResourceError
from alloy.models.configs import (
    AttentionConfig,
    Checkpointing,
    DecoderConfig,
    HybridConfig,
    LinearConfig,
    MambaConfig,
    Mixer,
    MLPConfig,
    MoEConfig,
)

AnyConfig = HybridConfig | DecoderConfig

DTYPE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}
# of recurrent states; "float16-sr" rounds stochastically
STATE_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float16-sr": 2.0}
GIB = 2**30
# what a CUDA context and its libraries take, and the share of the device that the allocator cannot use (estimates)
CONTEXT_BYTES = int(0.45 * GIB)
UNUSABLE_FRAC = 0.025
# what cuBLAS keeps for each stream on Hopper
WORKSPACE_BYTES = 32 * 2**20
# bytes of a logit while a token is chosen: as the head gives it, in fp32, and one copy
LOGIT_BYTES = 10


def dtype_bytes(name: str) -> float:
    """Bytes of one element of a dtype given by name, such as bfloat16 or bf16."""
    full = DTYPE_ALIASES.get(name, name)
    if full not in DTYPE_BYTES:
        raise RecipeError(f'unknown dtype "{name}". Use one of {", ".join([*DTYPE_BYTES, *DTYPE_ALIASES])}')
    return DTYPE_BYTES[full]


def state_dtype_bytes(name: str) -> float:
    """Bytes of one element of a recurrent state: sums that decay, so never whole numbers."""
    full = DTYPE_ALIASES.get(name, name)
    if full not in STATE_DTYPE_BYTES:
        raise RecipeError(f'a recurrent state cannot be "{name}". Use one of {", ".join(STATE_DTYPE_BYTES)}')
    return STATE_DTYPE_BYTES[full]


def parse_bytes(text: str) -> int:
    """Bytes in a size such as 22GiB, 80GB or 512MiB; a bare number counts bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or match[1].count(".") > 1 or match[1] == ".":
        raise RecipeError(f'cannot read "{text}" as a size. Write it like 22GiB or 80GB')
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# layers

_NAMES = {
    MambaConfig: "mamba",
    AttentionConfig: "attention",
    MLPConfig: "mlp",
    MoEConfig: "moe",
    LinearConfig: "linear",
}


def mixer_parameters(mixer: Mixer, active: bool = False) -> int:
    """Parameters of one mixer without its norm; `active`: those one token uses (top_k of the routed experts).

    The router's correction bias counts as parameters, as published totals do.
    """
    hidden = mixer.hidden
    if isinstance(mixer, MambaConfig):
        rows = 2 * mixer.inner + 2 * mixer.groups * mixer.state + mixer.heads
        projections = hidden * rows + mixer.inner * hidden + (rows + hidden) * mixer.proj_bias
        conv = mixer.channels * (mixer.conv_kernel + mixer.conv_bias)
        return projections + conv + 3 * mixer.heads + mixer.inner
    if isinstance(mixer, AttentionConfig):
        query, key = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        out_bias = mixer.bias if mixer.out_bias is None else mixer.out_bias
        biases = (query + 2 * key) * mixer.bias + hidden * out_bias
        return 2 * hidden * query + 2 * hidden * key + biases + 2 * mixer.head_dim * mixer.qk_norm
    if isinstance(mixer, MLPConfig):
        return _mlp_parameters(hidden, mixer.ffn, mixer.gated, mixer.bias)
    if isinstance(mixer, LinearConfig):
        return hidden * hidden + hidden * mixer.bias
    width = mixer.latent or hidden
    experts = (mixer.top_k if active else mixer.num_experts) * _mlp_parameters(width, mixer.ffn, mixer.gated, False)
    router = hidden * mixer.num_experts + mixer.num_experts * (mixer.router == "sigmoid")
    shared = _mlp_parameters(hidden, mixer.shared_ffn, mixer.gated, mixer.bias) if mixer.shared_ffn else 0
    latent = 2 * hidden * width + (hidden + width) * mixer.bias if mixer.latent else 0
    return experts + router + shared + latent


def _mlp_parameters(hidden: int, ffn: int, gated: bool, bias: bool) -> int:
    return (2 + gated) * hidden * ffn + ((1 + gated) * ffn + hidden) * bias


def backbone_mixers(config: AnyConfig) -> list[Mixer]:
    """Every mixer of the backbone in order; no-op halves of decoder layers are left out."""
    if isinstance(config, HybridConfig):
        return list(config.mixers)
    return [part for layer in config.resolved for part in (layer.attention, layer.mlp) if part is not None]


def norm_parameters(config: AnyConfig) -> int:
    """Parameters of one norm over the hidden width."""
    layer_norm = isinstance(config, DecoderConfig) and config.norm == "layer1p"
    return config.hidden * (2 if layer_norm else 1)


# whole models


def embedding_parameters(config: AnyConfig) -> int:
    """Parameters of the input embedding."""
    return config.vocab * config.hidden


def parameters(config: AnyConfig, active: bool = False, input_embedding: bool = True) -> int:
    """Parameters without MTP; `active`: those one token uses, with or without the input embedding's table.

    A tied table is the output head too, so that leaving the input embedding out changes nothing there.
    """
    tables = 1 if config.tie_embeddings else 1 + input_embedding
    layers = sum(mixer_parameters(mixer, active) + norm_parameters(config) for mixer in backbone_mixers(config))
    return tables * embedding_parameters(config) + layers + norm_parameters(config)


def mtp_parameters(config: AnyConfig) -> int:
    """Parameters of the stored multi-token-prediction depths."""
    if not isinstance(config, HybridConfig):
        return 0
    blocks = sum(mixer_parameters(mixer) + config.hidden for mixer in config.mtp_mixers)
    return config.mtp_depths * (blocks + 2 * config.hidden**2 + 3 * config.hidden)


def mixer_flops(mixer: Mixer, context: int, causal_mean: bool = True) -> int:
    """Forward FLOPs of one mixer for one token (a multiply-add counts two); norms and activations are left out.

    Attention: scores and weighted values over `context` keys; `causal_mean` averages over the positions of a sequence of
    that length, else it is the last token. Mamba: the recurrence (decay, update, read-out) and the convolution.
    """
    if isinstance(mixer, MambaConfig):
        weights = mixer_parameters(mixer) - 3 * mixer.heads - mixer.inner - mixer.channels * mixer.conv_bias
        return 2 * weights + 5 * mixer.inner * mixer.state + 2 * mixer.inner
    if isinstance(mixer, AttentionConfig):
        weights = 2 * mixer.hidden * (mixer.num_heads + mixer.num_kv_heads) * mixer.head_dim
        keys = _mean_keys(context, mixer.window) if causal_mean else min(context, mixer.window or context)
        return 2 * weights + int(4 * mixer.num_heads * mixer.head_dim * keys)
    if isinstance(mixer, MLPConfig):
        return 2 * _mlp_parameters(mixer.hidden, mixer.ffn, mixer.gated, False)
    if isinstance(mixer, LinearConfig):
        return 2 * mixer.hidden**2
    bias = mixer.num_experts * (mixer.router == "sigmoid")
    return 2 * (mixer_parameters(mixer.model_copy(update={"bias": False}), active=True) - bias)


def _mean_keys(context: int, window: int | None) -> float:
    """Keys a query sees, averaged over the positions of a causal sequence."""
    span = min(context, window or context)
    return (span * (span + 1) / 2 + (context - span) * span) / context


def flops_per_token(config: AnyConfig, context: int, causal_mean: bool = True) -> int:
    """Forward FLOPs for one token of the backbone and the output head (training: three times that)."""
    layers = sum(mixer_flops(mixer, context, causal_mean) for mixer in backbone_mixers(config))
    return layers + 2 * embedding_parameters(config)


def mtp_flops_per_token(config: AnyConfig, context: int, causal_mean: bool = True) -> int:
    """Forward FLOPs for one token of one MTP depth, its output head included."""
    if not isinstance(config, HybridConfig) or not config.mtp_depths:
        return 0
    layers = sum(mixer_flops(mixer, context, causal_mean) for mixer in config.mtp_mixers)
    return layers + 4 * config.hidden**2 + 2 * embedding_parameters(config)


# bytes


def weight_bytes(config: AnyConfig, dtype: str = "bfloat16", mtp: bool = True, tp: int = 1, ep: int = 1) -> int:
    """Bytes of the weights of one rank; A_log, D, dt_bias and the router's correction bias are fp32 in any dtype.

    Tensor parallelism divides the inside of every layer and the vocabulary, expert parallelism the routed experts; norms,
    routers and latent projections are on every rank.
    """
    blocks = [*backbone_mixers(config), *(_mtp_mixers(config) if mtp else ())]
    mixers = [divide(mixer, tp, ep) for mixer in blocks]
    islands = sum(3 * mixer.heads for mixer in mixers if isinstance(mixer, MambaConfig))
    islands += sum(mixer.num_experts for mixer in blocks if isinstance(mixer, MoEConfig) and mixer.router == "sigmoid")
    total = parameters(config) + (mtp_parameters(config) if mtp else 0)
    total -= sum(_rank_parameters(mixer, 1, 1) - _rank_parameters(mixer, tp, ep) for mixer in blocks)
    tables = 1 if config.tie_embeddings else 2
    total -= tables * (config.vocab - math.ceil(config.vocab / tp)) * config.hidden
    return math.ceil((total - islands) * dtype_bytes(dtype)) + islands * 4


def divide(mixer: Mixer, tp: int, ep: int = 1) -> Mixer:
    """The part of a mixer on one of `tp` x `ep` ranks: heads, groups and MLP widths over tp, routed experts over ep."""
    if tp == ep == 1:
        return mixer
    if isinstance(mixer, MambaConfig):
        parts = {"heads": mixer.heads, "groups": mixer.groups}
    elif isinstance(mixer, AttentionConfig):
        parts = {"num_heads": mixer.num_heads, "num_kv_heads": mixer.num_kv_heads}
    elif isinstance(mixer, LinearConfig):
        return mixer
    else:
        parts = {"ffn": mixer.ffn}
    if isinstance(mixer, MoEConfig):
        parts["shared_ffn"] = mixer.shared_ffn
    for name, size in parts.items():
        if size % tp:
            usable = ", ".join(str(n) for n in range(1, size + 1) if all(part % n == 0 for part in parts.values()))
            raise RecipeError(
                f"tp = {tp} does not divide {name} = {size} of {_NAMES[type(mixer)]} layers; use one of {usable}"
            )
    update = {name: size // tp for name, size in parts.items()}
    if isinstance(mixer, MoEConfig):
        if mixer.num_experts % ep:
            usable = ", ".join(str(n) for n in range(1, mixer.num_experts + 1) if mixer.num_experts % n == 0)
            raise RecipeError(f"ep = {ep} does not divide num_experts = {mixer.num_experts}; use one of {usable}")
        update["num_experts"] = mixer.num_experts // ep
    return mixer.model_copy(update=update)


def _rank_parameters(mixer: Mixer, tp: int, ep: int) -> int:
    """Parameters of one rank's part of a mixer; the router scores all experts wherever they are."""
    part = divide(mixer, tp, ep)
    count = mixer_parameters(part)
    if isinstance(mixer, MoEConfig) and isinstance(part, MoEConfig):
        count += (mixer.num_experts - part.num_experts) * (mixer.hidden + (mixer.router == "sigmoid"))
    return count


def kv_bytes(
    config: AnyConfig, batch: int, context: int, dtype: str = "bfloat16", mtp: bool = False, tp: int = 1
) -> int:
    """Bytes of keys and values of `batch` sequences of `context` tokens; a window caps its layer's context."""
    elements = sum(
        2 * mixer.num_kv_heads * mixer.head_dim * min(context, mixer.window or context)
        for mixer in _cached_mixers(config, mtp, tp)
        if isinstance(mixer, AttentionConfig)
    )
    return math.ceil(batch * elements * dtype_bytes(dtype))


def state_bytes(config: AnyConfig, batch: int, dtype: str = "float32", mtp: bool = False, tp: int = 1) -> int:
    """Bytes of the recurrent states (heads x head_dim x state a Mamba layer)."""
    elements = sum(m.inner * m.state for m in _cached_mixers(config, mtp, tp) if isinstance(m, MambaConfig))
    return math.ceil(batch * elements * state_dtype_bytes(dtype))


def conv_bytes(config: AnyConfig, batch: int, dtype: str = "bfloat16", mtp: bool = False, tp: int = 1) -> int:
    """Bytes of the convolution states: the last conv_kernel - 1 inputs of every channel."""
    mixers = _cached_mixers(config, mtp, tp)
    elements = sum(m.channels * (m.conv_kernel - 1) for m in mixers if isinstance(m, MambaConfig))
    return math.ceil(batch * elements * dtype_bytes(dtype))


def prefill_bytes(
    config: AnyConfig, context: int, chunk: int, dtype: str = "bfloat16", kv_dtype: str = "bfloat16", tp: int = 1
) -> int:
    """Estimate of the activations of one chunk of one sequence's prompt: residual stream, its sum and its norm, the widest
    layer's inner tensors, one row of logits, and one layer's keys and values in a row where earlier chunks left some."""
    tokens = min(context, chunk)
    gathered = max(
        (
            2 * mixer.num_kv_heads * mixer.head_dim * min(context, mixer.window or context)
            for mixer in _cached_mixers(config, False, tp)
            if isinstance(mixer, AttentionConfig) and context > chunk
        ),
        default=0,
    )
    behind = math.ceil(gathered * dtype_bytes(kv_dtype))
    return _layer_bytes(config, tokens, dtype, tp, behind) + LOGIT_BYTES * config.vocab


def decode_bytes(config: AnyConfig, batch: int, dtype: str = "bfloat16", tp: int = 1) -> int:
    """Estimate of the activations of one step of `batch` sequences, logits of all of them included."""
    return _layer_bytes(config, batch, dtype, tp, 0) + LOGIT_BYTES * config.vocab * batch


def _layer_bytes(config: AnyConfig, tokens: int, dtype: str, tp: int, gathered: int) -> int:
    """Bytes that are alive inside the layer that holds most; `gathered`: bytes that attention layers hold besides."""

    def alive(mixer: Mixer) -> float:
        elements = (3 * config.hidden + _inner_elements(divide(mixer, tp))) * tokens
        return elements * dtype_bytes(dtype) + (gathered if isinstance(mixer, AttentionConfig) else 0)

    return math.ceil(max(alive(mixer) for mixer in backbone_mixers(config)))


def _inner_elements(mixer: Mixer) -> int:
    """Elements per token that one mixer holds at its widest point."""
    if isinstance(mixer, MambaConfig):
        # projection, convolution, output of the scan and of the gated norm
        return 4 * mixer.inner + 2 * mixer.groups * mixer.state + mixer.heads + mixer.channels
    if isinstance(mixer, AttentionConfig):
        return (2 * mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim
    if isinstance(mixer, MLPConfig):
        return (2 + mixer.gated) * mixer.ffn
    if isinstance(mixer, LinearConfig):
        return mixer.hidden
    return mixer.top_k * ((2 + mixer.gated) * mixer.ffn + 2 * (mixer.latent or mixer.hidden)) + 2 * mixer.shared_ffn


def _cached_mixers(config: AnyConfig, mtp: bool, tp: int) -> list[Mixer]:
    """One rank's part of all mixers; MTP's depths share one cache, as they run one after another."""
    ahead = list(config.mtp_mixers) if mtp and isinstance(config, HybridConfig) else []
    return [divide(mixer, tp) for mixer in backbone_mixers(config) + ahead]


def _mtp_mixers(config: AnyConfig) -> tuple[Mixer, ...]:
    return config.mtp_mixers * config.mtp_depths if isinstance(config, HybridConfig) else ()


# what fits


@dataclass(frozen=True)
class Memory:
    """Bytes that serving a model takes on one device.

    Attributes:
        activations: estimate of the larger of one chunk of a prompt and one eager step
        graphs: estimate of the memory of captured steps
        reserved: estimate of what the driver and the allocator keep
    """

    weights: int
    kv: int
    state: int
    conv: int
    activations: int
    graphs: int
    reserved: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Setting:
    """How a model is held and run.

    Attributes:
        mtp: its multi-token-prediction weights are loaded too
        prefill_chunk: prompts run in pieces of so many tokens; only one piece's activations are alive at once
        tp, ep: ranks that share layers, and routed experts
        graphs: memory pools of captured decode steps (0: decode runs eagerly); counted on a device only
    """

    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    state_dtype: str = "float32"
    mtp: bool = True
    prefill_chunk: int = 2048
    tp: int = 1
    ep: int = 1
    graphs: int = 1


@dataclass(frozen=True)
class Fit:
    """Whether a model fits, and how far it could be taken: 0 when even one token does not fit."""

    memory: Memory
    available: int
    fits: bool
    # at the asked context
    largest_batch: int
    # at the asked batch
    largest_context: int


def memory(
    config: AnyConfig, batch: int, context: int, setting: Setting | None = None, device_bytes: int = 0
) -> Memory:
    """Bytes to serve `batch` sequences of `context` tokens; with `device_bytes` also what a GPU of that size keeps."""
    s = setting or Setting()
    _check(config, batch, context, s)
    mtp = s.mtp and bool(_mtp_mixers(config))
    step = decode_bytes(config, batch, s.dtype, s.tp)
    pools = s.graphs if device_bytes else 0
    prefill = prefill_bytes(config, context, s.prefill_chunk, s.dtype, s.kv_dtype, s.tp)
    return Memory(
        weights=weight_bytes(config, s.dtype, mtp, s.tp, s.ep),
        kv=kv_bytes(config, batch, context, s.kv_dtype, mtp, s.tp),
        state=state_bytes(config, batch, s.state_dtype, mtp, s.tp),
        conv=conv_bytes(config, batch, s.dtype, mtp, s.tp),
        activations=(prefill if pools else max(prefill, step)) + (WORKSPACE_BYTES if device_bytes else 0),
        graphs=pools * (step + WORKSPACE_BYTES),
        reserved=CONTEXT_BYTES + int(device_bytes * UNUSABLE_FRAC) if device_bytes else 0,
    )


def fits(
    config: AnyConfig, device_bytes: int, batch: int = 1, context: int = 4096, setting: Setting | None = None
) -> Fit:
    """Whether `batch` sequences of `context` tokens fit into `device_bytes`, and the largest of each that do.

    The largest context stops at the model's own max_positions or the asked context, whichever is longer.
    """
    s = setting or Setting()

    def inside(sequences: int, tokens: int) -> bool:
        return memory(config, sequences, tokens, s, device_bytes).total <= device_bytes

    needed = memory(config, batch, context, s, device_bytes)
    return Fit(
        memory=needed,
        available=device_bytes,
        fits=needed.total <= device_bytes,
        largest_batch=_largest(lambda sequences: inside(sequences, context), 1 << 20),
        largest_context=_largest(lambda tokens: inside(batch, tokens), max(config.max_positions, context)),
    )


def _check(config: AnyConfig, batch: int, context: int, s: Setting) -> None:
    """Refuse numbers that mean nothing."""
    ranks = {"tp": s.tp, "ep": s.ep}
    for name, value in {"batch": batch, "context": context, "prefill_chunk": s.prefill_chunk, **ranks}.items():
        if value < 1:
            raise RecipeError(f"{name} = {value} must be at least 1")
    if s.graphs < 0:
        raise RecipeError(f"graphs = {s.graphs} must be at least 0")
    if s.ep > 1 and not any(isinstance(mixer, MoEConfig) for mixer in backbone_mixers(config)):
        raise RecipeError(f"ep = {s.ep}, but the model has no routed experts to share; use 1")


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest n in 0..limit for which `holds`, which is true up to some n and false after it."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def require_fit(fit: Fit) -> None:
    """ResourceError (exit code 3) that says by how much it misses."""
    if fit.fits:
        return
    lack = (fit.memory.total - fit.available) / GIB
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(fit.memory).items())
    raise ResourceError(
        f"does not fit: needs {fit.memory.total / GIB:.2f} GiB ({parts}), there are {fit.available / GIB:.2f} GiB, {lack:.2f} "
        f"too few. Largest batch at this context: {fit.largest_batch}; largest context at this batch: {fit.largest_context}."
    )


def layer_counts(config: AnyConfig) -> dict[str, int]:
    """Number of mixers of each kind in the backbone."""
    return dict(Counter(_NAMES[type(mixer)] for mixer in backbone_mixers(config)))


def training_bytes(
    config: AnyConfig,
    tokens: int,
    ranks: int = 1,
    moments: int = 2,
    dtype: str = "float32",
    parameter_bytes: int = 4,
    checkpointing: Checkpointing = "none",
) -> int:
    """Estimate of what training takes on one rank: parameters, gradients and moments, shared by the ranks, and
    activations of one micro-batch.

    Args:
        config: of the model
        tokens: of a micro-batch
        ranks: that share parameters, gradients and moments
        moments: of the optimizer (AdamW 2, Muon 1)
        dtype: in which activations are kept
        parameter_bytes: of one parameter, its gradient and each of its moments
        checkpointing: "full" keeps only the residual stream and the widest layer, "selective" the results of matmuls too
    """
    states = (parameters(config) + mtp_parameters(config)) * parameter_bytes * (2 + moments) / ranks
    mixers = backbone_mixers(config) + list(_mtp_mixers(config))
    inner = [2 * _inner_elements(mixer) for mixer in mixers]
    kept = {
        "none": sum(inner) + 2 * len(mixers) * config.hidden,
        "selective": sum(inner) // 2 + max(inner),
        "full": max(inner),
    }
    per_token = len(mixers) * config.hidden + kept[checkpointing]
    return math.ceil(states + tokens * per_token * dtype_bytes(dtype))
