# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
"""The SSD scan forward: states stay on chip while a program walks the chunks of its heads.

One program owns some heads of one group (their states, fp32, in registers) and walks a stretch of the sequence chunk by
chunk. Where batch and heads alone give too few programs for the GPU, the sequence is cut into several walks; the state at
the start of each comes from a first pass over shorter stretches that computes states alone.
Legend as in `alloy.ops.ssd`. On chip S is (state, head_dim), so that no product has a transposed accumulator as operand.

Paper: Mamba-2 (Dao and Gu, 2024), section 6. arXiv:2405.21060
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.assembler import narrowest
from alloy.ops.triton.ssd_prep import Prep

# heads: of one group, in one program; resident: programs that a multiprocessor holds at a time
tuning.register(
    "ssd_scan",
    {"heads": 1, "num_warps": 4, "num_stages": 1, "resident": 2, "late": 0},
)
tuning.register(
    "ssd_carries",
    {"heads": 1, "num_warps": 4, "num_stages": 1, "resident": 2, "late": 0},
)

PIECES = 2  # stretches of the first pass in one walk


def scan(
    x: Tensor, prep: Prep, B: Tensor, C: Tensor, CB: Tensor, D: Tensor | None, h0: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole scan from what `ssd_prep` prepared.

    Args:
        x: (batch, seq, heads, head_dim), last stride 1
        prep: for chunks of `chunk` tokens
        B: (batch, seq, groups, state), last stride 1
        C: (batch, seq, groups, state), last stride 1
        CB: (batch, groups, chunks, chunk, chunk)
        D: (heads,)
        h0: (batch, heads, head_dim, state), the state before the first token
        chunk: tokens of a chunk

    Returns:
        y, like x and contiguous; the state after the last token, fp32 (batch, heads, head_dim, state); the states at the
        starts of stretches as in `carries`
    """
    batch, seq, heads, head_dim = x.shape
    groups, width = B.shape[2:]
    config = tuning.pick("ssd_scan", _key(x, width))
    tile = tiling(head_dim, width, x.dtype)
    together = _together(heads // groups, config["heads"])
    programs = batch * heads // together * tile.parts
    chunks = triton.cdiv(seq, chunk)
    walk, stretch = cut(chunks, programs, config["resident"] * _multiprocessors(x.device))
    walks = triton.cdiv(chunks, walk)
    states = carries(x, prep, B, h0, chunk, stretch, (walks - 1) * (walk // stretch) + 1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state = x.new_empty(batch, heads, head_dim, width, dtype=torch.float32)
    _walk[(programs // batch, walks, batch)](
        x, B, C, CB, D, prep.d, prep.logs, prep.segments, prep.lengths, states, state, None, y,
        seq, groups, chunks, walk, states.shape[1], walk // stretch,
        OUTPUT=True, HAS_CARRY=h0 is not None or walks > 1, HAS_D=D is not None, TOGETHER=together,
        STAGES=config["num_stages"], LATE=config["late"], num_warps=config["num_warps"], maxnreg=config.get("maxnreg"), **_common(x, B, C, tile, prep, chunk),
    )  # fmt: skip
    return y, state, states


def carries(
    x: Tensor, prep: Prep, B: Tensor, h0: Tensor | None, chunk: int, stretch: int, count: int | None = None
) -> Tensor:
    """The states before the first token of every `stretch` chunks, without any output: a half of the scan's work.

    Args:
        x: (batch, seq, heads, head_dim), last stride 1
        prep: for chunks of `chunk` tokens
        B: (batch, seq, groups, state), last stride 1
        h0: (batch, heads, head_dim, state)
        chunk: tokens of a chunk
        stretch: chunks between two states
        count: how many states; as many as there are stretches by default

    Returns:
        fp32 (batch, count, heads, head_dim, state); the first is h0
    """
    batch, seq, heads, head_dim = x.shape
    groups, width = B.shape[2:]
    chunks = triton.cdiv(seq, chunk)
    count = triton.cdiv(chunks, stretch) if count is None else count
    out = x.new_empty(batch, count, heads, head_dim, width, dtype=torch.float32)
    decays = x.new_empty(batch, count, heads, dtype=torch.float32)
    if count > 1:
        config = tuning.pick("ssd_carries", _key(x, width))
        tile = tiling(head_dim, width, x.dtype)
        together = _together(heads // groups, config["heads"])
        _walk[(heads // together * tile.parts, count - 1, batch)](
            x, B, B, None, None, prep.d, prep.logs, prep.segments, prep.lengths, None, out, decays, None,
            seq, groups, chunks, stretch, count, 1,
            OUTPUT=False, HAS_CARRY=False, HAS_D=False, TOGETHER=together,
            STAGES=config["num_stages"], LATE=config["late"], num_warps=config["num_warps"], maxnreg=config.get("maxnreg"), **_common(x, B, B, tile, prep, chunk),
        )  # fmt: skip
    _join[(triton.cdiv(head_dim * width, 1024), heads, batch)](
        out, decays, h0, count, heads, head_dim * width, *(h0.stride() if h0 is not None else (0, 0, 0, 0)),
        WIDTH=width, HAS_H0=h0 is not None, BLOCK=1024,
    )  # fmt: skip
    return out


class Tiling(tuple):
    """The columns of one program, as powers of two: `first` + `second` (may be 0), in `parts` programs a head."""

    first = property(lambda self: self[0])
    second = property(lambda self: self[1])
    parts = property(lambda self: self[2])


def tiling(head_dim: int, width: int, dtype: torch.dtype) -> Tiling:
    """Powers of two that cover head_dim, one or two where that fills less (80 = 64 + 16, not 128), of one program or several:
    a state of `width` rows and these columns must fit the registers."""
    least = narrowest(dtype)
    most = 32768 // dtype.itemsize**2 * 2 // max(64, triton.next_power_of_2(width))
    first = max(least, min(128 // dtype.itemsize, most, triton.next_power_of_2(head_dim)))
    if head_dim <= first or 2 * first > most:
        return Tiling((first, 0, triton.cdiv(head_dim, first)))
    second = max(least, min(first, triton.next_power_of_2(head_dim - first)))
    return Tiling((first, second, triton.cdiv(head_dim, first + second)))


def cut(chunks: int, programs: int, slots: int) -> tuple[int, int]:
    """(chunks of a walk, chunks of a stretch of the first pass), for `programs` a walk on a GPU that holds `slots` at a time.

    A pass takes as many rounds as the GPU needs, each as long as one program's chunks and 2 more to begin and end; a chunk of
    the first pass is 0.4 of one of the second, and the last walk needs none."""

    def cost(walks: int) -> float:
        walk = triton.cdiv(chunks, walks)
        second = triton.cdiv(programs * walks, slots) * (walk + 2)
        return second + triton.cdiv(programs * (walks - 1) * PIECES, slots) * (0.4 * walk / PIECES + 2)

    walks = min(range(1, max(1, min(64, chunks // 4)) + 1), key=cost)
    stretch = triton.cdiv(chunks, walks * PIECES)
    return stretch * PIECES, stretch


def _key(x: Tensor, width: int) -> str:
    return f"{x.shape[-1]}x{width}-{str(x.dtype).removeprefix('torch.')}"


def _together(share: int, most: int) -> int:
    """Heads in one program: at most as many as configured, all of one group."""
    return most if share % most == 0 else 1


def _common(x: Tensor, B: Tensor, C: Tensor, tile: Tiling, prep: Prep, chunk: int) -> dict:
    """Strides and sizes for `_walk`. Those of one token are compiled in, so that a tile needs one address."""
    width = B.shape[-1]
    strides = {
        f"{name}_{of}": t.stride(i)
        for name, t in (("x", x), ("B", B), ("C", C))
        for i, of in enumerate(("batch", "token", "part"))
    }
    return strides | {
        "HEADS": x.shape[2],
        "HEAD_DIM": x.shape[3],
        "FIRST": tile.first,
        "SECOND": tile.second,
        "WIDTH": width,
        "N": max(narrowest(x.dtype), triton.next_power_of_2(width)),
        "CHUNK": chunk,
        "DOCUMENTS": prep.segments is not None,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _walk(
    x_ptr, B_ptr, C_ptr, CB_ptr, D_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, carries_ptr, state_ptr, decays_ptr, y_ptr,
    seq, groups, chunks, walk, count, stretches,
    x_batch, x_part, B_batch, B_part, C_batch, C_part,
    x_token: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr, HEADS: tl.constexpr,
    OUTPUT: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_D: tl.constexpr, DOCUMENTS: tl.constexpr,
    WIDTH: tl.constexpr, N: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    CHUNK: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """`walk` chunks of TOGETHER heads, or of a part of one head's columns; grid (heads / TOGETHER * parts, walks, batch).

    With OUTPUT: from carries[:, number * stretches], y of the chunks, and the state if this is the last walk.
    Without: from zero, the state to state_ptr[:, number + 1] and exp(sum of logs) to decays_ptr[:, number + 1].
    """
    BLOCK: tl.constexpr = FIRST + SECOND
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK - 1) // BLOCK
    TILES: tl.constexpr = 2 if SECOND else 1
    LOG2E: tl.constexpr = 1.4426950408889634
    number = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = (tl.program_id(0) // PARTS * TOGETHER).to(tl.int64)
    part = tl.program_id(0) % PARTS
    group = head // (HEADS // groups)
    length = seq
    if DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
    padded = tl.cast(chunks, tl.int64) * CHUNK
    i = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    states = ()
    through = ()
    for h in tl.static_range(TOGETHER):
        through += (0.0,)
        for t in tl.static_range(TILES):
            p = part * BLOCK + t * FIRST + tl.arange(0, SECOND if t else FIRST)
            if HAS_CARRY:
                at = ((batch * count + number * stretches) * HEADS + head + h) * HEAD_DIM * WIDTH
                states += (_read(carries_ptr + at, n, p, WIDTH, HEAD_DIM),)
            else:
                states += (tl.zeros((N, SECOND if t else FIRST), dtype=tl.float32),)
    begin = number * walk
    end = tl.minimum(begin + walk, chunks)
    for c in tl.range(begin, end, num_stages=STAGES):
        token = tl.cast(c, tl.int64) * CHUNK
        real = token + i < length
        if not LATE:
            b = _tile(B_ptr + batch * B_batch + token * B_token + group * B_part + i * B_token, n, real, WIDTH, N)
        x_row = x_ptr + batch * x_batch + token * x_token + head * x_part + i * x_token
        if OUTPUT:
            q = _tile(C_ptr + batch * C_batch + token * C_token + group * C_part + i * C_token, n, real, WIDTH, N)
            cb_at = ((batch * groups + group) * chunks + c) * CHUNK * CHUNK
            cb = tl.load(CB_ptr + cb_at + i[:, None] * CHUNK + i[None, :])
            seen = i[:, None] >= i[None, :]
        if DOCUMENTS:
            own = tl.load(segments_ptr + batch * padded + token + i)
            last = tl.load(segments_ptr + batch * padded + token + CHUNK - 1)
            if OUTPUT:
                seen &= own[:, None] == own[None, :]
        states_after = ()
        through_after = ()
        for h in tl.static_range(TOGETHER):
            at = (batch * HEADS + head + h) * padded + token
            d = tl.load(d_ptr + at + i)
            logs = tl.load(logs_ptr + at + i) * LOG2E
            total = tl.load(logs_ptr + at + CHUNK - 1) * LOG2E
            into, onto = logs, total - logs
            if DOCUMENTS:
                into = tl.where(own == 0, into, float("-inf"))
                onto = tl.where(own == last, onto, float("-inf"))
                total = tl.where(last == 0, total, float("-inf"))
            onto = tl.exp2(onto) * d
            keep = tl.exp2(total)
            through_after += (through[h] + total,)
            if OUTPUT:
                into = tl.exp2(into)
                decay = tl.exp2(tl.where(seen, logs[:, None] - logs[None, :], float("-inf")))
                mixed = (cb * (decay * d[None, :])).to(cb.dtype)
            for t in tl.static_range(TILES):
                p = part * BLOCK + t * FIRST + tl.arange(0, SECOND if t else FIRST)
                s = states[h * TILES + t]
                v = _tile(x_row + h * x_part, p, real, HEAD_DIM, BLOCK)
                if OUTPUT:
                    y = tl.dot(q, s.to(q.dtype), input_precision=PRECISION) * into[:, None]
                    y = tl.dot(mixed, v, y, input_precision=PRECISION)
                    if HAS_D:
                        y += tl.load(D_ptr + head + h).to(tl.float32) * v
                    if DOCUMENTS:
                        y = tl.where(real[:, None], y, 0.0)
                    y_row = y_ptr + ((batch * seq + token) * HEADS + head + h) * HEAD_DIM + i * HEADS * HEAD_DIM
                    fits = (token + i < seq)[:, None]
                    if HEAD_DIM % BLOCK:
                        fits &= (p < HEAD_DIM)[None, :]
                    tl.store(y_row[:, None] + p[None, :], y.to(v.dtype), mask=fits)
                if LATE and h == 0 and t == 0:
                    b = _tile(
                        B_ptr + batch * B_batch + token * B_token + group * B_part + i * B_token, n, real, WIDTH, N
                    )
                u = (v * onto[:, None]).to(v.dtype)
                states_after += (tl.dot(tl.trans(b), u, s * keep, input_precision=PRECISION),)
        states = states_after
        through = through_after
    for h in tl.static_range(TOGETHER):
        for t in tl.static_range(TILES):
            p = part * BLOCK + t * FIRST + tl.arange(0, SECOND if t else FIRST)
            at = (batch * HEADS + head + h) * HEAD_DIM * WIDTH
            if not OUTPUT:
                at = ((batch * count + number + 1) * HEADS + head + h) * HEAD_DIM * WIDTH
            if not OUTPUT or end == chunks:
                _write(state_ptr + at, states[h * TILES + t], n, p, WIDTH, HEAD_DIM)
        if not OUTPUT:
            tl.store(decays_ptr + (batch * count + number + 1) * HEADS + head + h, tl.exp2(through[h]))


@triton.jit
def _tile(row, columns, real, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    """The tile at pointers `row` (tokens,) and `columns` (width,): zero where not real and from column LIMIT on."""
    mask = real[:, None]
    if LIMIT % WIDTH:
        mask &= (columns < LIMIT)[None, :]
    return tl.load(row[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _read(ptr, n, p, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows n and columns p of a state that lies as (head_dim, state) at ptr."""
    inside = (n < WIDTH)[:, None] & (p < HEAD_DIM)[None, :]
    return tl.load(ptr + p[None, :] * WIDTH + n[:, None], mask=inside, other=0.0)


@triton.jit
def _write(ptr, s, n, p, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The reverse of `_read`."""
    inside = (n < WIDTH)[:, None] & (p < HEAD_DIM)[None, :]
    tl.store(ptr + p[None, :] * WIDTH + n[:, None], s, mask=inside)


@triton.jit
def _join(
    states_ptr, decays_ptr, h0_ptr, count, heads, size, h0_batch, h0_head, h0_row, h0_column,
    WIDTH: tl.constexpr, HAS_H0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states[:, k] from each stretch's own sum to the state before stretch k; grid (blocks of a state, heads, batch)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside = at < size
    carry = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_H0:
        h0 = h0_ptr + batch * h0_batch + head * h0_head + at // WIDTH * h0_row + at % WIDTH * h0_column
        carry += tl.load(h0, mask=inside, other=0.0).to(tl.float32)
    row = states_ptr + (batch * count * heads + head) * size + at
    tl.store(row, carry, mask=inside)
    for k in range(1, count):
        row += tl.cast(heads, tl.int64) * size
        decay = tl.load(decays_ptr + (batch * count + k) * heads + head)
        carry = carry * decay + tl.load(row, mask=inside, other=0.0)
        tl.store(row, carry, mask=inside)
