"""Which of a kernel's few configurations runs: tables made ahead, nothing is timed when a kernel is first used.

A kernel registers at most six candidates, the safest first. `tables/sm_90.json` maps "op/key" to one of them, where the key
names what the best choice depends on (head dims, dtype). Without an entry the first candidate runs. `alloy bench --autotune`
times the candidates and writes the table; tests run every candidate through `override`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

Config = Mapping[str, int]

TABLES = Path(__file__).parent / "tables"
CANDIDATES: dict[str, tuple[Config, ...]] = {}
# (op, key) of every `pick` so far: what `--autotune` has to time
PICKED: set[tuple[str, str]] = set()
_overrides: dict[str, Config] = {}


def register(op: str, *candidates: Config) -> None:
    """Declare the configurations that `op` may run with: block sizes, `num_warps`, `num_stages`."""
    if not 1 <= len(candidates) <= 6:
        raise ValueError(f"{op}: {len(candidates)} configurations; a kernel has between one and six")
    CANDIDATES[op] = candidates


def pick(op: str, key: str) -> Config:
    """The configuration of `op` for shapes described by `key`, on this machine."""
    PICKED.add((op, key))
    return _overrides.get(op) or _pick(op, key, arch())


@contextmanager
def override(op: str, config: Config) -> Iterator[None]:
    """Within the block `op` runs with `config` whatever its shapes."""
    before = _overrides.get(op)
    _overrides[op] = config
    try:
        yield
    finally:
        _overrides.pop(op)
        if before is not None:
            _overrides[op] = before


@cache
def arch() -> str:
    """This machine's table: "sm_80", "sm_90" or "sm_100", the newest that its GPU is not older than."""
    if not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability()
    return next((f"sm_{n}" for n in (100, 90) if 10 * major + minor >= n), "sm_80")


def table(name: str) -> dict[str, Config]:
    """The entries of one architecture's table; empty without a file."""
    path = TABLES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def _pick(op: str, key: str, name: str) -> Config:
    chosen = table(name).get(f"{op}/{key}")
    candidates = CANDIDATES[op]
    # an entry that is no longer a candidate was never tested
    return chosen if chosen in candidates else candidates[0]
