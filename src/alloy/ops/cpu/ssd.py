"""The SSD scan for CPU cores: batched matmuls over all chunks at once and a hand-written backward.

Legend as in `alloy.ops.ssd`. Inside, arrays are chunk-major, so that matmul operands are contiguous and the carried
states of consecutive chunks lie next to each other:
    by head   (chunks, batch, heads, tokens, head_dim)             inside a chunk: decays differ from head to head
    by group  (chunks, batch, groups, tokens, heads a group * head_dim)   states: B and C are shared by the group's heads
    states    (chunks, batch, groups, heads a group * head_dim, state)
B and C are never expanded to heads. What keeps the element-wise passes cheap (torch 2.13, AVX-512):
    - exponents are in base 2: exp2 takes a third of exp's time
    - exponents are clamped from both sides, to 0 (never exp of a positive) and to where results are still normal numbers:
      exp is ten times slower when it underflows; pairs that do not meet are zeroed in C . B, once a group
    - the gradient of the cumulated log decay l is dl_t = dy_t . (y_t - D x_t) - d_t x_t . du_t, plus the product of the
      carried state and its gradient at a chunk's last token: every path of l is a factor exp(l_i - l_j), so no
      (tokens, tokens) array has to be reduced

Paper: Mamba-2 (Dao and Gu, 2024), section 6. arXiv:2405.21060
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops.documents import segment_ids
from alloy.ops.precision import wide

# d * A times this is the log of a decay in base 2
_LOG2_E = math.log2(math.e)
# smallest exponents in base 2 whose powers are normal numbers with room for a factor
_FLOOR = {torch.float32: -100.0, torch.float64: -900.0}


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    h0: Tensor | None,
    documents: Tensor | None,
    chunk: int,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `alloy.ops.ssd_scan`; the state is None unless `return_state`."""
    settings = (dt_softplus, dt_limit, chunk, return_state)
    given = (x, dt, A, B, C, D, dt_bias, h0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Scan.apply(*given, documents, settings)
    y, state = _forward(_prepare(x, dt, A, B, C, dt_bias, documents, settings), D, h0, return_state)
    return y.to(x.dtype), state


@dataclass
class _Chunked:
    """The inputs in chunk-major layout, in the wide dtype; padding is zero."""

    batch: int
    seq: int
    heads: int
    groups: int
    raw: Tensor  # (batch, seq, heads), dt + dt_bias
    real: Tensor | None  # bool (batch, seq)
    d: Tensor  # (chunks, batch, heads, tokens), like the next three
    logs: Tensor  # cumulated d * A, base 2
    into: Tensor  # decay from the carried state to a token
    onto: Tensor  # decay from a token to the chunk's end
    through: Tensor  # (chunks, batch, heads), decay from the carried state to the chunk's end
    meet: Tensor  # (chunks or 1, batch or 1, 1, tokens, tokens), 1 where token i sees token j, else 0
    x: Tensor  # (chunks, batch, heads, tokens, head_dim)
    B: Tensor  # (chunks * batch * groups, tokens, state)
    C: Tensor  # (chunks * batch * groups, tokens, state)

    @property
    def rows(self) -> int:
        """Rows of B and C that belong to one chunk."""
        return self.batch * self.groups

    def chunked(self, t: Tensor) -> Tensor:
        """(batch, seq, heads or groups, width) -> contiguous (chunks, batch, heads or groups, tokens, width)."""
        if self.real is not None:
            t = torch.where(self.real[..., None, None], t, 0)
        chunks, _, _, tokens = self.d.shape
        t = F.pad(t, (0, 0, 0, 0, 0, chunks * tokens - self.seq)) if self.seq < chunks * tokens else t
        out = torch.empty(chunks, self.batch, t.shape[2], tokens, t.shape[3], dtype=self.d.dtype, device=t.device)
        return out.copy_(t.unflatten(1, (chunks, tokens)).permute(1, 0, 3, 2, 4))

    def merged(self, t: Tensor) -> Tensor:
        """Inverse of `chunked`: (chunks, batch, heads or groups, tokens, width) -> (batch, seq, heads or groups, width)."""
        return t.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.seq]

    def grouped(self, t: Tensor) -> Tensor:
        """A view: (chunks, batch, heads, ...) -> (chunks, batch, groups, heads a group, ...)."""
        return t.unflatten(2, (self.groups, -1))

    def by_group(self, t: Tensor, weight: Tensor) -> Tensor:
        """t (chunks, batch, heads, tokens, head_dim) * weight (chunks, batch, heads, tokens), laid out by group:
        (chunks * batch * groups, tokens, heads a group * head_dim). Fewer chunks may be given."""
        t, weight = self.grouped(t).transpose(3, 4), self.grouped(weight).transpose(3, 4)
        out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        return torch.mul(t, weight[..., None], out=out).flatten(0, 2).flatten(2)

    def add_by_head(self, total: Tensor, t: Tensor, weight: Tensor) -> None:
        """total += t * weight in place: total and weight as in `by_group`, t laid out by group."""
        total = self.grouped(total)
        t = t.view(*total.shape[:3], total.shape[4], total.shape[3], total.shape[5]).transpose(3, 4)
        total.addcmul_(t, self.grouped(weight)[..., None])

    def decay(self) -> Tensor:
        """exp(l_i - l_j) for i >= j: (chunks, batch, groups, heads a group, tokens, tokens)."""
        logs = self.grouped(self.logs)
        return (logs[..., :, None] - logs[..., None, :]).clamp_(_FLOOR[logs.dtype], 0).exp2_()

    def products(self) -> Tensor:
        """C_i . B_j where token i sees token j, else 0: (chunks, batch, groups, 1, tokens, tokens)."""
        tokens = self.B.shape[1]
        products = torch.bmm(self.C, self.B.transpose(1, 2)).view(-1, self.batch, self.groups, tokens, tokens)
        return products.mul_(self.meet)[:, :, :, None]


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    documents: Tensor | None,
    settings: tuple[bool, tuple[float, float], int, bool],
) -> _Chunked:
    dt_softplus, dt_limit, chunk, _ = settings
    kind = wide(x)
    batch, seq, heads, _ = x.shape
    tokens = min(chunk, seq)
    chunks = -(-seq // tokens)
    extra = chunks * tokens - seq
    raw = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias.to(kind)
    d = _soft(raw, dt_softplus).clamp(*dt_limit)
    segments = real = None
    if documents is not None:
        segments, real = segment_ids(documents)
        d = torch.where(real[..., None], d, 0)
        segments = torch.cat([segments, segments[:, -1:].expand(-1, extra)], dim=1)
    d = F.pad(d, (0, 0, 0, extra)).view(batch, chunks, tokens, heads).permute(1, 0, 3, 2).contiguous()
    logs = (d * (A.to(kind) * _LOG2_E)[:, None]).cumsum(-1)
    into, onto = ((t.clamp(min=_FLOOR[kind])).exp2_() for t in (logs, logs[..., -1:] - logs))
    through = into[..., -1]
    meet = torch.ones(1, 1, 1, tokens, tokens, dtype=kind, device=x.device).tril_()
    if segments is not None:
        own = segments.view(batch, chunks, tokens).transpose(0, 1)[:, :, None]  # (chunks, batch, 1, tokens)
        # the segment whose state is carried into a chunk
        owner = torch.cat([own[:1, ..., :1], own[:-1, ..., -1:]])
        meet = meet * (own[..., :, None] == own[..., None, :])
        into = into * (own == owner)
        onto = onto * (own == own[..., -1:])
        through = into[..., -1]
    p = _Chunked(batch, seq, heads, B.shape[2], raw, real, d, logs, into, onto, through, meet, x, B, C)
    p.x, p.B, p.C = p.chunked(x), p.chunked(B).flatten(0, 2), p.chunked(C).flatten(0, 2)
    return p


def _soft(raw: Tensor, dt_softplus: bool) -> Tensor:
    return F.softplus(raw) if dt_softplus else raw


def _states(p: _Chunked, h0: Tensor | None, last: bool) -> Tensor:
    """States carried into each chunk and, if `last`, out of the last one: (chunks (+ 1), batch, heads, head_dim, state)."""
    count = p.d.shape[0] + last
    head_dim, width = p.x.shape[-1], p.B.shape[-1]
    states = torch.empty(count, p.batch, p.heads, head_dim, width, dtype=p.d.dtype, device=p.d.device)
    if h0 is None:
        states[0].zero_()
    else:
        states[0].copy_(h0)
    if count > 1:
        inputs = p.by_group(p.x[: count - 1], (p.onto * p.d)[: count - 1])
        torch.bmm(inputs.transpose(1, 2), p.B[: inputs.shape[0]], out=states[1:].view(inputs.shape[0], -1, width))
    for i in range(1, count):
        states[i].addcmul_(states[i - 1], p.through[i - 1, ..., None, None])
    return states


def _forward(p: _Chunked, D: Tensor | None, h0: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
    """y (batch, seq, heads, head_dim) in the wide dtype, and the last state if asked for."""
    chunks, _, _, tokens = p.d.shape
    mixed = p.decay().mul_(p.products()).mul_(p.grouped(p.d)[..., None, :])
    if D is not None:
        mixed.diagonal(dim1=-2, dim2=-1).add_(D.to(mixed.dtype).view(p.groups, -1, 1))
    y = torch.bmm(mixed.view(-1, tokens, tokens), p.x.flatten(0, 2)).view(p.x.shape)
    # without h0 nothing is carried into the first chunk
    first = 1 if h0 is None else 0
    if chunks == first and not return_state:
        return p.merged(y), None
    states = _states(p, h0, return_state)
    if chunks > first:
        carried = states[first:chunks].view((chunks - first) * p.rows, -1, states.shape[-1])
        p.add_by_head(y[first:], torch.bmm(p.C[first * p.rows :], carried.transpose(1, 2)), p.into[first:])
    return p.merged(y), states[chunks].clone() if return_state else None


class _Scan(torch.autograd.Function):
    """Keeps the chunk-major inputs and y; decays, products and states are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        h0: Tensor | None,
        documents: Tensor | None,
        settings: tuple[bool, tuple[float, float], int, bool],
    ) -> tuple[Tensor, Tensor | None]:
        p = _prepare(x, dt, A, B, C, dt_bias, documents, settings)
        y, state = _forward(p, D, h0, settings[3])
        given = tuple(vars(p).values())
        ctx.sizes, ctx.settings = given[:4], settings
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, dt, A, B, C, D, dt_bias, h0))
        out = y.to(x.dtype)
        ctx.save_for_backward(A, D, h0, y, *given[4:])
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        A, D, h0, y, *saved = ctx.saved_tensors
        p = _Chunked(*ctx.sizes, *saved)
        dx, dB, dC, dlogs, dd, dh0, skip = _backward(p, p.chunked(dy), dstate, D, h0, p.chunked(y))
        da = dlogs.flip(-1).cumsum(-1).flip(-1)
        dA = (da * p.d).sum((0, 1, 3))
        dd.addcmul_(da, A.to(dd.dtype)[:, None])
        ddt = dd.permute(1, 0, 3, 2).flatten(1, 2)[:, : p.seq]
        dt_softplus, (low, high), _, _ = ctx.settings
        soft = _soft(p.raw, dt_softplus)
        passed = (soft >= low) & (soft <= high)
        passed = passed if p.real is None else passed & p.real[..., None]
        ddt = torch.where(passed, ddt * p.raw.sigmoid() if dt_softplus else ddt, 0)
        gradients = (dx, ddt, dA, dB, dC, skip, ddt.sum((0, 1)), dh0)
        return *(None if kind is None else g.to(kind) for g, kind in zip(gradients, ctx.dtypes, strict=True)), None, None


def _backward(
    p: _Chunked, dy: Tensor, dstate: Tensor | None, D: Tensor | None, h0: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, B, C (as given), of the cumulated log decays (base e) and of d (chunks, batch, heads, tokens), of
    h0 and of D. dy and y are (chunks, batch, heads, tokens, head_dim)."""
    chunks, _, _, tokens = p.d.shape
    head_dim, width = p.x.shape[-1], p.B.shape[-1]
    u = p.x * p.d[..., None]
    # inside the chunks
    decay = p.decay()
    dmixed = torch.bmm(dy.flatten(0, 2), u.flatten(0, 2).transpose(1, 2)).view(decay.shape)
    dproducts = dmixed[:, :, :, 0] * decay[:, :, :, 0]
    for head in range(1, decay.shape[3]):
        dproducts.addcmul_(dmixed[:, :, :, head], decay[:, :, :, head])
    dproducts = dproducts.mul_(p.meet).flatten(0, 2)
    dC = torch.bmm(dproducts, p.B)
    dB = torch.bmm(dproducts.transpose(1, 2), p.C)
    mixed = decay.mul_(p.products()).flatten(0, 3)
    du = torch.bmm(mixed.transpose(1, 2), dy.flatten(0, 2), out=dmixed.new_empty(mixed.shape[0], tokens, head_dim))
    du = du.view(p.x.shape)
    del dmixed, decay, mixed
    # the carried states, forwards, and their gradients, backwards
    first = 1 if h0 is None else 0
    last = 0 if dstate is None else 1
    states = _states(p, h0, bool(last))
    weighted = p.by_group(dy, p.into)
    if chunks > first:
        dC[first * p.rows :].baddbmm_(weighted[first * p.rows :], states[first:chunks].view(-1, weighted.shape[2], width))
    dstates = torch.empty(chunks + 1, *states.shape[1:], dtype=u.dtype, device=u.device)
    torch.bmm(weighted.transpose(1, 2), p.C, out=dstates[:chunks].view(-1, weighted.shape[2], width))
    if dstate is None:
        dstates[chunks].zero_()
    else:
        dstates[chunks].copy_(dstate)
    for i in reversed(range(chunks)):
        dstates[i].addcmul_(dstates[i + 1], p.through[i, ..., None, None])
    dlogs = torch.zeros_like(p.logs)
    used = chunks - 1 + last
    if used:
        out = dstates[1 : used + 1]
        by_row = out.view(used * p.rows, -1, width)
        dB[: used * p.rows].baddbmm_(p.by_group(u[:used], p.onto[:used]), by_row)
        p.add_by_head(du[:used], torch.bmm(p.B[: used * p.rows], by_row.transpose(1, 2)), p.onto[:used])
        dlogs[:used, ..., -1] = (states[1 : used + 1] * out).sum((-2, -1))
    dd = (p.x * du).sum(-1)
    skip = (p.x * dy).sum(-1)
    dlogs += (dy * y).sum(-1)
    dlogs -= p.d * dd
    dx = du.mul_(p.d[..., None])
    if D is not None:
        D = D.to(dx.dtype)[:, None]
        dlogs -= skip * D
        dx.addcmul_(dy, D[..., None])
    shape = (chunks, p.batch, p.groups, tokens, width)
    return p.merged(dx), p.merged(dB.view(shape)), p.merged(dC.view(shape)), dlogs, dd, dstates[0], skip.sum((0, 1, 3))
