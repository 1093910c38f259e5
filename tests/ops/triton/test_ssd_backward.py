"""The scan's backward in Triton against autograd through the reference in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from alloy.ops.documents import segment_ids
from alloy.ops.ssd import _ssd_scan
from alloy.ops.triton import tuning

pytest.importorskip("triton")
from alloy.ops.triton import ssd_backward

OP = "ssd_scan_backward"
SMALL = {**tuning.CANDIDATES[OP][0], "chunk": 16, "tile": 16}
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "h0")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass
class Inputs:
    """Tensors of one scan and the gradients of its results."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor | None
    dy: Tensor
    dstate: Tensor | None
    documents: Tensor | None


@dataclass
class Case:
    """Shapes and options of one scan; `documents` are the lengths of each row's documents, the last one is padding."""

    batch: int = 1
    seq: int = 70
    heads: int = 4
    head_dim: int = 24
    groups: int = 2
    state: int = 16
    dtype: torch.dtype = torch.float32
    plain: bool = False
    softplus: bool = True
    limit: tuple[float, float] = (0.0, math.inf)
    documents: tuple[tuple[int, ...], ...] | None = None
    dstate: bool = True

    def inputs(self, device: torch.device) -> Inputs:
        """Random inputs in the dtypes of a model; padding is NaN; x, B and C are strided views of one projection."""
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        widths = [self.heads * self.head_dim, self.groups * self.state, self.groups * self.state]
        projected = draw(self.batch, self.seq, sum(widths) + 8)
        dt = draw(self.batch, self.seq, self.heads)
        dt = dt - 1 if self.softplus else dt.abs() * 0.2
        dy = draw(self.batch, self.seq, self.heads, self.head_dim)
        state = (self.batch, self.heads, self.head_dim, self.state)
        documents = None
        if self.documents is not None:
            documents = torch.tensor(
                [[i if i < len(row) - 1 else -1 for i, n in enumerate(row) for _ in range(n)] for row in self.documents]
            )
            for t in (projected, dt, dy):
                t[documents < 0] = math.nan
        x, B, C = projected.to(device, self.dtype)[..., : sum(widths)].split(widths, -1)
        return Inputs(
            x=x.unflatten(-1, (self.heads, -1)),
            dt=dt.to(device, self.dtype),
            A=(-torch.rand(self.heads, generator=g) * 3 - 0.05).to(device),
            B=B.unflatten(-1, (self.groups, -1)),
            C=C.unflatten(-1, (self.groups, -1)),
            D=None if self.plain else draw(self.heads).to(device),
            dt_bias=None if self.plain else draw(self.heads).abs().mul(0.1).to(device),
            h0=None if self.plain else draw(*state).to(device),
            dy=dy.to(device, self.dtype),
            dstate=draw(*state).to(device) if self.dstate else None,
            documents=None if documents is None else documents.to(device, torch.int32),
        )


def run(case: Case, i: Inputs) -> dict[str, Tensor]:
    """The kernels' gradients by name."""
    got = ssd_backward.backward(
        i.dy, i.dstate, i.x, i.dt, i.A, i.B, i.C, i.D, i.dt_bias, case.softplus, case.limit, i.h0, i.documents, 64
    )
    assert all((g is None) == (vars(i)[name] is None) for name, g in zip(NAMES, got, strict=True))
    return {name: g for name, g in zip(NAMES, got, strict=True) if g is not None}


def reference(case: Case, i: Inputs) -> dict[str, Tensor]:
    """Autograd's in float64 by name."""
    wide = {name: t.double().requires_grad_() for name in NAMES if (t := vars(i)[name]) is not None}
    j = replace(i, **wide)
    y, state = _ssd_scan(
        j.x, j.dt, j.A, j.B, j.C, j.D, j.dt_bias, case.softplus, case.limit, j.h0, i.documents, 64, True
    )
    dy = i.dy if i.documents is None else torch.where(segment_ids(i.documents)[1][..., None, None], i.dy, 0)
    loss = (y * dy.double()).sum()
    if i.dstate is not None:
        loss = loss + (state * i.dstate.double()).sum()
    return dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """|got - want| / |want| by name."""
    i = case.inputs(device)
    got, want = run(case, i), reference(case, i)
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}


def check(case: Case, device: torch.device) -> None:
    found = errors(case, device)
    assert all(error < (1e-4 if case.dtype == torch.float32 else 1e-2) for error in found.values()), found


def check_repetition(case: Case, device: torch.device) -> None:
    i = case.inputs(device)
    first, second = run(case, i), run(case, i)
    assert all(torch.equal(first[name], second[name]) for name in first)


CASES = {
    "plain": Case(plain=True, dstate=False),
    "everything": Case(seq=150, batch=2),
    "fp16": Case(seq=100, head_dim=48, state=32, dtype=torch.float16),
    "raw steps": Case(softplus=False, limit=(0.05, 0.4)),
    "limits": Case(limit=(0.1, 1.0)),
    "one group": Case(heads=6, groups=1, head_dim=10, state=20),
    "documents": Case(seq=150, documents=((30, 2, 40, 60, 18),)),
    "boundaries at edges": Case(batch=2, seq=96, documents=((16, 1, 15, 16, 1, 46, 1), (32, 1, 1, 1, 1, 1, 59))),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks and segments, so that few tokens cross many of them."""
    monkeypatch.setattr(ssd_backward, "SCRATCH", 0)
    monkeypatch.setattr(ssd_backward, "HEADS", 2)
    with tuning.override(OP, SMALL):
        check(CASES[name], device)


def test_gradients_are_the_same_each_time(device: torch.device) -> None:
    with tuning.override(OP, SMALL):
        check_repetition(Case(), device)


def test_an_expanded_gradient_is_taken(device: torch.device) -> None:
    """The gradient of a sum has strides of zero."""
    case = Case(plain=True, seq=40)
    i = case.inputs(device)
    ones = torch.ones_like(i.dy)
    with tuning.override(OP, SMALL):
        want = run(case, replace(i, dy=ones))
        got = run(case, replace(i, dy=ones[:1, :1, :1, :1].expand_as(ones)))
    assert all(torch.equal(got[name], want[name]) for name in want)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "config"), [(op, config) for op in (f"{OP}/64", f"{OP}/128") for config in tuning.CANDIDATES[op]]
)
def test_every_configuration(
    op: str, config: tuning.Config, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_backward, "SCRATCH", 2**22)
    case = Case(seq=1052, heads=16, head_dim=64 if op.endswith("/64") else 80, state=128, dtype=torch.bfloat16)
    with tuning.override(op, config):
        check(case, device)
        check(replace(case, documents=((300, 64, 20, 128, 500, 40),)), device)
        check(replace(case, dtype=torch.float16), device)
        check_repetition(case, device)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "state", "groups"),
    [(16, 16, 1), (32, 256, 2), (48, 64, 4), (64, 64, 8), (96, 32, 1), (112, 64, 2), (128, 128, 2)],
)
def test_shapes(head_dim: int, state: int, groups: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Case(batch=2, seq=333, heads=8, head_dim=head_dim, state=state, groups=groups, dtype=dtype), device)
