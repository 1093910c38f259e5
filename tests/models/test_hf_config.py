"""config.json: both generations, every alias, what is refused, and what is written."""

import json
import math
from typing import Any

import pytest
import transformers

from alloy.errors import CheckpointError, RecipeError
from alloy.models.configs import DecoderConfig, HybridConfig, LayerOverride, LinearConfig, MoEConfig
from alloy.models.hf.config import load_config, parse_style, read_config, write_config
from alloy.models.hf.hybrid import HYBRID_ALIASES
from alloy.models.presets import PRESETS, preset

HYBRID = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*-",
    "num_hidden_layers": 5,
    "vocab_size": 259,
    "hidden_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "intermediate_size": 88,
}
ROUTED = {
    **HYBRID,
    "hybrid_override_pattern": "MEM*E",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
}
NAS = {
    "model_type": "nemotron-nas",
    "vocab_size": 259,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "block_configs": [
        {"attention": {"n_heads_in_group": 3, "no_op": False}, "ffn": {"ffn_mult": 2.625, "no_op": False}}
    ],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(base: dict[str, Any], **changes: Any) -> Any:
    return read_config({**base, **changes})[0]


def without(base: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in base.items() if key not in keys}


def test_both_generations_mean_the_same() -> None:
    """The pattern string, and the block lists of early and of present transformers 5."""
    released = read(HYBRID)
    bare = without(HYBRID, "hybrid_override_pattern", "num_hidden_layers")
    early = ["mamba", "mlp", "mamba", "attention", "mlp"]
    now = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]
    for key, blocks in (("layers_block_type", early), ("layers_block_type", now), ("layer_types", now)):
        assert read(bare, **{key: blocks}) == released
    assert released.pattern == "M-M*-"


