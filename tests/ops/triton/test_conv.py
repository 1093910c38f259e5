"""The convolution kernels against the reference in float64."""

import pytest
import torch
from torch import Tensor

from alloy.ops import causal_conv1d

pytest.importorskip("triton")
from twins import GPU, check, check_captured, check_compiled, draw, gpu

from alloy.ops.triton import conv, tuning

# documents of one token and of two, a row of one document, an empty row, a row of one token
PACKED = [[4] * 5 + [1] + [2] * 2 + [3] * 6 + [-1] * 3, [0] * 8 + [1] * 9, [-1] * 17, [7] + [-1] * 16]
FORWARD, BACKWARD = tuning.CANDIDATES["causal_conv1d"], tuning.CANDIDATES["causal_conv1d_backward"]


def check_conv(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    seq: int = 17,
    channels: int = 19,
    kernel: int = 4,
    bias: bool = True,
    init: bool = False,
    documents: Tensor | None = None,
    activation: str | None = "silu",
) -> None:
    """Of a view into a wider array, whose padding and that of the outer gradient is NaN."""
    inputs = [draw(batch, seq, channels + 24), draw(channels, kernel, seed=1)]
    inputs += [draw(channels, seed=2)] if bias else []
    inputs += [draw(batch, kernel - 1, channels, seed=3)] if init else []
    padding = torch.zeros(batch, seq, 1, dtype=torch.bool) if documents is None else (documents < 0)[..., None]
    inputs[0] = inputs[0].masked_fill(padding, torch.nan)
    numbers = None if documents is None else documents.to(device)

    def op(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        # taps of a channel are not next to each other
        first = rest[-1].mT if init else None
        shift = rest[0] if bias else None
        return causal_conv1d(
            x[..., 8 : 8 + channels], weight, shift, activation=activation, init=first, documents=numbers
        )

    check(op, inputs, dtype, device, padding)


@pytest.mark.parametrize("kernel", [4, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed: bool, kernel: int, device: torch.device) -> None:
    """With init and without documents; with documents that start anywhere within a program and at its edges."""
    if packed:
        check_conv(device, batch=4, kernel=kernel, init=True, documents=torch.tensor(PACKED, dtype=torch.int32))
    else:
        check_conv(device, batch=2, seq=13, kernel=kernel, init=True)


def test_one_program_walks_the_whole_row(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Document starts at every place of an unrolled block; no activation, no bias, int64 numbers."""
    monkeypatch.setattr(conv, "_PROGRAMS", 1)
    starts = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 6, -1]])
    check_conv(device, seq=24, kernel=3, bias=False, documents=starts, activation=None)
    check_conv(device, seq=24, documents=starts.roll(3, 1).clamp_min(0))


@pytest.mark.parametrize(("seq", "kernel"), [(1, 4), (2, 4), (3, 1)])
def test_rows_shorter_than_the_kernel(seq: int, kernel: int, device: torch.device) -> None:
    """What is left of init still gets its gradient."""
    check_conv(device, seq=seq, kernel=kernel, init=kernel > 1)


@pytest.mark.parametrize("config", [FORWARD[0], *(gpu(c) for c in FORWARD[1:])])
def test_every_forward_configuration(config: tuning.Config, device: torch.device) -> None:
    """Two blocks of channels, the second one short."""
    with tuning.override("causal_conv1d", config):
        check_conv(device, seq=9, channels=config["BLOCK"] + 8)


@pytest.mark.parametrize("config", [BACKWARD[0], *(gpu(c) for c in BACKWARD[1:])])
def test_every_backward_configuration(config: tuning.Config, device: torch.device) -> None:
    """Two blocks of channels, the second one short."""
    with tuning.override("causal_conv1d_backward", config):
        check_conv(device, seq=9, channels=config["BLOCK"] + 8)


def test_compiles_without_breaks(device: torch.device) -> None:
    """In one graph with its backward."""
    check_compiled(causal_conv1d, [draw(1, 9, 7), draw(7, 4), draw(7)], device)


def test_refuses_long_kernels(device: torch.device) -> None:
    """And says what has them."""
    with pytest.raises(ValueError, match="5 taps, at most 4"):
        conv.causal_conv1d(torch.zeros(1, 3, 7, device=device), torch.zeros(7, 5), None, None, None, None)


def packed(batch: int, seq: int) -> Tensor:
    """Documents of all lengths, padding at the end of the first row."""
    starts = torch.rand(batch, seq, generator=torch.Generator().manual_seed(5)) < 0.02
    numbers = starts.cumsum(1)
    numbers[0, seq - seq // 5 :] = -1
    return numbers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("program", [*zip(FORWARD, BACKWARD, strict=True)])
def test_every_configuration_in_bf16(program: tuple[tuning.Config, ...], device: torch.device) -> None:
    """With documents, padding and init."""
    forward, backward = program
    with tuning.override("causal_conv1d", forward), tuning.override("causal_conv1d_backward", backward):
        check_conv(device, torch.bfloat16, 3, 1537, 1000, init=True, documents=packed(3, 1537))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float16, 1000), (torch.float32, 1000), (torch.bfloat16, 1003)])
def test_large(dtype: torch.dtype, channels: int, device: torch.device) -> None:
    """Every dtype, rows that are aligned and not, with documents and without."""
    check_conv(device, dtype, 3, 1537, channels, documents=packed(3, 1537))
    check_conv(device, dtype, 2, 4096, channels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graph_capture(device: torch.device) -> None:
    """Also with the state, whose place depends on the documents."""
    numbers = packed(2, 300).to(device)

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, state = causal_conv1d(x, weight, bias, documents=numbers, return_state=True)
        return y, state

    check_captured(op, [draw(2, 300, 64), draw(64, 4), draw(64)], device)


assert GPU
