"""State space duality (SSD), the sequence mixing of Mamba-2: over a sequence, one step, and steps to be verified.

Legend, used by every function here: x inputs of the heads, dt raw step sizes, A (< 0) decay rates, B input and C output
projections of a group of heads, D skip weights, S the state.
    d_t = clamp(softplus(dt_t + dt_bias), dt_limit); S_t = exp(d_t A) S_{t-1} + d_t x_t (outer) B_t; y_t = S_t C_t + D x_t
Head i belongs to group floor(i / (heads / groups)). The scan works on chunks of the sequence: products inside a chunk are
matmuls, one carried state joins the chunks, and the chunk size does not change the result.

Paper: Mamba-2 (Dao and Gu, 2024), section 6. arXiv:2405.21060
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.ops import backend
from alloy.ops.cpu import ssd as cpu
from alloy.ops.cpu.ssd import NO_LIMIT
from alloy.ops.documents import as_documents, segment_ids
from alloy.ops.precision import wide
from alloy.ops.rounding import round_to_half
from alloy.ops.slots import Rows, check_slots, read_slots, used_rows, write_slots

# of a head and of its state, whatever the backend
MOST_WIDTH = 256


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    h0: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence of any length; differentiable in every tensor.

    Args:
        x: (batch, seq, heads, head_dim)
        dt: (batch, seq, heads)
        A: (heads,), negative, kept in fp32
        B: (batch, seq, groups, state)
        C: (batch, seq, groups, state)
        D: (heads,)
        dt_bias: (heads,)
        dt_softplus: whether dt passes through softplus
        dt_limit: bounds of d, after softplus
        h0: (batch, heads, head_dim, state), the state before the first document of each row
        documents: int (batch, seq); -1 is padding, only at a row's end: never read, output 0
        cu_seqlens: int (docs + 1,) instead of `documents` when batch == 1
        chunk: tokens of a chunk, a power of two in 16 .. 256
        return_state: also return the state

    Returns:
        y (batch, seq, heads, head_dim) in x's dtype; the fp32 state (batch, heads, head_dim, state) after the last real
        token of the row's last document; with `cu_seqlens` (docs, heads, head_dim, state), one of each document
    """
    batch, seq = x.shape[:2]
    _check_scan(x, dt, A, B, C, h0, dt_limit, chunk)
    if cu_seqlens is not None and return_state:
        return _scan_documents(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, h0, cu_seqlens, chunk)
    documents = as_documents(documents, cu_seqlens, batch, seq)
    y, state = backend.run(
        "ssd_scan", x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, h0, documents, chunk, return_state
    )
    return (y, state) if return_state else y


@torch.no_grad()
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: Tensor | None = None,
    sr_seed: Tensor | None = None,
) -> Tensor:
    """One token for each row; the state is updated in place.

    Args:
        state: (slots, heads, head_dim, state)
        x: (batch, heads, head_dim)
        dt: (batch, heads)
        A: (heads,)
        B: (batch, groups, state)
        C: (batch, groups, state)
        D: (heads,)
        dt_bias: (heads,)
        dt_softplus: as in `ssd_scan`
        dt_limit: as in `ssd_scan`
        slots: int (batch,), the state row of each batch row, distinct; -1: no read, no write, output 0. None: in order
        sr_seed: int64, one element, another one each step: a float16 state is rounded up or down by chance
            (`alloy.ops.rounding`), so that it does not drift. None: to the nearest

    Returns:
        y (batch, heads, head_dim) in x's dtype
    """
    _check_state("ssd_step", state, x, dt, A, B, C, slots, sr_seed)
    return backend.run("ssd_step", state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, slots, sr_seed)


