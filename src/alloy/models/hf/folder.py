"""Weights of a checkpoint folder: streamed into a model tensor by tensor, and written as shards.

Everything is decided from the files' headers before the first weight is read: which tensors are missing, unexpected or of
another shape. Peak memory of a load is the model and one tensor.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alloy.core.logging import get_logger
from alloy.core.runs import atomic_write
from alloy.errors import CheckpointError
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.hf.config import read_json
from alloy.models.hf.files import Progress, Stored, TensorReader, read_header, write_tensors
from alloy.models.hf.names import IGNORED, Entry, Piece, bare_name, entries, reading_plan

AnyConfig = HybridConfig | DecoderConfig
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LISTED = 10
DEFAULT_SHARD = 5 * 2**30
log = get_logger(__name__)


@dataclass
class Audit:
    """How the tensors of a folder compare with those a model needs.

    Attributes:
        stored: bare name -> where it lies, for everything the model takes
        missing: hub names of absent tensors
        unexpected: stored names nothing wants
        misshaped: (stored name, stored shape, wanted shape)
    """

    stored: dict[str, Stored] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is missing, unexpected or mis-shaped."""
        return not (self.missing or self.unexpected or self.misshaped)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, from the headers alone."""
    found: dict[str, Stored] = {}
    for file in weight_files(path):
        found |= read_header(file)
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX)["weight_map"]
        lost = [name for name, file in listed.items() if name not in found or found[name].file.name != file]
        if lost:
            raise CheckpointError(
                f"{path / INDEX} names {len(lost)} tensors that their shards do not hold ({_some(lost)}). "
                "The folder mixes two checkpoints; download or save it again"
            )
    return found


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder; CheckpointError says why if there are none or some are absent."""
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{path / INDEX} has no weight_map of tensors and file names. Download it again")
        names = sorted(set(listed.values()))
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{path / INDEX} names {len(names)} shards, {len(absent)} of them absent: {_some(absent)}. "
                "Finish the download, or save the checkpoint again"
            )
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not re.search(r"-of-0*[2-9]", files[0].name):
        return files
    if files:
        raise CheckpointError(
            f"{path} has {len(files)} safetensors files but no {INDEX}: a download or a save was cut off. Run it again"
        )
    pickled = [file.name for pattern in PICKLES for file in sorted(path.glob(pattern))]
    if pickled:
        raise CheckpointError(
            f"{path} holds pickled weights only ({_some(pickled)}); unpickling can run any code, so they are not read. "
            "Convert them to safetensors where you trust them"
        )
    raise CheckpointError(f"{path} holds no weights (no *.safetensors). Give the folder of a complete checkpoint")


def model_tensors(model: nn.Module, config: AnyConfig, written: bool = False) -> dict[str, Tensor]:
    """Name -> tensor of everything a checkpoint holds.

    Args:
        model: the model
        config: its configuration
        written: as saved: a tied head of a decoder is left out, since every reader ties it again
    """
    tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    if written and config.tie_embeddings and isinstance(config, DecoderConfig):
        del tensors["head.weight"]
    return tensors


def audit(
    stored: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    config: AnyConfig,
    layers: Sequence[int] | None = None,
) -> Audit:
    """Compare what a folder holds with what a model of `shapes` needs."""
    plan = reading_plan(shapes, config, layers)
    result = Audit()
    nested = any("language_model." in name for name in stored)
    covered: set[tuple[str, int | None]] = set()
    for name, tensor in stored.items():
        bare = bare_name(name)
        pieces = plan.get(bare)
        if pieces is None:
            if not _is_ignorable(name, bare, nested, layers):
                result.unexpected.append(name)
        elif tensor.shape != pieces[0].shape:
            result.misshaped.append((name, tensor.shape, pieces[0].shape))
        elif bare in result.stored:
            result.unexpected.append(name)
        else:
            result.stored[bare] = tensor
            covered |= {(piece.key, piece.expert) for piece in pieces}
    wrong = {(piece.key, piece.expert) for name, *_ in result.misshaped for piece in plan[bare_name(name)]}
    for entry in entries(shapes, config, layers):
        have = covered | wrong
        is_tied = entry.key == "head.weight" and config.tie_embeddings
        if not is_tied and (entry.key, entry.expert) not in have and (entry.key, None) not in have:
            result.missing.append(entry.name)
    return result


def _is_ignorable(name: str, bare: str, nested: bool, layers: Sequence[int] | None) -> bool:
    if IGNORED.search(name) or (nested and "language_model." not in name):
        return True
    match = re.match(r"layers\.(\d+)\.", bare)
    return bool(match and layers is not None and int(match[1]) not in layers)


def explain(result: Audit, path: Path) -> str:
    """The message for a folder that does not match: what, how many, and why that usually happens."""
    parts: list[str] = []
    if result.missing:
        parts.append(f"{len(result.missing)} missing ({_some(result.missing)})")
    if result.unexpected:
        parts.append(f"{len(result.unexpected)} unexpected ({_some(result.unexpected)})")
    if result.misshaped:
        shown = [f"{name} is {list(have)}, needs {list(want)}" for name, have, want in result.misshaped]
        parts.append(f"{len(result.misshaped)} of another shape ({_some(shown)})")
    return f"{path} does not match its config.json: {'; '.join(parts)}. {_cause(result)}"


