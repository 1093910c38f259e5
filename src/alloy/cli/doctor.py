"""`alloy doctor`: what this installation can do, and what would let it do more."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from typing import Annotated, Any

import typer

import alloy

_PACKAGES = (
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface-hub", "pydantic", "typer", "rich", "fsspec",
    "jinja2", "matplotlib", "pyarrow",
)  # fmt: skip
# what each extra is for; its packages come from the installed metadata
_EXTRAS = {
    "cpu": "loops compiled for the processor: several answers at once, drafts, recurrent states",
    "track": "TensorBoard as a metric sink (log.tensorboard = true)",
    "serve": "the HTTP server (alloy serve), grammars, load on servers (alloy bench serve), talking to them (alloy chat URL)",
    "dev": "tests and checks of this repository",
    "interpreter": "tests of the GPU kernels on machines without a GPU",
}
_ADVICE = (
    "GOMP_SPINCOUNT is not set: when other programs share the cores, steps may take several times as long. "
    "Start with GOMP_SPINCOUNT=1000 in the environment."
)

Facts = dict[str, Any]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Versions, devices, backends, threads, and what each extra would add."""
    facts = diagnose()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for title, section in facts.items():
        typer.echo(f"{title}")
        rows = section if isinstance(section, dict) else dict.fromkeys(section, "")
        width = max((len(name) for name in rows), default=0)
        for name, value in rows.items():
            typer.echo(f"  {name.ljust(width)}  {_written(value)}".rstrip())


def diagnose() -> Facts:
    """All findings, as plain values."""
    return {
        "versions": versions(),
        "devices": devices(),
        "threads": threads(),
        "backends": backends(),
        "extras": extras(),
        "advice": advice(),
    }


def versions() -> Facts:
    """Installed versions; None for what is missing."""
    found: Facts = {"alloy-lm": alloy.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        found[package] = _version(package)
    return found


def devices() -> Facts:
    """CPU and accelerators, with memory and the peak rate that MFU is counted against."""
    import torch

    from alloy.core.device import memory_bytes, peak_flops

    def gib(device: torch.device) -> float:
        return round(memory_bytes(device) / 2**30, 1)

    capability = torch.backends.cpu.get_cpu_capability()
    found: Facts = {
        "cpu": {"cores": len(os.sched_getaffinity(0)), "vectors": capability, "memory_gib": gib(torch.device("cpu"))}
    }
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found[f"cuda:{index}"] = {
            "name": torch.cuda.get_device_name(device),
            "memory_gib": gib(device),
            "peak_bf16_tflops": (peak_flops(device, torch.bfloat16) or 0.0) / 1e12 or None,
        }
    return found


def threads() -> Facts:
    """How many threads torch uses, and what the environment says about it."""
    import torch

    found: Facts = {"torch": torch.get_num_threads(), "torch between operators": torch.get_num_interop_threads()}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        found[name] = os.environ.get(name)
    return found


def backends() -> Facts:
    """Which implementation each operation uses on the devices of this machine."""
    import torch

    from alloy import ops

    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {row["op"]: {name: value for name, value in row.items() if name != "op"} for row in ops.choices(kinds)}


def extras() -> Facts:
    """For each extra: what it is for, and which of its packages are missing."""
    wanted: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires("alloy-lm") or []
    except importlib.metadata.PackageNotFoundError:
        return {"none": "alloy-lm runs from a source tree that is not installed: pip install -e ."}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and extra:
            wanted.setdefault(extra[1], []).append(name[0])
    found: Facts = {}
    for extra, packages in wanted.items():
        missing = [package for package in packages if _version(package) is None]
        state = f'missing {", ".join(missing)}: pip install "alloy-lm[{extra}]"' if missing else "installed"
        found[extra] = f"{_EXTRAS.get(extra, '')}; {state}".removeprefix("; ")
    return found


def advice() -> list[str]:
    """What to change on this machine."""
    found: list[str] = []
    if "GOMP_SPINCOUNT" not in os.environ and platform.system() == "Linux":
        found.append(_ADVICE)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _written(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items() if inner is not None)
    return str(value)
