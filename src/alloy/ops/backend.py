"""The one table that says which function computes an op on which kind of device.

Backends: "torch" is the readable reference and runs everywhere; "cpu" is plain PyTorch tuned for CPU cores with a
hand-written backward; "triton" are kernels for NVIDIA GPUs of compute capability 8.0 and newer. Triton is imported on the
first use of a kernel, and never where it is not installed: such functions are named by "module:function".
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from alloy.errors import RecipeError

Op = Callable[..., Any]

TABLE: dict[str, dict[str, Op | str]] = {}

# what is taken first on each device type; "torch" is always last and always there
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton",)}
_forced: list[str] = []


def add(op: str, backend: str, fn: Op | str) -> None:
    """Register `fn`, or the function at "module:function", as `op` on `backend`. A place in the table is taken once."""
    row = TABLE.setdefault(op, {})
    if backend in row:
        raise ValueError(f'op "{op}" has a "{backend}" function already')
    row[backend] = fn
    _choose.cache_clear()


def resolve(op: str, device_type: str) -> Op:
    """The function that computes `op` on `device_type` ("cpu", "cuda", ...)."""
    return cast(Op, TABLE[op][_ready(op, device_type, _forced[-1] if _forced else None)])


def run(op: str, x: Tensor, *args: Any) -> Any:
    """Compute `op` of x (any shape) and `args` where x is. Autocast is off inside: an op fixes its own dtypes."""
    if not torch.is_autocast_enabled(x.device.type):
        return call(op, x, *args)
    with torch.autocast(x.device.type, enabled=False):
        return call(op, x, *args)


def call(op: str, x: Tensor, *args: Any) -> Any:
    """As `run` of x (any shape), with autocast as it is, for ops that are torch's own in other places."""
    fn = resolve(op, x.device.type)
    # a kernel is launched on the current device, whatever its tensors are on
    if x.is_cuda and not torch.compiler.is_compiling() and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return fn(x, *args)
    return fn(x, *args)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on, for ops that are matmuls of their inputs; else as they are."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op that has a `name` function uses it; the others use "torch"."""
    known = sorted({backend for row in TABLE.values() for backend in row})
    if name not in known:
        raise RecipeError(f'unknown backend "{name}". Known: {", ".join(known)}.')
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def explain(op: str, device_type: str = "cpu", **shapes: object) -> str:
    """One line: what would run for `op` and why. `shapes` are repeated in the line."""
    if op not in TABLE:
        raise RecipeError(f'unknown op "{op}". Known: {", ".join(sorted(TABLE))}.')
    forced = _forced[-1] if _forced else None
    chosen = _choose(op, device_type, forced)
    if forced is not None:
        why = f"use_backend({forced!r})" + ("" if chosen == forced else ", which lacks this op")
    elif chosen != "torch":
        why = f"first choice on {device_type}"
    elif device_type == "cuda" and "triton" in TABLE[op]:
        why = missing_triton() or "kernels are not for this device"
    else:
        why = f"no function of {device_type}'s own"
    fn = _function(op, chosen)
    given = "".join(f" {name}={value}" for name, value in shapes.items())
    return f"{op}{given} on {device_type}: {chosen} ({fn.__module__}.{fn.__name__}), {why}; has {', '.join(TABLE[op])}"


def choices(device_types: tuple[str, ...] = ("cpu", "cuda")) -> list[dict[str, str]]:
    """One row an op: its name, what runs on each device type, and the backends it has."""
    return [
        {"op": op, **{kind: _choose(op, kind, None) for kind in device_types}, "has": ", ".join(row)}
        for op, row in TABLE.items()
    ]


@cache
def missing_triton() -> str | None:
    """Why Triton kernels cannot run on this machine's CUDA device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


@cache
def _choose(op: str, device_type: str, forced: str | None) -> str:
    order = (forced,) if forced is not None else _PREFERENCE.get(device_type, ())
    for backend in order:
        # a forced backend is taken at its word: kernels also run in Triton's interpreter
        if backend in TABLE[op] and (backend != "triton" or forced is not None or missing_triton() is None):
            return backend
    return "torch"


# a compiler calls this while it traces: an import is nothing that it could trace
@torch.compiler.assume_constant_result
def _ready(op: str, device_type: str, forced: str | None) -> str:
    """The backend that computes `op`, its function imported."""
    backend = _choose(op, device_type, forced)
    _function(op, backend)
    return backend


def _function(op: str, backend: str) -> Op:
    fn = TABLE[op][backend]
    if isinstance(fn, str):
        module, name = fn.split(":")
        TABLE[op][backend] = fn = getattr(importlib.import_module(module), name)
    return fn
