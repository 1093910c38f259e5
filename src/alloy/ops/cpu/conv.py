"""The causal depthwise convolution for CPU cores: a few tokens of all channels at a time, so that the taps' passes and the
activation stay in the cache; the backward computes the values before the activation again.

Paper: Mamba-2 (Dao and Gu, 2024), section 7. arXiv:2405.21060
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops.documents import segment_ids
from alloy.ops.precision import wide

# elements of a block: three arrays of this size fit the level-2 cache of current cores
_BLOCK = 1 << 17


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    init: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """As `alloy.ops.causal_conv1d` without a final state."""
    given = (x, weight, bias, init)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Conv.apply(*given, documents, activation)
    return _forward(_Blocks(*given, documents), activation)


@dataclass
class _Block:
    start: int
    stop: int
    window: Tensor  # (batch, taps + tokens, channels), inputs from `taps` before the block on
    same: Tensor | None  # bool (taps, batch, tokens, 1), whether the token and its k-th tap are one document; None: all
    real: Tensor | None  # bool (batch, tokens, 1); None: all


class _Blocks:
    """Cuts the sequence into blocks; masks are made only for blocks where a document starts or padding lies."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, init: Tensor | None, documents: Tensor | None
    ) -> None:
        self.kind = wide(x)
        self.x = x
        self.batch, self.seq, self.channels = x.shape
        self.taps = weight.shape[1] - 1
        self.weight = weight.t().to(self.kind).contiguous()  # (kernel, channels)
        self.bias = None if bias is None else bias.to(self.kind)
        self.init = x.new_zeros(self.batch, self.taps, self.channels) if init is None else init.transpose(1, 2)
        self.tokens = max(_BLOCK // (self.batch * self.channels), 8)
        self.same = self.real = None
        if documents is not None:
            segments, self.real = segment_ids(documents)
            # what precedes a row belongs to its first document
            before = F.pad(segments, (self.taps, 0))
            self.same = torch.stack([before[:, k : k + self.seq] == segments for k in range(self.taps + 1)])[:-1]
            self.plain = self.same.all(0).logical_and_(self.real).all(0)  # (seq,)

    def __iter__(self) -> Iterator[_Block]:
        for start in range(0, self.seq, self.tokens):
            stop = min(start + self.tokens, self.seq)
            part = self.x[:, max(start - self.taps, 0) : stop]
            same = real = None
            if self.same is not None and self.real is not None and not self.plain[start:stop].all():
                same, real = self.same[:, :, start:stop, None], self.real[:, start:stop, None]
                part = torch.where(self.real[:, max(start - self.taps, 0) : stop, None], part, 0)
            part = part.to(self.kind)
            window = part if start >= self.taps else torch.cat([self.init[:, start:].to(self.kind), part], dim=1)
            yield _Block(start, stop, window, same, real)

    def convolve(self, block: _Block, out: Tensor) -> None:
        """out (batch, tokens, channels) = the convolution before the activation."""
        tokens = block.stop - block.start
        own = block.window[:, self.taps :]
        if self.bias is None:
            torch.mul(own, self.weight[-1], out=out)
        else:
            torch.addcmul(self.bias, own, self.weight[-1], out=out)
        for k in range(self.taps):
            out.addcmul_(self.tap(block, block.window[:, k : k + tokens], k), self.weight[k])

    def tap(self, block: _Block, t: Tensor, k: int) -> Tensor:
        """t (batch, tokens, channels) with zeros where tap k would cross a document start."""
        return t if block.same is None else torch.where(block.same[k], t, 0)

    def buffer(self) -> Tensor:
        return torch.empty(self.batch, min(self.tokens, self.seq), self.channels, dtype=self.kind, device=self.x.device)


def _forward(blocks: _Blocks, activation: str | None) -> Tensor:
    y = torch.empty(blocks.x.shape, dtype=blocks.x.dtype, device=blocks.x.device)
    narrow = None if y.dtype == blocks.kind else blocks.buffer()
    for block in blocks:
        place = y[:, block.start : block.stop]
        out = place if narrow is None else narrow[:, : block.stop - block.start]
        blocks.convolve(block, out)
        if activation == "silu":
            F.silu(out, inplace=True)
        if block.real is not None:
            out.mul_(block.real)
        if narrow is not None:
            place.copy_(out)
    return y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        init: Tensor | None,
        documents: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, init, documents)
        ctx.activation = activation
        return _forward(_Blocks(x, weight, bias, init, documents), activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, init, documents = ctx.saved_tensors
        blocks = _Blocks(x, weight, bias, init, documents)
        taps = blocks.taps
        dx = torch.empty(blocks.batch, blocks.seq, blocks.channels, dtype=blocks.kind, device=x.device)
        dinit = dx.new_zeros(blocks.batch, taps, blocks.channels)
        dweight = torch.zeros_like(blocks.weight)
        dbias = dweight.new_zeros(blocks.channels)
        pre, product = blocks.buffer(), blocks.buffer()
        for block in blocks:
            start, stop = block.start, block.stop
            tokens = stop - start
            dpre = dy[:, start:stop].to(blocks.kind)
            if block.real is not None:
                dpre = torch.where(block.real, dpre, 0)
            if ctx.activation == "silu":
                blocks.convolve(block, pre[:, :tokens])
                dpre = torch.ops.aten.silu_backward(dpre, pre[:, :tokens], grad_input=pre[:, :tokens])
            dbias += dpre.sum((0, 1))
            for k in reversed(range(taps + 1)):
                share = dpre if k == taps else blocks.tap(block, dpre, k)
                back = taps - k
                dweight[k] += torch.mul(share, block.window[:, k : k + tokens], out=product[:, :tokens]).sum((0, 1))
                if back == 0:
                    torch.mul(share, blocks.weight[k], out=dx[:, start:stop])
                    continue
                # the first tokens of a row reach back into what preceded it
                outside = min(max(back - start, 0), tokens)
                dx[:, start - back + outside : stop - back].addcmul_(share[:, outside:], blocks.weight[k])
                if outside:
                    first = taps - back + start
                    dinit[:, first : first + outside].addcmul_(share[:, :outside], blocks.weight[k])
        return (
            dx.to(x.dtype),
            dweight.t().to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if init is None else dinit.transpose(1, 2).to(init.dtype),
            None,
            None,
        )
