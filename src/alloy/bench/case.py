"""What a benchmark case is: problems, each with inputs, our function, a reference, a floor, and peers.

A case is a function that yields `Problem`s for one of three sizes: "full" (published shapes), "quick" (a few of them, seconds
each) and "tiny" (any machine; tests of the cases themselves). Problems are plain data: `alloy.bench.measure` runs them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    # the process that starts the others goes without torch, which takes seconds to load
    from torch import Tensor

Size = Literal["full", "quick", "tiny"]
Outputs = Mapping[str, "Tensor"]
Run = Callable[[Any], Outputs]

# |out - reference| / |reference| of 16-bit operands with fp32 accumulation (performance.md, section 4)
FORWARD, GRADIENT = 4e-3, 1e-2
# so many tokens of one operation are done before their launches are: they are timed in a graph
LAUNCH_TOKENS = 8192
# a peer may round where we do not: it counts as wrong beyond so many times our own tolerance
PEER_SLACK = 5.0


@dataclass(frozen=True)
class Problem:
    """One line of a case: what is computed at one shape.

    Attributes:
        label: names the shape, distinct within the case.
        inputs: draws one set of random inputs on the default device; what the functions below are given.
        ours: computes the named outputs by the public functions of alloy.
        reference: computes the same outputs, or the `part` of them, in float64 or another trusted way.
        part: the part of the outputs that the reference computes, where all of it would not fit.
        peers: label -> the same computation by another package; the peer's name is what stands before "/".
        bytes: fewest bytes that must move; each input read and each output written once. A function of the inputs where
            it takes them to know.
        flops: fewest operations of the matrix products.
        compute: dtype of the products, which names the ceiling they are held against.
        tolerance: largest relative error of an output.
        gradient_tolerance: the same for outputs whose name begins with "d" (dx, dA, ...).
        in_graph: about as short as its launches: timed in a CUDA graph, with inputs rotated beyond the cache.
        holds_inputs: the inputs are part of the peak memory that is shown (a model's weights).
        planned_bytes: the planner's count of that peak.
        tokens: a rate in tokens per second is shown where it is not 0.
    """

    label: str
    inputs: Callable[[], Any]
    ours: Run
    reference: Run
    part: Callable[[Outputs], Outputs] = dict
    peers: Mapping[str, Run] = field(default_factory=dict)
    bytes: float | Callable[[Any], float] = 0.0
    flops: float = 0.0
    compute: str = "bfloat16"
    tolerance: float = FORWARD
    gradient_tolerance: float = GRADIENT
    in_graph: bool = False
    holds_inputs: bool = False
    planned_bytes: int | None = None
    tokens: int = 0

    def limit(self, output: str) -> float:
        """Largest accepted relative error of `output`."""
        return self.gradient_tolerance if output.startswith("d") else self.tolerance


@dataclass(frozen=True)
class Task:
    """What a worker process does.

    Attributes:
        case: name of the case; "ceilings" measures the machine.
        target: "module:function" that yields the problems.
        device: "cuda" or "cpu".
        start: items to leave out, which earlier workers have done.
        peers: peers to measure; None: all.
        only: parts of labels: other problems are left out.
        autotune: time the candidates of the kernels instead.
    """

    case: str
    target: str
    device: str
    size: Size
    start: int = 0
    peers: list[str] | None = None
    only: list[str] = field(default_factory=list[str])
    autotune: bool = False


class Case(NamedTuple):
    """A row of the table of cases: where its problems come from ("module:function"), the device it needs, its help line."""

    target: str
    device: Literal["cuda", "any"]
    help: str


Problems = Callable[[Size], Iterator[Problem]]

CASES = {
    "ssd-fwd": Case("alloy.bench.cases.ssd:forward", "cuda", "the chunked scan over 8k and 64k tokens"),
    "ssd-train": Case("alloy.bench.cases.ssd:training", "cuda", "the scan, forward and backward"),
    "ssd-step": Case("alloy.bench.cases.ssd:step", "cuda", "one token of the recurrence, fp32 and fp16 states"),
    "conv": Case("alloy.bench.cases.conv:problems", "cuda", "causal convolution: forward, forward and backward, step"),
    "norm": Case("alloy.bench.cases.norm:problems", "cuda", "RMSNorm and the gated norm, forward and backward"),
    "moe": Case("alloy.bench.cases.moe:problems", "cuda", "routed experts, 1 to 32768 tokens, and training"),
    "linear-ce": Case("alloy.bench.cases.loss:problems", "cuda", "output head and cross entropy, forward and backward"),
    "decode": Case("alloy.bench.cases.model:decode", "cuda", "one token of every sequence, the whole model"),
    "prefill": Case("alloy.bench.cases.model:prefill", "cuda", "a prompt through the whole model"),
    "train-1b": Case("alloy.bench.cases.model:training", "cuda", "a training step of a 1.05 B hybrid"),
    "cpu": Case("alloy.bench.cases.cpu:problems", "any", "the scan and small hybrids on CPU cores"),
}


class Peer(NamedTuple):
    """The module whose presence says that a peer is installed, and what it is."""

    module: str
    help: str


PEERS = {
    "torch": Peer("torch", "the readable reference of alloy.ops, or PyTorch's own function"),
    "mamba-ssm": Peer("mamba_ssm", "Triton kernels of state-spaces/mamba"),
    "causal-conv1d": Peer("causal_conv1d", "CUDA kernels of Dao-AILab/causal-conv1d"),
    "fla": Peer("fla", "flash-linear-attention (package fla-core)"),
    "transformers": Peer("transformers", "Hugging Face transformers"),
    "liger": Peer("liger_kernel", "Liger kernels (package liger-kernel)"),
}
