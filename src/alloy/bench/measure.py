"""Runs the problems of a case one implementation at a time: right numbers first, then memory, then time."""

import gc
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alloy.bench import peers
from alloy.bench.case import PEER_SLACK, Outputs, Problem, Run
from alloy.bench.result import OURS, Ceilings, Row
from alloy.bench.timing import (
    copy_bytes_per_s,
    matmul_flops_per_s,
    peak_extra_bytes,
    read_bytes_per_s,
    time_graph_ms,
    time_ms,
)

# what rotates through a graph is at least this many times the L2 (60 MB on an H200)
ROTATED_BYTES = 240e6
MOST_ROTATED = 64
# calls longer than this are timed ten times instead of twenty, and three times
SLOW_MS, VERY_SLOW_MS = 50.0, 2000.0


@dataclass(frozen=True)
class Item:
    """One implementation of one problem: what a process measures, and where another one goes on after a crash."""

    case: str
    problem: Problem
    name: str
    run: Run

    def row(self, **fields: Any) -> Row:
        """A row of this item."""
        p = self.problem
        return Row(self.case, p.label, self.name, flops=p.flops, compute=p.compute, **fields)


def items(
    case: str, problems: Iterator[Problem], wanted: Collection[str] | None = None, only: Collection[str] = ()
) -> Iterator[Item]:
    """Ours, then the wanted peers (None: all), problem by problem; `only`: see `chosen`."""
    for problem in chosen(problems, only):
        yield Item(case, problem, OURS, problem.ours)
        for label, run in problem.peers.items():
            if wanted is None or peers.peer_of(label) in wanted:
                yield Item(case, problem, label, run)


def chosen(problems: Iterator[Problem], only: Collection[str]) -> Iterator[Problem]:
    """Problems whose label holds one of the texts; all if there is no text."""
    return (problem for problem in problems if not only or any(text in problem.label for text in only))


class Bench:
    """Measures items on one device; the reference of a problem is computed once for all its items."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device = device
        self.repeats = 10 if quick else 20
        self._reference: tuple[Problem, dict[str, Tensor]] | None = None

    def measure(self, item: Item) -> Row:
        """The row of `item`; a peer that is not installed gives one that says so."""
        self.clean()
        version = None
        if item.name != OURS:
            version = peers.version(item.name)
            if version is None:
                return item.row(status="absent")
        errors = self.errors(item.problem, item.run)
        if not errors:
            return item.row(version=version, message=f"{version}, outputs not compared", **self.time(item))
        slack = 1.0 if item.name == OURS else PEER_SLACK
        output, error = max(errors.items(), key=lambda pair: pair[1] / item.problem.limit(pair[0]))
        tolerance = slack * item.problem.limit(output)
        known: dict[str, Any] = {"error": error, "tolerance": tolerance, "output": output, "version": version}
        if not error <= tolerance:
            return item.row(status="failed", message=f"wrong numbers in {output}", **known)
        return item.row(**known, **self.time(item))

    def errors(self, problem: Problem, run: Run) -> dict[str, float]:
        """Relative error of every output of `run`; infinite where something is not finite."""
        if self._reference is None or self._reference[0] is not problem:
            self._reference = None
            self._reference = problem, dict(problem.reference(self.draw(problem)))
        reference = self._reference[1]
        outputs: Outputs = problem.part(run(self.draw(problem)))
        if not outputs and run is not problem.ours:
            # a peer that keeps states of its own
            return {}
        missing = reference.keys() ^ outputs.keys()
        if missing:
            raise ValueError(f"{problem.label}: {sorted(missing)} are not computed by both sides")
        return {name: relative_error(outputs[name], expected) for name, expected in reference.items()}

    def time(self, item: Item) -> dict[str, Any]:
        """Milliseconds of one call, the bytes it has to move, and on a GPU the most memory that it held."""
        problem = item.problem
        inputs = self.draw(problem)
        needed = problem.bytes(inputs) if callable(problem.bytes) else problem.bytes
        call = bind(item.run, inputs)
        found: dict[str, Any] = {"bytes": needed, "planned_bytes": problem.planned_bytes}
        # the first call may leave something behind, such as the moments of an optimizer
        call()
        if self.device == "cuda":
            own = torch.cuda.memory_allocated() if problem.holds_inputs else 0
            found["peak_bytes"] = own + peak_extra_bytes(call)
        if problem.in_graph and self.device == "cuda":
            count = min(MOST_ROTATED, max(2, math.ceil(ROTATED_BYTES / needed)))
            calls = [bind(item.run, self.draw(problem, seed)) for seed in range(count)]
            ms = time_graph_ms(calls, self.repeats)
        else:
            ms = time_ms(call, 1, 0, self.device)
            repeats = 3 if ms > VERY_SLOW_MS else 10 if ms > SLOW_MS else self.repeats
            ms = time_ms(call, repeats, 0, self.device)
        rate = problem.tokens / ms * 1e3 if problem.tokens else None
        return {**found, "ms": ms, "tokens_per_s": rate}

    def clean(self) -> None:
        """Give back what the item before held: blocks cut for one size serve another badly."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def draw(self, problem: Problem, seed: int = 0) -> Any:
        """Inputs of `problem`, the same for the same seed."""
        torch.manual_seed(seed)
        with torch.device(self.device):
            return problem.inputs()


def bind(run: Run, inputs: Any) -> Callable[[], Outputs]:
    """`run` of these inputs, without arguments."""
    return lambda: run(inputs)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64, both (...) of one shape."""
    if found.shape != expected.shape:
        raise ValueError(f"an output is {tuple(found.shape)}; the reference is {tuple(expected.shape)}")
    found, expected = found.detach().double(), expected.detach().double()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()
    return error if math.isfinite(error) else math.inf


def ceilings(device: str, quick: bool = False) -> Ceilings:
    """What this machine moves and multiplies: a 2 GiB copy and 8192^3 products on a GPU; reads and 1024^3 on a CPU."""
    if device == "cuda":
        rates = {"bfloat16": matmul_flops_per_s(), "float32": matmul_flops_per_s(4096, torch.float32)}
        return Ceilings(copy_bytes_per_s(), rates)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    size = 512 if quick else 1024
    rates = {name: matmul_flops_per_s(size, dtype, device) for name, dtype in dtypes.items()}
    return Ceilings(read_bytes_per_s(64 if quick else 256), rates)
