"""config.json both ways: both generations and every alias in, one agreed form out. No torch here.

Reading refuses what the modules could not compute, and two spellings that disagree. Keys the project does not use are
handed back as `foreign`, kept beside the model and written again.

Papers: Nemotron-H (2025), arXiv:2504.03624; Llama-Nemotron (2025), arXiv:2505.00949 (block_configs).
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alloy.errors import CheckpointError, RecipeError
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.hf.decoder import DECODERS, read_decoder, write_decoder
from alloy.models.hf.hybrid import HYBRIDS, read_hybrid, write_hybrid
from alloy.models.hf.keys import ConfigKeys, Style, messages

AnyConfig = HybridConfig | DecoderConfig
KINDS = (*HYBRIDS, *DECODERS)


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
    try:
        return _read_config(data, source, shared_rows)
    except ValidationError as error:
        raise CheckpointError(f"{source}: {'; '.join(messages(error))}") from error
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source}: a value is not of the type that its key has ({error}). Save or download the checkpoint again"
        ) from error


def _read_config(data: Mapping[str, Any], source: str, shared_rows: int | None) -> tuple[AnyConfig, dict[str, Any]]:
    kind = data.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f'{source}: model_type = "{kind}" is not supported. Known: {", ".join(KINDS)}')
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", data["quantization_config"].get("quant_algo", "?"))
        raise CheckpointError(
            f'{source}: quantization_config with method "{method}": quantised weights cannot be read. '
            "Use the checkpoint in bfloat16 or float32"
        )
    keys = ConfigKeys(data, source)
    keys.drop("model_type", "architectures", "torch_dtype", "dtype", "quantization_config")
    config = read_hybrid(kind, keys, shared_rows) if kind in HYBRIDS else read_decoder(kind, keys)
    return config, keys.rest()


def parse_style(name: str) -> Style:
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
        return data | write_hybrid(config, data.pop("block_configs", None), data.pop("mtp_block_configs", None), style)
    return data | write_decoder(config)
