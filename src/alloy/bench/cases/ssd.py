"""The state space scan and its one-token step.

Legend: H heads, P head_dim, N state, G groups; x (1, L, H, P), dt (1, L, H), A, D, dt_bias (H,), B and C (1, L, G, N).
x, B and C are views of one projection, as a Mamba layer has them. Floors are those of performance.md, section 4: every
input read and every output written once; 2 (Q G N + Q H P + 2 H P N) operations a token with chunks of Q = 128.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import LAUNCH_TOKENS, Outputs, Problem, Size

CHUNK = 128


class Shape(NamedTuple):
    """Sizes of a Mamba mixer."""

    heads: int
    head_dim: int
    state: int
    groups: int

    @property
    def inner(self) -> int:
        """H P."""
        return self.heads * self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's x, dt, B, C and y in 16 bits."""
        return 2 * (2 * self.inner + self.heads + 2 * self.groups * self.state)

    @property
    def token_flops(self) -> int:
        """Operations of one token in the chunked form."""
        return 2 * (CHUNK * self.groups * self.state + CHUNK * self.inner + 2 * self.inner * self.state)


SHAPES = {"Nano-9B": Shape(128, 80, 128, 8), "Nano-30B": Shape(64, 64, 128, 8)}
TINY = {"tiny": Shape(4, 16, 16, 2)}
# label -> lengths of the documents of one row
LENGTHS = {"8k": [8192], "64k": [65536], "16 x 4k": [4096] * 16}
SCANS: dict[str, Callable[..., Tensor]] = {
    "mamba-ssm/c128": peers.mamba_scan(128),
    "mamba-ssm/c256": peers.mamba_scan(256),
    "fla": peers.fla_scan,
    "torch": peers.plain(ops.ssd_scan),
}
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


@dataclass
class Inputs:
    """Tensors of the legend, dy like x, and the documents of a row of several."""

    tensors: dict[str, Tensor]
    dy: Tensor
    documents: Tensor | None


def forward(size: Size) -> Iterator[Problem]:
    """y of every shape and length."""
    for label, shape, lengths in _grid(size):
        tokens = sum(lengths)
        yield Problem(
            label=label,
            inputs=partial(draw, shape, lengths),
            ours=partial(_value, ops.ssd_scan),
            reference=partial(_in_float64, _value, shape),
            part=partial(_last_group, shape),
            peers={name: partial(_value, scan) for name, scan in _peers(lengths, SCANS).items()},
            bytes=tokens * shape.token_bytes,
            flops=tokens * shape.token_flops,
            in_graph=tokens <= LAUNCH_TOKENS,
        )


def training(size: Size) -> Iterator[Problem]:
    """y and every gradient. The floor: inputs, y, dy and gradients once, three times the forward's operations."""
    for label, shape, lengths in _grid(size):
        tokens = sum(lengths)
        # fla refuses its own backward on Hopper with these Triton versions; plain torch does not fit at 64k
        rivals = {name: scan for name, scan in SCANS.items() if name.startswith("mamba-ssm") or tokens <= 8192}
        rivals.pop("fla", None)
        yield Problem(
            label=label,
            inputs=partial(draw, shape, lengths),
            ours=partial(_gradients, ops.ssd_scan),
            reference=partial(_in_float64, _gradients, shape),
            part=partial(_last_group, shape),
            peers={name: partial(_gradients, scan) for name, scan in _peers(lengths, rivals).items()},
            bytes=tokens * 2 * shape.token_bytes,
            flops=tokens * 3 * shape.token_flops,
            in_graph=tokens <= LAUNCH_TOKENS,
        )


def step(size: Size) -> Iterator[Problem]:
    """One token of `batch` sequences. The floor: the state read and written once, which is nearly everything."""
    batches = {"full": (1, 8, 64, 256), "quick": (64,), "tiny": (3,)}[size]
    for name, shape in (TINY if size == "tiny" else SHAPES).items():
        for dtype in (torch.float32, torch.float16):
            for batch in batches:
                states = batch * shape.inner * shape.state * dtype.itemsize
                kind = str(dtype).removeprefix("torch.")
                yield Problem(
                    label=f"{name} {kind} batch {batch}",
                    inputs=partial(_draw_step, shape, batch, dtype),
                    ours=partial(_step, ops.ssd_step),
                    reference=_step_in_float64,
                    peers={
                        "mamba-ssm": partial(_step, peers.mamba_step),
                        "torch": partial(_step, peers.plain(ops.ssd_step)),
                    },
                    bytes=2 * states + batch * shape.token_bytes,
                    flops=batch * 5 * shape.inner * shape.state,
                    compute="float32",
                    in_graph=True,
                )