def ssd_step_multi(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: Tensor | None = None,
) -> Tensor:
    """What `tokens` steps would give, with the state left as it is (drafts to be verified).

    Args:
        state: (slots, heads, head_dim, state)
        x: (batch, tokens, heads, head_dim)
        dt: (batch, tokens, heads)
        A: (heads,)
        B: (batch, tokens, groups, state)
        C: (batch, tokens, groups, state)
        D: (heads,)
        dt_bias: (heads,)
        dt_softplus: as in `ssd_scan`
        dt_limit: as in `ssd_scan`
        slots: as in `ssd_step`

    Returns:
        y (batch, tokens, heads, head_dim) in x's dtype
    """
    _check_state("ssd_step_multi", state, x, dt, A, B, C, slots)
    return backend.run("ssd_step_multi", state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, slots)


@torch.no_grad()
def ssd_replay(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    counts: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: Tensor | None = None,
    sr_seed: Tensor | None = None,
) -> None:
    """Advance the state in place by the first counts[b] tokens of each row (drafts that were accepted).

    Args:
        state: (slots, heads, head_dim, state)
        x: (batch, tokens, heads, head_dim), like what follows as given to `ssd_step_multi`
        dt: (batch, tokens, heads)
        A: (heads,)
        B: (batch, tokens, groups, state)
        C: (batch, tokens, groups, state), not read
        counts: int (batch,), 0 .. tokens
        dt_bias: (heads,)
        dt_softplus: as in `ssd_scan`
        dt_limit: as in `ssd_scan`
        slots: as in `ssd_step`
        sr_seed: as in `ssd_step`
    """
    _check_state("ssd_replay", state, x, dt, A, B, B, slots, sr_seed)
    backend.run("ssd_replay", state, x, dt, A, B, counts, dt_bias, dt_softplus, dt_limit, slots, sr_seed)


def _check_state(
    op: str,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    slots: Tensor | None,
    sr_seed: Tensor | None = None,
) -> None:
    """Refuse a state of another model, one that cannot hold decaying sums, and slots that are not one for each row."""
    if state.shape[1:] != (*x.shape[-2:], B.shape[-1]):
        expected = ("slots", *x.shape[-2:], B.shape[-1])
        raise ValueError(f"{op}: state is {tuple(state.shape)}; expected {expected} for x {tuple(x.shape)}")
    if not state.is_floating_point():
        raise ValueError(f"{op}: state is {state.dtype}; a state is floating point")
    if sr_seed is not None and state.dtype != torch.float16:
        raise ValueError(f"{op}: sr_seed is for a float16 state, this one is {state.dtype}; leave sr_seed out")
    _check_shapes(op, x, dt, A, B, C)
    check_slots(slots, state, x.shape[0])


def _check_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None, dt_limit: tuple[float, float], chunk: int
) -> None:
    """Refuse what would broadcast silently or is outside the ranges that every backend serves."""
    _check_shapes("ssd_scan", x, dt, A, B, C)
    check_length("ssd_scan", x.shape[1])
    batch, _, heads, head_dim = x.shape
    state = B.shape[3]
    if h0 is not None and h0.shape != (batch, heads, head_dim, state):
        raise ValueError(f"ssd_scan: h0 is {tuple(h0.shape)}; expected {(batch, heads, head_dim, state)}")
    if h0 is not None and not h0.is_floating_point():
        raise ValueError(f"ssd_scan: h0 is {h0.dtype}; a state is floating point")
    if chunk not in (16, 32, 64, 128, 256):
        raise ValueError(f"ssd_scan: chunk = {chunk} is not a power of two in 16 .. 256")
    if not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"ssd_scan: dt_limit = {dt_limit}; the lower bound must be >= 0 and <= the upper")
    # only where looking costs no synchronisation; -exp(A_log) of a diverging model may underflow to 0 or be NaN, which the loss shows
    if A.device.type == "cpu" and not torch.compiler.is_compiling() and bool((A > 0).any()):
        raise ValueError(f"ssd_scan: A must be negative, its largest value is {A.max().item():g}")


