"""config.json of the hybrids, `nemotron_h` and `nemotron_h_puzzle`. No torch here.

Generation A (released files) has `hybrid_override_pattern`, generation B (transformers 5) `layers_block_type`; the
heterogeneous kind describes every layer in `block_configs`.

Paper: Nemotron-H (2025), arXiv:2504.03624.
"""

import math
from collections.abc import Sequence
from typing import Any

from alloy.core.logging import get_logger
from alloy.errors import CheckpointError
from alloy.models.configs import SYMBOLS, HybridConfig, LayerOverride
from alloy.models.hf.keys import ACTIVATION_NAMES, TOKEN_FIELDS, ConfigKeys, Style, token_ids, validated, write_eos

log = get_logger(__name__)

HYBRIDS = {"nemotron_h": "NemotronHForCausalLM", "nemotron_h_puzzle": "NemotronHPuzzleForCausalLM"}
# our field -> key of config.json
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
# what NemotronHConfig of transformers assumes when the file leaves them out
DEFAULT_IDS = {"pad_id": 0, "bos_id": 1, "eos_ids": 2}
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
# left out of the file of a model without experts, as releases do: llama.cpp takes a file with them for one with
EXPERT_KEYS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
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


def read_hybrid(kind: str, keys: ConfigKeys, shared_rows: int | None) -> HybridConfig:
    """The configuration of a hybrid; `shared_rows`: see `read_config`."""
    keys.merge(HYBRID_ALIASES)
    fields: dict[str, Any] = {"kind": kind, **DEFAULT_IDS}
    for name, key in HYBRID_FIELDS.items():
        value = keys.take(key)
        # null means "none" for token ids, "as usual" elsewhere
        if value is not None or (name in TOKEN_FIELDS and key in keys.data):
            fields[name] = value
    if "num_heads" in fields and "num_key_value_heads" in keys.data:
        fields.setdefault("num_kv_heads", fields["num_heads"])
    for key, wanted in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if ACTIVATION_NAMES.get(keys.take(key, wanted)) != wanted:
            raise keys.refuse(f'{key} = "{keys.data[key]}" is not supported; {kind} has "{wanted}"')
    if isinstance(fields.get("ffn"), list):
        fields["ffn"] = tuple(fields["ffn"])
    fields["eos_ids"] = token_ids(fields["eos_ids"])
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
        if not (fields.get("mtp_depths") and "E" in fields.get("mtp_pattern", "*E")):
            fields = {name: value for name, value in fields.items() if HYBRID_FIELDS.get(name) not in EXPERT_KEYS}
    return validated(HybridConfig, fields, HYBRID_FIELDS, keys)


def _read_patterns(fields: dict[str, Any], keys: ConfigKeys) -> None:
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


def _check_length(pattern: str, keys: ConfigKeys) -> None:
    count = keys.take("num_hidden_layers")
    if count is not None and count != len(pattern):
        raise keys.refuse(f'num_hidden_layers = {count} but the pattern "{pattern}" has {len(pattern)} blocks')


def _block_pattern(key: str, blocks: Sequence[str], keys: ConfigKeys) -> str:
    for i, name in enumerate(blocks):
        if name not in BLOCK_SYMBOLS:
            raise keys.refuse(f'{key}[{i}] = "{name}" is not a layer. Use one of {", ".join(BLOCK_SYMBOLS)}')
    return "".join(BLOCK_SYMBOLS[name] for name in blocks)


def _read_blocks(key: str, types: str, keys: ConfigKeys) -> tuple[str, tuple[LayerOverride, ...]]:
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


def _read_shared(fields: dict[str, Any], keys: ConfigKeys, shared_rows: int | None) -> None:
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


def write_hybrid(config: HybridConfig, blocks: Any, mtp_blocks: Any, style: Style) -> dict[str, Any]:
    """What config.json says of a hybrid; `blocks`, `mtp_blocks`: unknown keys of single blocks, kept from reading."""
    data: dict[str, Any] = {key: getattr(config, name) for name, key in HYBRID_FIELDS.items()}
    data["initializer_range"] = config.std
    data["eos_token_id"] = write_eos(config.eos_ids)
    data["intermediate_size"] = list(config.ffn) if isinstance(config.ffn, tuple) else config.ffn
    data["time_step_limit"] = [_infinity(bound, style) for bound in config.time_step_limit]
    data |= {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "n_shared_experts": int(config.shared_ffn > 0)}
    if style == "hybrid":
        # SGLang reads this spelling too, and takes 8 without it
        data["mamba_n_groups"] = config.ssm_groups
    if config.kind == "nemotron_h_puzzle":
        data["layers_block_type"], data["block_configs"] = _write_blocks(config.pattern, config.layers, blocks)
        data["num_hidden_layers"] = config.num_layers
        if config.mtp_depths:
            written = _write_blocks(config.mtp_pattern, config.mtp_layers, mtp_blocks)
            data["mtp_layers_block_type"], data["mtp_block_configs"] = written
        return data
    if "E" not in config.pattern + config.mtp_pattern * min(config.mtp_depths, 1):
        for key in EXPERT_KEYS:
            del data[key]
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


def _limit(value: Any, keys: ConfigKeys) -> tuple[float, float]:
    """time_step_limit with its bounds in any spelling of infinity; a null bound is unbounded."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise keys.refuse(f"time_step_limit = {value} is not a pair [lower, upper]")
    low, high = (_bound(bound, unbounded, keys) for bound, unbounded in zip(value, (0.0, math.inf), strict=True))
    if low < 0 or low > high:
        raise keys.refuse(f"time_step_limit = [{low}, {high}]: the lower bound must be >= 0 and <= the upper")
    return low, high


def _bound(value: object, unbounded: float, keys: ConfigKeys) -> float:
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