def draw(shape: Shape, lengths: list[int]) -> Inputs:
    """A row of documents of these lengths, in bf16; step sizes log-uniform in 0.001 .. 0.1, A in -16 .. -1."""
    heads, head_dim, state, groups = shape
    seq = sum(lengths)
    projected = torch.randn(1, seq, shape.inner + 2 * groups * state + heads, dtype=torch.bfloat16)
    x, B, C, dt = projected.split([shape.inner, groups * state, groups * state, heads], -1)
    tensors = {
        "x": x.unflatten(-1, (heads, head_dim)),
        "dt": dt,
        "A": -torch.empty(heads).uniform_(1, 16),
        "B": B.unflatten(-1, (groups, state)),
        "C": C.unflatten(-1, (groups, state)),
        "D": torch.rand(heads) + 0.5,
        "dt_bias": torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp().expm1().log(),
    }
    documents = None
    if len(lengths) > 1:
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]
    return Inputs(tensors, torch.randn(1, seq, heads, head_dim, dtype=torch.bfloat16), documents)


def _grid(size: Size) -> Iterator[tuple[str, Shape, list[int]]]:
    shapes = TINY if size == "tiny" else SHAPES
    lengths = {"tiny": {"": [40, 24]}, "quick": {"8k": LENGTHS["8k"]}, "full": LENGTHS}[size]
    for name, shape in shapes.items():
        for label, documents in lengths.items():
            yield f"{name} {label}".strip(), shape, documents


def _peers(lengths: list[int], scans: Mapping[str, Callable[..., Tensor]]) -> dict[str, Callable[..., Tensor]]:
    """Those that serve several documents in a row."""
    return {name: scan for name, scan in scans.items() if len(lengths) == 1 or name != "fla"}


def _apply(scan: Callable[..., Any], tensors: Mapping[str, Tensor], documents: Tensor | None) -> Tensor:
    x, dt, A, B, C, D, dt_bias = (tensors[name] for name in NAMES)
    return scan(x, dt, A, B, C, D, dt_bias=dt_bias, documents=documents, chunk=CHUNK)


def _value(scan: Callable[..., Any], i: Inputs) -> Outputs:
    with torch.no_grad():
        return {"y": _apply(scan, i.tensors, i.documents)}


def _gradients(scan: Callable[..., Any], i: Inputs) -> Outputs:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in i.tensors.items()}
    y = _apply(scan, leaves, i.documents)
    found = torch.autograd.grad(y, list(leaves.values()), i.dy)
    return {"y": y, **{f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}}


def _last_group(shape: Shape, outputs: Outputs) -> Outputs:
    """The last group and its heads: they depend on nothing else, and lie where offsets are largest."""
    heads = shape.heads // shape.groups
    found: dict[str, Tensor] = {}
    for name, tensor in outputs.items():
        if name in ("dB", "dC"):
            found[name] = tensor[:, :, -1:]
        elif tensor.dim() >= 3:
            found[name] = tensor[:, :, -heads:]
        else:
            found[name] = tensor[-heads:]
    return found


def _in_float64(run: Callable[..., Outputs], shape: Shape, i: Inputs) -> Outputs:
    """The plain recurrence of the last group in float64, document by document so that it fits."""
    heads = shape.heads // shape.groups
    part = {
        name: (t[:, :, -1:] if name in ("B", "C") else t[:, :, -heads:] if t.dim() > 1 else t[-heads:]).double()
        for name, t in i.tensors.items()
    }
    return run(peers.plain(ops.ssd_scan), Inputs(part, i.dy[:, :, -heads:].double(), i.documents))


def _draw_step(shape: Shape, batch: int, dtype: torch.dtype) -> Inputs:
    one = draw(shape, [batch])
    tensors = {name: t[0] if t.dim() > 1 else t for name, t in one.tensors.items()}
    state = torch.randn(batch, shape.heads, shape.head_dim, shape.state).to(dtype)
    return Inputs({**tensors, "state": state}, one.dy, None)


def _step(op: Callable[..., Tensor], i: Inputs) -> Outputs:
    x, dt, A, B, C, D, dt_bias = (i.tensors[name] for name in NAMES)
    state = i.tensors["state"]
    return {"y": op(state, x, dt, A, B, C, D, dt_bias=dt_bias), "state": state}


def _step_in_float64(i: Inputs) -> Outputs:
    wide = Inputs({name: t.double() for name, t in i.tensors.items()}, i.dy, None)
    return _step(peers.plain(ops.ssd_step), wide)
