"""SSD against the recurrence written out in float64, and every way of cutting a sequence against every other."""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alloy.ops import ssd_replay, ssd_scan, ssd_step, ssd_step_multi, use_backend

BACKENDS = ("torch", "cpu")


@dataclass
class Inputs:
    """Arguments of the scan by name; legend in alloy.ops.ssd."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [t for t in vars(self).values() if t is not None]

    def cut(self, start: int, stop: int) -> "Inputs":
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in ("x", "dt", "B", "C")})

    def row(self, i: int) -> "Inputs":
        h0 = None if self.h0 is None else self.h0[i : i + 1]
        return replace(self, **{name: getattr(self, name)[i : i + 1] for name in ("x", "dt", "B", "C")}, h0=h0)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """x, dt, B and C in `dtype`, the rest in fp32."""
        change = {f.name: dtype if f.name in ("x", "dt", "B", "C") else torch.float32 for f in fields(self)}
        return Inputs(**{k: None if v is None else v.detach().to(change[k]) for k, v in vars(self).items()})


def make(
    batch: int = 2,
    seq: int = 37,
    heads: int = 6,
    head_dim: int = 5,
    groups: int = 3,
    state: int = 7,
    seed: int = 0,
    plain: bool = False,
    h0: bool = True,
) -> Inputs:
    """Random inputs in float64 that require gradients; `plain` leaves D and dt_bias out."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    return Inputs(
        x=draw(batch, seq, heads, head_dim),
        dt=draw(batch, seq, heads),
        A=(-torch.rand(heads, generator=g, dtype=torch.float64) * 3 - 0.05).requires_grad_(),
        B=draw(batch, seq, groups, state),
        C=draw(batch, seq, groups, state),
        D=None if plain else draw(heads),
        dt_bias=None if plain else draw(heads),
        h0=draw(batch, heads, head_dim, state) if h0 else None,
    )


