# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""One token, drafted tokens and accepted tokens of the SSD recurrence: one kernel that reads a state once.

Layout: one program takes TILES tiles of (BLOCK_P, state) of one head's state, so that 16-byte loads of a whole tile are in
flight together, walks its tokens with the tiles in registers, and writes them back if the state is to move:
    S_t = exp(d_t A) S_{t-1} + d_t x_t (outer) B_t; y_t = S_t C_t + D x_t
The drafted form repeats the steps' arithmetic on wide registers; the replay stops at its row's count.
The bound is bandwidth: a step moves the state twice.

Rates: docs/performance.md (`alloy bench ssd-step`); rounding by chance costs a fifth of an fp16 state's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops import ssd
from alloy.ops.precision import wide
from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import num_blocks, power_of_2

tuning.register(
    "ssd_step",
    {"BLOCK_P": 8, "TILES": 1, "num_warps": 1},
    {"BLOCK_P": 16, "TILES": 1, "num_warps": 1},
    {"BLOCK_P": 32, "TILES": 1, "num_warps": 2},
    {"BLOCK_P": 16, "TILES": 8, "num_warps": 4},
)


@triton.jit
def step_size(dt, bias, low, high, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """clamp(softplus(dt + bias)) in fp32 of scalars or blocks; relative errors stay below 1e-5 for any dt."""
    d = dt.to(tl.float32)
    if HAS_BIAS:
        d += bias.to(tl.float32)
    if SOFTPLUS:
        # max(d, 0) + log(1 + u) with u = exp(-|d|): the logarithm is 2 artanh(u / (2 + u)), whose series ends early
        u = tl.exp(-tl.abs(d))
        s = u / (2.0 + u)
        q = s * s
        series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
        series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
        d = tl.maximum(d, 0.0) + 2.0 * s * series
    return tl.minimum(tl.maximum(d, low), high)


@triton.jit
def round_to_half(value, seed, slot, first, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """value (BLOCK_P, BLOCK_N) fp32 in float16, up or down by chance; bits as in `alloy.ops.rounding`.

    `first` (BLOCK_P,) is the number of each row of the block in its slot's state.
    """
    counter = first[:, None] * ((WIDTH + 7) // 8) + tl.arange(0, BLOCK_N // 8)[None, :]
    zero = tl.zeros_like(counter)
    a, b, c, d = tl.philox(seed, counter, zero + slot, zero, zero, 5)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    chance = tl.join(words & 0x1FFF, words >> 19).to(tl.int32, bitcast=True).reshape(BLOCK_P, BLOCK_N)
    # float16 below its smallest normal number, 2^-14, is evenly spaced, as above it up to twice that number
    small = tl.abs(value) < 0.00006103515625
    sign = value.to(tl.int32, bitcast=True) & -2147483648
    offset = tl.where(small, sign | 0x38800000, 0).to(tl.float32, bitcast=True)
    bits = ((value + offset).to(tl.int32, bitcast=True) + chance) & -8192
    return (bits.to(tl.float32, bitcast=True) - offset).to(tl.float16)


@triton.jit
def _step_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    slots,
    counts,
    seed,
    y,
    low,
    high,
    state_slot,
    state_head,
    state_row,
    x_batch,
    x_token,
    x_head,
    dt_batch,
    dt_token,
    dt_head,
    b_batch,
    b_token,
    b_group,
    c_batch,
    c_token,
    c_group,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    p = part * (TILES * BLOCK_P) + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    used = slot >= 0
    total = TOKENS
    if HAS_COUNTS:
        total = tl.load(counts + row).to(tl.int32)
        used = used & (total > 0)
    state += slot * state_slot + head * state_head
    real = (n < WIDTH) & used
    tiles = ()
    for i in tl.static_range(TILES):
        rows = p + i * BLOCK_P
        mask = (rows < HEAD_DIM)[:, None] & real[None, :]
        tiles += (tl.load(state + rows[:, None] * state_row + n[None, :], mask=mask, other=0.0).to(tl.float32),)
    group = head // SHARE
    x += row * x_batch + head * x_head
    dt += row * dt_batch + head * dt_head
    B += row * b_batch + group * b_group
    C += row * c_batch + group * c_group
    y += (row * TOKENS * HEADS + head) * HEAD_DIM
    rate = tl.load(A + head).to(tl.float32)
    bias = tl.load(dt_bias + head) if HAS_BIAS else 0.0
    skip = tl.load(D + head).to(tl.float32) if HAS_D else 0.0
    for t in tl.static_range(TOKENS):
        kept = used & (t < total)
        d = step_size(tl.load(dt + t * dt_token), bias, low, high, HAS_BIAS, SOFTPLUS)
        # a token that is not kept changes nothing, and is not read
        d = tl.where(kept, d, 0.0)
        decay = tl.exp(d * rate)
        b = tl.load(B + t * b_token + n, mask=real & kept, other=0.0).to(tl.float32)
        if READS:
            c = tl.load(C + t * c_token + n, mask=real, other=0.0).to(tl.float32)
        after = ()
        for i in tl.static_range(TILES):
            rows = p + i * BLOCK_P
            u = tl.load(x + t * x_token + rows, mask=(rows < HEAD_DIM) & kept, other=0.0).to(tl.float32)
            tile = tiles[i] * decay + (d * u)[:, None] * b[None, :]
            after += (tile,)
            if READS:
                out = tl.sum(tile * c[None, :], 1) + skip * u
                tl.store(y + t * (HEADS * HEAD_DIM) + rows, out.to(y.dtype.element_ty), mask=rows < HEAD_DIM)
        tiles = after
    if WRITES:
        tl.debug_barrier()
        for i in tl.static_range(TILES):
            rows = p + i * BLOCK_P
            new = tiles[i]
            if STOCHASTIC:
                number = head * HEAD_DIM + rows
                new = round_to_half(new, tl.load(seed), slot.to(tl.int32), number, BLOCK_P, BLOCK_N, WIDTH)
            mask = (rows < HEAD_DIM)[:, None] & real[None, :]
            tl.store(state + rows[:, None] * state_row + n[None, :], new.to(state.dtype.element_ty), mask=mask)


def tiles(op: str, state: Tensor) -> tuple[int, dict[str, int]]:
    """Programs for each head of state (slots, heads, head_dim, state), and the sizes of their tiles."""
    head_dim, width = state.shape[2:]
    config = tuning.pick(op, f"{head_dim}x{width}-{state.dtype}".replace("torch.", ""))
    threads, block_n = 32 * config["num_warps"], max(16, power_of_2(width))
    # registers: at most 64 elements of a tile a thread, and 128 of all its tiles
    block_p = min(config["BLOCK_P"], 64 * threads // block_n)
    number = min(config["TILES"], num_blocks(head_dim, block_p), 128 * threads // (block_p * block_n))
    sizes = {"BLOCK_P": block_p, "BLOCK_N": block_n, "TILES": number, "num_warps": config["num_warps"]}
    return num_blocks(head_dim, block_p * number), sizes


def _launch(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
    slots: Tensor | None,
    counts: Tensor | None,
    sr_seed: Tensor | None,
    y: Tensor | None,
    writes: bool,
) -> None:
    """x (batch, tokens, heads, head_dim) and the rest alike; y (like x) None: only the state is wanted."""
    if state.stride(-1) != 1 or x.stride(-1) != 1 or B.stride(-1) != 1 or C.stride(-1) != 1:
        raise ValueError(
            f"strides of state {state.stride()}, x {x.stride()}, B {B.stride()}, C {C.stride()}: the last must be 1"
        )
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2:]
    blocks, sizes = tiles("ssd_step", state)
    _step_kernel[(blocks, heads, batch)](
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        slots,
        counts,
        sr_seed,
        x if y is None else y,
        *limit,
        *state.stride()[:3],
        *x.stride()[:3],
        *dt.stride(),
        *B.stride()[:3],
        *C.stride()[:3],
        SHARE=heads // groups,
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDTH=width,
        TOKENS=tokens,
        READS=y is not None,
        WRITES=writes,
        HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=softplus,
        HAS_SLOTS=slots is not None,
        HAS_COUNTS=counts is not None,
        STOCHASTIC=sr_seed is not None,
        **sizes,
    )


@torch.library.custom_op("alloy::ssd_step", mutates_args=("state",))
def _ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dt, B, C = (t[:, None] for t in (x, dt, B, C))
    _launch(state, x, dt, A, B, C, D, dt_bias, softplus, (low, high), slots, None, sr_seed, y, True)
    return y


@torch.library.custom_op("alloy::ssd_step_multi", mutates_args=())
def _ssd_step_multi(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    slots: Tensor | None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(state, x, dt, A, B, C, D, dt_bias, softplus, (low, high), slots, None, None, y, False)
    return y


@torch.library.custom_op("alloy::ssd_replay", mutates_args=("state",))
def _ssd_replay(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    slots: Tensor | None,
    sr_seed: Tensor | None,
) -> None:
    _launch(state, x, dt, A, B, B, None, dt_bias, softplus, (low, high), slots, counts, sr_seed, None, True)


@_ssd_step.register_fake
def _(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_ssd_step_multi.register_fake
def _(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
    """As `alloy.ops.ssd_step`; float64 states are the reference's."""
    if wide(state) is torch.float64:
        return ssd._ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, slots, sr_seed)
    return _ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *dt_limit, slots, sr_seed)


def ssd_step_multi(
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
    """As `alloy.ops.ssd_step_multi`; float64 states are the reference's."""
    if wide(state) is torch.float64:
        return ssd._ssd_step_multi(state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, slots)
    return _ssd_step_multi(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *dt_limit, slots)


def ssd_replay(
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
    """As `alloy.ops.ssd_replay`; float64 states are the reference's."""
    if wide(state) is torch.float64:
        return ssd._ssd_replay(state, x, dt, A, B, counts, dt_bias, dt_softplus, dt_limit, slots, sr_seed)
    return _ssd_replay(state, x, dt, A, B, counts, dt_bias, dt_softplus, *dt_limit, slots, sr_seed)
