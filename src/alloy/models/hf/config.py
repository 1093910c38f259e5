"""config.json both ways: both generations and every alias in, one agreed form out. No torch here.

Reading refuses what the modules could not compute, and two spellings that disagree. Keys the project does not use are
handed back as `foreign`, kept beside the model and written again.

Papers: Nemotron-H (2025), arXiv:2504.03624; Llama-Nemotron (2025), arXiv:2505.00949 (block_configs).
"""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from alloy.core.logging import get_logger
from alloy.errors import CheckpointError, RecipeError
from alloy.models.configs import (
    SYMBOLS,
    AttentionConfig,
    DecoderConfig,
    DecoderLayerConfig,
    HybridConfig,
    LayerOverride,
    MLPConfig,
    RopeConfig,
)
from alloy.models.presets import ffn_width

AnyConfig = HybridConfig | DecoderConfig
Style = Literal["hybrid", "transformers5"]
log = get_logger(__name__)

# our field -> key of config.json
TOKEN_FIELDS = {"pad_id": "pad_token_id", "bos_id": "bos_token_id", "eos_ids": "eos_token_id"}
HYBRID_FIELDS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
    "norm_eps": "layer_norm_epsilon",
    "residual_fp32": "residual_in_fp32",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "attention_bias": "attention_bias",
    "window": "sliding_window",
    "ffn": "intermediate_size",
    "mlp_bias": "mlp_bias",
    "ssm_heads": "mamba_num_heads",
    "ssm_head_dim": "mamba_head_dim",
    "ssm_state": "ssm_state_size",
    "ssm_groups": "n_groups",
    "conv_kernel": "conv_kernel",
    "chunk": "chunk_size",
    "conv_bias": "use_conv_bias",
    "ssm_bias": "use_bias",
    "time_step_min": "time_step_min",
    "time_step_max": "time_step_max",
    "time_step_floor": "time_step_floor",
    "time_step_limit": "time_step_limit",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "shared_ffn": "moe_shared_expert_intermediate_size",
    "latent": "moe_latent_size",
    "num_router_groups": "n_group",
    "top_router_groups": "topk_group",
    "normalize_weights": "norm_topk_prob",
    "router_scale": "routed_scaling_factor",
    "mtp_depths": "num_nextn_predict_layers",
    "mtp_repeated": "mtp_use_repeated_layer",
    "mtp_loss_scale": "mtp_loss_scaling_factor",
    "init_std": "initializer_range",
    "rescale_residual": "rescale_prenorm_residual",
    **TOKEN_FIELDS,
}
HYBRID_ALIASES = {
    "attention_head_dim": "head_dim",
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
    "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
# what a block of nemotron_h_puzzle may change
BLOCK_FIELDS = {
    "ffn": "intermediate_size",
    "ssm_state": "ssm_state_size",
    "ssm_heads": "mamba_num_heads",
    "ssm_head_dim": "mamba_head_dim",
    "ssm_groups": "n_groups",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "shared_ffn": "moe_shared_expert_intermediate_size",
    "latent": "moe_latent_size",
}
# transformers 5.23 names first: those are written; the others are what earlier files hold
BLOCK_NAMES = {
    "M": ("linear_attention", "mamba"),
    "*": ("full_attention", "attention"),
    "E": ("moe",),
    "-": ("mlp",),
}
BLOCK_SYMBOLS = {name: symbol for symbol, names in BLOCK_NAMES.items() for name in names}

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
HYBRIDS = {"nemotron_h": "NemotronHForCausalLM", "nemotron_h_puzzle": "NemotronHPuzzleForCausalLM"}
KINDS = (*HYBRIDS, *DECODERS)
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "relu2": "relu2", "relu": "relu", "gelu": "gelu"}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# what an attention or MLP block of nemotron-nas may say that is not supported, and the values that mean "off"
NAS_REFUSED = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "unshifted_sink")


def load_config(path: Path) -> tuple[AnyConfig, dict[str, Any]]:
    """Configuration and foreign keys of a checkpoint folder or a config.json."""
    return read_config(read_json(config_path(path)), str(config_path(path)))