def recurrence(
    i: Inputs,
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
    documents: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Token by token, head by head: y, the state of each row, and the state after each document of all rows."""
    batch, seq, heads, head_dim = i.x.shape
    share = heads // i.B.shape[2]
    ys, states, ends = [], [], []
    for b in range(batch):
        S = i.x.new_zeros(heads, head_dim, i.B.shape[3]) if i.h0 is None else i.h0[b]
        rows = []
        for t in range(seq):
            if documents is not None and documents[b][t] < 0:
                rows.append(i.x.new_zeros(heads, head_dim))
                continue
            if documents is not None and t > 0 and documents[b][t] != documents[b][t - 1]:
                ends.append(S)
                S = torch.zeros_like(S)
            heads_out, new = [], []
            for h in range(heads):
                d = i.dt[b, t, h] if i.dt_bias is None else i.dt[b, t, h] + i.dt_bias[h]
                d = (F.softplus(d) if softplus else d).clamp(*limit)
                new.append(torch.exp(d * i.A[h]) * S[h] + d * torch.outer(i.x[b, t, h], i.B[b, t, h // share]))
                y = new[-1] @ i.C[b, t, h // share]
                heads_out.append(y if i.D is None else y + i.D[h] * i.x[b, t, h])
            S = torch.stack(new)
            rows.append(torch.stack(heads_out))
        ys.append(torch.stack(rows))
        states.append(S)
        ends.append(S)
    return torch.stack(ys), torch.stack(states), ends


def scan(i: Inputs, **options: object) -> tuple[Tensor, Tensor]:
    return ssd_scan(i.x, i.dt, i.A, i.B, i.C, i.D, dt_bias=i.dt_bias, h0=i.h0, return_state=True, **options)


def assert_same_gradients(
    i: Inputs, got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-9
) -> None:
    """Gradients of one random linear functional of the outputs agree for every input."""
    g = torch.Generator().manual_seed(9)
    directions = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in want]
    ours, theirs = (
        torch.autograd.grad(sum((t * d).sum() for t, d in zip(outputs, directions, strict=True)), i.tensors())
        for outputs in (got, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


SHAPES = [
    {"batch": 2, "seq": 37, "heads": 6, "head_dim": 5, "groups": 3, "state": 7},
    {"batch": 3, "seq": 1, "heads": 2, "head_dim": 3, "groups": 1, "state": 4},
    {"batch": 1, "seq": 35, "heads": 4, "head_dim": 2, "groups": 4, "state": 5, "plain": True},
    {"batch": 2, "seq": 16, "heads": 5, "head_dim": 3, "groups": 1, "state": 2, "h0": False},
    {"batch": 1, "seq": 35, "heads": 4, "head_dim": 16, "groups": 1, "state": 16, "h0": False},
    {"batch": 1, "seq": 48, "heads": 4, "head_dim": 8, "groups": 2, "state": 2},
    {"batch": 1, "seq": 49, "heads": 4, "head_dim": 3, "groups": 2, "state": 3, "h0": False, "plain": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_equals_recurrence_in_values_and_gradients(shape: dict[str, int], backend: str) -> None:
    """y, the last state and the gradients of every input, D, dt_bias and h0 included."""
    i = make(**shape)
    with use_backend(backend):
        y, state = scan(i, chunk=16)
        want_y, want_state, _ = recurrence(i)
        close(y, want_y)
        close(state, want_state)
        assert_same_gradients(i, (y, state), (want_y, want_state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_without_state_has_the_same_gradients(backend: str) -> None:
    """When nothing uses the last state, its part of the backward is left out."""
    i = make(seq=33)
    with use_backend(backend):
        y = ssd_scan(i.x, i.dt, i.A, i.B, i.C, i.D, dt_bias=i.dt_bias, h0=i.h0, chunk=16)
        assert_same_gradients(i, (y,), recurrence(i)[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("softplus", "limit"), [(True, (0.4, 1.1)), (False, (0.0, math.inf)), (False, (0.2, 0.9))])
def test_dt_limits_bound_values_and_stop_gradients(softplus: bool, limit: tuple[float, float], backend: str) -> None:
    """dt passes softplus or not, then the clamp; clamped steps have no gradient."""
    i = make(seq=21)
    if not softplus:
        i = replace(i, dt=i.dt.detach().abs().requires_grad_(), dt_bias=None)
    with use_backend(backend):
        y, state = scan(i, chunk=16, dt_softplus=softplus, dt_limit=limit)
        want_y, want_state, _ = recurrence(i, softplus, limit)
        close(y, want_y)
        assert_same_gradients(i, (y, state), (want_y, want_state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_size_does_not_change_the_result(backend: str) -> None:
    """Every allowed chunk, on a length that none divides."""
    i = make(seq=275, heads=2, groups=1, batch=1)
    with use_backend(backend), torch.no_grad():
        want_y, want_state = scan(i, chunk=16)
        for chunk in (32, 64, 128, 256):
            y, state = scan(i, chunk=chunk)
            close(y, want_y)
            close(state, want_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_cut_of_a_prefill_gives_the_same_result(backend: str) -> None:
    """The state handed over at any place continues the sequence."""
    i = make(seq=35)
    with use_backend(backend), torch.no_grad():
        want_y, want_state = scan(i, chunk=16)
        for at in range(1, 35):
            first, h = scan(i.cut(0, at), chunk=16)
            second, state = scan(replace(i.cut(at, 35), h0=h), chunk=16)
            close(torch.cat([first, second], dim=1), want_y)
            close(state, want_state)


# a document of one token, one that begins at a chunk edge (16), a repeated number, padding, and a row of padding only
PACKED = [
    [4] * 5 + [1] + [2] * 10 + [3] * 17 + [-1] * 4,
    [0] * 16 + [1] * 3 + [0] * 18,
    [-1] * 37,
    [7] * 36 + [-1],
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_separate_ones(backend: str) -> None:
    """Values, states and gradients, with NaN in the padding of inputs and of the incoming gradient."""
    i = make(batch=4)
    documents = torch.tensor(PACKED, dtype=torch.int32)
    real = documents >= 0
    poisoned = replace(
        i,
        **{
            name: torch.where(real.view(4, 37, *[1] * (getattr(i, name).dim() - 2)), getattr(i, name), math.nan)
            for name in ("x", "dt", "B", "C")
        },
    )
    with use_backend(backend):
        y, state = scan(poisoned, documents=documents, chunk=16)
        want_y, want_state, _ = recurrence(i, documents=PACKED)
        close(y, want_y)
        close(state, want_state)
        assert not y[~real].any()
        poison = torch.where(real[..., None, None], 0.0, math.nan).expand_as(y)
        ours = torch.autograd.grad([y, state], i.tensors(), [torch.ones_like(y) + poison, torch.ones_like(state)])
        theirs = torch.autograd.grad(want_y.sum() + want_state.sum(), i.tensors())
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_equal_separate_documents_with_a_state_each(backend: str) -> None:
    """Boundaries instead of numbers; with states, values and gradients of each document's own."""
    i = make(batch=1)
    bounds = [0, 5, 6, 16, 37]
    numbers = [[0] * 5 + [1] + [2] * 10 + [3] * 21]
    cu = torch.tensor(bounds, dtype=torch.int32)
    with use_backend(backend):
        y, states = scan(i, cu_seqlens=cu, chunk=16)
        want_y, _, ends = recurrence(i, documents=numbers)
        close(y, want_y)
        close(states, torch.stack(ends))
        assert_same_gradients(i, (y, states), (want_y, torch.stack(ends)))
        close(ssd_scan(i.x, i.dt, i.A, i.B, i.C, i.D, dt_bias=i.dt_bias, h0=i.h0, cu_seqlens=cu, chunk=32), want_y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    """Finite differences, with packing and padding, of all inputs at once."""
    i = make(batch=2, seq=19, heads=2, head_dim=2, groups=1, state=2)
    documents = torch.tensor([[0] * 3 + [1] * 15 + [-1], [0] * 17 + [1, -1]], dtype=torch.int32)
    # padding must not be read, so its finite differences are zero too

    def f(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, h0: Tensor
    ) -> tuple[Tensor, Tensor]:
        return scan(Inputs(x, dt, A, B, C, D, bias, h0), documents=documents, chunk=16, dt_limit=(0.01, 9.0))

    with use_backend(backend):
        assert torch.autograd.gradcheck(f, i.tensors(), fast_mode=True)


def test_backward_can_run_twice() -> None:
    """The backward leaves what was saved as it was."""
    i = make(seq=33)
    y, _ = scan(i, chunk=16)
    first = torch.autograd.grad(y.square().sum(), i.tensors(), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), i.tensors())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointed_scan_has_the_same_gradients() -> None:
    """What the backward needs is saved where activation checkpointing can drop and recompute it."""
    i = make(seq=33)
    want = torch.autograd.grad(scan(i, chunk=16)[0].square().sum(), i.tensors())
    y = checkpoint(lambda *t: scan(Inputs(*t), chunk=16)[0], *i.tensors(), use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), i.tensors())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(1, 200, 8, 80, 2, 128), (2, 65, 6, 48, 3, 16), (3, 130, 2, 16, 1, 256)])
