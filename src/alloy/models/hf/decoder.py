"""config.json of the transformer decoders: llama, qwen3, qwen3_moe, nemotron, nemotron-nas. No torch here.

Papers: Nemotron-4 340B (2024), arXiv:2406.11704; Llama-Nemotron (2025), arXiv:2505.00949 (block_configs).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alloy.errors import CheckpointError
from alloy.models.configs import (
    AttentionConfig,
    DecoderConfig,
    DecoderLayerConfig,
    LinearConfig,
    MLPConfig,
    RopeConfig,
)
from alloy.models.hf.keys import ACTIVATION_NAMES, TOKEN_FIELDS, ConfigKeys, token_ids, validated, write_eos
from alloy.models.presets import ffn_width

# our field -> key of config.json
DECODER_FIELDS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "activation": "hidden_act",
    "attention_bias": "attention_bias",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
    "init_std": "initializer_range",
    **TOKEN_FIELDS,
}
MOE_FIELDS = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "normalize_weights": "norm_topk_prob",
}


@dataclass(frozen=True)
class Architecture:
    """What config.json says for one kind of decoder."""

    name: str
    fields: dict[str, str]
    # what transformers assumes for a key that the file leaves out
    defaults: dict[str, object]
    # fields the architecture settles
    fixed: dict[str, object] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


DECODERS = {
    "llama": Architecture(
        "LlamaForCausalLM",
        {**DECODER_FIELDS, "mlp_bias": "mlp_bias"},
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        DECODER_FIELDS,
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "head_dim": 128},
        {"qk_norm": True},
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        {**DECODER_FIELDS, **MOE_FIELDS},
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "norm_topk_prob": False},
        {"qk_norm": True},
        {"num_local_experts": "num_experts"},
    ),
    "nemotron": Architecture(
        "NemotronForCausalLM",
        {**DECODER_FIELDS, "norm_eps": "norm_eps", "mlp_bias": "mlp_bias"},
        {"norm_eps": 1e-5, "hidden_act": "relu2", "bos_token_id": 2, "eos_token_id": 3, "partial_rotary_factor": 0.5},
        {"norm": "layer1p", "gated": False},
        {"rope_percent": "partial_rotary_factor", "rope_percentage": "partial_rotary_factor"},
    ),
    "nemotron-nas": Architecture(
        "DeciLMForCausalLM",
        {**DECODER_FIELDS, "mlp_bias": "mlp_bias"},
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 131_072},
    ),
}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# what an attention or MLP block of nemotron-nas may say that is not supported, unless its value means "off"
NAS_REFUSED = ("sparsify", "window_length", "num_sink_tokens", "unshifted_sink")


def read_decoder(kind: str, keys: ConfigKeys) -> DecoderConfig:
    """The configuration of a decoder."""
    form = DECODERS[kind]
    keys.merge(form.aliases)
    required = [key for key in REQUIRED if key != "intermediate_size" or kind != "nemotron-nas"]
    absent = [key for key in required if keys.data.get(key) is None]
    if absent:
        raise keys.refuse(f"{', '.join(absent)} missing; {kind} needs it")
    fields: dict[str, Any] = {"kind": kind, **form.fixed}
    for name, key in form.fields.items():
        # null means "none" for token ids, "as usual" elsewhere
        is_none = name in TOKEN_FIELDS and key in keys.data
        value = keys.take(key, None if is_none else form.defaults.get(key))
        if value is not None:
            fields[name] = value
    heads = fields["num_heads"]
    fields.setdefault("num_kv_heads", heads)
    fields.setdefault("head_dim", fields["hidden"] // heads)
    fields["eos_ids"] = token_ids(fields.get("eos_ids", ()))
    activation = fields.get("activation", "silu")
    if activation not in ACTIVATION_NAMES:
        raise keys.refuse(f'hidden_act = "{activation}" is not supported. Use one of {", ".join(ACTIVATION_NAMES)}')
    fields["activation"] = ACTIVATION_NAMES[activation]
    fields["rope"] = _read_rope(keys, form.defaults.get("partial_rotary_factor", 1.0))
    if keys.data.get("use_sliding_window") or "sliding_attention" in (keys.data.get("layer_types") or ()):
        raise keys.refuse(f"sliding-window attention is not supported for {kind}; set use_sliding_window to false")
    keys.drop("layer_types")
    if kind == "qwen3_moe":
        step, dense = keys.take("decoder_sparse_step", 1), keys.take("mlp_only_layers", [])
        layers = range(fields["num_layers"])
        fields["dense_layers"] = tuple(i for i in layers if i in dense or (i + 1) % step)
    if kind == "nemotron-nas":
        fields["layers"] = _read_nas(fields, keys)
        widths = [layer.mlp.ffn for layer in fields["layers"] if isinstance(layer.mlp, MLPConfig)]
        fields.setdefault("ffn", max(widths, default=1))
        attention = [layer.attention for layer in fields["layers"] if isinstance(layer.attention, AttentionConfig)]
        kv_heads = [part.num_kv_heads for part in attention]
        fields["num_kv_heads"] = max(kv_heads, default=fields["num_heads"])
    return validated(DecoderConfig, fields, form.fields, keys)


def _read_rope(keys: ConfigKeys, partial: Any) -> RopeConfig:
    """RoPE from `rope_parameters` (transformers 5) or top-level keys; both must agree."""
    nested, scaling = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    flat = {**scaling, "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
    for key in ("rope_theta", "partial_rotary_factor"):
        if keys.take(key) is not None:
            flat[key] = keys.data[key]
    if nested and scaling and nested.get("rope_type", "default") != flat["rope_type"]:
        raise keys.refuse(f"rope_parameters = {nested} and rope_scaling = {scaling} differ; remove one")
    for key, value in flat.items():
        if nested and key in nested and key != "rope_type" and nested[key] != value:
            raise keys.refuse(f"rope_parameters has {key} = {nested[key]} but the top level has {value}; remove one")
    rope = {**flat, **nested}
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise keys.refuse(f'rope_type = "{kind}" is not supported. Known: default, linear, llama3')
    fields: dict[str, Any] = {
        "theta": rope.get("rope_theta", 10_000.0),
        "partial": rope.get("partial_rotary_factor", partial),
    }
    if kind != "default":
        fields |= {"scaling": kind, "factor": _rope_value(rope, "factor", keys)}
    if kind == "llama3":
        fields["low_freq_factor"] = _rope_value(rope, "low_freq_factor", keys)
        fields["high_freq_factor"] = _rope_value(rope, "high_freq_factor", keys)
        fields["original_max_positions"] = _rope_value(rope, "original_max_position_embeddings", keys)
    return RopeConfig.model_validate(fields)


def _rope_value(rope: Mapping[str, Any], key: str, keys: ConfigKeys) -> Any:
    if rope.get(key) is None:
        raise keys.refuse(f'rope_type = "{rope["rope_type"]}" needs {key}')
    return rope[key]


def _read_nas(fields: Mapping[str, Any], keys: ConfigKeys) -> tuple[DecoderLayerConfig, ...]:
    blocks = keys.take("block_configs")
    if not blocks or len(blocks) != fields["num_layers"]:
        raise keys.refuse(
            f"block_configs has {len(blocks or ())} entries but num_hidden_layers = {fields['num_layers']}"
        )
    layers = []
    for i, block in enumerate(blocks):
        attention, ffn = block.get("attention") or {}, block.get("ffn") or {}
        for part, name in ((attention, "attention"), (ffn, "ffn")):
            refused = [key for key in NAS_REFUSED if part.get(key)]
            if refused:
                values = ", ".join(f"{key} = {part[key]}" for key in refused)
                raise keys.refuse(f"block_configs[{i}].{name}: {values} is not supported")
        layers.append(
            DecoderLayerConfig(attention=_nas_attention(attention, i, fields, keys), mlp=_nas_mlp(ffn, i, fields, keys))
        )
    return tuple(layers)


def _nas_attention(
    part: Mapping[str, Any], i: int, fields: Mapping[str, Any], keys: ConfigKeys
) -> AttentionConfig | LinearConfig | None:
    if part.get("no_op"):
        return None
    if part.get("replace_with_linear"):
        return LinearConfig(hidden=fields["hidden"], bias=fields.get("attention_bias", False))
    heads, group = fields["num_heads"], part.get("n_heads_in_group")
    if not group or heads % group:
        raise keys.refuse(f"block_configs[{i}].attention.n_heads_in_group = {group} does not divide {heads} heads")
    return AttentionConfig(
        hidden=fields["hidden"],
        num_heads=heads,
        num_kv_heads=heads // group,
        head_dim=fields["head_dim"],
        bias=fields.get("attention_bias", False),
        rope=fields["rope"],
        norm_eps=fields["norm_eps"],
    )


def _nas_mlp(
    part: Mapping[str, Any], i: int, fields: Mapping[str, Any], keys: ConfigKeys
) -> MLPConfig | LinearConfig | None:
    if part.get("no_op"):
        return None
    if part.get("replace_with_linear"):
        return LinearConfig(hidden=fields["hidden"], bias=fields.get("mlp_bias", False))
    hidden, width = fields["hidden"], part.get("intermediate_size")
    if width is None and part.get("ffn_mult") is None:
        raise keys.refuse(f"block_configs[{i}].ffn has neither ffn_mult nor intermediate_size")
    activation = part.get("hidden_act") or fields["activation"]
    if activation not in ACTIVATION_NAMES:
        raise keys.refuse(f'block_configs[{i}].ffn.hidden_act = "{activation}" is not supported')
    return MLPConfig(
        hidden=hidden,
        ffn=width or ffn_width(part["ffn_mult"], hidden),
        activation=ACTIVATION_NAMES[activation],  # pyright: ignore[reportArgumentType]  the table holds only its literals
        gated=True,
        bias=fields.get("mlp_bias", False),
    )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """What config.json says of a decoder."""
    form = DECODERS[config.kind]
    if config.window is not None:
        raise CheckpointError(f"window = {config.window} cannot be written: {config.kind} files have no sliding window")
    if config.layers is not None and config.kind != "nemotron-nas":
        raise CheckpointError(f'layers that differ cannot be written as {config.kind}; use kind = "nemotron-nas"')
    data: dict[str, Any] = {key: getattr(config, name) for name, key in form.fields.items()}
    data |= {"initializer_range": config.std, "eos_token_id": write_eos(config.eos_ids)} | _write_rope(config)
    if config.kind == "qwen3_moe":
        data |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    if config.kind == "nemotron-nas":
        data |= {"num_key_value_heads": None, "intermediate_size": None}
        data["block_configs"] = [_write_nas_block(layer, config) for layer in config.resolved]
    return data


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Both spellings: top-level keys for older readers, `rope_parameters` for transformers 5."""
    rope = config.rope
    scaling: dict[str, Any] = {}
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    partial = {"partial_rotary_factor": rope.partial} if rope.partial != 1.0 or config.kind == "nemotron" else {}
    nested = {"rope_type": "default", "rope_theta": rope.theta, **partial, **scaling}
    return {"rope_theta": rope.theta, "rope_scaling": scaling or None, "rope_parameters": nested, **partial}


def _write_nas_block(layer: DecoderLayerConfig, config: DecoderConfig) -> dict[str, Any]:
    attention: dict[str, Any] = {
        "n_heads_in_group": None,
        "no_op": layer.attention is None,
        "num_sink_tokens": None,
        "replace_with_linear": isinstance(layer.attention, LinearConfig),
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    if isinstance(layer.attention, AttentionConfig):
        attention["n_heads_in_group"] = layer.attention.num_heads // layer.attention.num_kv_heads
    linear = isinstance(layer.mlp, LinearConfig)
    ffn: dict[str, Any] = {
        "ffn_mult": None,
        "no_op": layer.mlp is None,
        "replace_with_linear": linear,
        "sparsify": None,
    }
    if isinstance(layer.mlp, MLPConfig):
        multiple = 3 * layer.mlp.ffn / (2 * config.hidden)
        if ffn_width(multiple, config.hidden) == layer.mlp.ffn:
            ffn["ffn_mult"] = multiple
        else:
            ffn["intermediate_size"] = layer.mlp.ffn
        if layer.mlp.activation != config.activation:
            ffn["hidden_act"] = layer.mlp.activation
    return {"attention": attention, "ffn": ffn}