def _check_shapes(op: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    """Refuse sizes that no kernel serves, and shapes that would broadcast."""
    *rows, heads, head_dim = x.shape
    groups, state = B.shape[-2:]
    check_sizes(op, heads, groups, head_dim, state)
    if dt.shape != (*rows, heads) or A.shape != (heads,):
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, so dt must be {(*rows, heads)} and A ({heads},); "
            f"got {tuple(dt.shape)} and {tuple(A.shape)}"
        )
    if B.shape != (*rows, groups, state) or C.shape != B.shape:
        raise ValueError(
            f"{op}: B and C must both be {(*rows, groups, state)}; got {tuple(B.shape)} and {tuple(C.shape)}"
        )


def check_length(op: str, seq: int) -> None:
    """Refuse a scan of nothing, which has no last state."""
    if seq == 0:
        raise ValueError(f"{op}: seq = 0; give at least one token")


def check_sizes(op: str, heads: int, groups: int, head_dim: int, state: int) -> None:
    """Refuse heads that are not dealt out evenly to groups, and those too wide for the kernels."""
    if heads % groups:
        raise ValueError(f"{op}: heads = {heads} is not a multiple of groups = {groups}")
    if max(head_dim, state) > MOST_WIDTH:
        raise ValueError(f"{op}: head_dim = {head_dim} and state = {state}; both must be at most {MOST_WIDTH}")


def _scan_documents(
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
    cu_seqlens: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The scan with a final state of each packed document: every document becomes a padded row."""
    as_documents(None, cu_seqlens, *x.shape[:2])
    bounds = cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    place = torch.arange(int(lengths.max()), device=x.device)
    real = place < lengths[:, None]  # (docs, longest)
    index = torch.where(real, bounds[:-1, None] + place, 0)
    rows = [t[0][index] for t in (x, dt, B, C)]
    if h0 is not None:
        h0 = torch.cat([h0, h0.new_zeros(len(lengths) - 1, *h0.shape[1:])])
    documents = torch.where(real, 0, -1).to(torch.int32)
    y, state = backend.run(
        "ssd_scan", rows[0], rows[1], A, rows[2], rows[3], D, dt_bias, dt_softplus, dt_limit, h0, documents, chunk, True
    )
    return y[real][None], state


def _step_sizes(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    real: Tensor | None,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(d, d * A), both like dt (batch, tokens, heads); zero where `real` (batch, tokens) is false."""
    if real is not None:
        dt = torch.where(real[..., None], dt, 0)
    d = dt.to(kind)
    if dt_bias is not None:
        d = d + dt_bias.to(kind)
    if dt_softplus:
        d = F.softplus(d)
    if dt_limit != NO_LIMIT:
        d = d.clamp(*dt_limit)
    if real is not None:
        d = torch.where(real[..., None], d, 0)
    return d, d * A.to(kind)


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """(batch, tokens, heads, width) -> (batch, groups, tokens, heads of a group * width)."""
    return heads.unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)


def _ssd_step_multi(
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
) -> Tensor:
    """One chunk of the scan with the state carried in and no state carried out."""
    rows, used = used_rows(slots, state, x.shape[0])
    if used is not None:
        assert isinstance(rows, Tensor), "rows are left out"
        y = _ssd_step_multi(state, x[used], dt[used], A, B[used], C[used], D, dt_bias, dt_softplus, dt_limit, rows)
        return y.new_zeros(x.shape).index_copy_(0, used, y)
    before = read_slots(state, rows, x.shape[0])
    kind = wide(before)
    tokens = x.shape[1]
    groups = B.shape[2]
    d, log_decay = _step_sizes(dt, A, dt_bias, dt_softplus, dt_limit, None, kind)
    logs = log_decay.cumsum(1)  # (batch, tokens, heads)
    B, C = B.to(kind).transpose(1, 2), C.to(kind).transpose(1, 2)  # (batch, groups, tokens, state)
    from_state = _read_state(before, C).unflatten(
        -1, (-1, x.shape[3])
    )  # (batch, groups, tokens, heads a group, head_dim)
    y = from_state.transpose(1, 2).flatten(2, 3) * logs.exp()[..., None]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    logs = logs.transpose(1, 2)  # (batch, heads, tokens)
    decay = (logs[..., :, None] - logs[..., None, :]).masked_fill(later, -math.inf).exp() * d.transpose(1, 2)[
        :, :, None
    ]
    mixed = decay.unflatten(1, (groups, -1)) * (C @ B.transpose(-1, -2))[:, :, None]
    y = y + (mixed.flatten(1, 2) @ x.to(kind).transpose(1, 2)).transpose(1, 2)
    if D is not None:
        y = y + x * D.to(kind)[:, None]
    return y.to(x.dtype)


