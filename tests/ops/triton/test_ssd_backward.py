"""The scan's backward in Triton against autograd through the reference in float64."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from alloy.ops.documents import segment_ids
from alloy.ops.ssd import _ssd_scan
from alloy.ops.triton import tuning

pytest.importorskip("triton")
from alloy.ops.triton import ssd_backward  # noqa: E402

OP = "ssd_scan_backward"
SMALL = {**tuning.CANDIDATES[OP][0], "chunk": 16, "tile": 16}
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "h0")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass
class Case:
    """Shapes and options of one scan."""

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
    seed: int = 0

    def inputs(self, device: torch.device) -> dict[str, Tensor | None]:
        """Random inputs in the dtypes of a model; padding is NaN; x, B and C are strided views of one projection."""
        g = torch.Generator().manual_seed(self.seed)
        widths = (self.heads * self.head_dim, self.groups * self.state, self.groups * self.state)
        projected = torch.randn(self.batch, self.seq, sum(widths) + 8, generator=g).to(self.dtype)
        dt = torch.randn(self.batch, self.seq, self.heads, generator=g) - 1
        dt = (dt if self.softplus else dt.abs() * 0.2).to(self.dtype)
        if self.documents is not None:
            padding = self.labels() < 0
            projected[padding], dt[padding] = math.nan, math.nan
        x, B, C = projected.to(device)[..., : sum(widths)].split(widths, -1)
        rest = {
            "A": -torch.rand(self.heads, generator=g) * 3 - 0.05,
            "D": None if self.plain else torch.randn(self.heads, generator=g),
            "dt_bias": None if self.plain else torch.randn(self.heads, generator=g).abs() * 0.1,
            "h0": None if self.plain else torch.randn(self.batch, self.heads, self.head_dim, self.state, generator=g),
        }
        return {
            "x": x.unflatten(-1, (self.heads, -1)),
            "dt": dt.to(device),
            "B": B.unflatten(-1, (self.groups, -1)),
            "C": C.unflatten(-1, (self.groups, -1)),
            **{name: None if t is None else t.to(device) for name, t in rest.items()},
        }

    def labels(self) -> Tensor:
        """documents as a tensor, each row given as lengths: the last is padding."""
        assert self.documents is not None, "a case with documents"
        rows = [[*range(len(lengths) - 1), -1] for lengths in self.documents]
        return torch.stack(
            [torch.tensor(r).repeat_interleave(torch.tensor(n)) for r, n in zip(rows, self.documents, strict=True)]
        ).to(torch.int32)


def outputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Random gradients of y and of the final state; NaN for padding."""
    g = torch.Generator().manual_seed(case.seed + 1)
    dy = torch.randn(case.batch, case.seq, case.heads, case.head_dim, generator=g).to(case.dtype)
    if case.documents is not None:
        dy[case.labels() < 0] = math.nan
    dstate = torch.randn(case.batch, case.heads, case.head_dim, case.state, generator=g)
    return dy.to(device), dstate.to(device) if case.dstate else None


def run(case: Case, device: torch.device) -> dict[str, Tensor]:
    i = case.inputs(device)
    dy, dstate = outputs(case, device)
    documents = None if case.documents is None else case.labels().to(device)
    got = ssd_backward.backward(
        dy, dstate, i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["dt_bias"], case.softplus, case.limit, i["h0"],
        documents, 64,
    )  # fmt: skip
    order = ("x", "dt", "A", "B", "C", "D", "dt_bias", "h0")
    assert all((g is None) == (i[name] is None) for name, g in zip(order, got, strict=True))
    return {name: g for name, g in zip(order, got, strict=True) if g is not None}


def reference(case: Case, device: torch.device) -> dict[str, Tensor]:
    i = {name: None if t is None else t.double().requires_grad_() for name, t in case.inputs(device).items()}
    documents = None if case.documents is None else case.labels().to(device)
    y, state = _ssd_scan(
        i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["dt_bias"], case.softplus, case.limit, i["h0"],
        documents, 64, True,
    )  # fmt: skip
    dy, dstate = outputs(case, device)
    if documents is not None:
        dy = torch.where(segment_ids(documents)[1][..., None, None], dy, 0)
    loss = (y * dy.double()).sum()
    if dstate is not None:
        loss = loss + (state * dstate.double()).sum()
    given = {name: t for name, t in i.items() if t is not None}
    return dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))


def check(case: Case, device: torch.device) -> None:
    tolerance = 1e-4 if case.dtype == torch.float32 else 1e-2
    got, want = run(case, device), reference(case, device)
    assert got.keys() == want.keys()
    errors = {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}
    assert all(error < tolerance for error in errors.values()), errors


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
    monkeypatch.setattr(ssd_backward, "TOKENS", 1)
    monkeypatch.setattr(ssd_backward, "HEADS", 2)
    with tuning.override(OP, SMALL):
        check(CASES[name], device)


def test_gradients_are_the_same_each_time(device: torch.device) -> None:
    case = Case(seq=80)
    with tuning.override(OP, SMALL):
        first, second = run(case, device), run(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_expanded_gradient_is_taken(device: torch.device) -> None:
    """The gradient of a sum has strides of zero."""
    i = Case(plain=True).inputs(device)
    args = (i["x"], i["dt"], i["A"], i["B"], i["C"], None, None, True, (0.0, math.inf), None, None, 64)
    ones = i["x"].new_ones(i["x"].shape)
    with tuning.override(OP, SMALL):
        want = ssd_backward.backward(ones, None, *args)
        got = ssd_backward.backward(ones[:1, :1, :1, :1].expand_as(ones), None, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if a is not None)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("config", tuning.CANDIDATES[OP], ids=str)
@pytest.mark.parametrize(("head_dim", "state"), [(80, 128), (64, 128)])
def test_every_configuration(
    head_dim: int, state: int, config: tuning.Config, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_backward, "TOKENS", 1)
    documents = ((300, 64, 20, 128, 500, 40),)
    with tuning.override(OP, config):
        for dtype in (torch.bfloat16, torch.float16):
            check(Case(seq=1052, heads=16, head_dim=head_dim, state=state, dtype=dtype), device)
        case = Case(seq=1052, heads=16, head_dim=head_dim, state=state, dtype=torch.bfloat16, documents=documents)
        check(case, device)
        first, second = run(case, device), run(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "state", "groups"), [(16, 16, 1), (32, 256, 2), (48, 64, 4), (64, 64, 8), (96, 32, 1), (128, 128, 2)]
)
def test_shapes(head_dim: int, state: int, groups: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Case(batch=2, seq=333, heads=8, head_dim=head_dim, state=state, groups=groups, dtype=dtype), device)
