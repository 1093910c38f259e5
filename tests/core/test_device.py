"""Devices, dtypes, seeds, optional packages, hub names, the registry."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from alloy.core import device, hub
from alloy.core.device import (
    free_memory_bytes,
    host_memory,
    memory_bytes,
    peak_memory_bytes,
    require,
    resolve_device,
    resolve_dtype,
    rng_state,
    seed_everything,
    set_rng_state,
)
from alloy.core.registry import Registry
from alloy.errors import CheckpointError, RecipeError, ResourceError


def test_unknown_device_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear sentence; indices beyond the last device are unknown too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("gpu", "cuda:2", "cuda:x", "CPU"):
        with pytest.raises(RecipeError, match=rf'device = "{name}": .* one of cpu, cuda:0, cuda:1\.'):
            resolve_device(name)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto falls back to the CPU, "cuda" does not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(RecipeError, match=r'Use "auto" or one of cpu\.'):
        resolve_device("cuda")


def test_dtypes() -> None:
    """Names of torch, and nothing else that torch happens to have."""
    assert resolve_dtype("bfloat16") is torch.bfloat16
    for name in ("bf17", "nn", "int8"):
        with pytest.raises(RecipeError, match=f'dtype = "{name}" is not known. Use one of float32'):
            resolve_dtype(name)


def draws() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        float(torch.rand(())),
        float(np.random.randn()),
        random.gauss(0, 1),
    ]


def test_seed_and_state_repeat_the_draws(tmp_path: Path) -> None:
    """Seeding repeats from the start; the state repeats from the middle, also through a file of plain tensors."""
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    state = rng_state()
    expected = draws()
    torch.save(state, tmp_path / "rng.pt")
    draws()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draws() == expected
    seed_everything(2**40 + 3)


def test_require_names_the_extra() -> None:
    """Installed: the module. Missing: one line. A fault inside the package is not hidden."""
    assert require("json", extra="track", why="a test reads JSON").loads("1") == 1
    with pytest.raises(ResourceError) as caught:
        require("no_such_package", extra="track", why="log.tensorboard writes event files")
    assert str(caught.value) == (
        'log.tensorboard writes event files with no_such_package, which is not installed: pip install "alloy-lm[track]"'
    )


def test_require_passes_on_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is there but lacks a part of its own."""
    (tmp_path / "broken_package.py").write_text("import part_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="part_that_is_missing"):
        require("broken_package", extra="track", why="x")


def test_peak_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-sheet figures by name; None for a CPU and unknown devices."""
    assert device.peak_flops(torch.device("cpu"), torch.float32) is None
    cuda = torch.device("cuda", 0)
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device.peak_flops(cuda, torch.bfloat16) == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Something New")
    assert device.peak_flops(cuda, torch.bfloat16) is None


def test_peak_memory_counts_an_allocation() -> None:
    """64 MiB more at least, once they are touched."""
    before = peak_memory_bytes()
    assert before > 2**20
    block = np.ones(max(0, before - _current()) + 2**26, dtype=np.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= before + 2**25
    assert block[-1] == 1


MIB = 2**20


def _files(root: Path, files: dict[str, object]) -> Path:
    """A made-up /: 3,000 MiB available, and what else is given."""
    for name, content in {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {3000 * 1024} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({}, None, 3000),
        # cgroup v2: the container's own, whose path is / there
        ({"proc/self/cgroup": "0::/", f"{V2}/memory.max": 1000 * MIB, f"{V2}/memory.current": 700 * MIB}, 1000, 300),
        ({"proc/self/cgroup": "0::/", f"{V2}/memory.max": "max", f"{V2}/memory.current": 700 * MIB}, None, 3000),
        # what files left in the cache can be had again
        (
            {
                "proc/self/cgroup": "0::/",
                f"{V2}/memory.max": 1000 * MIB,
                f"{V2}/memory.current": 700 * MIB,
                f"{V2}/memory.stat": f"anon {400 * MIB}\ninactive_file {250 * MIB}",
            },
            1000,
            550,
        ),
        # the machine has less left than the limit
        ({"proc/self/cgroup": "0::/", f"{V2}/memory.max": 5000 * MIB, f"{V2}/memory.current": 700 * MIB}, 5000, 3000),
        # a group above that limits more
        (
            {
                "proc/self/cgroup": "0::/a/b",
                f"{V2}/a/b/memory.max": "max",
                f"{V2}/a/b/memory.current": 10 * MIB,
                f"{V2}/a/memory.max": 500 * MIB,
                f"{V2}/a/memory.current": 600 * MIB,
            },
            500,
            0,
        ),
        # cgroup v1, whose path is the host's: only the mount is there
        (
            {
                "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/1\n0::/",
                f"{V1}/memory.limit_in_bytes": 800 * MIB,
                f"{V1}/memory.usage_in_bytes": 300 * MIB,
                f"{V1}/memory.stat": f"inactive_file 5\ntotal_inactive_file {100 * MIB}",
            },
            800,
            600,
        ),
        # no limit in v1 is a number beyond any machine
        (
            {
                "proc/self/cgroup": "4:memory:/",
                f"{V1}/memory.limit_in_bytes": 9223372036854771712,
                f"{V1}/memory.usage_in_bytes": 300 * MIB,
            },
            None,
            3000,
        ),
    ],
)
def test_a_container_has_what_its_group_may_use(
    files: dict[str, object], limit: int | None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller of machine and cgroup, in all and free."""
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 8000 * 256, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert host_memory(_files(tmp_path, files)) == ((limit or 8000) * MIB, free * MIB)


def test_memory_of_this_machine() -> None:
    """Free is a part of all."""
    cpu = torch.device("cpu")
    assert 0 < free_memory_bytes(cpu) <= memory_bytes(cpu)


def _current() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_hub_takes_local_paths_first(tmp_path: Path) -> None:
    """A folder is itself; a name that is neither path nor id is refused at once."""
    assert hub.resolve(tmp_path) == tmp_path
    for name in ("no/such/path", "nothing", "./x"):
        with pytest.raises(CheckpointError, match="no such path, and not a hub id"):
            hub.resolve(name)


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network the message says what to do."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r'"owner/name": no such path here, and the hub cannot be reached .*hf download'
    ):
        hub.resolve("owner/name")


def test_registry() -> None:
    """Lazy targets, nearest names, one place each."""
    registry = Registry("thing")
    registry.add("join", "os.path:join")
    registry.add("here", 5)
    assert registry.names() == ["join", "here"]
    assert registry.get("join")("a", "b") == "a/b"  # type: ignore[operator]
    assert registry.get("here") == 5
    with pytest.raises(RecipeError, match=r'unknown thing "jion"\. Did you mean "join"\?'):
        registry.get("jion")
    with pytest.raises(RecipeError, match=r'unknown thing "zzz"\. Known: join, here\.'):
        registry.get("zzz")
    with pytest.raises(ValueError, match="registered already"):
        registry.add("here", 6)
    assert "here" in registry
    assert list(registry) == ["join", "here"]
