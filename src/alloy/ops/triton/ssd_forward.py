# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportMissingModuleSource=false
"""The SSD scan forward: states stay on chip while a program walks the chunks of its head.

One program owns some columns of one head (their state, fp32, in registers) and walks a stretch of the sequence chunk by
chunk. Where batch, heads and columns alone give too few programs for the GPU, the sequence is cut into several walks; the
state at the start of each comes from a first pass over shorter stretches that computes states alone.
Legend as in `alloy.ops.ssd`. On chip S is (state, columns), so that no product has a transposed accumulator as operand.

Paper: Mamba-2 (Dao and Gu, 2024), section 6. arXiv:2405.21060
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import num_blocks, power_of_2
from alloy.ops.triton.ssd_prep import Prep, narrowest

for op in ("ssd_scan", "ssd_carries"):
    tuning.register(op, {"num_warps": 4, "num_stages": 2})

PIECES = 2  # stretches of the first pass in one walk
RESIDENT = 2  # programs that a multiprocessor holds at a time


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
    width = B.shape[-1]
    config = tuning.pick("ssd_scan", _key(x, width))
    programs = heads * num_blocks(head_dim, narrowest(x.dtype))
    chunks = num_blocks(seq, chunk)
    walk, stretch = cut(chunks, batch * programs, RESIDENT * _multiprocessors(x.device))
    walks = num_blocks(chunks, walk)
    states = carries(x, prep, B, h0, chunk, stretch, (walks - 1) * (walk // stretch) + 1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state = x.new_empty(batch, heads, head_dim, width, dtype=torch.float32)
    _walk[(programs, walks, batch)](
        x, B, C, CB, D, prep.d, prep.logs, prep.segments, prep.lengths, states, state, None, y,
        seq, chunks, walk, states.shape[1], walk // stretch,
        OUTPUT=True, HAS_CARRY=h0 is not None or walks > 1, HAS_D=D is not None, **_common(x, B, C, prep, chunk, config),
    )  # fmt: skip
    return y, state, states


def carries(
    x: Tensor, prep: Prep, B: Tensor, h0: Tensor | None, chunk: int, stretch: int, count: int | None = None
) -> Tensor:
    """The states before the first token of every `stretch` chunks, without any output: less than half of the scan's work.

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
    width = B.shape[-1]
    chunks = num_blocks(seq, chunk)
    number: int = num_blocks(chunks, stretch) if count is None else count
    out = x.new_empty(batch, number, heads, head_dim, width, dtype=torch.float32)
    decays = x.new_empty(batch, number, heads, dtype=torch.float32)
    if number > 1:
        config = tuning.pick("ssd_carries", _key(x, width))
        _walk[(heads * num_blocks(head_dim, narrowest(x.dtype)), number - 1, batch)](
            x, B, B, None, None, prep.d, prep.logs, prep.segments, prep.lengths, None, out, decays, None,
            seq, chunks, stretch, number, 1,
            OUTPUT=False, HAS_CARRY=False, HAS_D=False, **_common(x, B, B, prep, chunk, config),
        )  # fmt: skip
    _join[(num_blocks(head_dim * width, 1024), heads, batch)](
        out, decays, h0, number, heads, head_dim * width, *(h0.stride() if h0 is not None else (0, 0, 0, 0)),
        WIDTH=width, HAS_H0=h0 is not None, BLOCK=1024,
    )  # fmt: skip
    return out


