"""RMSNorm and the gated norm of a Mamba layer (groups of inner / 8 channels), forward and with backward.

The floor is memory: inputs and outputs once, with backward the inputs twice. About four operations an element.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import Problem, Size
from alloy.bench.cases.gradients import Inputs, gradients, in_float64, value

EPS = 1e-5
# label -> (hidden, inner)
WIDTHS = {"Nano-9B": (4480, 10240), "Nano-30B": (2688, 4096)}
GROUPS = 8
Op = Callable[..., Tensor]


def problems(size: Size) -> Iterator[Problem]:
    """Both norms at 8k tokens, and forward at a decode batch of 64."""
    for label, (hidden, inner) in ({"tiny": (24, 32)} if size == "tiny" else WIDTHS).items():
        plain = {"eps": EPS}
        yield from _problems(
            f"rms_norm {label}", ("x", "weight"), hidden, ops.rms_norm, peers.liger_rms_norm, plain, size
        )
        gated = {"eps": EPS, "group_size": inner // GROUPS}
        names = ("x", "gate", "weight")
        rival = peers.mamba_gated_norm
        yield from _problems(f"gated_rms_norm {label}", names, inner, ops.gated_rms_norm, rival, gated, size)


def _problems(
    label: str, names: tuple[str, ...], width: int, op: Op, rival: Op, options: dict[str, float], size: Size
) -> Iterator[Problem]:
    rows, steps = (9, 3) if size == "tiny" else (8192, 64)
    ours, reference = partial(op, **options), partial(peers.plain(op), **options)
    name = "liger" if rival is peers.liger_rms_norm else "mamba-ssm"
    rivals: dict[str, Op] = {name: partial(rival, **options), "torch": reference}
    # one tensor of (rows, width) in bf16
    one = 2 * rows * width
    inputs, outputs = len(names) - 1, 1
    yield Problem(
        f"{label} fwd",
        partial(_draw, names, rows, width),
        value(ours, names),
        in_float64(value(reference, names)),
        peers={key: value(peer, names) for key, peer in rivals.items()},
        bytes=one * (inputs + outputs),
        flops=4 * rows * width,
        in_graph=True,
    )
    yield Problem(
        f"{label} fwd+bwd",
        partial(_draw, names, rows, width),
        gradients(ours, names),
        in_float64(gradients(reference, names)),
        peers={key: gradients(peer, names) for key, peer in rivals.items()},
        bytes=one * (3 * inputs + 2 * outputs),
        flops=12 * rows * width,
        in_graph=True,
    )
    yield Problem(
        f"{label} batch {steps}",
        partial(_draw, names, steps, width),
        value(ours, names),
        in_float64(value(reference, names)),
        peers={key: value(peer, names) for key, peer in rivals.items()},
        bytes=2 * steps * width * (inputs + outputs),
        flops=4 * steps * width,
        in_graph=True,
    )


def _draw(names: tuple[str, ...], rows: int, width: int) -> Inputs:
    found = {name: torch.randn(rows, width, dtype=torch.bfloat16) for name in (*names[:-1], "dy")}
    return {**found, "weight": torch.rand(width).bfloat16() + 0.5}
