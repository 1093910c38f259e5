"""The mixer of one token against the ops over a sequence, and what it refuses."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from alloy.ops import causal_conv1d, gated_rms_norm, mamba_step, ssd_scan, use_backend
from alloy.ops.cpu.compiled import state_rows
from alloy.ops.cpu.mamba_step import CACHED

HEADS, HEAD_DIM, GROUPS, STATE, KERNEL = 4, 5, 2, 7, 4
INNER, WIDE = HEADS * HEAD_DIM, GROUPS * STATE
CHANNELS = INNER + 2 * WIDE
SIZES = {"heads": HEADS, "head_dim": HEAD_DIM, "groups": GROUPS, "state": STATE}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


WEIGHTS = (draw(CHANNELS, KERNEL), draw(CHANNELS), -draw(HEADS).exp(), draw(HEADS), draw(HEADS, seed=1), draw(INNER))
LIMIT = (0.1, 2.0)


def sequence(projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (batch, seq, inner), conv state and recurrent state of projected (batch, seq, width) from zero states."""
    weight, bias, A, D, dt_bias, norm = WEIGHTS
    z, xbc, dt = projected.split([INNER, CHANNELS, HEADS], dim=-1)
    xbc, conv = causal_conv1d(xbc, weight, bias, return_state=True)
    x, B, C = xbc.split([INNER, WIDE, WIDE], dim=-1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, HEADS), (B, GROUPS), (C, GROUPS)))
    y, ssm = ssd_scan(x, dt, A, B, C, D, dt_bias=dt_bias, dt_limit=LIMIT, return_state=True)
    return gated_rms_norm(y.flatten(2), z, norm, 1e-5, INNER // GROUPS), conv, ssm


@pytest.mark.parametrize(("backend", "cached"), [("torch", 0), ("cpu", 0), ("cpu", CACHED)])
def test_steps_equal_the_sequence(backend: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through slots in another order; a row without one gives 0, and its NaN goes nowhere."""
    monkeypatch.setattr("alloy.ops.cpu.mamba_step.CACHED", cached)
    projected = draw(3, 9, INNER + CHANNELS + HEADS)
    slots = torch.tensor([4, -1, 0])
    conv = torch.full((5, CHANNELS, KERNEL - 1), math.nan, dtype=torch.float64)
    ssm = torch.full((5, HEADS, HEAD_DIM, STATE), math.nan, dtype=torch.float64)
    conv[[4, 0]], ssm[[4, 0]] = 0.0, 0.0
    with use_backend(backend):
        want, want_conv, want_ssm = sequence(projected)
        projected[1] = math.nan
        steps = [
            mamba_step(projected[:, t], conv, ssm, *WEIGHTS, 1e-5, **SIZES, dt_limit=LIMIT, slots=slots)
            for t in range(9)
        ]
    y = torch.stack(steps, 1)
    torch.testing.assert_close(y[[0, 2]], want[[0, 2]])
    torch.testing.assert_close(conv[[4, 0]], want_conv[[0, 2]])
    torch.testing.assert_close(ssm[[4, 0]], want_ssm[[0, 2]])
    assert not y[1].any()
    assert conv[1:4].isnan().all()
    assert ssm[1:4].isnan().all()


@pytest.mark.parametrize("cached", [0, CACHED])
def test_no_row_has_a_slot(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros come out, and no state changes."""
    monkeypatch.setattr("alloy.ops.cpu.mamba_step.CACHED", cached)
    conv, ssm = draw(3, CHANNELS, KERNEL - 1), draw(3, HEADS, HEAD_DIM, STATE)
    before = conv.clone(), ssm.clone()
    projected = draw(2, INNER + CHANNELS + HEADS)
    slots = torch.tensor([-1, -1])
    y = mamba_step(projected, conv, ssm, *WEIGHTS, 1e-5, **SIZES, dt_limit=LIMIT, slots=slots)
    assert not y.any()
    assert torch.equal(conv, before[0])
    assert torch.equal(ssm, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projected": (3, 70)}, r"projected is \(3, 70\); expected \(batch, 72\) for 4 heads of 5, 2 groups of 7"),
        ({"heads": 3, "projected": (3, 61)}, "heads = 3 is not a multiple of groups = 2"),
        ({"state": 300, "projected": (3, 1244)}, "head_dim = 5 and state = 300; both must be at most 256"),
        ({"ssm": (3, 4, 5, 6)}, r"ssm_state is \(3, 4, 5, 6\); expected \('slots', 4, 5, 7\)"),
        ({"conv": (3, 48, 2)}, r"conv_state is \(3, 48, 2\); expected \(3, 48, 3\)"),
        ({"conv": (2, 48, 3)}, r"conv_state is \(2, 48, 3\); expected \(3, 48, 3\)"),
        ({"slots": [0, 1]}, r"slots is \(2,\); expected one number for each row, \(3,\)"),
        ({"slots": [0, 1, 1]}, "a slot is used twice"),
        ({"slots": [0, 1, 3]}, "the state has 3 slots"),
        ({"sr_seed": torch.tensor([1])}, "sr_seed is for a float16 state, this one is torch.float64"),
    ],
    ids=str,
)
def test_refuses(change: dict[str, object], message: str) -> None:
    """Sizes that do not belong together, slots that are not one for each row, and chances for a state that needs none."""
    shapes = {"projected": (3, 72), "conv": (3, 48, 3), "ssm": (3, 4, 5, 7)}
    given = {name: torch.zeros(change.get(name, shape), dtype=torch.float64) for name, shape in shapes.items()}
    options = SIZES | {k: v for k, v in change.items() if k in ("heads", "state", "sr_seed")}
    slots = torch.tensor(change["slots"]) if "slots" in change else None
    with pytest.raises(ValueError, match=message):
        mamba_step(*given.values(), *WEIGHTS, 1e-5, **options, dt_limit=LIMIT, slots=slots)


@pytest.mark.parametrize("cached", [0, CACHED])
@pytest.mark.parametrize("slots", [None, [0], [2], [1, 2, 3], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), LIMIT])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_together_and_alone(
    cached: int,
    slots: list[int] | None,
    has_bias: bool,
    limit: tuple[float, float],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and both states over several tokens, in states laid out as a cache has them: as the reference in float64."""
    monkeypatch.setattr("alloy.ops.cpu.mamba_step.CACHED", cached)
    weight, bias, A, D, dt_bias, norm = WEIGHTS
    wide = (weight, bias if has_bias else None, A, D, dt_bias, norm)
    fixed = [None if t is None else t.to(dtype) for t in wide]
    conv = draw(4, 2, KERNEL - 1, CHANNELS, seed=7).to(dtype)[:, 1].transpose(1, 2)
    ssm = draw(4, 2, HEADS, HEAD_DIM, STATE, seed=8).to(dtype)[:, 1]
    twin_conv, twin_ssm = conv.double().clone(), ssm.double().clone()
    places = None if slots is None else torch.tensor(slots)
    rows = 4 if slots is None else len(slots)
    bound = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for token in range(4):
        projected = draw(rows, INNER + CHANNELS + HEADS, seed=9 + token)
        y = mamba_step(projected.to(dtype), conv, ssm, *fixed, 1e-5, **SIZES, dt_limit=limit, slots=places)
        with use_backend("torch"):
            want = mamba_step(projected, twin_conv, twin_ssm, *wide, 1e-5, **SIZES, dt_limit=limit, slots=places)
        torch.testing.assert_close(y, want.to(dtype), **bound)
        torch.testing.assert_close(conv, twin_conv.to(dtype), **bound)
        torch.testing.assert_close(ssm, twin_ssm.to(dtype), **bound)


@pytest.mark.parametrize("slots", [None, [1, 2, 3], [3, -1, 0]])
@pytest.mark.parametrize("cached", [0, CACHED])
def test_the_loop_computes_what_torch_does(
    slots: list[int] | None, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, where only values are wanted: same output, same states, and no other slot's."""
    pytest.importorskip("llvmlite")
    monkeypatch.setattr("alloy.ops.cpu.mamba_step.CACHED", cached)
    real, taken = state_rows(), [0]
    assert real is not None

    def counted(*given: int) -> None:
        taken[0] += 1
        real(*given)

    # columns side by side, as no linear map makes them
    projected = draw(INNER + CHANNELS + HEADS, 3).float().t()
    # other layers' states lie between
    conv = draw(5, 2, KERNEL - 1, CHANNELS).float()
    ssm = draw(5, 2, HEADS, HEAD_DIM, STATE).float()
    weights = [t.float() for t in WEIGHTS]
    found: list[tuple[Tensor, ...]] = []
    for loop in (lambda: counted, lambda: None):
        monkeypatch.setattr("alloy.ops.cpu.mamba_step.state_rows", loop)
        own = conv.clone(), ssm.clone()
        with torch.inference_mode():
            y = mamba_step(
                projected,
                own[0][:, 1].transpose(1, 2),
                own[1][:, 1],
                *weights,
                1e-5,
                **SIZES,
                dt_limit=LIMIT,
                slots=None if slots is None else torch.tensor(slots),
            )
        found.append((y, *own))
    assert taken[0]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    used = [0, 1, 2] if slots is None else [slot for slot in slots if slot >= 0]
    untouched = [slot for slot in range(5) if slot not in used]
    assert torch.equal(found[0][2][untouched], ssm[untouched])
    assert torch.equal(found[0][2][:, 0], ssm[:, 0])
    assert not torch.equal(found[0][2][used, 1], ssm[used, 1])


@pytest.mark.parametrize("width", [4, 8, None])
def test_the_loop_reads_and_writes_what_it_should(width: int | None) -> None:
    """Against the formula in float64, for sizes around its tiles and vectors; what lies around is NaN, and stays."""
    pytest.importorskip("llvmlite")
    loop = state_rows(width)
    assert loop is not None

    def framed(*shape: int) -> tuple[Tensor, Tensor]:
        whole = torch.full((math.prod(shape) + 64,), math.nan)
        return whole, whole[32:-32].view(shape).copy_(draw(*shape))

    for batch, heads, groups, head_dim, state in itertools.product((1, 3), (2, 6), (1, 2), (1, 4, 5), (1, 16, 17, 40)):
        inner, wide = heads * head_dim, groups * state
        (around, h), (_, xbc) = framed(batch, heads, head_dim, state), framed(batch, inner + 2 * wide)
        (_, d), (_, decay), (_, D), (edge, y) = (
            framed(*shape) for shape in ((batch, heads), (batch, heads), (heads,), (batch, heads, head_dim))
        )
        x, B, C = xbc.double().split([inner, wide, wide], 1)
        x = x.view(batch, heads, head_dim)
        B, C = (t.view(batch, groups, 1, state).repeat_interleave(heads // groups, 1) for t in (B, C))
        want_h = h.double() * decay.double()[..., None, None] + (x * d.double()[..., None])[..., None] * B
        want = (want_h * C).sum(-1) + D.double()[:, None] * x
        addresses = [t.data_ptr() for t in (h, xbc, d, decay, D, y)]
        loop(*addresses, batch, heads, head_dim, groups, state, h.stride(0), xbc.stride(0))
        torch.testing.assert_close(h, want_h.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y, want.float(), atol=1e-4, rtol=1e-4)
        for frame in (around, edge):
            assert frame[:32].isnan().all()
            assert frame[-32:].isnan().all()
