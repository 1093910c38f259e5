"""The causal convolution against sums written out in float64, and its step, multi and replay against it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import causal_conv1d, causal_conv1d_multi, causal_conv1d_step, conv_replay, use_backend
from alloy.ops.cpu import conv as cpu_conv

BACKENDS = ("torch", "cpu")
PACKED = [[4] * 5 + [1] + [2] * 2 + [3] * 13 + [-1] * 4, [0] * 8 + [1] * 17, [-1] * 25, [7] + [-1] * 24]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one short, also on the short sequences of these tests."""
    monkeypatch.setattr(cpu_conv, "_BLOCK", 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = "silu",
    init: Tensor | None = None,
    documents: list[list[int]] | None = None,
) -> Tensor:
    """One output at a time; a tap outside its document is zero, before the first document it is `init`."""
    batch, seq, channels = x.shape
    kernel = weight.shape[1]
    rows = []
    for b in range(batch):
        numbers = documents[b] if documents is not None else [0] * seq
        first = 0
        out = []
        for t in range(seq):
            if t and numbers[t] != numbers[t - 1]:
                first = t
            if numbers[t] < 0:
                out.append(x.new_zeros(channels))
                continue
            y = x.new_zeros(channels) if bias is None else bias
            for k in range(kernel):
                at = t - (kernel - 1) + k
                if at >= first:
                    y = y + weight[:, k] * x[b, at]
                elif at < 0 and first == 0 and init is not None:
                    y = y + weight[:, k] * init[b, :, at]
            out.append(F.silu(y) if activation == "silu" else y)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("kernel", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_conv_equals_direct_sums_in_values_and_gradients(
    packed: bool, kernel: int, activation: str | None, backend: str
) -> None:
    """Values and all gradients, with init, packing, NaN in the padding, a document of one token, an empty row."""
    x, weight, bias = draw(4, 25, 11), draw(11, kernel), draw(11)
    init = draw(4, 11, kernel - 1)
    documents = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    real = torch.ones(4, 25, 1, dtype=torch.bool) if documents is None else (documents >= 0)[..., None]
    with use_backend(backend):
        y = causal_conv1d(
            torch.where(real, x, math.nan), weight, bias, activation=activation, init=init, documents=documents
        )
        want = direct(x, weight, bias, activation, init, PACKED if packed else None)
        close(y, want)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs = [x, weight, bias, init][: 3 if kernel == 1 else 4]
        ours = torch.autograd.grad(y, inputs, torch.where(real, g, math.nan), retain_graph=True)
        for a, b in zip(ours, torch.autograd.grad(want, inputs, g), strict=True):
            close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_without_bias_or_init(backend: str) -> None:
    """What precedes the first token is zero; shorter than the kernel is fine; gradcheck."""
    x, weight = draw(3, 2, 5), draw(5, 4)
    with use_backend(backend):
        close(causal_conv1d(x, weight), direct(x, weight, None))
        assert torch.autograd.gradcheck(lambda *a: causal_conv1d(*a), (x, weight))
        x = draw(1, 11, 2)
        init = draw(1, 2, 3)
        assert torch.autograd.gradcheck(
            lambda *a: causal_conv1d(a[0], a[1], a[2], init=a[3]), (x, draw(2, 4), draw(2), init)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_cut_continues(backend: str) -> None:
    """The state at any place, also inside the first kernel - 1 tokens, continues the sequence."""
    x, weight, bias, init = draw(2, 19, 7), draw(7, 4), draw(7), draw(2, 7, 3)
    with use_backend(backend), torch.no_grad():
        want, want_state = causal_conv1d(x, weight, bias, init=init, return_state=True)
        for at in range(1, 19):
            first, state = causal_conv1d(x[:, :at], weight, bias, init=init, return_state=True)
            second, state = causal_conv1d(x[:, at:], weight, bias, init=state, return_state=True)
            close(torch.cat([first, second], dim=1), want)
            close(state, want_state)


def test_state_is_the_last_real_inputs() -> None:
    """Of the row's last document: zeros or init where it is shorter than the kernel; an empty row keeps init."""
    x, weight, init = draw(4, 25, 3), draw(3, 4), draw(4, 3, 3)
    documents = torch.tensor(PACKED, dtype=torch.int32)
    poisoned = torch.where((documents >= 0)[..., None], x, math.nan)
    _, state = causal_conv1d(poisoned, weight, init=init, documents=documents, return_state=True)
    close(state[0], x[0, 18:21].T)
    close(state[1], x[1, 22:25].T)
    close(state[2], init[2])
    close(state[3], torch.stack([init[3, :, 1], init[3, :, 2], x[3, 0]], dim=1))
    _, zeros = causal_conv1d(poisoned, weight, documents=documents, return_state=True)
    close(zeros[2], torch.zeros(3, 3, dtype=torch.float64))
    close(zeros[3], torch.stack([torch.zeros(3).double(), torch.zeros(3).double(), x[3, 0]], dim=1))
    (gradient,) = torch.autograd.grad(state.sum(), init)
    assert gradient.sum() == 9 + 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_equal_documents_with_a_state_each(backend: str) -> None:
    """Boundaries instead of numbers; short documents have zeros before their tokens, the first has init."""
    x, weight, init = draw(1, 12, 5), draw(5, 4), draw(1, 5, 3)
    bounds = torch.tensor([0, 2, 3, 12], dtype=torch.int32)
    with use_backend(backend):
        y, states = causal_conv1d(x, weight, init=init, cu_seqlens=bounds, return_state=True)
        close(y, direct(x, weight, None, init=init, documents=[[0, 0, 1] + [2] * 9]))
    empty = torch.zeros(5, dtype=torch.float64)
    close(states[0], torch.stack([init[0, :, 2], x[0, 0], x[0, 1]], dim=1))
    close(states[1], torch.stack([empty, empty, x[0, 2]], dim=1))
    close(states[2], x[0, 9:12].T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_accumulates_in_fp32(backend: str) -> None:
    """The result is the fp32 result rounded once."""
    x, weight, bias = (t.detach().bfloat16() for t in (draw(2, 25, 7), draw(7, 4), draw(7)))
    with use_backend(backend):
        y = causal_conv1d(x, weight, bias)
        want = direct(x.double(), weight.double(), bias.double())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, atol=1e-6, rtol=2**-8)


def states(x: Tensor, slots: int, taps_first: bool) -> Tensor:
    """A NaN-filled state; channels of a tap may lie next to each other."""
    shape = (slots, 3, x.shape[-1]) if taps_first else (slots, x.shape[-1], 3)
    state = torch.full(shape, math.nan, dtype=torch.float64)
    return state.transpose(1, 2) if taps_first else state


@pytest.mark.parametrize("taps_first", [False, True])
def test_steps_multi_and_replay_equal_the_sequence(taps_first: bool) -> None:
    """Through slots in another order, with a row that has none; replay of 0 .. n tokens equals that many steps."""
    x, weight, bias, init = (t.detach() for t in (draw(3, 9, 7), draw(7, 4), draw(7), draw(3, 7, 3)))
    want, want_state = causal_conv1d(x, weight, bias, init=init, return_state=True)
    slots = torch.tensor([3, -1, 1], dtype=torch.int32)
    state = states(x, 4, taps_first)
    state[3], state[1] = init[0], init[2]
    x[1] = math.nan
    before = state.clone()
    multi = causal_conv1d_multi(state, x, weight, bias, slots=slots)
    assert torch.equal(state.nan_to_num(), before.nan_to_num())
    close(multi[[0, 2]], want[[0, 2]])
    assert not multi[1].any()
    steps = torch.stack([causal_conv1d_step(state, x[:, t], weight, bias, slots=slots) for t in range(9)], dim=1)
    close(steps[[0, 2]], want[[0, 2]])
    assert not steps[1].any()
    close(state[[3, 1]], want_state[[0, 2]])
    assert state[[0, 2]].isnan().all()
    for counts in ([0, 0, 0], [1, 5, 9], [2, 0, 4]):
        state[3], state[1] = init[0], init[2]
        conv_replay(state, x, torch.tensor(counts), slots)
        for b, slot in ((0, 3), (2, 1)):
            one = init[b : b + 1].clone()
            for t in range(counts[b]):
                causal_conv1d_step(one, x[b : b + 1, t], weight, bias)
            close(state[slot], one[0])


def test_refuses_a_weight_of_another_shape() -> None:
    """Shapes that would broadcast are named."""
    with pytest.raises(ValueError, match=r"conv weight has shape \(1, 4\); expected \(3, kernel\)"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("rows", "bounds", "message"),
    [
        (2, [0, 5], "cu_seqlens needs batch == 1, got batch = 2; pass documents for several rows"),
        (1, [0, 4], r"cu_seqlens = \[0, 4\] must rise strictly from 0 to seq = 5"),
        (1, [0, 3, 2, 5], r"cu_seqlens = \[0, 3, 2, 5\] must rise strictly"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(rows: int, bounds: list[int], message: str) -> None:
    """Packing is one row, cut up from its beginning to its end."""
    with pytest.raises(ValueError, match=message):
        causal_conv1d(torch.zeros(rows, 5, 3), torch.zeros(3, 4), cu_seqlens=torch.tensor(bounds))
