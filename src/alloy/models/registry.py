"""Models by kind: build from a configuration, load a checkpoint folder, save one."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alloy.core import hub
from alloy.core.device import resolve_device, resolve_dtype
from alloy.core.logging import get_logger
from alloy.core.registry import Registry
from alloy.core.runs import atomic_write
from alloy.core.tokenizer import load_tokenizer, save_tokenizer
from alloy.errors import CheckpointError, RecipeError, RequestError
from alloy.models.base import CausalLM
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.hf.config import parse_style, read_config, read_json, write_config
from alloy.models.hf.files import Progress, Stored
from alloy.models.hf.folder import (
    DEFAULT_SHARD,
    load_weights,
    match_weights,
    read_optional_json,
    save_weights,
    stored_tensors,
)
from alloy.models.hf.keys import Style
from alloy.models.hf.names import bare_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyConfig = HybridConfig | DecoderConfig
GENERATION = "generation_config.json"
# the one library whose numbers can be reproduced, where they differ
COMPAT = "transformers-5.23"
log = get_logger(__name__)

# kind -> class(config, device, dtype)
MODELS = Registry("model kind")
for _kind in ("nemotron_h", "nemotron_h_puzzle"):
    MODELS.add(_kind, "alloy.models.hybrid:HybridLM")
for _kind in ("llama", "qwen3", "qwen3_moe", "nemotron", "nemotron-nas"):
    MODELS.add(_kind, "alloy.models.llama:DecoderLM")


def build(config: AnyConfig, device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32) -> CausalLM:
    """A model with random weights; on device "meta" it has shapes and no memory."""
    kind: Any = MODELS.get(config.kind)
    place = torch.device("meta") if str(device) == "meta" else resolve_device(str(device))
    return kind(config, place, resolve_dtype(dtype) if isinstance(dtype, str) else dtype)


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    compat: str | None = None,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[CausalLM, "PreTrainedTokenizerBase | None"]:
    """The model and the tokenizer (None when there is none) of a Hugging Face folder.

    Args:
        path: a folder, or a hub id (owner/name)
        dtype: of the weights; None: as stored. Tensors that must stay fp32 do in any case.
        device: "auto", "cpu", "cuda", "cuda:1"; "meta": shapes alone, no weight is read
        compat: "transformers-5.23" reproduces that library's handling of dt in the Mamba layers
        layers: load only these blocks, in this order (None: all)
        progress: called with the bytes of every tensor read
    """
    if compat not in (None, COMPAT):
        raise RecipeError(f'compat = "{compat}" is not known. Use None or "{COMPAT}"')
    folder = hub.resolve(path)
    config, foreign, stored = inspect(folder)
    if layers is not None:
        config = take_layers(config, layers)
    model = build(config, "meta", dtype or stored_dtype(stored))
    # before any memory is taken: a config.json of another size would ask for more than there is
    found = match_weights(model, config, stored, folder, layers)
    if str(device) != "meta":
        model.to_empty(device=resolve_device(str(device)))
        if config.tie_embeddings:
            model.head.weight = model.embed.weight
        start = time.perf_counter()
        load_weights(model, config, found, folder, layers, progress)
        _log_rate("loaded", model, start)
    model.foreign = foreign
    model.generation = read_optional_json(folder / GENERATION)
    if isinstance(config, HybridConfig):
        model.compat = compat
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and len(tokenizer) > config.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the embedding {config.vocab} rows. "
            "Use the tokenizer that the model was trained with"
        )
    return model.eval(), tokenizer


def inspect(folder: Path) -> tuple[AnyConfig, dict[str, Any], dict[str, Stored]]:
    """Configuration, foreign keys of config.json and stored tensors of a folder; no weight is read."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds config.json and *.safetensors")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter, which cannot be loaded yet. Give a full checkpoint, or merge the adapter first"
        )
    data = read_json(folder / "config.json")
    stored = stored_tensors(folder)
    shared = [t.shape[0] for name, t in stored.items() if name.endswith("shared_experts.up_proj.weight")]
    config, foreign = read_config(data, str(folder / "config.json"), shared[0] if shared else None)
    eight_bit = [
        name for name, tensor in stored.items() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    ]
    if eight_bit:
        raise CheckpointError(
            f"{folder} has quantised weights ({len(eight_bit)} tensors in 8-bit floats, such as {eight_bit[0]}), which "
            "cannot be read. Use the checkpoint in bfloat16 or float32"
        )
    if isinstance(config, HybridConfig):
        config = _without_lost_mtp(config, stored, folder)
    return _with_stop_tokens(config, read_optional_json(folder / GENERATION)), foreign, stored