def test_backends_agree_at_real_widths(shape: tuple[int, ...]) -> None:
    """fp32, values and gradients, where the recurrence would take too long."""
    wide = make(*shape).to(torch.float32)
    results = []
    for backend in BACKENDS:
        i = Inputs(**{k: None if v is None else v.requires_grad_() for k, v in vars(wide).items()})
        with use_backend(backend):
            y, state = scan(i)
            results.append([y, state, *torch.autograd.grad(y.square().mean() + state.square().mean(), i.tensors())])
    for a, b in zip(*results, strict=True):
        assert relative(a, b.double()) < 1e-4


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 4e-3, 1e-2)], ids=["fp32", "bf16"]
)
def test_precision(dtype: torch.dtype, forward: float, backward: float, backend: str) -> None:
    """Relative error against the float64 recurrence on the same rounded inputs; the state stays fp32."""
    narrow = make(batch=1, seq=130, heads=4, head_dim=16, groups=2, state=16).to(dtype)
    exact = Inputs(**{k: None if v is None else v.double().requires_grad_() for k, v in vars(narrow).items()})
    narrow = Inputs(**{k: None if v is None else v.requires_grad_() for k, v in vars(narrow).items()})
    with use_backend(backend):
        y, state = scan(narrow)
        want_y, want_state, _ = recurrence(exact)
        assert y.dtype == dtype
        assert state.dtype == torch.float32
        assert relative(y, want_y) < forward
        assert relative(state, want_state) < forward
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ours = torch.autograd.grad((y * g).sum(), narrow.tensors())
        theirs = torch.autograd.grad((want_y * g).sum(), exact.tensors())
        assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dt", [-1e4, -40.0, 60.0, 1e4])
