"""The SSD scan for CPU cores: one loop over chunks in buffers that stay in the cache, and a hand-written backward.

Legend as in `alloy.ops.ssd`; `share` is the number of heads in a group. The loop copies a chunk into buffers made once
a call (or reads it in place, where one matmul can take it), so that all heads of a chunk are a few batched matmuls on contiguous operands and memory does not grow with the
sequence. Two layouts occur, and B and C are never expanded to heads:
    by head   (batch, groups, share, tokens, head_dim)   inside a chunk: decays differ from head to head
    by group  (batch, groups, tokens, share, head_dim)   states: all heads of a group meet the same B and C
What keeps the element-wise passes cheap (torch 2.13, AVX-512):
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
from alloy.ops.rounding import round_to_half
from alloy.ops.slots import slot_numbers

# d * A times this is the log of a decay in base 2
NO_LIMIT = (0.0, math.inf)
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
    y, state = _forward(_prepare(x, dt, A, B, dt_bias, documents, settings), x, B, C, D, h0, return_state)
    return y.to(x.dtype), state


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> Tensor:
    """As `alloy.ops.ssd_step`: three passes over each state, in place where it lies; a slot's own state is contiguous."""
    batch, heads, head_dim = x.shape
    groups, width = B.shape[1:]
    kind = wide(state)
    d = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias.to(kind)
    d = _soft(d, dt_softplus)
    d = d if dt_limit == NO_LIMIT else d.clamp(*dt_limit)
    decay = torch.exp(d * A.to(kind))[..., None, None]
    inputs = (x * d[..., None]).view(batch, groups, -1, 1)
    B, C = B.to(kind)[:, :, None], C.to(kind)[:, :, None]
    y = torch.zeros(batch, groups, 1, heads // groups * head_dim, dtype=kind, device=x.device)
    for row, slot in enumerate(slot_numbers(slots, state, batch)):
        if slot < 0:
            continue
        # the state itself, or a wide copy of a narrow one
        own = state[slot].to(kind)
        grouped = own.mul_(decay[row]).view(groups, -1, width)
        grouped.addcmul_(inputs[row], B[row])
        torch.bmm(C[row], grouped.transpose(1, 2), out=y[row])
        if sr_seed is not None:
            state[slot] = round_to_half(own[None], sr_seed, torch.tensor([slot]))[0]
        elif own.dtype != state.dtype:
            state[slot] = own
    y = y.view(x.shape)
    if D is not None:
        used = x if slots is None else torch.where((slots >= 0)[:, None, None], x, 0)
        y.addcmul_(used, D.to(kind)[:, None])
    return y.to(x.dtype)


@dataclass
class _Steps:
    """What depends on dt alone, for all chunks: small beside x, B and C."""

    raw: Tensor  # (batch, seq, heads), dt + dt_bias
    real: Tensor | None  # bool (batch, seq)
    d: Tensor  # (chunks, batch, groups, share, tokens), like the next three
    logs: Tensor  # cumulated d * A, base 2
    into: Tensor  # decay from the carried state to a token
    onto: Tensor  # decay from a token to the chunk's end
    through: Tensor  # (chunks, batch, groups, share), decay from the carried state to the chunk's end
    meet: Tensor  # (chunks, batch, 1, tokens, tokens), 1 where token i sees token j, else 0


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    documents: Tensor | None,
    settings: tuple[bool, tuple[float, float], int, bool],
) -> _Steps:
    dt_softplus, dt_limit, chunk, _ = settings
    kind = wide(x)
    batch, seq = x.shape[:2]
    groups = B.shape[2]
    chunks = -(-seq // chunk)
    # chunks of equal size leave the fewest places empty in the last one
    tokens = -(-seq // chunks)
    extra = chunks * tokens - seq
    raw = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias.to(kind)
    d = _soft(raw, dt_softplus)
    d = d if dt_limit == NO_LIMIT else d.clamp(*dt_limit)
    real = segments = None
    if documents is not None:
        segments, real = segment_ids(documents)
        d = torch.where(real[..., None], d, 0)
    d = F.pad(d, (0, 0, 0, extra)).view(batch, chunks, tokens, groups, -1).permute(1, 0, 3, 4, 2).contiguous()
    logs = (d * (A.to(kind) * _LOG2_E).view(groups, -1, 1)).cumsum(-1)
    into, onto = (t.clamp(min=_FLOOR[kind]).exp2_() for t in (logs, logs[..., -1:] - logs))
    meet = torch.ones(tokens, tokens, dtype=kind, device=x.device).tril_().expand(chunks, batch, 1, -1, -1)
    if segments is not None:
        segments = torch.cat([segments, segments[:, -1:].expand(-1, extra)], dim=1)
        own = segments.view(batch, chunks, 1, tokens).transpose(0, 1)  # (chunks, batch, 1, tokens)
        # the segment whose state is carried into a chunk
        owner = torch.cat([own[:1, ..., :1], own[:-1, ..., -1:]])
        meet = meet * (own[..., :, None] == own[..., None, :])
        into = into * (own == owner)[:, :, None]
        onto = onto * (own == own[..., -1:])[:, :, None]
    return _Steps(raw, real, d, logs, into, onto, into[..., -1], meet)


def _soft(raw: Tensor, dt_softplus: bool) -> Tensor:
    return F.softplus(raw) if dt_softplus else raw


class _Buffers:
    """One chunk's arrays, and the pieces of the algorithm that forward and backward share."""

    def __init__(self, steps: _Steps, head_dim: int, width: int) -> None:
        self.steps = steps
        self.chunks, self.batch, self.groups, self.share, self.tokens = steps.d.shape
        self.head_dim, self.width = head_dim, width
        self.weights = steps.onto * steps.d
        self.x, self.inputs = self.by_head(), self.by_group()
        self.B, self.C = self.shared(), self.shared()
        self.products = self.new(self.batch, self.groups, self.tokens, self.tokens)
        self.decay = self.new(self.batch, self.groups, self.share, self.tokens, self.tokens)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.steps.d.dtype, device=self.steps.d.device)

    def by_head(self) -> Tensor:
        return self.new(self.batch, self.groups, self.share, self.tokens, self.head_dim)

    def by_group(self) -> Tensor:
        return self.new(self.batch, self.groups, self.tokens, self.share, self.head_dim)

    def shared(self) -> Tensor:
        """The size of B, C and their gradients."""
        return self.new(self.batch, self.groups, self.tokens, self.width)

    def states(self, *count: int) -> Tensor:
        return self.new(*count, self.batch, self.groups, self.share, self.head_dim, self.width)

    def place(self, t: Tensor, i: int) -> Tensor:
        """Chunk i of t (batch, seq, groups, ..., width) as a view (batch, groups, ..., tokens, width); the last chunk may
        have fewer tokens."""
        return t[:, i * self.tokens : (i + 1) * self.tokens].movedim(1, -2)

    def load(self, buffer: Tensor, t: Tensor, i: int) -> Tensor:
        """Chunk i of t (batch, seq, groups, ..., width), with zeros for padding and past the end: a view if the matmuls can
        take it as one array of matrices, else copied into `buffer`."""
        part = self.place(t, i)
        count = part.shape[-2]
        real = self.steps.real
        if (
            self.batch == 1
            and real is None
            and count == self.tokens
            and part.dtype == buffer.dtype
            and part.stride(-1) == 1
        ):
            return part
        if real is not None:
            own = real[:, i * self.tokens : i * self.tokens + count]
            part = torch.where(own.view(self.batch, *[1] * (part.dim() - 3), -1, 1), part, 0)
        buffer[..., :count, :].copy_(part)
        if count < self.tokens:
            buffer[..., count:, :].zero_()
        return buffer

    def multiply(self, B: Tensor, C: Tensor, i: int) -> None:
        """products = C_i . B_j where token i sees token j, else 0."""
        _bmm(C, B.transpose(-1, -2), self.products)
        self.products.mul_(self.steps.meet[i])

    def decays(self, i: int) -> None:
        """decay = exp(l_i - l_j) for token i at or after token j."""
        logs = self.steps.logs[i]
        torch.sub(logs[..., :, None], logs[..., None, :], out=self.decay).clamp_(_FLOOR[logs.dtype], 0).exp2_()

    def advance(self, x: Tensor, B: Tensor, i: int, before: Tensor | None, after: Tensor) -> None:
        """after = through * before + what chunk i adds; `before` may be `after`, None is zero."""
        torch.mul(x, self.weights[i][..., None], out=self.inputs.transpose(2, 3))
        inputs = self.inputs.flatten(3).transpose(-1, -2)
        if before is None:
            _bmm(inputs, B, after)
        else:
            torch.mul(before, self.steps.through[i][..., None, None], out=after)
            _bmm(inputs, B, after, add=True)


def _bmm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a @ b. a (..., n, k) and b (..., k, m) have collapsible leading dimensions; `out` is contiguous and may be
    split into more dimensions."""
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    out = out.view(a.shape[0], a.shape[1], b.shape[2])
    if add:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)


def _forward(
    steps: _Steps,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    return_state: bool,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (batch, seq, heads, head_dim) in the wide dtype, and the last state if asked for.

    `states`, if given, is filled as by `_states`; without it one state is carried along in place.
    """
    buffers = _Buffers(steps, x.shape[-1], B.shape[-1])
    chunks, groups = buffers.chunks, buffers.groups
    within, carried = buffers.by_head(), buffers.by_group()
    diagonal = buffers.decay.diagonal(dim1=-2, dim2=-1)
    skip = None if D is None else D.to(within.dtype).view(groups, -1, 1)
    x = x.unflatten(2, (groups, -1))
    y = torch.empty(x.shape, dtype=within.dtype, device=x.device)
    if states is None:
        states = buffers.states(1).expand(chunks + 1, *[-1] * 5)
    before = None if h0 is None else states[0].copy_(h0.view(states[0].shape))
    for i in range(chunks):
        xc, Bc, Cc = buffers.load(buffers.x, x, i), buffers.load(buffers.B, B, i), buffers.load(buffers.C, C, i)
        buffers.multiply(Bc, Cc, i)
        buffers.decays(i)
        buffers.decay.mul_(buffers.products[:, :, None]).mul_(steps.d[i][..., None, :])
        if skip is not None:
            diagonal.add_(skip)
        _bmm(buffers.decay, xc, within)
        out = buffers.place(y, i)
        count = out.shape[-2]
        if before is None:
            out.copy_(within[..., :count, :])
        else:
            _bmm(Cc, before.flatten(2, 3).transpose(-1, -2), carried)
            torch.addcmul(
                within[..., :count, :],
                carried.transpose(2, 3)[..., :count, :],
                steps.into[i][..., :count, None],
                out=out,
            )
        if i < chunks - 1 or return_state:
            buffers.advance(xc, Bc, i, before, states[i + 1])
            before = states[i + 1]
    return y.flatten(2, 3), states[chunks].flatten(1, 2).clone() if return_state else None


def _states(buffers: _Buffers, x: Tensor, B: Tensor, h0: Tensor | None, last: int) -> Tensor:
    """The states that enter each chunk and the one that leaves the last, of which the first `last` + 1 are computed:
    (chunks + 1, batch, groups, share, head_dim, state)."""
    states = buffers.states(buffers.chunks + 1)
    if h0 is not None:
        states[0].copy_(h0.view(states[0].shape))
    for i in range(last):
        xc, Bc = buffers.load(buffers.x, x, i), buffers.load(buffers.B, B, i)
        buffers.advance(xc, Bc, i, None if i == 0 and h0 is None else states[i], states[i + 1])
    return states


class _Scan(torch.autograd.Function):
    """Keeps the inputs, y, and the states where they are smaller than the inputs; the rest is computed again."""

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
        steps = _prepare(x, dt, A, B, dt_bias, documents, settings)
        shape = (steps.d.shape[0] + 1, *steps.d.shape[1:4], x.shape[-1], B.shape[-1])
        kept = None
        if math.prod(shape) < x.numel() + B.numel() + C.numel():
            kept = torch.empty(shape, dtype=steps.d.dtype, device=x.device)
        y, state = _forward(steps, x, B, C, D, h0, settings[3], kept)
        out = y.to(x.dtype)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, h0, y, kept, *vars(steps).values())
        ctx.settings = settings
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, h0, y, kept, *saved = ctx.saved_tensors
        steps = _Steps(*saved)
        dx, dB, dC, dlogs, dd, dh0, skip = _backward(steps, x, B, C, D, h0, y, kept, dy, dstate)
        da = dlogs.flip(-1).cumsum(-1).flip(-1)
        dA = (da * steps.d).sum((0, 1, 4))
        dd.addcmul_(da, A.to(dd.dtype).view(*dA.shape, 1))
        ddt = dd.permute(1, 0, 4, 2, 3).flatten(3).flatten(1, 2)[:, : x.shape[1]]
        dt_softplus, (low, high), _, _ = ctx.settings
        soft = _soft(steps.raw, dt_softplus)
        passed = (soft >= low) & (soft <= high)
        passed = passed if steps.real is None else passed & steps.real[..., None]
        ddt = torch.where(passed, ddt * steps.raw.sigmoid() if dt_softplus else ddt, 0)
        pairs = ((x, dx), (dt, ddt), (A, dA), (B, dB), (C, dC), (D, skip), (dt_bias, ddt.sum((0, 1))), (h0, dh0))
        return *(None if t is None else g.view(t.shape).to(t.dtype) for t, g in pairs), None, None