def config_path(path: Path) -> Path:
    """The config.json that `path`, a folder or the file itself, means."""
    return path / "config.json" if path.is_dir() else path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when it is absent or no JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a checkpoint folder needs a {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Save or download the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, not an object")
    return data


def read_config(
    data: Mapping[str, Any], source: str = "config.json", shared_rows: int | None = None
) -> tuple[AnyConfig, dict[str, Any]]:
    """Configuration and foreign keys from the content of a config.json.

    Args:
        data: the parsed file
        source: how messages call it
        shared_rows: rows of the first shared expert's up_proj, which settles what n_shared_experts > 1 means
    """
    kind = data.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f'{source}: model_type = "{kind}" is not supported. Known: {", ".join(KINDS)}')
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", data["quantization_config"].get("quant_algo", "?"))
        raise CheckpointError(
            f'{source}: quantization_config with method "{method}": quantised weights cannot be read. '
            "Use the checkpoint in bfloat16 or float32"
        )
    keys = _Keys(data, source)
    keys.drop("model_type", "architectures", "torch_dtype", "dtype", "quantization_config")
    config = _read_hybrid(kind, keys, shared_rows) if kind in HYBRIDS else _read_decoder(kind, keys)
    return config, keys.rest()


def style(name: str) -> Style:
    """A config style given by name; RecipeError if there is no such one."""
    if name == "hybrid" or name == "transformers5":
        return name
    raise RecipeError(f'config style "{name}" is not known. Use hybrid or transformers5')