def test_transformers_file_is_read_as_it_means(tmp_path: Any) -> None:
    """What transformers 5.23 saves, with its own spelling of infinity and without a pattern string."""
    ours = read(ROUTED, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    theirs = transformers.NemotronHConfig(**without(write_config(ours), "model_type"))
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in saved
    assert load_config(tmp_path)[0] == ours.model_copy(update={"init_std": ours.std})


@pytest.mark.parametrize(
    ("alias", "field", "value"),
    [
        ("attention_head_dim", "head_dim", 10),
        ("mamba_n_groups", "ssm_groups", 3),
        ("mamba_d_conv", "conv_kernel", 3),
        ("mamba_dt_min", "time_step_min", 1e-9),
        ("mamba_dt_max", "time_step_max", 0.3),
        ("mamba_dt_init_floor", "time_step_floor", 1e-5),
        ("mamba_conv_bias", "conv_bias", False),
        ("mamba_chunk_size", "chunk", 16),
        ("norm_eps", "norm_eps", 1e-6),
        ("num_local_experts", "num_experts", 16),
    ],
)
def test_aliases_are_read(alias: str, field: str, value: Any) -> None:
    """Every old spelling reaches its field."""
    config = read(without(ROUTED if field == "num_experts" else HYBRID, HYBRID_ALIASES[alias]), **{alias: value})
    assert getattr(config, field) == value


def test_numbers_of_experts_of_a_model_without_any_are_left_out() -> None:
    """llama.cpp takes a file with them for one of a model with experts; MTP may have the only ones."""
    keys = {"num_experts_per_tok": 3, "n_routed_experts": 16, "moe_intermediate_size": 24}
    for form in ("hybrid", "transformers5"):
        assert not set(keys) & set(write_config(read(HYBRID, **keys), style=form))
    config = read(HYBRID, **keys, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    assert write_config(config).items() >= keys.items()


def test_alias_that_disagrees_is_refused() -> None:
    """Both names, both values."""
    with pytest.raises(
        CheckpointError, match=r"config.json: head_dim = 8 and its alias attention_head_dim = 16 differ"
    ):
        read(HYBRID, attention_head_dim=16)


@pytest.mark.parametrize(
    "written",
    [[0.0, math.inf], [0.0, {"__float__": "Infinity"}], ["0", "inf"], [0, "Infinity"], [None, None], [0.0, None]],
)
def test_every_spelling_of_infinity(written: list[Any]) -> None:
    """time_step_limit without an upper bound."""
    assert read(HYBRID, time_step_limit=written).time_step_limit == (0.0, math.inf)


def test_json_literal_infinity_is_read_and_written() -> None:
    """Released files hold the literal; transformers 5 an object."""
    config = read_config(json.loads(json.dumps({**HYBRID, "time_step_limit": [0.001, math.inf]})))[0]
    assert config.time_step_limit == (0.001, math.inf)
    assert '"time_step_limit": [0.001, Infinity]' in json.dumps(write_config(config))
    assert write_config(config, style="transformers5")["time_step_limit"] == [0.001, {"__float__": "Infinity"}]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("form", ["hybrid", "transformers5"])
def test_writing_and_reading_keeps_every_config(name: str, form: Any) -> None:
    """Any preset in either style, through JSON text, with foreign keys."""
    config = preset(name)
    data = json.loads(json.dumps(write_config(config, {"auto_map": {"AutoConfig": "x.Y"}, "expand": 2}, form)))
    again, foreign = read_config(data)
    assert again == type(config).model_validate({**config.model_dump(), "init_std": config.std})
    assert foreign.items() >= {"auto_map": {"AutoConfig": "x.Y"}, "expand": 2}.items()


def test_styles_hold_the_keys_of_their_readers() -> None:
    """The released form has patterns and no block list, the library's form the reverse."""
    config = read(ROUTED, num_nextn_predict_layers=1, mtp_layers_block_type=["full_attention", "moe"])
    released, library = write_config(config), write_config(config, style="transformers5")
    assert (released["hybrid_override_pattern"], released["num_hidden_layers"]) == ("MEM*E", 5)
    assert released["mtp_hybrid_override_pattern"] == "*E"
    assert "layers_block_type" not in released
    assert library["layers_block_type"] == ["linear_attention", "moe", "linear_attention", "full_attention", "moe"]
    assert not {"hybrid_override_pattern", "num_hidden_layers"} & set(library)


def test_style_is_checked() -> None:
    """A style nobody knows."""
    with pytest.raises(RecipeError, match='config style "megatron" is not known'):
        parse_style("megatron")


def test_unknown_keys_are_kept_apart() -> None:
    """They are no part of the config and come back."""
    config, foreign = read_config({**HYBRID, "rope_theta": 10_000, "use_mamba_kernels": True})
    assert foreign == {"rope_theta": 10_000, "use_mamba_kernels": True}
    assert write_config(config, foreign).items() >= foreign.items()


def test_token_ids() -> None:
    """One id, a list, or none."""
    assert read(HYBRID, eos_token_id=[2, 11]).eos_ids == (2, 11)
    assert read(HYBRID, eos_token_id=2).eos_ids == (2,)
    assert read(HYBRID, eos_token_id=None).eos_ids == ()
    assert read(HYBRID, pad_token_id=None).pad_id is None


def test_token_ids_that_are_null_stay_none() -> None:
    """null is no token; only an absent key takes the default of the library's class."""
    null = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    silent = {**LLAMA, "model_type": "nemotron"}
    assert (read(silent).bos_id, read(silent).eos_ids) == (2, (3,))
    for base in (HYBRID, silent):
        config = read(base, **null)
        assert (config.pad_id, config.bos_id, config.eos_ids) == (None, None, ())
        assert read_config(write_config(config))[0].eos_ids == ()


def test_widths_of_single_layers() -> None:
    """intermediate_size as a list, one value for each `-` layer."""
    config = read(HYBRID, intermediate_size=[40, 72])
    assert [mixer.ffn for mixer in config.mixers if mixer.__class__.__name__ == "MLPConfig"] == [40, 72]
    assert write_config(config)["intermediate_size"] == [40, 72]


def test_megatron_pattern_with_mtp() -> None:
    """Pipeline cuts are stripped, depths counted."""
    config = read(without(ROUTED, "num_hidden_layers"), hybrid_override_pattern="ME|M*E/*E/*E")
    assert (config.pattern, config.mtp_pattern, config.mtp_depths) == ("MEM*E", "*E", 2)


def test_shared_expert_width_is_settled_by_the_weights() -> None:
    """transformers reads the full width, vLLM width times n_shared_experts; the first matrix tells."""
    data = {**ROUTED, "n_shared_experts": 2}
    for rows in (40, 80):
        config = read_config(data, shared_rows=rows)[0]
        assert {m.shared_ffn for m in config.mixers if isinstance(m, MoEConfig)} == {rows}
        assert write_config(config)["n_shared_experts"] == 1
    with pytest.raises(CheckpointError, match="can mean a width of 40 or 80, and there are no weights to tell"):
        read_config(data)
    with pytest.raises(CheckpointError, match="the weights have 60"):
        read_config(data, shared_rows=60)
    assert read(ROUTED, n_shared_experts=0).shared_ffn == 0


def test_puzzle_blocks() -> None:
    """Per-layer overrides, their unknown keys, num_hidden_layers null, norm_eps as alias."""
    data = {
        **without(ROUTED, "hybrid_override_pattern"),
        "model_type": "nemotron_h_puzzle",
        "num_hidden_layers": None,
        "norm_eps": 1e-6,
        "layers_block_type": ["mamba", "moe", "attention"],
        "block_configs": [
            {"block_type": "mamba", "ssm_state_size": 64},
            {"block_type": "moe", "num_experts_per_tok": 2, "moe_intermediate_size": 16, "score": 0.5},
            {"block_type": "attention", "sliding_window": 32},
        ],
    }
    config, foreign = read_config(data)
    assert (config.pattern, config.norm_eps) == ("ME*", 1e-6)
    assert config.layers == (
        LayerOverride(ssm_state=64),
        LayerOverride(top_k=2, expert_ffn=16),
        LayerOverride(window=32),
    )
    written = write_config(config, foreign)
    assert written["block_configs"] == data["block_configs"]
    assert read_config(written)[0] == type(config).model_validate({**config.model_dump(), "init_std": config.std})


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (HYBRID, {"hybrid_override_pattern": "M-X*-"}, r'"X" at position 3 is not a layer. Use M \(Mamba-2\)'),
        (HYBRID, {"hybrid_override_pattern": "M-G*-"}, '"G" at position 3 is gated delta net'),
        (HYBRID, {"num_hidden_layers": 6}, r'num_hidden_layers = 6 but the pattern "M-M\*-" has 5 blocks'),
        (HYBRID, {"layers_block_type": ["mamba", "mlp", "mamba", "mlp", "mlp"]}, r'"M-M\*-" and layers_block_type, which means "M-M--", differ'),
        (HYBRID, {"layers_block_type": ["mamba", "conv"]}, r'layers_block_type\[1\] = "conv" is not a layer'),
        (HYBRID, {"hybrid_override_pattern": None}, "neither hybrid_override_pattern nor layers_block_type"),
        (HYBRID, {"n_groups": 4}, "mamba_num_heads = 6 is not a multiple of n_groups = 4"),
        (HYBRID, {"ssm_state_size": 300}, r"mamba_head_dim = \d+ and ssm_state_size = 300; both must be at most 256"),
        (HYBRID, {"num_key_value_heads": 4}, "num_attention_heads = 6 is not a multiple of num_key_value_heads = 4"),
        (HYBRID, {"intermediate_size": [1, 2, 3]}, "intermediate_size lists 3 widths but pattern has 2"),
        (HYBRID, {"time_step_limit": [0.5, 0.1]}, r"time_step_limit = \[0.5, 0.1\]: the lower bound"),
        (HYBRID, {"time_step_limit": [-1.0, 0.1]}, "must be >= 0"),
        (HYBRID, {"time_step_limit": "none"}, "is not a pair"),
        (HYBRID, {"time_step_limit": [0, "many"]}, "'many', which is not a number"),
        (HYBRID, {"mlp_hidden_act": "silu"}, 'mlp_hidden_act = "silu" is not supported'),
        (HYBRID, {"num_nextn_predict_layers": 1}, "neither mtp_hybrid_override_pattern nor mtp_layers_block_type"),
        (HYBRID, {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*Q"}, '"Q" at position 2 is not a layer'),
        (HYBRID, {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", "mtp_layers_block_type": ["mlp"]}, "the MTP patterns"),
        (ROUTED, {"n_group": 3}, "n_routed_experts = 8 is not a multiple of n_group = 3"),
        (ROUTED, {"n_group": 2, "topk_group": 4}, "topk_group = 4 is more than n_group = 2"),
        (ROUTED, {"n_group": 8}, "router groups hold 1 expert"),
        (ROUTED, {"n_group": 4, "topk_group": 1}, "num_experts_per_tok = 3 is more than the 2 experts"),
        (HYBRID, {"quantization_config": {"quant_method": "fp8"}}, 'quantization_config with method "fp8"'),
        (HYBRID, {"hidden_size": -1}, "hidden_size = -1"),
        (LLAMA, {"model_type": "gpt2"}, 'model_type = "gpt2" is not supported. Known: nemotron_h'),
        (LLAMA, {"hidden_size": None}, "hidden_size missing; llama needs it"),
        (LLAMA, {"hidden_act": "tanh"}, 'hidden_act = "tanh" is not supported'),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2}}, 'rope_type = "yarn" is not supported'),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "needs low_freq_factor"),
        (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters has rope_theta = 1000000.0 but the top level has 10000.0"),
        (LLAMA, {"use_sliding_window": True}, "sliding-window attention is not supported for llama"),
        (NAS, {"num_hidden_layers": 2}, "block_configs has 1 entries but num_hidden_layers = 2"),
        (NAS, {"block_configs": [{"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}}]}, "n_heads_in_group = 4 does not divide 6 heads"),
        (NAS, {"block_configs": [{"attention": {"no_op": True}, "ffn": {}}]}, "neither ffn_mult nor intermediate_size"),
        (NAS, {"block_configs": [{"attention": {"no_op": True}, "ffn": {"no_op": True, "sparsify": [1]}}]}, "sparsify"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """Each message names the key of the file, its value and what is allowed."""
    with pytest.raises(CheckpointError, match=message):
        read(base, **changes)


def test_rope_in_both_spellings() -> None:
    """Old files keep it at the top level, transformers 5 in rope_parameters; we write both."""
    old = read(LLAMA, rope_theta=5e5, rope_scaling=LLAMA3)
    new = read(LLAMA, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert (old.rope.scaling, old.rope.factor, old.rope.theta) == ("llama3", 8.0, 5e5)
    written = write_config(old)
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == LLAMA3
    assert written["rope_parameters"] == {**LLAMA3, "rope_theta": 5e5}


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_percent", "rope_percentage"])
def test_partial_rotary_of_nemotron(key: str) -> None:
    """Three spellings, and the default of one half."""
    data = {**LLAMA, "model_type": "nemotron", "hidden_act": "relu2"}
    assert read(data, **{key: 0.25}).rope.partial == 0.25
    assert read(data).rope.partial == 0.5
    assert (read(data).norm, read(data).gated) == ("layer1p", False)


def test_class_defaults_where_a_file_is_silent() -> None:
    """llama: as many KV heads as heads, head_dim hidden / heads, RMSNorm eps 1e-6."""
    config = read(without(LLAMA, "num_key_value_heads"))
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.max_positions) == (6, 8, 1e-6, 2048)


def test_dense_layers_of_qwen3_moe() -> None:
    """decoder_sparse_step and mlp_only_layers together, as transformers decides it."""
    data = {**LLAMA, "model_type": "qwen3_moe", "num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2}
    config = read(data, moe_intermediate_size=8, decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.dense_layers == (0, 2, 3, 4)
    assert isinstance(config.resolved[1].mlp, MoEConfig)


def test_nas_blocks() -> None:
    """KV heads from the group size, widths from ffn_mult, no-op and linear halves, fused FFN widths."""
    config = read(
        NAS,
        num_hidden_layers=4,
        block_configs=[
            {"attention": {"n_heads_in_group": 3}, "ffn": {"ffn_mult": 39}},
            {"attention": {"no_op": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 6, "window_length": None}, "ffn": {"intermediate_size": 100}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        ],
    )
    assert isinstance(config, DecoderConfig)
    first, second, third, fourth = config.resolved
    linear = LinearConfig(hidden=config.hidden)
    assert (fourth.attention, fourth.mlp) == (linear, linear)
    assert first.attention is not None
    assert first.mlp is not None
    assert (first.attention.num_kv_heads, first.mlp.ffn) == (2, 1280)
    assert (second.attention, second.mlp) == (None, None)
    assert third.mlp is not None
    assert third.mlp.ffn == 100
    written = write_config(config)
    assert [block["ffn"]["ffn_mult"] for block in written["block_configs"]] == [40.0, None, None, None]
    assert read_config(written)[0].resolved == config.resolved


def test_published_nas_multiples_survive() -> None:
    """The width that a written multiple means is the one that was read."""
    config = preset("llama-nemotron-ultra-253b")
    assert isinstance(config, DecoderConfig)
    assert read_config(write_config(config))[0].resolved == config.resolved


def test_overrides_need_the_puzzle_kind() -> None:
    """nemotron_h has no place for them."""
    data = {**preset("tiny-puzzle").model_dump(), "kind": "nemotron_h"}
    with pytest.raises(CheckpointError, match='only be written as kind = "nemotron_h_puzzle"'):
        write_config(HybridConfig.model_validate(data))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (HYBRID, {"n_shared_experts": "two", "hybrid_override_pattern": "MEM*-"}, "a value is not of the type"),
        (HYBRID, {"layers_block_type": 5}, "a value is not of the type"),
        (HYBRID, {"sliding_window": 0}, "sliding_window = 0: Input should be greater than 0"),
        (HYBRID, {"mamba_head_dim": 10**30}, "mamba_head_dim = .*: Input should be less than"),
        (ROUTED, {"moe_latent_size": -1}, "moe_latent_size = -1: Input should be greater than 0"),
        (LLAMA, {"num_attention_heads": "x"}, "a value is not of the type"),
        (LLAMA, {"num_attention_heads": 0}, "a value is not of the type"),
        (LLAMA, {"rope_scaling": 2.0}, "a value is not of the type"),
        (LLAMA, {"head_dim": 7}, "head_dim = 7 rotates 7 channels; rotary embedding needs pairs"),
        (NAS, {"block_configs": [[]]}, "a value is not of the type"),
        (LLAMA, {"quantization_config": "int4"}, "a value is not of the type"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """A damaged or foreign value is told as such, never as a traceback or a failed allocation."""
    with pytest.raises(CheckpointError, match=message):
        read(base, **changes)


def test_broken_files_are_named(tmp_path: Any) -> None:
    """Absent, no JSON, no object."""
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        load_config(tmp_path)
