"""The fused mixer of one token against its parts in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alloy.ops import mamba_step, use_backend
from alloy.ops.triton import tuning

# its import registers the configurations
pytest.importorskip("alloy.ops.triton.mamba_step")

CANDIDATES = tuning.CANDIDATES["mamba_step"]
# batch, heads, head_dim, groups, state, kernel
SHAPES = [(3, 4, 20, 2, 24, 4), (3, 2, 80, 1, 16, 4), (3, 2, 16, 2, 128, 3), (3, 1, 128, 1, 256, 4)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class Case:
    """Random weights, projections as a view of something wider, states with NaN in slots that no row has; row 1 has none."""

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        taps_first: bool,
    ) -> None:
        batch, heads, head_dim, groups, state, kernel = shape
        inner = heads * head_dim
        channels = inner + 2 * groups * state
        g = torch.Generator().manual_seed(sum(shape))

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=g)

        projected = draw(batch, inner + channels + heads + 16)
        projected[1] = math.nan
        conv = draw(batch + 2, kernel - 1, channels).transpose(1, 2)
        ssm = draw(batch + 2, heads, head_dim, state)
        self.slots = torch.tensor([batch + 1, -1, *range(batch - 2)], dtype=torch.int64, device=device)
        self.unused = torch.arange(batch - 2, batch + 1)
        conv[self.unused] = math.nan
        ssm[self.unused] = math.nan
        self.projected = projected.to(device, dtype)[:, 8:-8]
        conv = conv.to(device, dtype)
        self.conv = conv if taps_first else conv.contiguous()
        self.ssm = ssm.to(device, state_dtype)
        self.weights: list[Tensor | None] = [
            draw(channels, kernel).to(device, dtype),
            draw(channels).to(device, dtype),
            -torch.rand(heads, generator=g).to(device),
            draw(heads).to(device),
            draw(heads).to(device),
            draw(inner).to(device, dtype),
        ]
        self.sizes: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "groups": groups, "state": state}

    def run(
        self,
        conv: Tensor,
        ssm: Tensor,
        wide: bool = False,
        limit: tuple[float, float] = (0.0, math.inf),
        **options: Any,
    ) -> Tensor:
        given = [self.projected, *self.weights]
        projected, *weights = [None if t is None else t.double() for t in given] if wide else given
        return mamba_step(
            projected, conv, ssm, *weights, 1e-5, **self.sizes, dt_limit=limit, slots=self.slots, **options
        )


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_equals_parts(shape: tuple[int, ...], config: tuning.Config, device: torch.device) -> None:
    """Output and both states; rows without a slot give 0 and touch nothing."""
    for dtype, taps_first in ((torch.float32, True), (torch.bfloat16, False)):
        case = Case(shape, device, dtype, torch.float32, taps_first)
        if shape[-1] == 3:
            case.weights[1] = None
        conv, ssm = case.conv.double(), case.ssm.double()
        with use_backend("torch"):
            want = case.run(conv, ssm, wide=True, limit=(0.1, 2.0))
        with use_backend("triton"), tuning.override("mamba_step", config):
            y = case.run(case.conv, case.ssm, limit=(0.1, 2.0))
        used = case.slots[case.slots >= 0]
        assert y.dtype == dtype
        # bf16 rounds y before the norm and after it, and the interpreter cuts off instead
        assert relative(y, want) < (1e-5 if dtype == torch.float32 else 8e-3)
        assert relative(case.ssm[used], ssm[used]) < 1e-5
        assert torch.equal(case.conv[used].double(), conv[used])
        assert not y[1].any()
        assert case.ssm[case.unused].isnan().all()
        assert case.conv[case.unused].isnan().all()


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_stochastic_states(config: tuning.Config, device: torch.device) -> None:
    """The same chances as `ssd_step`."""
    case = Case(SHAPES[0], device, torch.float32, torch.float16, True)
    seed = torch.tensor([11], device=device)
    conv, ssm = case.conv.clone(), case.ssm.clone()
    with use_backend("torch"):
        want = case.run(conv, ssm, sr_seed=seed)
    with use_backend("triton"), tuning.override("mamba_step", config):
        y = case.run(case.conv, case.ssm, sr_seed=seed)
    used = case.slots[case.slots >= 0]
    assert relative(y, want) < 1e-5
    assert (case.ssm[used] != ssm[used]).float().mean() < 5e-3


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_real_sizes_compile_and_repeat_in_a_graph(
    state_dtype: torch.dtype, config: tuning.Config, device: torch.device
) -> None:
    """Nano-9B's layer."""
    case = Case((5, 128, 80, 8, 128, 4), device, torch.bfloat16, state_dtype, True)
    before = case.conv.clone(), case.ssm.clone()
    conv, ssm = (t.double() for t in before)
    with use_backend("torch"):
        wanted = case.run(conv, ssm, wide=True)
    with use_backend("triton"), tuning.override("mamba_step", config):
        want = case.run(case.conv, case.ssm)
        assert relative(want, wanted) < 6e-3
        for call in (case.run, torch.compile(case.run, fullgraph=True, backend="aot_eager")):
            conv, ssm = (t.clone() for t in before)
            assert torch.equal(call(conv, ssm), want)
            assert torch.equal(ssm.nan_to_num(), case.ssm.nan_to_num())
            assert torch.equal(conv.nan_to_num(), case.conv.nan_to_num())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case.run(conv, ssm)
        conv.copy_(before[0])
        ssm.copy_(before[1])
        graph.replay()
        assert torch.equal(y, want)
        assert torch.equal(ssm.nan_to_num(), case.ssm.nan_to_num())
