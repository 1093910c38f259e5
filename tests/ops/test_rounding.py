"""Stochastic rounding: the published words, the two neighbours only, and no bias."""

import pytest
import torch
from torch import Tensor

from alloy.ops import ssd_step, use_backend
from alloy.ops.rounding import philox, round_to_half

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# kat_vectors of Random123 1.14: philox4x32 10, counter and key of zeros
KNOWN = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_gives_the_published_words() -> None:
    """With the ten rounds for which they are published."""
    zero = torch.tensor(0)
    assert [int(word) for word in philox(zero[None], zero, zero, rounds=10)] == KNOWN


def draws(value: Tensor, number: int = 4096) -> Tensor:
    """`number` roundings of each element of value (width,): float16 (number, width)."""
    return round_to_half(value.expand(1, number, 1, -1), torch.tensor([-7]), torch.tensor([3]))[0, :, 0]


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    """Normal, subnormal and signed values, at powers of two too, and those that float16 holds exactly."""
    g = torch.Generator().manual_seed(0)
    random = torch.randn(40, generator=g) * 10 ** torch.linspace(-7, 4, 40)
    edges = torch.tensor([1 - 2**-20, 1 + 2**-20, 2**-14 - 2**-30, 2**-14 + 2**-30, 3e-8, -(2.0**-14) * 0.99, 0.0])
    value = torch.cat([random, edges, -edges])
    rounded = draws(value).double()
    nearest = value.half()
    below = torch.where(nearest.float() <= value, nearest, torch.nextafter(nearest, torch.tensor(-torch.inf).half()))
    above = torch.where(nearest.float() >= value, nearest, torch.nextafter(nearest, torch.tensor(torch.inf).half()))
    assert ((rounded == below.double()) | (rounded == above.double())).all()
    gap = (above.double() - below.double()).clamp(min=1e-30)
    share = (value.double() - below.double()) / gap
    deviation = (rounded.mean(0) - value.double()).abs() / gap
    assert (deviation <= 5 * (share * (1 - share) / 4096).sqrt() + 2**-13).all()
    exact = torch.tensor([0.0, 1.0, -3.5, 65504.0, 2.0**-24, torch.inf])
    assert torch.equal(draws(exact), exact.half().expand(4096, -1))


def test_chances_differ_between_elements_slots_and_seeds() -> None:
    """And are the same again for the same seed and slot, whatever the row."""
    value = torch.full((2, 3, 5, 19), 1 + 2**-12)
    seed, slots = torch.tensor([5]), torch.tensor([4, 9])
    first = round_to_half(value, seed, slots)
    assert torch.equal(first, round_to_half(value.flip(0), seed, slots.flip(0)).flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, round_to_half(value, seed + 1, slots))
    assert not torch.equal(first, round_to_half(value, seed + (1 << 32), slots))
    assert len(first.flatten().unique()) == 2


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_state_does_not_drift(backend: str) -> None:
    """Slow decay and small inputs, where rounding to the nearest stops adding: by chance it stays right on average."""
    with use_backend(backend):
        errors = drift(4096, torch.zeros(1, dtype=torch.int64))
    assert errors["float16-sr"][0] < 2e-2
    assert abs(errors["float16-sr"][1]) < 3e-3
    assert errors["float16"][0] > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def test_state_does_not_drift_in_a_long_answer(device: str) -> None:
    """16,384 tokens; a float16 state that is rounded to the nearest has lost a third of its sum."""
    errors = drift(16384, torch.zeros(1, dtype=torch.int64, device=device))
    assert errors["float16-sr"][0] < 2e-2
    assert abs(errors["float16-sr"][1]) < 3e-3
    assert errors["float16"][0] > 0.2


def drift(
    steps: int, seed: Tensor, heads: int = 4, head_dim: int = 16, state: int = 32
) -> dict[str, tuple[float, float]]:
    """(relative error, mean relative error) of the last outputs with narrow states, against a float32 state."""
    g = torch.Generator().manual_seed(1)
    device = seed.device
    kinds = {"float32": torch.float32, "float16": torch.float16, "float16-sr": torch.float16}
    states = {name: torch.zeros(1, heads, head_dim, state, dtype=kind, device=device) for name, kind in kinds.items()}
    rates = -torch.full((heads,), 0.5, device=device)
    # inputs vary around a mean, as a feature that is on for long does
    x, B, C = (1 + 0.5 * torch.randn(64, heads, width, generator=g).to(device) for width in (head_dim, state, state))
    dt = torch.full((1, heads), 2e-4, device=device)
    last: dict[str, list[Tensor]] = {name: [] for name in states}
    for t in range(steps):
        seed += 1
        i = t % 64
        for name, held in states.items():
            given = (x[i : i + 1], dt, rates, B[i : i + 1], C[i : i + 1])
            y = ssd_step(held, *given, dt_softplus=False, sr_seed=seed if name == "float16-sr" else None)
            if t >= steps - 64:
                last[name].append(y)
    true = torch.stack(last.pop("float32")).double()
    out = {}
    for name, ys in last.items():
        error = torch.stack(ys).double() - true
        out[name] = (float(error.norm() / true.norm()), float(error.mean() / true.mean()))
    return out
