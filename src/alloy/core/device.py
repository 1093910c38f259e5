"""Devices, dtypes, seeds, memory and the optional packages. torch is imported inside the functions that need it,
so that `require` costs nothing."""

import importlib
import os
import random
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alloy.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")

# dense matrix FLOP/s by part of the device name and dtype (vendors' data sheets, without sparsity)
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12}),
    ("H200", {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}),
    ("H100 PCIe", {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12}),
    ("H100", {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}),
    ("A100", {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}),
    ("L40S", {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12}),
    ("A10G", {"bfloat16": 70e12, "float16": 70e12, "float32": 35e12}),
    ("RTX 4090", {"bfloat16": 165e12, "float16": 165e12, "float32": 82.6e12}),
    ("V100", {"float16": 125e12, "float32": 15.7e12}),
    ("T4", {"float16": 65e12, "float32": 8.1e12}),
)


def require(package: str, extra: str, why: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        package: import name, "tensorboard".
        extra: the extra of alloy-lm that installs it.
        why: what needs it, as the start of a sentence: "log.tensorboard writes event files".
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        raise ResourceError(f'{why} with {package}, which is not installed: pip install "alloy-lm[{extra}]"') from error


def resolve_device(name: str = "auto") -> "torch.device":
    """The torch device called "auto" (cuda if there is one), "cpu", "cuda" or "cuda:N"."""
    import torch

    have = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if len(have) > 1 else torch.device("cpu")
    if name == "cuda" and len(have) > 1:
        return torch.device("cuda", torch.cuda.current_device())
    if name in have:
        return torch.device(name)
    raise RecipeError(f'device = "{name}": there is no such device here. Use "auto" or one of {", ".join(have)}.')


def resolve_dtype(name: str) -> "torch.dtype":
    """The torch dtype called "float32", "bfloat16", "float16" or "float64"."""
    import torch

    if name not in DTYPES:
        raise RecipeError(f'dtype = "{name}" is not known. Use one of {", ".join(DTYPES)}.')
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]  untyped in torch


def rng_state() -> dict[str, Any]:
    """State of all generators, as plain values and CPU tensors, for `set_rng_state`."""
    import numpy as np
    import torch

    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    version, internal, gauss = random.getstate()
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {**numpy_state, "state": {"key": [int(word) for word in inner["key"]], "pos": int(inner["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put all generators back to what `rng_state` returned."""
    import numpy as np
    import torch

    python, numpy_state, cuda = state["python"], state["numpy"], state["cuda"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    inner = numpy_state["state"]
    np.random.set_state({**numpy_state, "state": {"key": np.array(inner["key"], dtype=np.uint32), "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def peak_flops(device: "torch.device", dtype: "torch.dtype") -> float | None:
    """Dense matrix FLOP/s of a known accelerator; None where it is not known (CPUs among them)."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peaks in _PEAKS:
        if part in name:
            return peaks.get(str(dtype).removeprefix("torch."))
    return None


def peak_memory_bytes(device: "torch.device | None" = None) -> int:
    """Most memory held so far: of the CUDA device, or of this process."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def memory_bytes(device: "torch.device") -> int:
    """Memory that `device` has in all: of the CUDA device, or of this machine or container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    return host_memory()[0]


def free_memory_bytes(device: "torch.device") -> int:
    """Memory that can still be had: of the CUDA device, what torch keeps for itself included, or of this host."""
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return host_memory()[1]


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes in all and free of this machine, or of the container where that has less (cgroup v2 and v1)."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # in KiB; macOS has no such file
    free = min(total, _numbers(root / "proc/meminfo").get("MemAvailable:", total // 1024) * 1024)
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        number, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if number == "0":
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # every group above limits too; inside a container the path may be that of the host, and only the mount is there
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None:
                # cached files give way
                used -= _numbers(folder / "memory.stat").get(names[2], 0)
                total, free = min(total, limit), min(free, max(0, limit - used))
            if folder == mount:
                break
    return total, free


def _number(path: Path) -> int | None:
    """The number in a file; None when there is none, or "max"."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """First word -> second of every line of a file; empty when there is none."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