def stored_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The dtype of the folder's embedding, which is that of its matrices."""
    for name, tensor in stored.items():
        if bare_name(name) in ("embeddings.weight", "embed_tokens.weight"):
            return tensor.dtype
    return torch.bfloat16


def take_layers(config: AnyConfig, layers: Sequence[int]) -> AnyConfig:
    """The configuration of a model that keeps only these blocks, in this order."""
    if not layers or any(not 0 <= i < config.num_layers for i in layers) or len(set(layers)) != len(layers):
        raise CheckpointError(f"layers = {list(layers)} must be different numbers from 0 to {config.num_layers - 1}")
    data = config.model_dump()
    if config.layers is not None:
        data["layers"] = [config.layers[i] for i in layers]
    if isinstance(config, DecoderConfig):
        data |= {
            "num_layers": len(layers),
            "dense_layers": [j for j, i in enumerate(layers) if i in config.dense_layers],
        }
        return DecoderConfig.model_validate(data)
    data["pattern"] = "".join(config.pattern[i] for i in layers)
    if isinstance(config.ffn, tuple) and len(config.ffn) > 1:
        number = {i: config.pattern[:i].count("-") for i in layers}
        data["ffn"] = tuple(config.ffn[number[i]] for i in layers if config.pattern[i] == "-") or config.ffn[0]
    return HybridConfig.model_validate(data)


def save(
    model: CausalLM,
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config_style: Style = "hybrid",
    max_shard_bytes: int = DEFAULT_SHARD,
    progress: Progress | None = None,
) -> None:
    """Write a Hugging Face folder that loads to bit-equal tensors.

    Args:
        model: of any kind in `MODELS`; its foreign config keys are written too
        path: the folder; files of an earlier checkpoint there are replaced
        tokenizer: written beside the model
        config_style: "hybrid" as the released files, "transformers5" as that library writes
        max_shard_bytes: larger models are cut into several files
        progress: called with the bytes of every tensor written
    """
    if model.weights is not None:
        raise RequestError(
            f'a model with weights = "{model.weights}" cannot be saved: what they were rounded from is gone; '
            "save the model before, and quantise on load"
        )
    folder, config = Path(path), model.config
    name = str(model.embed.weight.dtype).removeprefix("torch.")
    data = write_config(config, model.foreign, parse_style(config_style), name)
    start = time.perf_counter()
    save_weights(model, config, folder, max_shard_bytes, progress)
    _log_rate("saved", model, start)
    ids = {key: data[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if data[key] is not None}
    _write_json(folder / GENERATION, {**model.generation, **ids})
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    _write_json(folder / "config.json", data)


def refuse_checkpoint(path: Path) -> None:
    """A command writes to no folder that holds a whole checkpoint (config.json comes last), which may be somebody's work."""
    if (path / "config.json").exists():
        raise RecipeError(f"{path} holds a checkpoint already; choose another folder or remove it")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(data, indent=2) + "\n")


def _without_lost_mtp(config: HybridConfig, stored: dict[str, Stored], folder: Path) -> HybridConfig:
    """A folder whose MTP weights another library dropped is loaded without them, with a warning."""
    if not config.mtp_depths or any(bare_name(name).startswith("mtp.") for name in stored):
        return config
    log.warning(
        "%s: num_nextn_predict_layers = %d but there are no mtp.* weights (transformers drops them when it saves). "
        "The model is loaded without multi-token prediction",
        folder,
        config.mtp_depths,
    )
    return HybridConfig.model_validate({**config.model_dump(), "mtp_depths": 0, "mtp_layers": None})


def _with_stop_tokens(config: AnyConfig, generation: dict[str, Any]) -> AnyConfig:
    """Released chat models name the end-of-turn token in generation_config.json only."""
    found = generation.get("eos_token_id")
    extra = [i for i in (found if isinstance(found, list) else [found]) if i is not None and i not in config.eos_ids]
    if not extra:
        return config
    if any(type(i) is not int for i in extra):
        raise CheckpointError(f"{GENERATION}: eos_token_id = {found} is neither a token id nor a list of them")
    return type(config).model_validate({**config.model_dump(), "eos_ids": (*config.eos_ids, *extra)})


def _log_rate(what: str, model: CausalLM, start: float) -> None:
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    seconds = time.perf_counter() - start
    if size >= 2**30:
        log.info("%s %.2f GiB in %.1f s (%.2f GB/s)", what, size / 2**30, seconds, size / seconds / 1e9)
