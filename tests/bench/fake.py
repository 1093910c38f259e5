"""Cases for the tests of the harness: one that is right, wrong ones, one that kills its process."""

import os
import time
from collections.abc import Iterator
from functools import partial

import torch

from alloy.bench.case import Outputs, Problem, Size
from alloy.ops.triton import tuning


def doubled(factor: float, x: torch.Tensor) -> Outputs:
    """x times `factor`, where 2 is right."""
    return {"y": x * factor}


def die(x: torch.Tensor) -> Outputs:
    """What a fault in a driver does: no exception reaches Python."""
    os.abort()


def fall(x: torch.Tensor) -> Outputs:
    """A crash with a message."""
    raise RuntimeError("device-side assert")


def problem(label: str, **fields: object) -> Problem:
    """y = 2 x of 100 numbers."""
    base = {
        "inputs": partial(torch.randn, 100),
        "ours": partial(doubled, 2.0),
        "reference": lambda x: doubled(2.0, x.double()),
        "bytes": 800.0,
        "flops": 100.0,
        "compute": "float32",
        "tolerance": 1e-6,
    }
    return Problem(label, **{**base, **fields})


def good(size: Size) -> Iterator[Problem]:
    """Right, with a peer that is right, one that is wrong and one that is not installed."""
    peers = {"torch": partial(doubled, 2.0), "torch/wrong": partial(doubled, 2.1), "fla": fall}
    yield problem("one", peers=peers, tokens=100)
    yield problem("two")


def bad(size: Size) -> Iterator[Problem]:
    """Wrong, NaN, a crash, an abort; a right problem after each kind of end."""
    yield problem("wrong", ours=partial(doubled, 2.01))
    yield problem("nan", ours=partial(doubled, float("nan")))
    yield problem("crash", ours=fall, peers={"torch": partial(doubled, 2.0)})
    yield problem("abort", ours=die)
    yield problem("after")


def tuned(size: Size) -> Iterator[Problem]:
    """Asks for a configuration of an op with two, of which one is right."""
    tuning.register("fake", {"factor": 3}, {"factor": 2})
    for label in ("one", "two"):
        yield problem(label, ours=lambda x, label=label: doubled(tuning.pick("fake", label)["factor"], x))


def broken(size: Size) -> Iterator[Problem]:
    """The case itself cannot say what its second problem is."""
    yield problem("first")
    raise ValueError("no such shape")


def endless(size: Size) -> Iterator[Problem]:
    """The second problem does not end."""
    yield problem("one")
    yield problem("forever", ours=lambda x: time.sleep(600))