def _cause(result: Audit) -> str:
    if any(re.search(r"experts\.\w+_proj$", name) for name in result.unexpected):
        return "Likely cause: stacked experts in a layout that is not known here"
    if result.missing == ["lm_head.weight"]:
        return "Likely cause: a tied head; set tie_word_embeddings to true in config.json"
    if result.missing and len(result.unexpected) >= len(result.missing):
        return "Likely cause: a wrong prefix or other names; the weights are those of another architecture or library"
    if result.misshaped and not result.missing:
        return "Likely cause: config.json belongs to another size"
    if result.missing:
        return "Likely cause: an incomplete download or save, or a pattern longer than the weights"
    return "Likely cause: config.json describes fewer layers or parts than the weights hold"


def match_weights(
    model: nn.Module,
    config: AnyConfig,
    stored: Mapping[str, Stored],
    path: Path,
    layers: Sequence[int] | None = None,
) -> dict[str, Stored]:
    """Bare name -> where it lies, for everything the model takes; CheckpointError unless that is all of it, in floats.

    Args:
        model: the model, which needs no memory yet
        config: its configuration
        stored: of `stored_tensors(path)`
        path: the folder, for messages
        layers: which of the file's blocks the model's are (None: all)
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model_tensors(model, config).items()}
    result = audit(stored, shapes, config, layers)
    if not result.is_clean:
        raise CheckpointError(explain(result, path))
    odd = [name for name, tensor in result.stored.items() if not tensor.dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"{path}: {len(odd)} weights are stored as whole numbers ({_some(odd)}). "
            "Use the checkpoint in bfloat16 or float32"
        )
    return result.stored


def load_weights(
    model: nn.Module,
    config: AnyConfig,
    stored: Mapping[str, Stored],
    path: Path,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill a materialised model from a folder, converting to each tensor's own dtype and device.

    Args:
        model: the model, its memory allocated
        config: its configuration
        stored: of `match_weights`
        path: the folder, for messages
        layers: which of the file's blocks the model's are (None: all)
        progress: called with the bytes of each tensor read
    """
    tensors = model_tensors(model, config)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    plan = reading_plan(shapes, config, layers)
    by_file: dict[Path, list[str]] = defaultdict(list)
    for bare, tensor in stored.items():
        by_file[tensor.file].append(bare)
    head = None
    with torch.no_grad():
        for file, names in by_file.items():
            with TensorReader(file, progress) as reader:
                for bare in names:
                    if bare == "lm_head.weight" and config.tie_embeddings:
                        head = reader.read(stored[bare])
                    else:
                        _fill(reader, stored[bare], plan[bare], tensors)
    if head is not None and not torch.equal(head.to(tensors["embed.weight"]), tensors["embed.weight"]):
        raise CheckpointError(
            f"{path}: tie_word_embeddings is true but lm_head.weight differs from the embedding. "
            "Set tie_word_embeddings to false in config.json"
        )


def _fill(reader: TensorReader, stored: Stored, pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> None:
    targets = [tensors[p.key].detach() if p.expert is None else tensors[p.key].detach()[p.expert] for p in pieces]
    first = targets[0]
    if len(pieces) == 1 and first.dtype == stored.dtype and first.device.type == "cpu" and first.is_contiguous():
        reader.read(stored, into=first)
        return
    value = reader.read(stored)
    for piece, target in zip(pieces, targets, strict=True):
        part = value if piece.rows is None else value[:, slice(*piece.rows)]
        target.copy_(part.reshape(target.shape))


def save_weights(
    model: nn.Module,
    config: AnyConfig,
    path: Path,
    max_shard_bytes: int = DEFAULT_SHARD,
    progress: Progress | None = None,
) -> None:
    """Write a model's tensors as one file, or as shards with an index.

    Each file appears complete or not at all. The old index goes first and the new one comes last, so that a folder whose
    save was cut off is recognised and never read as a mixture.
    """
    tensors = model_tensors(model, config, written=True)
    shards = list(
        plan_shards(entries({key: tuple(t.shape) for key, t in tensors.items()}, config), tensors, max_shard_bytes)
    )
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        (path / SINGLE).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        write_tensors(path / name, {entry.name: _part(tensors, entry) for entry in shard}, progress)
    for stale in path.glob("model-*-of-*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    if len(shards) > 1:
        total = sum(_part(tensors, entry).nbytes for shard in shards for entry in shard)
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write(path / INDEX, json.dumps(index, indent=2) + "\n")


def plan_shards(items: Iterator[Entry], tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[Entry]]:
    """Cut the tensors into runs of at most `limit` bytes; a larger tensor has a shard of its own."""
    shard: list[Entry] = []
    size = 0
    for entry in items:
        nbytes = _part(tensors, entry).nbytes
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += nbytes
    yield shard


def _part(tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
    tensor = tensors[entry.key].detach()
    return (tensor if entry.expert is None else tensor[entry.expert]).view(entry.shape)


def bad_values(stored: Mapping[str, Stored]) -> dict[str, int]:
    """Name -> number of NaN and infinite elements, for tensors that have any; reads every weight."""
    found: dict[str, int] = {}
    by_file: dict[Path, dict[str, Stored]] = defaultdict(dict)
    for name, tensor in stored.items():
        by_file[tensor.file][name] = tensor
    for file, tensors in by_file.items():
        with TensorReader(file) as reader:
            for name, tensor in tensors.items():
                if tensor.dtype.is_floating_point:
                    # 8-bit floats have no isfinite of their own
                    value = reader.read(tensor)
                    value = value.float() if tensor.dtype.itemsize == 1 else value
                    count = int((~value.isfinite()).sum())
                    if count:
                        found[name] = count
    return found


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is none."""
    return read_json(path) if path.is_file() else {}
