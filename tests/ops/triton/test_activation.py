"""Element-wise kernels against the reference in float64."""

import pytest
import torch

from alloy.ops import use_backend
from alloy.ops.activation import gated, relu2, silu_mul

pytest.importorskip("triton")
from twins import check, check_captured, check_compiled, draw, gpu, run

from alloy.ops.triton import activation, tuning

DTYPES = [torch.float32, gpu(torch.bfloat16), gpu(torch.float16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [37, gpu(1856), gpu(100_003)])
def test_values_and_gradients(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of contiguous tensors and of views."""
    wide, up = draw(2, 7, width + 24), draw(2, 4, width, seed=1)
    check(relu2, [up], dtype, device)
    check(lambda x: relu2(x[:, 1:5, 8 : 8 + width]), [wide], dtype, device)
    check(silu_mul, [up, draw(2, 4, width, seed=2)], dtype, device)
    check(lambda x, y: silu_mul(x[:, 1:5, 8 : 8 + width], y), [wide, up], dtype, device)


@pytest.mark.parametrize("config", tuning.CANDIDATES["relu2"])
def test_every_configuration(config: tuning.Config, device: torch.device) -> None:
    """Two programs, the second one short."""
    x = draw(config["BLOCK"] + 9)
    for op in ("relu2", "silu_mul"):
        assert tuning.CANDIDATES[op] == tuning.CANDIDATES[f"{op}_backward"] == tuning.CANDIDATES["relu2"]
    with tuning.override("relu2", config), tuning.override("relu2_backward", config):
        check(relu2, [x], torch.float32, device)
    with tuning.override("silu_mul", config), tuning.override("silu_mul_backward", config):
        check(silu_mul, [x, x.flip(0)], torch.float32, device)


def test_special_values(device: torch.device) -> None:
    """NaN stays NaN; far below zero, silu is zero and not NaN; a scalar and an empty tensor."""
    x = torch.tensor([torch.nan, -torch.inf, -1000.0, torch.inf, 0.0], device=device)
    with use_backend("triton"):
        y, dx = run(relu2, [x])
        assert y.isnan().tolist() == [True, False, False, False, False]
        assert dx[1:3].tolist() == [0, 0]
        assert silu_mul(x[2:3], torch.ones_like(x[2:3])).item() == 0
        assert relu2(x[4]).item() == 0
        assert relu2(x[:0]).shape == (0,)


def test_gated_takes_any_activation(device: torch.device) -> None:
    """Names of ACTIVATIONS; silu is the fused one."""
    gate, up = draw(3, 9).to(device), draw(3, 9, seed=1).to(device)
    for name, act in activation_functions().items():
        torch.testing.assert_close(gated(name, gate, up), act(gate) * up)


def activation_functions() -> dict:
    return {"silu": torch.nn.functional.silu, "relu": torch.relu, "gelu": torch.nn.functional.gelu}


def test_compiles_without_breaks(device: torch.device) -> None:
    """In one graph with its backward."""
    check_compiled(relu2, [draw(5, 40)], device)
    check_compiled(silu_mul, [draw(5, 40), draw(5, 40, seed=1)], device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graph_capture(device: torch.device) -> None:
    """Forward and backward."""
    check_captured(relu2, [draw(50, 512)], device)
    check_captured(silu_mul, [draw(50, 512), draw(50, 512, seed=1)], device)


assert activation
