"""The causal convolution of a Mamba layer: 4 taps, SiLU, channels last.

The floor is memory: x read and y written; with backward x twice, dy read, dx written; the step its state and x. Two
operations a tap.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import LAUNCH_TOKENS, Outputs, Problem, Size
from alloy.bench.cases.gradients import Inputs, gradients, in_float64, value

TAPS = 4
NAMES = ("x", "weight", "bias")
PEERS: dict[str, Callable[..., Tensor]] = {
    "causal-conv1d": peers.cuda_conv,
    "fla": peers.fla_conv,
    "torch/F.conv1d": peers.torch_conv,
}


def problems(size: Size) -> Iterator[Problem]:
    """Forward, forward with backward, and the step of both published widths."""
    lengths = {"full": {"8k": 8192, "64k": 65536}, "quick": {"8k": 8192}, "tiny": {"tiny": 33}}[size]
    batches = {"full": (1, 64, 256), "quick": (64,), "tiny": (3,)}[size]
    for channels in (24,) if size == "tiny" else (12288, 6144):
        for label, seq in lengths.items():
            one = 2 * seq * channels
            inputs = partial(_draw, seq, channels)
            runs = {name: value(conv, NAMES) for name, conv in PEERS.items()}
            yield Problem(
                f"{channels} {label} fwd",
                inputs,
                value(ops.causal_conv1d, NAMES),
                in_float64(value(peers.plain(ops.causal_conv1d), NAMES)),
                peers=runs,
                bytes=2 * one,
                flops=TAPS * one,
                in_graph=seq <= LAUNCH_TOKENS,
            )
            yield Problem(
                f"{channels} {label} fwd+bwd",
                inputs,
                gradients(ops.causal_conv1d, NAMES),
                in_float64(gradients(peers.plain(ops.causal_conv1d), NAMES)),
                peers={name: gradients(conv, NAMES) for name, conv in PEERS.items()},
                bytes=5 * one,
                flops=3 * TAPS * one,
                in_graph=seq <= LAUNCH_TOKENS,
            )
        for batch in batches:
            yield Problem(
                f"{channels} step batch {batch}",
                partial(_draw_step, batch, channels),
                partial(_step, ops.causal_conv1d_step),
                in_float64(partial(_step, peers.plain(ops.causal_conv1d_step))),
                peers={"causal-conv1d": partial(_step, peers.cuda_conv_step)},
                bytes=2 * batch * channels * (2 * (TAPS - 1) + 2),
                flops=2 * TAPS * batch * channels,
                in_graph=True,
            )


def _draw(seq: int, channels: int) -> Inputs:
    """x is a view of a wider projection, as in the layer."""
    x = torch.randn(1, seq, channels + 64, dtype=torch.bfloat16)[..., :channels]
    weight = torch.empty(channels, TAPS).uniform_(-0.5, 0.5).bfloat16()
    return {"x": x, "weight": weight, "bias": torch.randn(channels).bfloat16(), "dy": torch.randn_like(x)}


def _draw_step(batch: int, channels: int) -> Inputs:
    state = torch.randn(batch, channels, TAPS - 1, dtype=torch.bfloat16)
    one = _draw(batch, channels)
    return {"state": state, "x": one["x"][0], "weight": one["weight"], "bias": one["bias"]}


def _step(op: Callable[..., Tensor], i: Inputs) -> Outputs:
    y = op(i["state"], i["x"], i["weight"], i["bias"])
    return {"y": y, "state": i["state"]}