def _read_state(before: Tensor, C: Tensor) -> Tensor:
    """C_i . S for the queries C (batch, groups, tokens, state): (batch, groups, tokens, heads a group * head_dim).

    The states of slots need not lie next to each other; row by row they are read where they are, without a copy where they
    have the dtype of C."""
    groups = C.shape[1]
    rows = [
        c @ row.to(c.dtype).view(groups, -1, row.shape[-1]).transpose(1, 2) for c, row in zip(C, before, strict=True)
    ]
    return torch.stack(rows)


def _ssd_replay(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> None:
    """What a chunk adds to its state, with d = 0 for the tokens that are not kept."""
    rows, used = used_rows(slots, state, x.shape[0])
    if used is not None:
        x, dt, B, counts = x[used], dt[used], B[used], counts[used]
    before = read_slots(state, rows, x.shape[0])
    kind = wide(before)
    kept = torch.arange(x.shape[1], device=x.device) < counts[:, None]  # (batch, tokens)
    d, log_decay = _step_sizes(dt, A, dt_bias, dt_softplus, dt_limit, kept, kind)
    total = log_decay.sum(1)  # (batch, heads)
    ahead = torch.exp(total[:, None] - log_decay.cumsum(1)) * d  # (batch, tokens, heads)
    inputs = torch.where(kept[..., None, None], x, 0).to(kind) * ahead[..., None]
    gates = torch.where(kept[..., None, None], B, 0).to(kind).transpose(1, 2)  # (batch, groups, tokens, state)
    after = before.to(kind).mul_(torch.exp(total)[..., None, None])
    for own, left, right in zip(after, _by_group(inputs, B.shape[2]).transpose(-1, -2), gates, strict=True):
        own.view(left.shape[0], -1, own.shape[-1]).baddbmm_(left, right)
    if sr_seed is not None:
        # what is not advanced is not rounded either: it is float16 already
        after = round_to_half(after, sr_seed, _slot_numbers(rows, after))
    if isinstance(rows, Tensor) or after.dtype != state.dtype or sr_seed is not None:
        write_slots(state, rows, after)


def _ssd_scan(
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
) -> tuple[Tensor, Tensor]:
    """Reference: a loop over chunks, each one matmuls; autograd does the backward."""
    kind = wide(x)
    batch, seq, heads, head_dim = x.shape
    groups, width = B.shape[2:]
    segments, real = (None, None) if documents is None else segment_ids(documents)
    d, log_decay = _step_sizes(dt, A, dt_bias, dt_softplus, dt_limit, real, kind)
    out_dtype, x, B, C = x.dtype, x.to(kind), B.to(kind), C.to(kind)
    if real is not None:
        x, B, C = (torch.where(real[..., None, None], t, 0) for t in (x, B, C))
    carry = x.new_zeros(batch, heads, head_dim, width) if h0 is None else h0.to(kind)
    owner = None if segments is None else segments[:, :1]  # (batch, 1), the segment that the carry belongs to
    parts = []
    for start in range(0, seq, chunk):
        part = slice(start, min(start + chunk, seq))
        logs = log_decay[:, part].cumsum(1).transpose(1, 2)  # (batch, heads, tokens)
        tokens = logs.shape[2]
        u = (d[:, part, :, None] * x[:, part]).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        b, c = B[:, part].transpose(1, 2), C[:, part].transpose(1, 2)  # (batch, groups, tokens, state)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        into, onto, through = logs, logs[..., -1:] - logs, logs[..., -1]
        if segments is not None and owner is not None:
            own = segments[:, part]
            hidden = hidden | (own[:, :, None] != own[:, None, :])[:, None]
            into = into.masked_fill((own != owner)[:, None], -math.inf)
            onto = onto.masked_fill((own != own[:, -1:])[:, None], -math.inf)
            through = through.masked_fill(own[:, -1:] != owner, -math.inf)
            owner = own[:, -1:]
        decay = (logs[..., :, None] - logs[..., None, :]).masked_fill(hidden, -math.inf).exp()
        mixed = (decay.unflatten(1, (groups, -1)) * (c @ b.transpose(-1, -2))[:, :, None]).flatten(1, 2)
        from_carry = c @ carry.unflatten(1, (groups, -1)).flatten(2, 3).transpose(-1, -2)
        from_carry = from_carry.unflatten(-1, (-1, head_dim)).transpose(2, 3).flatten(1, 2)
        parts.append(mixed @ u + into.exp()[..., None] * from_carry)
        weighted = (onto.exp()[..., None] * u).unflatten(1, (groups, -1))  # (batch, groups, heads, tokens, head_dim)
        added = weighted.transpose(-1, -2).flatten(2, 3) @ b
        carry = through.exp()[..., None, None] * carry + added.view(carry.shape)
    y = torch.cat(parts, dim=2).transpose(1, 2)
    if D is not None:
        y = y + D.to(kind)[:, None] * x
    if real is not None:
        # so that what comes back for padding is not read either
        y = torch.where(real[..., None, None], y, 0)
    return y.to(out_dtype), carry


def _ssd_step(
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
    """Reference: the recurrence as it is written."""
    rows, used = used_rows(slots, state, x.shape[0])
    if used is not None:
        assert isinstance(rows, Tensor), "rows are left out"
        y = _ssd_step(state, x[used], dt[used], A, B[used], C[used], D, dt_bias, dt_softplus, dt_limit, rows, sr_seed)
        return y.new_zeros(x.shape).index_copy_(0, used, y)
    before = read_slots(state, rows, x.shape[0])
    kind = wide(before)
    share = x.shape[1] // B.shape[1]
    d, log_decay = _step_sizes(dt[:, None], A, dt_bias, dt_softplus, dt_limit, None, kind)
    d, decay = d[:, 0], log_decay[:, 0].exp()
    b, c = (t.to(kind).repeat_interleave(share, dim=1)[:, :, None] for t in (B, C))
    after = before * decay[..., None, None] + (d[..., None] * x)[..., None] * b
    y = (after * c).sum(-1)
    if D is not None:
        y = y + D.to(kind)[:, None] * x
    if sr_seed is not None:
        after = round_to_half(after, sr_seed, _slot_numbers(rows, after))
    write_slots(state, rows, after)
    return y.to(x.dtype)


def _slot_numbers(rows: Rows, after: Tensor) -> Tensor:
    """The slot of each row of `after`, int (rows,)."""
    if isinstance(rows, Tensor):
        return rows
    first = 0 if rows is None else rows.start
    return torch.arange(first, first + len(after), device=after.device)


backend.add("ssd_scan", "torch", _ssd_scan)
backend.add("ssd_scan", "cpu", cpu.ssd_scan)
backend.add("ssd_scan", "triton", "alloy.ops.triton.ssd_scan:ssd_scan")
backend.add("ssd_step", "torch", _ssd_step)
backend.add("ssd_step", "cpu", cpu.ssd_step)
backend.add("ssd_step", "triton", "alloy.ops.triton.ssd_step:ssd_step")
backend.add("ssd_step_multi", "torch", _ssd_step_multi)
backend.add("ssd_step_multi", "triton", "alloy.ops.triton.ssd_step:ssd_step_multi")
backend.add("ssd_replay", "torch", _ssd_replay)
backend.add("ssd_replay", "triton", "alloy.ops.triton.ssd_step:ssd_replay")
