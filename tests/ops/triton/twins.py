"""Compares what the kernels compute with the reference in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from alloy.ops import use_backend

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
# |out - reference| / |reference| of values and of gradients
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-3, 1e-2), torch.float16: (4e-3, 1e-2)}

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def gpu(*values: object) -> object:
    """A parameter that is for GPUs alone: too big for the interpreter, or of a dtype that it rounds otherwise."""
    return pytest.param(*values, marks=GPU)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm().clamp_min(1e-30))


def run(op: Op, inputs: Sequence[Tensor], poison: Tensor | None = None) -> list[Tensor]:
    """Values and gradients of every input for random outer gradients, which are NaN where `poison` is."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = op(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    outer = [draw(*y.shape, seed=9 + i).to(y.device, torch.bfloat16).to(y.dtype) for i, y in enumerate(out)]
    if poison is not None:
        outer = [g.masked_fill(poison, torch.nan) for g in outer]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, inputs, outer)]


def check(
    op: Op, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device, poison: Tensor | None = None
) -> None:
    """The kernels agree with the reference in values and gradients, twice with the same bits."""
    given = [t.to(device, dtype) for t in inputs]
    poison = None if poison is None else poison.to(device)
    with use_backend("triton"):
        got, again = run(op, given, poison), run(op, given, poison)
    with use_backend("torch"):
        want = run(op, [t.double() for t in given], poison)
    num_values = len(want) - len(inputs)
    for i, (a, b, c) in enumerate(zip(got, again, want, strict=True)):
        assert torch.equal(a, b), f"result {i} differs between two runs"
        assert error(a, c) < TOLERANCES[dtype][i >= num_values], f"result {i}"


def check_compiled(op: Op, inputs: Sequence[Tensor], device: torch.device) -> None:
    """One graph without breaks gives the same bits, forward and backward."""
    given = [t.to(device, torch.float32) for t in inputs]
    with use_backend("triton"):
        want = run(op, given)
        got = run(torch.compile(op, fullgraph=True, backend="aot_eager"), given)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def check_captured(op: Op, inputs: Sequence[Tensor], device: torch.device) -> None:
    """A CUDA graph of forward and backward, replayed on new values, gives the bits of a plain call: no synchronisation."""
    held = [t.to(device, torch.bfloat16).requires_grad_() for t in inputs]
    fresh = [t.detach().roll(1, 0) * 0.5 for t in held]

    def both() -> list[Tensor]:
        out = op(*held)
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad(out, held, [torch.ones_like(y) for y in out])]

    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        with torch.no_grad():
            for t, new in zip(held, fresh, strict=True):
                t.copy_(new)
        for t in captured:
            t.detach().fill_(torch.nan)
        graph.replay()
        got = [t.clone() for t in captured]
        want = both()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
