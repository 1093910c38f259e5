"""Convolution and scan in one operator: the bits of the two ops it is made of, in values and gradients."""

import pytest
import torch
from torch import Tensor

from alloy.ops import causal_conv1d, mamba_scan, ssd_scan, use_backend

pytest.importorskip("triton")
from twins import GPU, check, check_captured, check_compiled, draw, gpu, run

from alloy.ops.mamba_scan import split

HEADS, HEAD_DIM, GROUPS, STATE = 2, 16, 1, 16
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE
DOCUMENTS = [[0] * 7 + [1] * 20 + [-1] * 3, [3] * 30]


def inputs(seq: int) -> list[Tensor]:
    """xbc and dt as views of one projection, and the parameters."""
    projected = draw(2, seq, CHANNELS + HEADS)
    return [projected, *(draw(HEADS, seed=i) for i in (1, 2, 3)), draw(CHANNELS, 4, seed=4), draw(CHANNELS, seed=5)]


def fused(documents: Tensor | None):
    def op(projected: Tensor, a: Tensor, D: Tensor, dt_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        xbc, dt = projected.split([CHANNELS, HEADS], -1)
        return mamba_scan(
            xbc, dt, -a.exp(), D, dt_bias, weight, bias,
            head_dim=HEAD_DIM, groups=GROUPS, dt_limit=(0.0, 0.7), documents=documents,
        )  # fmt: skip

    return op


def two_ops(documents: Tensor | None):
    def op(projected: Tensor, a: Tensor, D: Tensor, dt_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        xbc, dt = projected.split([CHANNELS, HEADS], -1)
        mixed = causal_conv1d(xbc, weight, bias, documents=documents)
        assert isinstance(mixed, Tensor)
        x, B, C = split(mixed, HEADS * HEAD_DIM, HEAD_DIM, GROUPS)
        y = ssd_scan(x, dt, -a.exp(), B, C, D, dt_bias=dt_bias, dt_limit=(0.0, 0.7), documents=documents)
        assert isinstance(y, Tensor)
        return y

    return op


@pytest.mark.parametrize("dtype", [torch.float32, gpu(torch.bfloat16)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_bits_of_two_ops(packed: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Padding is NaN in the inputs and in the outer gradient."""
    documents = torch.tensor(DOCUMENTS, dtype=torch.int32, device=device) if packed else None
    given = inputs(30)
    padding = None
    if documents is not None:
        given[0] = given[0].masked_fill((documents < 0).cpu()[..., None], torch.nan)
        padding = (documents < 0)[..., None, None]
    given = [t.to(device, dtype) for t in given]
    with use_backend("triton"):
        got, want = run(fused(documents), given, padding), run(two_ops(documents), given, padding)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_against_the_reference(device: torch.device) -> None:
    """In float64."""
    check(fused(None), inputs(21), torch.float32, device)


def test_a_batch_without_rows(device: torch.device) -> None:
    """Empty, with gradients of zero."""
    given = [t.to(device) for t in inputs(5)]
    leaves = [t.requires_grad_() for t in (given[0][:0], *given[1:])]
    with use_backend("triton"):
        for op in (fused, two_ops):
            y = op(None)(*leaves)
            assert y.shape == (0, 5, HEADS, HEAD_DIM)
            assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves))


def test_compiles_whole(device: torch.device) -> None:
    """Without a graph break."""
    check_compiled(fused(None), inputs(9), device)


@pytest.mark.gpu
@GPU[1]
def test_is_captured(device: torch.device) -> None:
    """Forward and backward."""
    check_captured(fused(None), inputs(65), device)


def test_wrong_channels_are_refused() -> None:
    """By their number."""
    with pytest.raises(ValueError, match="66 channels do not hold 2 heads of 16 and B and C of 4 groups"):
        mamba_scan(
            draw(1, 3, 66), draw(1, 3, 2), -draw(2).exp(), draw(2), draw(2), draw(66, 4), None,
            head_dim=16, groups=4, dt_limit=(0.0, 1.0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("seq", "heads", "head_dim", "groups", "state", "message"),
    [
        (3, 4, 16, 3, 5, "heads = 4 is not a multiple of groups = 3"),
        (3, 2, 300, 1, 5, "head_dim = 300 and state = 5; both must be at most 256"),
        (0, 2, 16, 1, 5, "seq = 0; give at least one token"),
    ],
)
def test_sizes_are_refused(seq: int, heads: int, head_dim: int, groups: int, state: int, message: str) -> None:
    """Before a kernel, which does not look."""
    channels = heads * head_dim + 2 * groups * state
    with pytest.raises(ValueError, match=f"mamba_scan: {message}"):
        mamba_scan(
            torch.zeros(1, seq, channels), torch.zeros(1, seq, heads), -torch.ones(heads), torch.zeros(heads),
            torch.zeros(heads), torch.zeros(channels, 4), None, head_dim=head_dim, groups=groups, dt_limit=(0.0, 1.0),
        )  # fmt: skip