def test_extreme_steps_stay_finite(dt: float, backend: str) -> None:
    """Decays that underflow and steps that vanish: no overflow of an exponent, no NaN in a gradient."""
    i = make(seq=40).to(torch.float32)
    i = Inputs(**{k: None if v is None else v.requires_grad_() for k, v in vars(i).items()})
    with use_backend(backend):
        y, state = scan(replace(i, dt=i.dt + dt), chunk=16)
        gradients = torch.autograd.grad(y.sum() + state.sum(), i.tensors())
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)


def test_scan_is_deterministic_and_reads_any_strides() -> None:
    """Two runs are bit-equal; views into a wider array, as a projection's output gives them, need no copy by the caller."""
    i = make(seq=50).to(torch.float32)
    heads, head_dim = i.x.shape[2:]
    wide = torch.cat([i.x.flatten(2), i.B.flatten(2), i.C.flatten(2), i.dt], dim=-1)
    x, B, C, dt = wide.split([heads * head_dim, 21, 21, heads], dim=-1)
    views = replace(i, x=x.unflatten(2, (heads, -1)), B=B.unflatten(2, (3, -1)), C=C.unflatten(2, (3, -1)), dt=dt)
    first, second, strided = scan(i), scan(i), scan(views)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], strided[0])


def test_autocast_leaves_the_scan_in_fp32() -> None:
    """Under bf16 autocast the matmuls of the scan keep fp32 operands, forward and backward."""
    i = make(seq=40).to(torch.float32)
    i = Inputs(**{k: None if v is None else v.requires_grad_() for k, v in vars(i).items()})
    for backend in BACKENDS:
        with use_backend(backend):
            want = scan(i)[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = scan(i)[0]
            assert torch.equal(got, want)


def step(i: Inputs, t: int, state: Tensor, slots: Tensor | None = None) -> Tensor:
    return ssd_step(state, i.x[:, t], i.dt[:, t], i.A, i.B[:, t], i.C[:, t], i.D, dt_bias=i.dt_bias, slots=slots)


def arena(i: Inputs, slots: int) -> tuple[Tensor, Tensor]:
    """A state whose slots lie apart in a larger array, as one layer's view of a cache, and that array; filled with NaN."""
    size = i.h0[0].numel()
    whole = torch.full((slots, 2 * size + 3), math.nan, dtype=torch.float64)
    return whole[:, 3 : 3 + size].unflatten(1, i.h0.shape[1:]), whole


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plain", [False, True])
def test_steps_equal_scan(plain: bool, backend: str) -> None:
    """Token by token through strided slots in another order; unused slots and a row without one are not touched."""
    i = make(batch=3, seq=11, plain=plain)
    state, whole = arena(i, slots=5)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    state[4], state[0] = i.h0[0].detach(), i.h0[2].detach()
    before = whole.clone()
    with use_backend(backend), torch.no_grad():
        want_y, want_state = scan(i)
        bad = replace(i, x=i.x.clone())
        bad.x[1] = math.nan
        y = torch.stack([step(bad, t, state, slots) for t in range(11)], dim=1)
        close(y[[0, 2]], want_y[[0, 2]])
        assert not y[1].any()
        close(state[[4, 0]], want_state[[0, 2]])
        rest = torch.ones_like(whole, dtype=torch.bool)
        rest[[0, 4], 3 : 3 + i.h0[0].numel()] = False
        assert torch.equal(whole[rest].nan_to_num(), before[rest].nan_to_num())
        # rows in order
        state = i.h0.detach().clone()
        y = torch.stack([step(i, t, state) for t in range(11)], dim=1)
        close(y, want_y)
        close(state, want_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_limits_dt_as_the_scan_does(backend: str) -> None:
    """dt_limit and dt_softplus mean the same in prefill and decode."""
    i = replace(make(seq=9), dt_bias=None)
    options = {"dt_limit": (0.5, 0.9), "dt_softplus": False}
    with use_backend(backend), torch.no_grad():
        want, _ = scan(i, **options)
        state = i.h0.detach().clone()
        for t in range(9):
            y = ssd_step(state, i.x[:, t], i.dt[:, t], i.A, i.B[:, t], i.C[:, t], i.D, **options)
            close(y, want[:, t])


def test_multi_equals_steps_and_leaves_the_state() -> None:
    """Verification of drafts: the outputs of repeated steps, and not a bit of the state written."""
    i = make(batch=3, seq=7)
    slots = torch.tensor([2, -1, 0])
    state, whole = arena(i, slots=4)
    state[2], state[0] = i.h0[0].detach(), i.h0[2].detach()
    before = whole.clone()
    with torch.no_grad():
        y = ssd_step_multi(state, i.x, i.dt, i.A, i.B, i.C, i.D, dt_bias=i.dt_bias, slots=slots)
        assert torch.equal(whole.nan_to_num(), before.nan_to_num())
        want = torch.stack([step(i, t, state, slots) for t in range(7)], dim=1)
        close(y, want)
        in_order = ssd_step_multi(i.h0, i.x, i.dt, i.A, i.B, i.C, i.D, dt_bias=i.dt_bias)
        close(in_order, scan(i)[0])


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 1, 4], [4, 3, 2], [4, 4, 4]])
def test_replay_equals_the_accepted_steps(counts: list[int]) -> None:
    """Each row advances by its own number of drafts; rejected ones are never read."""
    i = make(batch=3, seq=4)
    state, _ = arena(i, slots=4)
    slots = torch.tensor([3, 1, 0])
    state[slots] = i.h0.detach()
    with torch.no_grad():
        want = i.h0.detach().clone()
        for b, count in enumerate(counts):
            for t in range(count):
                step(i.row(b), t, want[b : b + 1])
        kept = torch.arange(4) < torch.tensor(counts)[:, None]
        bad = {
            k: torch.where(kept.view(3, 4, *[1] * (v.dim() - 2)), v, math.nan)
            for k, v in vars(i.cut(0, 4)).items()
            if k in "xdtBC"
        }
        ssd_replay(
            state, bad["x"], bad["dt"], i.A, bad["B"], bad["C"], torch.tensor(counts), dt_bias=i.dt_bias, slots=slots
        )
        close(state[slots], want)
        missing = torch.tensor([3, -1, 0])
        state[slots] = i.h0.detach()
        ssd_replay(state, i.x, i.dt, i.A, i.B, i.C, torch.tensor(counts), dt_bias=i.dt_bias, slots=missing)
        close(state[[3, 0]], want[[0, 2]])
        assert torch.equal(state[1], i.h0[1])


