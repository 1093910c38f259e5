"""What other engines read of a checkpoint folder, and what of it they would refuse or read otherwise. No weight is read.

The folder that `save` writes is the hand-over itself; this module knows where vLLM, SGLang, TensorRT-LLM and llama.cpp's
converter differ from it. Facts are those of their sources of autumn 2026 (`models/nemotron_h.py` and
`configs/nemotron_h.py` of vLLM and SGLang, `modeling_nemotron_h.py` of TensorRT-LLM, `conversion/nemotron.py` of
llama.cpp).

Differs: quantised weights are refused by the reader before anything is compared.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alloy.core.tokenizer import load_tokenizer
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.hf.config import read_json, write_config
from alloy.models.hf.files import Stored
from alloy.models.hf.folder import model_tensors
from alloy.models.hf.hybrid import HYBRID_ALIASES
from alloy.models.hf.names import IGNORED, bare_name, entries, reading_plan
from alloy.models.registry import GENERATION, build, inspect, stored_dtype

AnyConfig = HybridConfig | DecoderConfig
VLLM, SGLANG, TRTLLM, LLAMA_CPP = ENGINES = ("vLLM", "SGLang", "TensorRT-LLM", "llama.cpp")
Shapes = Mapping[str, tuple[int, ...]]
LISTED = 3
ABSENT = "alloy convert SRC DST --to vllm writes it into config.json"

# part of the table -> keys of config.json that all engines read, of a hybrid
HYBRID_KEYS = {
    "sizes": (
        "vocab_size", "hidden_size", "max_position_embeddings", "layer_norm_epsilon", "num_attention_heads",
        "num_key_value_heads", "head_dim",
    ),
    "mlp": ("intermediate_size", "mlp_hidden_act"),
    "mamba": (
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size", "use_conv_bias",
        "use_bias", "mamba_hidden_act",
    ),
    "experts": (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
        "n_shared_experts", "moe_latent_size", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
    ),
}  # fmt: skip
# of a decoder
DECODER_KEYS = {
    "sizes": (
        "vocab_size", "hidden_size", "max_position_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim",
        "rms_norm_eps", "norm_eps",
    ),
    "mlp": ("intermediate_size", "hidden_act"),
    "experts": ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
}  # fmt: skip
# symbol of the pattern that a part needs
NEEDS = {"mlp": "-", "mamba": "M", "experts": "E"}


@dataclass(frozen=True)
class Finding:
    """One thing that some engines refuse or read otherwise.

    Attributes:
        part: row of the table
        name: key of config.json, tensor or file
        state: how it stands
        engines: who minds
        text: what is wrong and the mend
    """

    part: str
    name: str
    state: Literal["missing", "differs"]
    engines: tuple[str, ...]
    text: str


@dataclass
class Export:
    """A checkpoint folder as other engines see it.

    Attributes:
        config: as alloy reads it
        parts: rows of the table, in order
        findings: what is wrong
        dtype: of the weights
        template: source of the chat template; empty: none
    """

    config: AnyConfig
    parts: list[str] = field(default_factory=list[str])
    findings: list[Finding] = field(default_factory=list[Finding])
    dtype: str = ""
    template: str = ""

    def state(self, part: str, engine: str) -> str:
        """ok, differs or missing."""
        states = {found.state for found in self.findings if found.part == part and engine in found.engines}
        return "missing" if "missing" in states else "differs" if states else "ok"


def look_over(folder: Path) -> Export:
    """Compare a folder with what other engines read; CheckpointError if alloy itself cannot read it."""
    data = read_json(folder / "config.json")
    config, foreign, stored = inspect(folder)
    dtype = str(stored_dtype(stored)).removeprefix("torch.")
    result = Export(config, dtype=dtype)
    model = build(config, "meta")
    shapes = {k: tuple(t.shape) for k, t in model_tensors(model, config, written=True).items()}
    written = write_config(config, foreign, dtype=dtype)

    def add(part: str, findings: Iterator[Finding]) -> None:
        result.parts.append(part)
        result.findings += findings

    add("architecture", _architecture(data, written, folder))
    keys = HYBRID_KEYS if isinstance(config, HybridConfig) else DECODER_KEYS
    symbols = config.pattern if isinstance(config, HybridConfig) else ("-E" if config.kind == "qwen3_moe" else "-")
    measured = _measured({bare_name(name): tensor.shape for name, tensor in stored.items()}, config)
    if isinstance(config, HybridConfig):
        add("layers", _layers(data, config, stored))
    for part, names in keys.items():
        if NEEDS.get(part, symbols[0]) in symbols:
            add(part, _keys(part, names, data, written, measured))
    if isinstance(config, HybridConfig):
        result.findings += _limits(data, config)
        if config.mtp_depths:
            add("MTP", _mtp(data, config))
    else:
        add("rope", _rope(data, config))
    add("dtype", _dtype(data, dtype))
    add("weights", _weights(stored, shapes, config))
    tokenizer = load_tokenizer(folder)
    result.template = str(tokenizer.chat_template or "") if tokenizer else ""
    result.parts.append("tokenizer")
    if tokenizer is None:
        text = "save the model with the tokenizer it was trained with"
        result.findings.append(Finding("tokenizer", "tokenizer.json", "missing", ENGINES, text))
    elif not config.eos_ids and tokenizer.eos_token_id is None:
        text = f"neither config.json, {GENERATION} nor the tokenizer has one, so answers never end; add it"
        result.findings.append(Finding("tokenizer", "eos_token_id", "missing", ENGINES, text))
    return result


def _architecture(data: Mapping[str, Any], written: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    wanted, found = written["architectures"], data.get("architectures")
    if found != wanted:
        state = "differs" if found else "missing"
        text = f"it is {found}, and engines choose the model by it; write {wanted}"
        yield Finding("architecture", "architectures", state, ENGINES, text)
    kind = data["model_type"]
    if kind == "nemotron_h_puzzle":
        text = "there is no NemotronHPuzzleForCausalLM"
        yield Finding("architecture", "architectures", "missing", (LLAMA_CPP,), text)
    if kind == "nemotron":
        text = "there is no NemotronForCausalLM; add --model-impl transformers to the command"
        yield Finding("architecture", "architectures", "missing", (SGLANG,), text)
    code = str((data.get("auto_map") or {}).get("AutoConfig", "")).split("--")[-1].split(".")[0]
    if kind == "nemotron-nas" and not (code and (folder / f"{code}.py").is_file()):
        text = (
            "transformers has no nemotron-nas, so engines read its configuration with code that the folder must hold: "
            "copy configuration_decilm.py and its imports from a release, name it in auto_map, and trust remote code"
        )
        yield Finding("architecture", "auto_map", "missing", (VLLM, SGLANG, TRTLLM), text)


def _layers(data: Mapping[str, Any], config: HybridConfig, stored: Mapping[str, Stored]) -> Iterator[Finding]:
    marks = {"A_log": "M", "q_proj.weight": "*", "gate.weight": "E", "up_proj.weight": "-"}
    found: dict[int, str] = {}
    for name in stored:
        match = re.match(r"layers\.(\d+)\.mixer\.([\w.]+)", bare_name(name))
        if match and match[2] in marks:
            found[int(match[1])] = marks[match[2]]
    pattern = "".join(found[i] for i in sorted(found))
    key = "block_configs" if config.kind == "nemotron_h_puzzle" else "hybrid_override_pattern"
    if pattern != config.pattern:
        text = f'it means "{config.pattern}" but the weights "{pattern}"; correct config.json'
        yield Finding("layers", key, "differs", ENGINES, text)
    if config.kind == "nemotron_h_puzzle":
        if data.get("layers_block_type") is None:
            yield Finding("layers", "layers_block_type", "missing", (SGLANG,), ABSENT)
        return
    if data.get("hybrid_override_pattern") is None:
        text = (
            "not every release knows the names in layers_block_type, so the string "
            f'"{config.pattern}" is needed; alloy convert SRC DST --to vllm writes it'
        )
        yield Finding("layers", "hybrid_override_pattern", "missing", (VLLM, SGLANG, LLAMA_CPP), text)
    if data.get("num_hidden_layers") is None:
        yield Finding("layers", "num_hidden_layers", "missing", (VLLM, LLAMA_CPP), ABSENT)


def _keys(
    part: str, names: tuple[str, ...], data: Mapping[str, Any], written: Mapping[str, Any], measured: Mapping[str, str]
) -> Iterator[Finding]:
    is_hybrid = "mamba_num_heads" in written
    # a decoder's keys that follow from others
    follows = {
        "head_dim": written["hidden_size"] // written["num_attention_heads"],
        "num_key_value_heads": written["num_attention_heads"],
    }
    for key in names:
        if key not in written:
            continue
        # engines take the mamba_* spellings too
        spellings = [alias for alias, name in HYBRID_ALIASES.items() if name == key and alias.startswith("mamba_")]
        is_there = any(data.get(name) is not None for name in [key, *(spellings if is_hybrid else [])])
        is_implied = written[key] in (None, False) or (not is_hybrid and follows.get(key) == written[key])
        if not is_there and not is_implied and written.get("block_configs") is None:
            yield Finding(part, key, "missing", ENGINES, ABSENT)
        elif key in measured:
            yield Finding(part, key, "differs", ENGINES, measured[key])
    if part == "mamba" and written["n_groups"] != 8 and data.get("mamba_n_groups") != written["n_groups"]:
        text = f"8 is taken without it, and n_groups is {written['n_groups']}; {ABSENT}"
        yield Finding(part, "mamba_n_groups", "missing", (SGLANG,), text)


def _measured(shapes: Shapes, config: AnyConfig) -> dict[str, str]:
    """Key -> what is wrong, for numbers of config.json that the weights contradict."""
    if config.kind in ("nemotron_h_puzzle", "nemotron-nas"):
        # every layer has its own numbers; the shapes of the weights are compared one by one
        return {}

    def size(dim: int, *ends: str) -> int | None:
        """Of the first weight whose name ends so; None: there is none."""
        return next((s[dim] for name, s in shapes.items() if not name.startswith("mtp.") and name.endswith(ends)), None)

    found: dict[str, str] = {}

    def compare(key: str, says: int | None, have: int | None) -> None:
        if have is not None and says != have:
            found[key.split(" ")[0]] = f"{key} is {says} but the weights have {have}; correct config.json"

    embeddings = ("embeddings.weight", "embed_tokens.weight")
    compare("vocab_size", config.vocab, size(0, *embeddings))
    compare("hidden_size", config.hidden, size(1, *embeddings))
    compare("num_attention_heads x head_dim", config.num_heads * config.head_dim, size(0, "q_proj.weight"))
    compare("num_key_value_heads x head_dim", config.num_kv_heads * config.head_dim, size(0, "k_proj.weight"))
    compare("moe_intermediate_size", config.expert_ffn, size(0, "experts.0.up_proj.weight"))
    if not isinstance(config.ffn, tuple):
        compare("intermediate_size", config.ffn, size(0, "mixer.up_proj.weight", "mlp.up_proj.weight"))
    if isinstance(config, DecoderConfig):
        compare("num_experts", config.num_experts, size(0, "mlp.gate.weight"))
        return found
    compare("n_routed_experts", config.num_experts, size(0, "mixer.gate.weight"))
    compare("moe_shared_expert_intermediate_size", config.shared_ffn, size(0, "shared_experts.up_proj.weight"))
    compare("moe_latent_size", config.latent, size(0, "fc1_latent_proj.weight"))
    heads, inner, channels = size(0, "A_log"), size(0, "mixer.norm.weight"), size(0, "conv1d.weight")
    compare("mamba_num_heads", config.ssm_heads, heads)
    compare("conv_kernel", config.conv_kernel, size(-1, "conv1d.weight"))
    if heads and inner and channels:
        compare("mamba_head_dim", config.ssm_head_dim, inner // heads)
        compare("n_groups x ssm_state_size", config.ssm_groups * config.ssm_state, (channels - inner) // 2)
    return found


def _limits(data: Mapping[str, Any], config: HybridConfig) -> Iterator[Finding]:
    """What single engines cannot compute; no conversion mends these."""
    mamba, attention, dense, experts = (symbol in config.pattern for symbol in "M*-E")
    bound = list(config.time_step_limit)
    if mamba and bound != [0.0, math.inf]:
        text = f"time_step_limit = {bound}, but none of them clamps dt; train with [0, inf]"
        yield Finding("mamba", "time_step_limit", "differs", ENGINES, text)
    if mamba and config.ssm_bias:
        yield Finding("mamba", "use_bias", "differs", (TRTLLM,), "there is no bias in Mamba projections")
    if attention and config.attention_bias:
        text = "there is no bias in the attention of hybrids"
        yield Finding("sizes", "attention_bias", "differs", (VLLM, SGLANG), text)
    if attention and config.window is not None:
        text = "there is no sliding window in hybrids"
        yield Finding("sizes", "sliding_window", "differs", (TRTLLM, LLAMA_CPP), text)
    if config.residual_fp32:
        text = "the residual stream is kept in the dtype of the weights"
        yield Finding("sizes", "residual_in_fp32", "differs", (VLLM, SGLANG, TRTLLM), text)
    if dense and config.mlp_bias:
        yield Finding("mlp", "mlp_bias", "differs", (TRTLLM,), "there is no bias in the MLP of hybrids")
    if dense and isinstance(config.ffn, tuple) and len(config.ffn) > 1:
        text = "TensorRT-LLM reads a list of intermediate_size by block and llama.cpp one width; make all layers equal"
        yield Finding("mlp", "intermediate_size", "differs", (TRTLLM, LLAMA_CPP), text)
    if dense and experts:
        text = "there is no model with both - and E layers"
        yield Finding("layers", "hybrid_override_pattern", "differs", (LLAMA_CPP,), text)
    if not experts and data.get("num_experts_per_tok") is not None:
        text = (
            "a model without experts is taken for one with experts where config.json has this key; "
            "alloy convert SRC DST --to vllm leaves it out"
        )
        yield Finding("mlp", "num_experts_per_tok", "differs", (LLAMA_CPP,), text)
    count, width = data.get("n_shared_experts"), data.get("moe_shared_expert_intermediate_size")
    if experts and config.kind == "nemotron_h" and isinstance(count, int) and isinstance(width, int) and count > 1:
        reads = {engine: width if engine == LLAMA_CPP else width * count for engine in ENGINES}
        wrong = tuple(engine for engine, read in reads.items() if read != config.shared_ffn)
        text = (
            f"{count} with width {width} is read as {width * count} in all, by llama.cpp as {width}; "
            f"the weights have {config.shared_ffn}: alloy convert SRC DST --to vllm writes 1 and the full width"
        )
        yield Finding("experts", "n_shared_experts", "differs", wrong, text)


def _mtp(data: Mapping[str, Any], config: HybridConfig) -> Iterator[Finding]:
    named = data.get("mtp_hybrid_override_pattern") or data.get("mtp_layers_block_type")
    if config.kind == "nemotron_h" and config.mtp_pattern != "*E" and not named:
        key = "mtp_hybrid_override_pattern"
        yield Finding("MTP", key, "missing", (VLLM, SGLANG, TRTLLM), ABSENT)
    if config.mtp_depths > 1 or config.mtp_pattern != "*E" or "E" not in config.pattern:
        text = "only one depth of *E beside a model with experts is known; convert with --no-mtp"
        yield Finding("MTP", "num_nextn_predict_layers", "differs", (LLAMA_CPP,), text)


def _rope(data: Mapping[str, Any], config: DecoderConfig) -> Iterator[Finding]:
    nested = data.get("rope_parameters") or {}
    if data.get("rope_theta") is None and nested.get("rope_theta") is None and config.rope.theta != 10_000:
        yield Finding("rope", "rope_theta", "missing", ENGINES, ABSENT)


def _dtype(data: Mapping[str, Any], dtype: str) -> Iterator[Finding]:
    said = data.get("dtype") or data.get("torch_dtype")
    if said is None:
        text = f'write "{dtype}", that of the weights'
        yield Finding("dtype", "dtype", "missing", (VLLM, SGLANG, TRTLLM), text)
    elif said != dtype:
        text = f'"{said}", but the weights are {dtype}, and engines would convert them; write "{dtype}"'
        yield Finding("dtype", "dtype", "differs", ENGINES, text)


def _weights(stored: Mapping[str, Stored], shapes: Shapes, config: AnyConfig) -> Iterator[Finding]:
    wanted = {entry.name: entry.shape for entry in entries(shapes, config)}
    plan = reading_plan(shapes, config)
    have = {name: tensor.shape for name, tensor in stored.items() if not IGNORED.search(name)}
    if config.tie_embeddings and isinstance(config, DecoderConfig):
        # every engine ties these heads and leaves a stored copy alone
        have.pop("lm_head.weight", None)
    absent = [name for name in wanted if name not in have]
    others = [name for name in have if name not in wanted]
    renamed = [name for name in others if bare_name(name) in plan]
    if renamed:
        text = (
            f"the hub has other names, such as {next(iter(absent), '')}: alloy convert SRC DST --to vllm writes them so"
        )
        yield Finding("weights", _some(renamed), "differs", ENGINES, text)
    unknown = [name for name in others if bare_name(name) not in plan]
    if unknown:
        text = "no engine knows these tensors; config.json describes another model, or they are to be removed"
        yield Finding("weights", _some(unknown), "differs", ENGINES, text)
    bare = {bare_name(name) for name in renamed}
    stacked = any(re.search(r"experts\.\w+_proj$", name) for name in renamed)
    lost = [n for n in absent if bare_name(n) not in bare and not (stacked and re.search(r"experts\.\d+\.", n))]
    if lost == ["lm_head.weight"] and config.tie_embeddings:
        text = "vLLM and TensorRT-LLM tie no head of a hybrid: alloy convert SRC DST --to vllm writes it"
        yield Finding("weights", "lm_head.weight", "missing", (VLLM, TRTLLM), text)
    elif lost:
        yield Finding("weights", _some(lost), "missing", ENGINES, "the folder is incomplete; save or download it again")
    wrong = [name for name in wanted if name in have and have[name] != wanted[name]]
    if wrong:
        first = wrong[0]
        text = f"{first} is {list(have[first])}, config.json means {list(wanted[first])}; correct config.json"
        yield Finding("weights", _some(wrong), "differs", ENGINES, text)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
