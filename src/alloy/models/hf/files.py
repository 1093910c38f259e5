"""safetensors files, read and written one tensor at a time.

A file is 8 bytes (length of the header, little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the bytes
of the tensors. Reading goes straight into a tensor's memory; nothing is mapped, so that a load takes the model and no more.

Differs: from the safetensors package, which holds a whole file at a time when writing.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from alloy.core.runs import atomic_path
from alloy.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000

# called with the bytes that were just read or written
Progress = Callable[[int], None]


class Stored(NamedTuple):
    """A tensor in a file, from the header alone."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    # position of its first byte in the file
    start: int
    size: int


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, in the order of its bytes; CheckpointError if it is damaged or truncated."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Download or save the checkpoint again")
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head.startswith(b"version "):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights. Run git lfs pull in its folder")
        if len(head) < 8 or length > min(MAX_HEADER, total - 8):
            raise CheckpointError(
                f"{path} ({total} bytes) is truncated or no safetensors file. Download or save it again"
            )
        try:
            header = json.loads(file.read(length))
            return _entries(path, header, 8 + length, total)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}). Download or save it again") from error


def _entries(path: Path, header: dict[str, Any], base: int, total: int) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f'{path}: {name} has dtype "{entry["dtype"]}", which cannot be read')
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        start, end = (int(n) for n in entry["data_offsets"])
        size = torch.Size(shape).numel() * dtype.itemsize
        if end - start != size or start < 0:
            raise CheckpointError(
                f"{path}: {name} of shape {list(shape)} needs {size} bytes, the header gives {end - start}"
            )
        found[name] = Stored(path, dtype, shape, base + start, size)
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].size)))
    last = base
    for name, entry in ordered.items():
        if entry.start != last:
            raise CheckpointError(
                f"{path} is damaged: {name} begins at byte {entry.start}, the tensor before it ends at {last}. "
                "Download or save it again"
            )
        last += entry.size
    if last != total:
        state = "truncated" if total < last else "damaged (extra bytes at the end)"
        raise CheckpointError(
            f"{path} is {state}: its header describes {last} bytes, it has {total}. Download or save it again"
        )
    return ordered


class TensorReader:
    """Reads tensors out of one open file."""

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self._file = path.open("rb", buffering=0)
        self._progress = progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, stored: Stored, into: Tensor | None = None) -> Tensor:
        """The tensor, (stored.shape); `into`: a contiguous CPU tensor of its size and dtype that takes the bytes."""
        target = torch.empty(stored.shape, dtype=stored.dtype) if into is None else into
        view = memoryview(_bytes(target))
        self._file.seek(stored.start)
        done = 0
        while done < stored.size:
            count = self._file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{stored.file} became shorter while it was read. Download or save it again")
            done += count
        if self._progress is not None:
            self._progress(stored.size)
        return target


def write_tensors(path: Path, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> None:
    """Write a safetensors file in one step: it appears complete, or not at all. At most one tensor is copied at a time."""
    # wide elements first, so that every tensor is aligned to its element
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(memoryview(_bytes(tensor.detach().cpu().contiguous())))
            if progress is not None:
                progress(tensor.numel() * tensor.element_size())


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor as a flat NumPy array that shares its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