def write_config(
    config: AnyConfig, foreign: Mapping[str, Any] | None = None, style: Style = "hybrid", dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Content of config.json.

    Args:
        config: the model's configuration
        foreign: keys kept from the file it was read from
        style: "hybrid", the form of the released files; "transformers5", the form of that library
        dtype: of the weights, such as bfloat16
    """
    kind = config.kind
    architecture = HYBRIDS.get(kind) or DECODERS[kind].name
    data: dict[str, Any] = {"architectures": [architecture], "model_type": kind}
    data |= copy.deepcopy(dict(foreign or {}))
    data["torch_dtype" if style == "hybrid" else "dtype"] = dtype
    if isinstance(config, HybridConfig):
        return data | _write_hybrid(config, data.pop("block_configs", None), data.pop("mtp_block_configs", None), style)
    return data | _write_decoder(config)


class _Keys:
    """The keys of one config.json: what was read is left out of `rest`."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = dict(data)
        self.source = source
        self.used: set[str] = set()

    def merge(self, aliases: Mapping[str, str]) -> None:
        """Move every alias to its own name; two spellings must agree."""
        for alias, name in aliases.items():
            if alias not in self.data:
                continue
            value = self.data.pop(alias)
            if value is None:
                continue
            if self.data.get(name) is not None and self.data[name] != value:
                raise self.refuse(f"{name} = {self.data[name]} and its alias {alias} = {value} differ; remove one")
            self.data[name] = value

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a key, `default` when it is absent or null."""
        self.used.add(name)
        value = self.data.get(name)
        return default if value is None else value

    def drop(self, *names: str) -> None:
        self.used.update(names)

    def rest(self) -> dict[str, Any]:
        return {name: value for name, value in self.data.items() if name not in self.used}

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {what}")


# nemotron_h and nemotron_h_puzzle


def _read_hybrid(kind: str, keys: _Keys, shared_rows: int | None) -> HybridConfig:
    keys.merge(HYBRID_ALIASES)
    fields: dict[str, Any] = {"kind": kind}
    for name, key in HYBRID_FIELDS.items():
        value = keys.take(key)
        if value is not None or (name in ("pad_id", "bos_id") and key in keys.data):
            fields[name] = value
    if "num_heads" in fields and "num_key_value_heads" in keys.data:
        fields.setdefault("num_kv_heads", fields["num_heads"])
    for key, wanted in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if ACTIVATION_NAMES.get(keys.take(key, wanted)) != wanted:
            raise keys.refuse(f'{key} = "{keys.data[key]}" is not supported; {kind} has "{wanted}"')
    if isinstance(fields.get("ffn"), list):
        fields["ffn"] = tuple(fields["ffn"])
    if "eos_ids" in fields:
        fields["eos_ids"] = _token_ids(fields["eos_ids"])
    if "time_step_limit" in fields:
        fields["time_step_limit"] = _limit(fields["time_step_limit"], keys)
    if kind == "nemotron_h_puzzle":
        fields["pattern"], fields["layers"] = _read_blocks("block_configs", "layers_block_type", keys)
        _check_length(fields["pattern"], keys)
        if fields.get("mtp_depths"):
            fields["mtp_pattern"], fields["mtp_layers"] = _read_blocks(
                "mtp_block_configs", "mtp_layers_block_type", keys
            )
        keys.drop("mtp_layers_block_type", "mtp_block_configs")
    else:
        _read_patterns(fields, keys)
    if "E" in fields["pattern"]:
        _read_shared(fields, keys, shared_rows)
    else:
        keys.drop("n_shared_experts")
    return _validate(HybridConfig, fields, HYBRID_FIELDS, keys)


def _read_patterns(fields: dict[str, Any], keys: _Keys) -> None:
    """Put pattern, mtp_pattern and mtp_depths into `fields` from either generation's keys."""
    text, blocks = keys.take("hybrid_override_pattern"), keys.take("layers_block_type")
    main, *depths = str(text or "").split("/")
    main = main.replace("|", "")
    if blocks is not None:
        listed = _block_pattern("layers_block_type", blocks, keys)
        if text is not None and listed != main:
            raise keys.refuse(
                f'hybrid_override_pattern = "{text}" and layers_block_type, which means "{listed}", differ'
            )
        main = listed
    elif text is None:
        raise keys.refuse("there is neither hybrid_override_pattern nor layers_block_type, so the layers are unknown")
    fields["pattern"] = main
    _check_length(main, keys)

    mtp_text, mtp_blocks = keys.take("mtp_hybrid_override_pattern"), keys.take("mtp_layers_block_type")
    found = [*depths, *(str(mtp_text).replace("|", "").split("/") if mtp_text else [])]
    found += [_block_pattern("mtp_layers_block_type", mtp_blocks, keys)] if mtp_blocks else []
    fields.setdefault("mtp_depths", len(depths))
    if fields["mtp_depths"] and not found:
        raise keys.refuse(
            f"num_nextn_predict_layers = {fields['mtp_depths']} but there is neither mtp_hybrid_override_pattern "
            "nor mtp_layers_block_type"
        )
    if fields["mtp_depths"] and len(set(found)) > 1:
        raise keys.refuse(
            f"the MTP patterns {' and '.join(sorted(set(found)))} differ; every depth must have the same one"
        )
    if found:
        fields["mtp_pattern"] = found[0]


def _check_length(pattern: str, keys: _Keys) -> None:
    count = keys.take("num_hidden_layers")
    if count is not None and count != len(pattern):
        raise keys.refuse(f'num_hidden_layers = {count} but the pattern "{pattern}" has {len(pattern)} blocks')


def _block_pattern(key: str, blocks: Sequence[str], keys: _Keys) -> str:
    for i, name in enumerate(blocks):
        if name not in BLOCK_SYMBOLS:
            raise keys.refuse(f'{key}[{i}] = "{name}" is not a layer. Use one of {", ".join(BLOCK_SYMBOLS)}')
    return "".join(BLOCK_SYMBOLS[name] for name in blocks)


def _read_blocks(key: str, types: str, keys: _Keys) -> tuple[str, tuple[LayerOverride, ...]]:
    """Pattern and overrides of a heterogeneous hybrid; keys of a block that are unknown stay in the foreign part."""
    blocks = keys.take(key)
    if not blocks:
        raise keys.refuse(f"{key} is missing; nemotron_h_puzzle describes every layer there")
    pattern = _block_pattern(f"{key} block_type", [block.get("block_type") for block in blocks], keys)
    listed = keys.take(types)
    if listed is not None and _block_pattern(types, listed, keys) != pattern:
        raise keys.refuse(f'{key} means "{pattern}" but {types} means "{_block_pattern(types, listed, keys)}"')
    names = {hub: name for name, hub in BLOCK_FIELDS.items()}
    overrides, unknown = [], []
    for block in blocks:
        known = {names[hub]: value for hub, value in block.items() if hub in names and value is not None}
        overrides.append(LayerOverride.model_validate(known))
        unknown.append({hub: value for hub, value in block.items() if hub not in names and hub != "block_type"})
    if any(unknown):
        keys.used.discard(key)
        keys.data[key] = unknown
    return pattern, tuple(overrides)


def _read_shared(fields: dict[str, Any], keys: _Keys, shared_rows: int | None) -> None:
    """Settle the width of the shared expert: transformers takes it as it stands, vLLM times n_shared_experts."""
    count = keys.take("n_shared_experts", 1)
    width = fields.get("shared_ffn", HybridConfig.model_fields["shared_ffn"].default)
    if count == 0:
        width = 0
    elif count > 1:
        if shared_rows not in (width, width * count):
            raise keys.refuse(
                f"n_shared_experts = {count} with moe_shared_expert_intermediate_size = {width} can mean a width of {width} "
                f"or {width * count}"
                + (", and there are no weights to tell" if shared_rows is None else f"; the weights have {shared_rows}")
                + ". Write n_shared_experts = 1 and the full width"
            )
        log.info("n_shared_experts = %d: the weights say that the shared width is %d in all", count, shared_rows)
        width = shared_rows
    fields["shared_ffn"] = width


def _write_hybrid(config: HybridConfig, blocks: Any, mtp_blocks: Any, style: Style) -> dict[str, Any]:
    data: dict[str, Any] = {key: getattr(config, name) for name, key in HYBRID_FIELDS.items()}
    data["initializer_range"] = config.std
    data["eos_token_id"] = _eos(config.eos_ids)
    data["intermediate_size"] = list(config.ffn) if isinstance(config.ffn, tuple) else config.ffn
    data["time_step_limit"] = [_infinity(bound, style) for bound in config.time_step_limit]
    data |= {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "n_shared_experts": int(config.shared_ffn > 0)}
    if config.kind == "nemotron_h_puzzle":
        data["layers_block_type"], data["block_configs"] = _write_blocks(config.pattern, config.layers, blocks)
        data["num_hidden_layers"] = config.num_layers
        if config.mtp_depths:
            written = _write_blocks(config.mtp_pattern, config.mtp_layers, mtp_blocks)
            data["mtp_layers_block_type"], data["mtp_block_configs"] = written
        return data
    if config.layers is not None or config.mtp_layers is not None:
        raise CheckpointError('layers with overrides can only be written as kind = "nemotron_h_puzzle"')
    if style == "transformers5":
        data["layers_block_type"] = [BLOCK_NAMES[symbol][0] for symbol in config.pattern]
        data["mtp_layers_block_type"] = [BLOCK_NAMES[symbol][0] for symbol in config.mtp_pattern]
        return data
    data |= {"hybrid_override_pattern": config.pattern, "num_hidden_layers": config.num_layers}
    if config.mtp_depths:
        data["mtp_hybrid_override_pattern"] = config.mtp_pattern
    return data


def _write_blocks(
    pattern: str, overrides: tuple[LayerOverride, ...] | None, unknown: Sequence[dict[str, Any]] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    blocks = []
    for i, symbol in enumerate(pattern):
        changed = overrides[i].model_dump(exclude_none=True) if overrides else {}
        block = {"block_type": SYMBOLS[symbol], **{BLOCK_FIELDS[name]: value for name, value in changed.items()}}
        blocks.append(block | (unknown[i] if unknown and len(unknown) == len(pattern) else {}))
    return [block["block_type"] for block in blocks], blocks


def _limit(value: Any, keys: _Keys) -> tuple[float, float]:
    """time_step_limit with its bounds in any spelling of infinity; a null bound is unbounded."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise keys.refuse(f"time_step_limit = {value} is not a pair [lower, upper]")
    low, high = (_bound(bound, unbounded, keys) for bound, unbounded in zip(value, (0.0, math.inf), strict=True))
    if low < 0 or low > high:
        raise keys.refuse(f"time_step_limit = [{low}, {high}]: the lower bound must be >= 0 and <= the upper")
    return low, high


def _bound(value: object, unbounded: float, keys: _Keys) -> float:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = value["__float__"]
    if value is None:
        return unbounded
    try:
        number = float(str(value))
    except ValueError as error:
        raise keys.refuse(f"time_step_limit holds {value!r}, which is not a number") from error
    if math.isnan(number):
        raise keys.refuse("time_step_limit holds NaN")
    return number


def _infinity(value: float, style: Style) -> Any:
    return {"__float__": "Infinity"} if style == "transformers5" and math.isinf(value) else value


# llama, qwen3, qwen3_moe, nemotron, nemotron-nas


def _read_decoder(kind: str, keys: _Keys) -> DecoderConfig:
    form = DECODERS[kind]
    keys.merge(form.aliases)
    required = [key for key in REQUIRED if key != "intermediate_size" or kind != "nemotron-nas"]
    absent = [key for key in required if keys.data.get(key) is None]
    if absent:
        raise keys.refuse(f"{', '.join(absent)} missing; {kind} needs it")
    fields: dict[str, Any] = {"kind": kind, **form.fixed}
    for name, key in form.fields.items():
        value = keys.take(key, form.defaults.get(key))
        if value is not None:
            fields[name] = value
    heads = fields["num_heads"]
    fields.setdefault("num_kv_heads", heads)
    fields.setdefault("head_dim", fields["hidden"] // heads)
    fields["eos_ids"] = _token_ids(fields.get("eos_ids", ()))
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
        widths = [layer.mlp.ffn for layer in fields["layers"] if layer.mlp]
        fields.setdefault("ffn", max(widths, default=1))
        kv_heads = [layer.attention.num_kv_heads for layer in fields["layers"] if layer.attention]
        fields["num_kv_heads"] = max(kv_heads, default=fields["num_heads"])
    return _validate(DecoderConfig, fields, form.fields, keys)


def _read_rope(keys: _Keys, partial: Any) -> RopeConfig:
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


def _rope_value(rope: Mapping[str, Any], key: str, keys: _Keys) -> Any:
    if rope.get(key) is None:
        raise keys.refuse(f'rope_type = "{rope["rope_type"]}" needs {key}')
    return rope[key]


def _read_nas(fields: Mapping[str, Any], keys: _Keys) -> tuple[DecoderLayerConfig, ...]:
    blocks = keys.take("block_configs")
    if not blocks or len(blocks) != fields["num_layers"]:
        raise keys.refuse(
            f"block_configs has {len(blocks or ())} entries but num_hidden_layers = {fields['num_layers']}"
        )
    layers = []
    for i, block in enumerate(blocks):
        attention, ffn = block.get("attention") or {"no_op": True}, block.get("ffn") or {"no_op": True}
        for part, name in ((attention, "attention"), (ffn, "ffn")):
            refused = [key for key in NAS_REFUSED if part.get(key)]
            if refused:
                values = ", ".join(f"{key} = {part[key]}" for key in refused)
                raise keys.refuse(f"block_configs[{i}].{name}: {values} is not supported")
        layers.append(
            DecoderLayerConfig(attention=_nas_attention(attention, i, fields, keys), mlp=_nas_mlp(ffn, i, fields, keys))
        )
    return tuple(layers)


def _nas_attention(part: Mapping[str, Any], i: int, fields: Mapping[str, Any], keys: _Keys) -> AttentionConfig | None:
    if part.get("no_op"):
        return None
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


def _nas_mlp(part: Mapping[str, Any], i: int, fields: Mapping[str, Any], keys: _Keys) -> MLPConfig | None:
    if part.get("no_op"):
        return None
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


def _write_decoder(config: DecoderConfig) -> dict[str, Any]:
    form = DECODERS[config.kind]
    if config.window is not None:
        raise CheckpointError(f"window = {config.window} cannot be written: {config.kind} files have no sliding window")
    if config.layers is not None and config.kind != "nemotron-nas":
        raise CheckpointError(f'layers that differ cannot be written as {config.kind}; use kind = "nemotron-nas"')
    data: dict[str, Any] = {key: getattr(config, name) for name, key in form.fields.items()}
    data |= {"initializer_range": config.std, "eos_token_id": _eos(config.eos_ids)} | _write_rope(config)
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
        "n_heads_in_group": layer.attention.num_heads // layer.attention.num_kv_heads if layer.attention else None,
        "no_op": layer.attention is None,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    ffn: dict[str, Any] = {"ffn_mult": None, "no_op": layer.mlp is None, "replace_with_linear": False, "sparsify": None}
    if layer.mlp is not None:
        multiple = 3 * layer.mlp.ffn / (2 * config.hidden)
        if ffn_width(multiple, config.hidden) == layer.mlp.ffn:
            ffn["ffn_mult"] = multiple
        else:
            ffn["intermediate_size"] = layer.mlp.ffn
        if layer.mlp.activation != config.activation:
            ffn["hidden_act"] = layer.mlp.activation
    return {"attention": attention, "ffn": ffn}


# shared


def _token_ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _eos(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)


def _validate(model: type[Any], fields: dict[str, Any], names: Mapping[str, str], keys: _Keys) -> Any:
    """The validated config; its errors are told in the names that config.json uses."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        known = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b(?= [=l]|$)")
        text = "; ".join(_messages(error))
        raise keys.refuse(known.sub(lambda match: names[match[1]], text)) from error


def _messages(error: ValidationError) -> list[str]:
    texts: list[str] = []
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            texts += _messages(inner)
        elif item["loc"]:
            texts.append(f"{item['loc'][0]} = {item['input']!r}: {item['msg']}")
        else:
            texts.append(str(inner or item["msg"]))
    return texts
