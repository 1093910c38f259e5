"""The convolution kernels against the reference in float64."""

import math

import pytest
import torch
from torch import Tensor

from alloy.ops import causal_conv1d, use_backend
from alloy.ops.triton import tuning

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
PACKED = [[4] * 5 + [1] + [2] * 2 + [3] * 13 + [-1] * 4, [0] * 8 + [1] * 17, [-1] * 25, [7] + [-1] * 24]
# |out - reference| / |reference| of values and of gradients
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-3, 1e-2), torch.float16: (4e-3, 1e-2)}


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm().clamp_min(1e-30))


def draw(*shape: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def check(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    seq: int,
    channels: int,
    kernel: int = 4,
    *,
    bias: bool = True,
    init: bool = False,
    documents: Tensor | None = None,
    activation: str | None = "silu",
) -> None:
    """Values and all gradients, of a view into a wider array; padding of x and of dy is NaN; repetition is bit-equal."""
    wide = draw(batch, seq, channels + 24, device=device, dtype=dtype, seed=0)
    leaves = {
        "weight": draw(channels, kernel, device=device, dtype=dtype, seed=1),
        "bias": draw(channels, device=device, dtype=dtype, seed=2) if bias else None,
        "init": draw(batch, kernel - 1, channels, device=device, dtype=dtype, seed=3).mT if init else None,
    }
    grad = draw(batch, seq, channels, device=device, dtype=dtype, seed=4)
    real = torch.ones(batch, seq, 1, dtype=torch.bool, device=device)
    if documents is not None:
        documents = documents.to(device)
        real = (documents >= 0)[..., None]

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        held = wide.to(precision).detach().requires_grad_()
        given = {k: None if t is None else t.detach().to(precision).requires_grad_() for k, t in leaves.items()}
        with use_backend(name):
            x = torch.where(real, held[..., 8 : 8 + channels], math.nan)
            if documents is None:
                x = held[..., 8 : 8 + channels]
            y = causal_conv1d(
                x, given["weight"], given["bias"], activation=activation, init=given["init"], documents=documents
            )
            inputs = [held, *(t for t in given.values() if t is not None)]
            return [y.detach(), *torch.autograd.grad(y, inputs, torch.where(real, grad.to(precision), math.nan))]

    got, again, want = run("triton", dtype), run("triton", dtype), run("torch", torch.float64)
    forward, backward = TOLERANCES[dtype]
    for i, (a, b, c) in enumerate(zip(got, again, want, strict=True)):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        assert error(a, c) < (backward if i else forward), i


@pytest.mark.parametrize("config", tuning.CANDIDATES.get("causal_conv1d", ()))
def test_every_forward_configuration(config: tuning.Config, device: torch.device) -> None:
    """Two blocks of channels, the second one short."""
    with tuning.override("causal_conv1d", {**config, "BLOCK": config["BLOCK"] // 8}):
        check(device, torch.float32, 1, 21, config["BLOCK"] // 8 + 9)


@pytest.mark.parametrize("kernel", [4, 3, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed: bool, kernel: int, device: torch.device) -> None:
    """Documents of one token, of two and longer, an empty row, init, several programs in time."""
    documents = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    check(device, torch.float32, 4, 25, 19, kernel, init=True, documents=documents)
