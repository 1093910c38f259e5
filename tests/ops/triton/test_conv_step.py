"""The convolution's step, drafts and replay against the reference in float64, in both layouts of the state."""

import math

import pytest
import torch
from torch import Tensor

from alloy.ops import causal_conv1d_multi, causal_conv1d_step, conv_replay, use_backend
from alloy.ops.triton import tuning

# its import registers the configurations
pytest.importorskip("alloy.ops.triton.conv_step")

CANDIDATES = tuning.CANDIDATES["conv_step"]
CHANNELS = 300
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def make(
    device: torch.device, tokens: int, kernel: int, taps_first: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """state with NaN in slots that no row has, x as a view of something wider with NaN in the row without a slot,
    weight, bias, slots."""
    g = torch.Generator().manual_seed(tokens + kernel)
    shape = (5, kernel - 1, CHANNELS) if taps_first else (5, CHANNELS, kernel - 1)
    state = torch.randn(shape, generator=g)
    state[[0, 2, 3]] = math.nan
    x = torch.randn(3, tokens, CHANNELS + 9, generator=g)[..., 4:-5]
    x[1] = math.nan
    weight, bias = torch.randn(CHANNELS, kernel, generator=g), torch.randn(CHANNELS, generator=g)
    state, x, weight, bias = (t.to(device, dtype) for t in (state, x, weight, bias))
    slots = torch.tensor([4, -1, 1], dtype=torch.int32, device=device)
    return state.transpose(1, 2) if taps_first else state, x, weight, bias, slots


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("taps_first", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype"), [(4, torch.float32), (2, torch.float32), (1, torch.float32), (4, torch.bfloat16)]
)
def test_all_three_equal_the_reference(
    kernel: int, dtype: torch.dtype, taps_first: bool, config: tuning.Config, device: torch.device
) -> None:
    """Values, the moved windows, and nothing written elsewhere."""
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    state, x, weight, bias, slots = make(device, 5, kernel, taps_first, dtype)
    before, wide = state.clone(), state.double()
    counts = torch.tensor([2, 4, 5], device=device)
    with use_backend("torch"):
        want = causal_conv1d_multi(wide, x.double(), weight.double(), bias.double(), slots=slots)
    with use_backend("triton"), tuning.override("conv_step", config):
        y = causal_conv1d_multi(state, x, weight, bias, slots=slots)
        assert relative(y, want) < tolerance
        assert not y[1].any()
        assert torch.equal(state.nan_to_num(), before.nan_to_num())
        conv_replay(state, x, counts, slots)
        stepped = before.clone()
        for t in range(5):
            y = causal_conv1d_step(stepped, x[:, t], weight, bias, slots=slots)
            assert relative(y, want[:, t]) < tolerance
            if t == 1:
                after_two = stepped[4].clone()
    assert torch.equal(state[4], after_two)
    assert torch.equal(state[1], stepped[1])
    assert torch.equal(stepped[4], x[0, 5 - (kernel - 1) :].T)
    assert torch.equal(state[[0, 2, 3]].isnan(), before[[0, 2, 3]].isnan())


def test_without_bias_activation_or_slots(device: torch.device) -> None:
    """Rows in order; no drafts accepted, nothing written."""
    state, x, weight, _, _ = make(device, 1, 4, False, torch.float32)
    state, x = state.nan_to_num(), x.nan_to_num()
    twin, before = state.double(), state.clone()
    with use_backend("torch"):
        want = causal_conv1d_step(twin, x[:, 0].double(), weight.double(), activation=None)
    with use_backend("triton"):
        conv_replay(state, x * math.nan, torch.zeros(3, dtype=torch.int64, device=device))
        assert torch.equal(state, before)
        y = causal_conv1d_step(state, x[:, 0], weight, activation=None)
    assert relative(y, want) < 1e-5
    assert torch.equal(state, twin.float())


def test_refusals(device: torch.device) -> None:
    """A state of another layer, and inputs whose channels lie apart."""
    state, x, weight, bias, slots = make(device, 2, 4, False, torch.float32)
    with use_backend("triton"):
        with pytest.raises(
            ValueError, match=r"causal_conv1d_multi: state is \(5, 300, 2\); expected \('slots', 300, 3\)"
        ):
            causal_conv1d_multi(state[..., :2], x, weight, bias, slots=slots)
        with pytest.raises(ValueError, match="the channels of a token must lie next to each other"):
            conv_replay(state, x.transpose(1, 2).contiguous().transpose(1, 2), slots, slots)
        with pytest.raises(ValueError, match=r"slots is \(1,\); expected one number for each row, \(3,\)"):
            causal_conv1d_step(state, x[:, 0], weight, bias, slots=slots[:1])


@gpu
@pytest.mark.gpu
def test_compiles_whole_and_repeats_in_a_graph(device: torch.device) -> None:
    """fullgraph, and a replay that moves the state as a call does."""
    state, x, weight, bias, slots = make(device, 3, 4, True, torch.bfloat16)
    twin, before = state.clone(), state.clone()

    def f(state: Tensor) -> Tensor:
        y = causal_conv1d_multi(state, x, weight, bias, slots=slots)
        conv_replay(state, x, slots.clamp(0, 3), slots)
        return y.sum(1) + causal_conv1d_step(state, x[:, 0], weight, bias, slots=slots)

    with use_backend("triton"):
        want = f(state)
        assert torch.equal(want, torch.compile(f, fullgraph=True, backend="aot_eager")(twin))
        assert torch.equal(state.nan_to_num(), twin.nan_to_num())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = f(twin)
        twin.copy_(before)
        graph.replay()
        assert torch.equal(y, want)
        assert torch.equal(state.nan_to_num(), twin.nan_to_num())
