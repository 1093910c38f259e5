"""The mixer of one token against the ops over a sequence, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from alloy.ops import causal_conv1d, gated_rms_norm, mamba_step, ssd_scan, use_backend
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