def test_replay_of_narrow_states_by_chance() -> None:
    """A float16 state is rounded with the step's chances; a row that accepts nothing keeps its bits."""
    i = make(batch=2, seq=1).to(torch.float32)
    seed, start = torch.tensor([8]), i.h0.half()
    stepped, replayed = start.clone(), start.clone()
    ssd_step(stepped, i.x[:, 0], i.dt[:, 0], i.A, i.B[:, 0], i.C[:, 0], dt_bias=i.dt_bias, sr_seed=seed)
    ssd_replay(replayed, i.x, i.dt, i.A, i.B, i.C, torch.tensor([1, 0]), dt_bias=i.dt_bias, sr_seed=seed)
    assert torch.equal(replayed[1], start[1])
    # sums differ in their last bits, which chance seldom shows
    assert (replayed[0] != stepped[0]).float().mean() < 0.02
    assert (replayed[0] != start[0]).any()


BAD = [
    (
        {
            "x": torch.zeros(1, 0, 4, 2),
            "dt": torch.zeros(1, 0, 4),
            "B": torch.zeros(1, 0, 2, 3),
            "C": torch.zeros(1, 0, 2, 3),
        },
        "seq = 0",
    ),
    ({"B": torch.zeros(1, 5, 3, 3), "C": torch.zeros(1, 5, 3, 3)}, "heads = 4 is not a multiple of groups = 3"),
    ({"A": torch.tensor([-1.0, -1.0, 0.5, -1.0])}, "A must be negative, its largest value is 0.5"),
    ({"A": -torch.ones(3)}, r"A \(4,\)"),
    ({"dt": torch.zeros(1, 5, 1)}, r"dt must be \(1, 5, 4\)"),
    ({"C": torch.zeros(1, 5, 2, 4)}, "B and C must both be"),
    ({"B": torch.zeros(1, 5, 2, 257), "C": torch.zeros(1, 5, 2, 257)}, "state = 257; both must be at most 256"),
    ({"h0": torch.zeros(1, 4, 3, 2)}, r"h0 is \(1, 4, 3, 2\); expected \(1, 4, 2, 3\)"),
    ({"h0": torch.zeros(1, 4, 2, 3, dtype=torch.int32)}, "a state is floating point"),
    ({"chunk": 48}, "chunk = 48 is not a power of two in 16 .. 256"),
    ({"dt_limit": (0.5, 0.1)}, "the lower bound must be >= 0"),
    ({"cu_seqlens": torch.tensor([0, 3, 3, 5])}, r"cu_seqlens = \[0, 3, 3, 5\] must rise strictly from 0 to seq = 5"),
    ({"cu_seqlens": torch.tensor([1, 5])}, "must rise strictly from 0 to seq = 5"),
    ({"cu_seqlens": torch.tensor([0, 4]), "return_state": True}, "must rise strictly from 0 to seq = 5"),
    ({"x": torch.zeros(1, 5, 4, 300)}, "head_dim = 300 and state = 3; both must be at most 256"),
    ({"documents": torch.zeros(1, 4)}, r"documents has shape \(1, 4\) but the input is \(1, 5\)"),
    ({"documents": torch.zeros(1, 5), "cu_seqlens": torch.tensor([0, 5])}, "pass one of them"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_scan_refuses(change: dict[str, object], message: str) -> None:
    """Shapes that would broadcast, and ranges that no backend serves, with the values in the message."""
    good: dict[str, object] = {
        "x": torch.zeros(1, 5, 4, 2),
        "dt": torch.zeros(1, 5, 4),
        "A": -torch.ones(4),
        "B": torch.zeros(1, 5, 2, 3),
        "C": torch.zeros(1, 5, 2, 3),
    }
    with pytest.raises(ValueError, match=message):
        ssd_scan(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 0], "used twice"),
        ([0, 5], "the state has 3 slots"),
        ([0], r"slots is \(1,\); expected one number for each row, \(2,\)"),
        ([0, -2], "-1 marks"),
    ],
)
def test_step_refuses_slots(slots: list[int], message: str) -> None:
    """Slots past the end, used twice, or not one for each row."""
    i = make(batch=2, seq=1)
    with pytest.raises(ValueError, match=message):
        step(i, 0, torch.zeros(3, 6, 5, 7), torch.tensor(slots))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_with_a_narrow_state(backend: str) -> None:
    """A bf16 state is read and written once a step, computed in fp32."""
    i = make(batch=2, seq=1).to(torch.float32)
    wide, narrow = i.h0.clone(), i.h0.bfloat16()
    wide.copy_(narrow)
    with use_backend(backend):
        torch.testing.assert_close(step(i, 0, narrow), step(i, 0, wide), atol=1e-5, rtol=1e-5)
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drafts_over_a_narrow_state(dtype: torch.dtype) -> None:
    """Verification reads a narrow state and computes in fp32."""
    i = make(batch=2, seq=3).to(torch.float32)
    narrow = i.h0.detach().to(dtype)
    found, want = (
        ssd_step_multi(h0, i.x, i.dt, i.A, i.B, i.C, i.D, dt_bias=i.dt_bias) for h0 in (narrow, narrow.float())
    )
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_states_of_another_shape_or_type_are_refused() -> None:
    """Before anything is written."""
    i = make(batch=1, seq=1)
    with pytest.raises(ValueError, match=r"ssd_step: state is \(1, 6, 5, 8\); expected \('slots', 6, 5, 7\)"):
        step(i, 0, torch.zeros(1, 6, 5, 8))
    with pytest.raises(ValueError, match=r"ssd_step: state is torch.int32; a state is floating point"):
        step(i, 0, torch.zeros(1, 6, 5, 7, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": (2, 5, 3, 3), "C": (2, 5, 3, 3)}, "heads = 4 is not a multiple of groups = 3"),
        (
            {"state": (3, 4, 2, 300), "B": (2, 5, 2, 300), "C": (2, 5, 2, 300)},
            "head_dim = 2 and state = 300; both must be at most 256",
        ),
        ({"dt": (2, 5, 1)}, r"so dt must be \(2, 5, 4\) and A \(4,\); got \(2, 5, 1\)"),
        ({"A": (1,)}, r"A \(4,\); got \(2, 5, 4\) and \(1,\)"),
        ({"B": (2, 1, 2, 3)}, r"B and C must both be \(2, 5, 2, 3\); got \(2, 1, 2, 3\)"),
    ],
    ids=str,
)
def test_steps_refuse_shapes(change: dict[str, tuple[int, ...]], message: str) -> None:
    """One token, drafts and their replay: what would broadcast, and sizes that no kernel serves."""
    good = {"x": (2, 5, 4, 2), "dt": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 3), "C": (2, 5, 2, 3)}
    state = torch.zeros(change.get("state", (3, 4, 2, 3)))
    x, dt, A, B, C = (torch.zeros(change.get(name, shape)) for name, shape in good.items())
    with pytest.raises(ValueError, match=f"ssd_step_multi: .*{message}"):
        ssd_step_multi(state, x, dt, A, B, C)
    with pytest.raises(ValueError, match=f"ssd_replay: .*{message}"):
        ssd_replay(state, x, dt, A, B, C, torch.tensor([1, 2]))
    if B.shape[1] == 5:
        with pytest.raises(ValueError, match=f"ssd_step: .*{message.replace('2, 5, ', '2, ')}"):
            ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])


def test_step_refuses_more_rows_than_slots() -> None:
    """Without slot numbers every row needs a state of its own."""
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(ValueError, match="batch = 2 rows, but the state has 1 slots"):
            step(make(batch=2, seq=1), 0, torch.zeros(1, 6, 5, 7))
