"""The step kernels against the reference in float64: every configuration, dtype, slot order, and nothing else touched."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alloy.ops import ssd_replay, ssd_scan, ssd_step, ssd_step_multi, use_backend
from alloy.ops.triton import tuning

# its import registers the configurations
pytest.importorskip("alloy.ops.triton.ssd_step")

CANDIDATES = tuning.CANDIDATES["ssd_step"]
# batch, heads, head_dim, groups, state
SHAPES = [(3, 2, 80, 2, 24), (3, 4, 20, 2, 16), (3, 2, 16, 1, 128), (3, 4, 7, 4, 256), (3, 1, 128, 1, 16)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class Case:
    """Random inputs as strided views of one projection, and a state as a layer's view of a larger arena.

    Row 1 has no slot: its inputs are NaN, as are all elements of the arena that belong to no used slot.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        tokens: int = 1,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, heads, head_dim, groups, state = shape
        g = torch.Generator().manual_seed(sum(shape) + tokens)
        sizes = [heads * head_dim, groups * state, groups * state, heads]
        self.slots = torch.tensor([batch + 1, -1, *range(batch - 2)], dtype=torch.int32, device=device)
        inputs = torch.randn(batch, tokens, sum(sizes), generator=g).to(dtype)
        inputs[1] = math.nan
        x, B, C, dt = inputs.to(device).split(sizes, -1)
        self.given: dict[str, Any] = {
            "x": x.unflatten(-1, (heads, head_dim)),
            "dt": dt,
            "A": -torch.rand(heads, generator=g).to(device) * 3,
            "B": B.unflatten(-1, (groups, state)),
            "C": C.unflatten(-1, (groups, state)),
        }
        self.D, self.dt_bias = (torch.randn(heads, generator=g).to(device) for _ in range(2))
        size = heads * head_dim * state
        self.arena = torch.full((batch + 3, 2 * size + 16), math.nan, device=device).to(state_dtype)
        self.state = self.arena[:, 16 : 16 + size].unflatten(1, (heads, head_dim, state))
        used = self.slots[self.slots >= 0].long()
        self.state[used] = torch.randn(batch - 1, heads, head_dim, state, generator=g).to(device, state_dtype)
        self.rest = torch.ones_like(self.arena, dtype=torch.bool)
        self.rest[used, 16 : 16 + size] = False
        self.before = self.arena.clone()

    def wide(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and state in float64."""
        return {k: v.double() for k, v in self.given.items()}, self.state.double()

    def assert_rest_untouched(self) -> None:
        assert torch.equal(self.arena[self.rest].isnan(), self.before[self.rest].isnan())

    def token(self, t: int, wide: bool = False) -> dict[str, Tensor]:
        given = self.wide()[0] if wide else self.given
        return {k: v if k == "A" else v[:, t] for k, v in given.items()}


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_the_reference(shape: tuple[int, ...], config: tuning.Config, device: torch.device) -> None:
    """fp32 and bf16 inputs, limits of dt, with and without D and bias; a row without a slot has output 0."""
    for dtype, options in (
        (torch.float32, {"dt_limit": (0.3, 0.9)}),
        (torch.bfloat16, {"D": "D", "dt_bias": "dt_bias"}),
        (torch.float32, {"dt_softplus": False, "D": "D", "dt_limit": (0.0, 1.5)}),
    ):
        case = Case(shape, device, dtype=dtype)
        options = {k: getattr(case, v) if isinstance(v, str) else v for k, v in options.items()}
        _, state = case.wide()
        with use_backend("torch"):
            want = ssd_step(state, **case.token(0, wide=True), slots=case.slots, **options)
        with use_backend("triton"), tuning.override("ssd_step", config):
            y = ssd_step(case.state, **case.token(0), slots=case.slots, **options)
        assert y.dtype == dtype
        assert relative(y, want) < TOLERANCE[dtype]
        used = case.slots[case.slots >= 0].long()
        assert relative(case.state[used], state[used]) < 1e-5
        assert not y[1].any()
        case.assert_rest_untouched()


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16])
def test_narrow_states(state_dtype: torch.dtype, config: tuning.Config, device: torch.device) -> None:
    """Computed in fp32, written once; with a seed by chance, with the reference's bits but for rounding of the sums."""
    chance = None if state_dtype == torch.bfloat16 else torch.tensor([1 << 40], device=device)
    # the last: numbers that float16 holds with less than its precision, or not at all
    for seed, scale in ((None, 1.0), (chance, 1.0), (chance, 3e-6)):
        case = Case(SHAPES[1], device, state_dtype=state_dtype)
        case.state *= scale
        case.given["x"] *= scale
        twin = case.state.clone()
        options = {"D": case.D, "dt_bias": case.dt_bias, "slots": case.slots, "sr_seed": seed}
        with use_backend("torch"):
            want = ssd_step(twin, **case.token(0), **options)
        with use_backend("triton"), tuning.override("ssd_step", config):
            y = ssd_step(case.state, **case.token(0), **options)
        used = case.slots[case.slots >= 0].long()
        assert relative(y, want) < 1e-5
        if state_dtype == torch.float16:
            assert (case.state[used] != twin[used]).float().mean() < 6e-3
        # the interpreter cuts bf16 off instead of rounding it
        assert relative(case.state[used], twin[used]) < (5e-3 if state_dtype == torch.bfloat16 else 1e-3)
        case.assert_rest_untouched()


def test_steps_equal_the_scan(device: torch.device) -> None:
    """Token by token, rows in order."""
    case = Case((2, 4, 20, 2, 24), device, tokens=9)
    case.given = {k: v.nan_to_num() for k, v in case.given.items()}
    given, _ = case.wide()
    bias = {"dt_bias": case.dt_bias}
    with use_backend("torch"):
        want, want_state = ssd_scan(**given, D=case.D, **bias, return_state=True)
    state = torch.zeros(2, 4, 20, 24, device=device)
    with use_backend("triton"):
        y = torch.stack([ssd_step(state, **case.token(t), D=case.D, **bias) for t in range(9)], 1)
    assert relative(y, want) < 1e-5
    assert relative(state, want_state) < 1e-5


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_multi_equals_steps_and_writes_nothing(config: tuning.Config, device: torch.device) -> None:
    """Drafts of 1 and 5 tokens."""
    for tokens in (1, 5):
        case = Case(SHAPES[1], device, tokens=tokens)
        options = {"D": case.D, "dt_bias": case.dt_bias, "slots": case.slots}
        with use_backend("triton"), tuning.override("ssd_step", config):
            y = ssd_step_multi(case.state, **case.given, **options)
            assert torch.equal(case.arena.nan_to_num(), case.before.nan_to_num())
            want = torch.stack([ssd_step(case.state, **case.token(t), **options) for t in range(tokens)], 1)
        assert relative(y, want) < 1e-6
        assert not y[1].any()


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("seed", [None, 3, 5 << 32 | 7])
def test_replay_equals_the_accepted_steps(seed: int | None, config: tuning.Config, device: torch.device) -> None:
    """Each row its own number; rejected tokens are NaN and a row that accepts none keeps its bits."""
    counts = [0, 3, 2, 4]
    case = Case((4, 2, 20, 2, 24), device, tokens=4, state_dtype=torch.float32 if seed is None else torch.float16)
    kept = torch.arange(4) < torch.tensor(counts)[:, None]
    for name in ("x", "dt", "B", "C"):
        value = case.given[name]
        value[~kept.to(device)] = math.nan
    twin = case.state.clone()
    options = {"counts": torch.tensor(counts, device=device), "dt_bias": case.dt_bias, "slots": case.slots}
    options["sr_seed"] = None if seed is None else torch.tensor([seed], device=device)
    with use_backend("torch"):
        ssd_replay(twin, **case.given, **options)
    with use_backend("triton"), tuning.override("ssd_step", config):
        ssd_replay(case.state, **case.given, **options)
    used = case.slots[case.slots >= 0].long()
    assert relative(case.state[used], twin[used]) < (1e-5 if seed is None else 1e-4)
    assert torch.equal(case.state[used[0]], twin[used[0]])
    case.assert_rest_untouched()


def test_float64_is_the_reference(device: torch.device) -> None:
    """Exact where gradients and twins are checked."""
    case = Case(SHAPES[1], device)
    _, state = case.wide()
    twin = state.clone()
    with use_backend("triton"):
        y = ssd_step(state, **case.token(0, wide=True), slots=case.slots)
    with use_backend("torch"):
        assert torch.equal(y, ssd_step(twin, **case.token(0, wide=True), slots=case.slots))


def test_refusals(device: torch.device) -> None:
    """With what is wrong and its values."""
    case = Case(SHAPES[1], device)
    token = case.token(0)
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"strides of state .* the last must be 1"):
            ssd_step(case.state.transpose(2, 3).contiguous().transpose(2, 3), **token, slots=case.slots)
        with pytest.raises(ValueError, match=r"sr_seed is for a float16 state, this one is torch.float32"):
            ssd_step(case.state, **token, sr_seed=torch.tensor([1], device=device))
        with pytest.raises(ValueError, match=r"slots is \(2,\); expected one number for each row, \(3,\)"):
            ssd_step(case.state, **token, slots=case.slots[:2])
        with pytest.raises(ValueError, match=r"slots is torch.float32; slot numbers are int32 or int64"):
            ssd_step(case.state, **token, slots=case.slots.float())
        with pytest.raises(ValueError, match="batch = 3 rows, but the state has 2 slots"):
            ssd_step(case.state[:2], **token)
        with pytest.raises(ValueError, match="a state is floating point"):
            ssd_step(case.state.int(), **token)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_real_sizes_repeat_bit_for_bit_in_a_graph(
    state_dtype: torch.dtype, config: tuning.Config, device: torch.device
) -> None:
    """Nano-9B's layer, 5 rows; the graph's replay advances seed and state as eager calls do."""
    case = Case((5, 128, 80, 8, 128), device, dtype=torch.bfloat16, state_dtype=state_dtype)
    options = {"D": case.D, "dt_bias": case.dt_bias, "slots": case.slots}
    seed = torch.zeros(1, dtype=torch.int64, device=device) if state_dtype == torch.float16 else None
    with use_backend("torch"):
        _, state = case.wide()
        want = ssd_step(state, **case.token(0, wide=True), **options)
    runs = []
    with use_backend("triton"), tuning.override("ssd_step", config):
        for _ in range(2):
            case.arena.copy_(case.before)
            ys = [
                ssd_step(case.state, **case.token(0), **options, sr_seed=seed if seed is None else seed + t)
                for t in range(3)
            ]
            runs.append([*ys, case.state.clone()])
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*runs, strict=True))
        assert relative(runs[0][0], want) < 4e-3
        case.arena.copy_(case.before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ssd_step(case.state, **case.token(0), **options, sr_seed=seed)
            if seed is not None:
                seed += 1
        for t in range(3):
            graph.replay()
            assert torch.equal(y, runs[0][t])
        assert torch.equal(case.state.nan_to_num(), runs[0][3].nan_to_num())


@gpu
@pytest.mark.gpu
def test_compiles_whole(device: torch.device) -> None:
    """torch.compile(fullgraph=True) traces through the ops, which mutate their states."""
    case = Case(SHAPES[0], device, tokens=3)
    twin = case.state.clone()
    counts = torch.tensor([1, 2, 3], device=device)

    def f(state: Tensor) -> Tensor:
        y = ssd_step(state, **case.token(0), slots=case.slots)
        multi = ssd_step_multi(state, **case.given, slots=case.slots)
        ssd_replay(state, **case.given, counts=counts, slots=case.slots)
        return y.sum() + multi.sum()

    with use_backend("triton"):
        assert torch.equal(f(case.state), torch.compile(f, fullgraph=True, backend="aot_eager")(twin))
    assert torch.equal(case.state.nan_to_num(), twin.nan_to_num())


def test_step_sizes_are_exact(device: torch.device) -> None:
    """softplus of large, small and very negative inputs as far as the exponential is: its argument is rounded."""
    dt = torch.cat([torch.linspace(-80, 80, 61), torch.tensor([-1e4, 1e4])]).to(device)
    heads = len(dt)
    ones = torch.ones(1, heads, 1, device=device)
    with use_backend("triton"):
        state = torch.zeros(1, heads, 1, 1, device=device)
        ssd_step(state, ones, dt[None], -torch.ones(heads, device=device), ones, ones)
    want = torch.nn.functional.softplus(dt.double())
    torch.testing.assert_close(state.double().flatten(), want, rtol=1e-5, atol=1e-37)