@cache
def cut(chunks: int, programs: int, slots: int) -> tuple[int, int]:
    """(chunks of a walk, chunks of a stretch of the first pass), for `programs` a walk on a GPU that holds `slots` at a time.

    A pass takes as many rounds as the GPU needs, each as long as one program's chunks and 2 more to begin and end; a chunk of
    the first pass is 0.4 of one of the second, and the last walk needs none."""

    def cost(walks: int) -> float:
        walk = num_blocks(chunks, walks)
        second = num_blocks(programs * walks, slots) * (walk + 2)
        return second + num_blocks(programs * (walks - 1) * PIECES, slots) * (0.4 * walk / PIECES + 2)

    walks = min(range(1, max(1, min(64, chunks // 4)) + 1), key=cost)
    stretch = num_blocks(chunks, walks * PIECES)
    return stretch * PIECES, stretch


def _key(x: Tensor, width: int) -> str:
    return f"{x.shape[-1]}x{width}-{str(x.dtype).removeprefix('torch.')}"


def _common(x: Tensor, B: Tensor, C: Tensor, prep: Prep, chunk: int, config: tuning.Config) -> dict:
    """Strides, sizes and options for `_walk`. Strides of tokens are compiled in, so that a tile needs one address."""
    tensors, n = (("x", x), ("B", B), ("C", C)), max(narrowest(x.dtype), power_of_2(B.shape[3]))
    strides = {f"{name}_{of}": t.stride(i) for name, t in tensors for i, of in enumerate(("batch", "token", "part"))}
    return strides | {
        "HEADS": x.shape[2],
        "GROUPS": B.shape[2],
        "HEAD_DIM": x.shape[3],
        "COLUMNS": narrowest(x.dtype),
        "WIDTH": B.shape[3],
        "N": n,
        "CHUNK": chunk,
        "DOCUMENTS": prep.segments is not None,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        # the next chunk's tiles do not fit the shared memory beside this one's where they are large
        "STAGES": 1 if x.dtype == torch.float32 or B.shape[3] > 128 else config["num_stages"],
        "num_warps": config["num_warps"],
    }


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _walk(
    x_ptr, B_ptr, C_ptr, CB_ptr, D_ptr, d_ptr, logs_ptr, segments_ptr, lengths_ptr, carries_ptr, state_ptr, decays_ptr, y_ptr,
    seq, chunks, walk, count, stretches,
    x_batch, x_part, B_batch, B_part, C_batch, C_part,
    x_token: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    OUTPUT: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_D: tl.constexpr, DOCUMENTS: tl.constexpr,
    WIDTH: tl.constexpr, N: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`walk` chunks of COLUMNS columns of one head; grid (heads * parts of a head, walks, batch).

    With OUTPUT: from carries[:, number * stretches], y of the chunks, and the state if this is the last walk.
    Without: from zero, the state to state_ptr[:, number + 1] and 2^(sum of logs) to decays_ptr[:, number + 1].
    """
    PARTS: tl.constexpr = (HEAD_DIM + COLUMNS - 1) // COLUMNS
    number = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = (tl.program_id(0) // PARTS).to(tl.int64)
    group = head // (HEADS // GROUPS)
    length = seq
    if DOCUMENTS:
        length = tl.load(lengths_ptr + batch)
    padded = tl.cast(chunks, tl.int64) * CHUNK
    i = tl.arange(0, CHUNK)
    n = tl.arange(0, N)
    p = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    in_state = (n < WIDTH)[:, None] & (p < HEAD_DIM)[None, :]
    if HAS_CARRY:
        at = ((batch * count + number * stretches) * HEADS + head) * HEAD_DIM * WIDTH
        state = tl.load(carries_ptr + at + p[None, :] * WIDTH + n[:, None], mask=in_state, other=0.0)
    else:
        state = tl.zeros((N, COLUMNS), dtype=tl.float32)
    through = 0.0
    end = tl.minimum(number * walk + walk, chunks)
    for c in tl.range(number * walk, end, num_stages=STAGES):
        token = tl.cast(c, tl.int64) * CHUNK
        real = token + i < length
        b = _tile(B_ptr + batch * B_batch + token * B_token + group * B_part + i * B_token, n, real, WIDTH, N)
        here = (batch * HEADS + head) * padded + token
        d = tl.load(d_ptr + here + i)
        logs = tl.load(logs_ptr + here + i)
        total = tl.load(logs_ptr + here + CHUNK - 1)
        into, onto = logs, total - logs
        if DOCUMENTS:
            own = tl.load(segments_ptr + batch * padded + token + i)
            last = tl.load(segments_ptr + batch * padded + token + CHUNK - 1)
            into = tl.where(own == 0, into, float("-inf"))
            onto = tl.where(own == last, onto, float("-inf"))
            total = tl.where(last == 0, total, float("-inf"))
        v = _tile(x_ptr + batch * x_batch + token * x_token + head * x_part + i * x_token, p, real, HEAD_DIM, COLUMNS)
        if OUTPUT:
            q = _tile(C_ptr + batch * C_batch + token * C_token + group * C_part + i * C_token, n, real, WIDTH, N)
            cb_at = ((batch * GROUPS + group) * chunks + c) * CHUNK * CHUNK
            cb = tl.load(CB_ptr + cb_at + i[:, None] * CHUNK + i[None, :])
            seen = i[:, None] >= i[None, :]
            if DOCUMENTS:
                seen &= own[:, None] == own[None, :]
            decay = tl.exp2(tl.where(seen, logs[:, None] - logs[None, :], float("-inf")))
            mixed = (cb * (decay * d[None, :])).to(v.dtype)
            y = tl.dot(q, state.to(q.dtype), input_precision=PRECISION) * tl.exp2(into)[:, None]
            y = tl.dot(mixed, v, y, input_precision=PRECISION)
            if HAS_D:
                y += tl.load(D_ptr + head).to(tl.float32) * v
            if DOCUMENTS:
                y = tl.where(real[:, None], y, 0.0)
            y_row = y_ptr + ((batch * seq + token) * HEADS + head) * HEAD_DIM + i * HEADS * HEAD_DIM
            in_y = (token + i < seq)[:, None] & (p < HEAD_DIM)[None, :]
            tl.store(y_row[:, None] + p[None, :], y.to(v.dtype), mask=in_y)
        u = (v * (tl.exp2(onto) * d)[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(b), u, state * tl.exp2(total), input_precision=PRECISION)
        through += total
    if OUTPUT:
        if end == chunks:
            at = (batch * HEADS + head) * HEAD_DIM * WIDTH
            tl.store(state_ptr + at + p[None, :] * WIDTH + n[:, None], state, mask=in_state)
    else:
        row = (batch * count + number + 1) * HEADS + head
        tl.store(state_ptr + row * HEAD_DIM * WIDTH + p[None, :] * WIDTH + n[:, None], state, mask=in_state)
        # every part of a head writes the same number
        tl.store(decays_ptr + row, tl.exp2(through))


@triton.jit
def _tile(row, columns, real, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    """The tile at pointers `row` (tokens,) and `columns` (width,): zero where not real and from column LIMIT on."""
    mask = real[:, None]
    if LIMIT % WIDTH:
        mask &= (columns < LIMIT)[None, :]
    return tl.load(row[:, None] + columns[None, :], mask=mask, other=0.0)


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