def _backward(
    steps: _Steps,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    y: Tensor,
    states: Tensor | None,
    dy: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, B and C, of the cumulated log decays (base e) and of d (like d), of h0 and of D.

    The loop goes backwards with `dcarry`, the gradient of the state that leaves the chunk.
    """
    buffers = _Buffers(steps, x.shape[-1], B.shape[-1])
    chunks, groups = buffers.chunks, buffers.groups
    x, y, dy = (t.unflatten(2, (groups, -1)) for t in (x, y, dy))
    skip = None if D is None else D.to(steps.d.dtype).view(groups, -1, 1, 1)
    last = chunks if dstate is not None else chunks - 1
    if states is None:
        states = _states(buffers, x, B, h0, last)
    dx = torch.empty(x.shape, dtype=steps.d.dtype, device=x.device)
    dB, dC = (
        torch.empty(B.shape, dtype=dx.dtype, device=x.device),
        torch.empty(C.shape, dtype=dx.dtype, device=x.device),
    )
    dlogs, dd, dskip = (torch.empty_like(steps.d) for _ in range(3))
    dcarry = buffers.states()
    if dstate is None:
        dcarry.zero_()
    else:
        dcarry.copy_(dstate.view(dcarry.shape))
    room_dy, room_y, u, du, product = (buffers.by_head() for _ in range(5))
    weighted, from_state = buffers.by_group(), buffers.by_group()
    dshared = buffers.shared()
    dmixed, dproducts = torch.empty_like(buffers.decay), torch.empty_like(buffers.products)
    for i in reversed(range(chunks)):
        xc, dyc, yc = buffers.load(buffers.x, x, i), buffers.load(room_dy, dy, i), buffers.load(room_y, y, i)
        Bc, Cc = buffers.load(buffers.B, B, i), buffers.load(buffers.C, C, i)
        into, onto, d = (t[i][..., None] for t in (steps.into, steps.onto, steps.d))
        torch.mul(xc, d, out=u)
        # inside the chunk
        buffers.decays(i)
        _bmm(dyc, u.transpose(-1, -2), dmixed)
        torch.mul(dmixed[:, :, 0], buffers.decay[:, :, 0], out=dproducts)
        for head in range(1, buffers.share):
            dproducts.addcmul_(dmixed[:, :, head], buffers.decay[:, :, head])
        dproducts.mul_(steps.meet[i])
        buffers.multiply(Bc, Cc, i)
        buffers.decay.mul_(buffers.products[:, :, None])
        _bmm(buffers.decay.transpose(-1, -2), dyc, du)
        # B and the state that leaves the chunk
        _bmm(dproducts.transpose(-1, -2), Cc, dshared)
        if i < last:
            torch.mul(u, onto, out=weighted.transpose(2, 3))
            _bmm(weighted.flatten(3), dcarry.flatten(2, 3), dshared, add=True)
            _bmm(Bc, dcarry.flatten(2, 3).transpose(-1, -2), from_state)
            du.addcmul_(from_state.transpose(2, 3), onto)
        _put(buffers.place(dB, i), dshared)
        # C and the state that enters it
        _bmm(dproducts, Bc, dshared)
        if i > 0 or h0 is not None:
            torch.mul(dyc, into, out=weighted.transpose(2, 3))
            _bmm(weighted.flatten(3), states[i].flatten(2, 3), dshared, add=True)
        _put(buffers.place(dC, i), dshared)
        torch.sum(torch.mul(dyc, yc, out=product), -1, out=dlogs[i])
        if i < last:
            dlogs[i, ..., -1] += (states[i + 1] * dcarry).sum((-2, -1))
        if i > 0 or h0 is not None:
            dcarry.mul_(steps.through[i][..., None, None])
            _bmm(weighted.flatten(3).transpose(-1, -2), Cc, dcarry, add=True)
        # x and d
        torch.sum(torch.mul(xc, du, out=product), -1, out=dd[i])
        torch.sum(torch.mul(xc, dyc, out=product), -1, out=dskip[i])
        du.mul_(d)
        if skip is not None:
            du.addcmul_(dyc, skip)
        _put(buffers.place(dx, i), du)
    dlogs -= steps.d * dd
    if skip is not None:
        dlogs -= dskip * skip[..., 0]
    return dx, dB, dC, dlogs, dd, dcarry, dskip.sum((0, 1, 4))


def _put(target: Tensor, buffer: Tensor) -> None:
    """Copy a buffer to its place, without what lies past the end of the sequence."""
    target.copy_(buffer[..., : target.shape[-2], :])
