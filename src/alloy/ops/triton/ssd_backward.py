# pyright: basic, reportAttributeAccessIssue=false, reportMissingModuleSource=false
"""Backward of the SSD scan: everything from the inputs alone, with scratch for one segment of the sequence at a time.

A first pass finds the state at the start of each segment, all at once. Then, last segment first, one kernel finds the states
before its chunks and the gradients of the states behind them, two kernels all gradients inside the chunks, and a small one
those of the step sizes. Two states a chunk are kept of one segment: with chunks of 64 tokens, head_dim 80 and state 128 they
take four times the bytes of its x.

Differs: the appendix of performance.md keeps or recomputes the states of the whole sequence; here they go with their segment.
Repetitions give the same bits. Rates and errors: docs/performance.md (`alloy bench ssd-train`).
"""

import torch
from torch import Tensor

from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import num_blocks
from alloy.ops.triton.ssd_backward_carry import carries, starts
from alloy.ops.triton.ssd_backward_chunk import gradients, shares
from alloy.ops.triton.ssd_backward_step import steps
from alloy.ops.triton.ssd_prep import prepare

# bytes for the states of one segment: more of them fill the machine better and cost fewer launches
SCRATCH = 2**28
# heads that one program walks; more of them share a group's sums over heads, fewer fill the machine with less scratch
HEADS = 16

# chunk: tokens of a chunk; tile, warps, stages, registers (at most; 0: as many as they want): of the kernel that carries states
# from chunk to chunk; start_*: of the one before the segments; token_*, sum_*: of those inside chunks. Chunks of 32 tokens
# serve every shape, they make no narrow operands of wgmma (ssd_backward_carry.py); chunks of 64 serve the shapes for which each
# candidate was checked on a GPU
tuning.register(
    "ssd_scan_backward",
    {"chunk": 32, "tile": 64, "warps": 4, "stages": 1, "registers": 0, "start_tile": 64, "start_warps": 4, "start_stages": 1,
     "token_warps": 4, "token_stages": 1, "sum_warps": 4, "sum_stages": 1},
)  # fmt: skip
tuning.register(
    "ssd_scan_backward/wide",
    {"chunk": 64, "tile": 64, "warps": 4, "stages": 3, "registers": 128, "start_tile": 128, "start_warps": 8, "start_stages": 3,
     "token_warps": 4, "token_stages": 2, "sum_warps": 4, "sum_stages": 2},
    {"chunk": 64, "tile": 64, "warps": 4, "stages": 2, "registers": 128, "start_tile": 128, "start_warps": 8, "start_stages": 3,
     "token_warps": 4, "token_stages": 2, "sum_warps": 4, "sum_stages": 2},
    {"chunk": 64, "tile": 64, "warps": 4, "stages": 3, "registers": 0, "start_tile": 64, "start_warps": 4, "start_stages": 3,
     "token_warps": 4, "token_stages": 2, "sum_warps": 4, "sum_stages": 2},
)  # fmt: skip
WIDE = ((64, 128), (80, 128))


def backward(
    dy: Tensor,
    dstate: Tensor | None,
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
) -> tuple[Tensor | None, ...]:
    """Gradients of the scan, each in the dtype of its tensor.

    Args:
        dy: (batch, seq, heads, head_dim), gradient of y
        dstate: (batch, heads, head_dim, state), gradient of the final state, or None
        x: (batch, seq, heads, head_dim)
        dt: (batch, seq, heads)
        A: (heads,)
        B: (batch, seq, groups, state)
        C: (batch, seq, groups, state)
        D: (heads,)
        dt_bias: (heads,)
        dt_softplus: as in `alloy.ops.ssd_scan`
        dt_limit: as in `alloy.ops.ssd_scan`
        h0: (batch, heads, head_dim, state)
        documents: int (batch, seq)
        chunk: not used: the kernels choose their own chunks

    Returns:
        gradients of x, dt, A, B, C, D, dt_bias, h0; None for what was None
    """
    grads = torch.ops.alloy.ssd_scan_backward(
        dy, dstate, x, dt, A, B, C, D, dt_bias, dt_softplus, *dt_limit, h0, documents
    )
    dx, ddt, dA, dB, dC, dD, dbias, dh0 = grads
    return (
        dx, ddt, dA, dB, dC,
        dD if D is not None else None, dbias if dt_bias is not None else None, dh0 if h0 is not None else None,
    )  # fmt: skip


@torch.library.custom_op("alloy::ssd_scan_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    h0: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` with empty tensors for the gradients of what is None."""
    batch, seq, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    is_wide = (head_dim, state) in WIDE and x.dtype == torch.bfloat16
    config = tuning.pick("ssd_scan_backward/wide" if is_wide else "ssd_scan_backward", f"{head_dim}-{state}")
    chunk = config["chunk"]
    # an expanded gradient, as of a sum, has no rows to be read
    dy = dy if dy.stride(3) == 1 else dy.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    prep = prepare(dt, A, dt_bias, dt_softplus, (low, high), documents, chunk)
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    slope = x.new_zeros(batch, heads, head_dim, state, dtype=torch.float32)
    if dstate is not None:
        slope.copy_(dstate)

    share = heads // groups
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= HEADS)
    chunks = num_blocks(seq, chunk)
    sums = x.new_empty(3, batch, chunks, heads, dtype=torch.float32)
    # a segment's dx, less the last chunk, has room for a state in fp32
    room = 1 + num_blocks(4 * state, chunk * x.element_size())
    fitting = SCRATCH // (2 * batch * heads * head_dim * state * x.element_size())
    # two programs a multiprocessor run at a time: no segment ends with a few of them
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    wave = max(1, 2 * processors // (batch * groups * parts))
    rest = min(chunks, max(fitting // wave * wave or fitting, room))
    first = chunks - (num_blocks(chunks, rest) - 1) * rest
    begun = _states_in(dx, first * chunk, rest * chunk, (chunks - first) // rest, state)
    if begun is not None:
        starts(x, B, prep, h0, begun, first, rest, config)
    scratch, left = x.new_empty(2, batch, rest, heads, head_dim, state), shares(x, groups, rest, parts, chunk)
    for stop in range(chunks, 0, -rest):
        length = min(stop, rest)
        segment = (stop - first) // rest
        start = h0 if segment == 0 or begun is None else begun[:, segment - 1]
        if length < rest:
            scratch, left = (
                scratch.new_empty(2, batch, length, *scratch.shape[3:]),
                shares(x, groups, length, parts, chunk),
            )
        before, after = scratch
        carries(x, dy, B, C, prep, start, slope, before, after, stop - length, config)
        gradients(dy, x, B, C, D, prep, before, after, stop - length, dx, dB, dC, left, parts, config)
        steps(left, dt, A, dt_bias, dt_softplus, (low, high), prep, stop - length, ddt, sums, chunk)
    dA, dbias, dD = (
        x.new_empty(0) if t is None else total.sum((0, 1)).to(t.dtype)
        for total, t in zip(sums, (A, dt_bias, D), strict=True)
    )
    return dx, ddt, dA, dB, dC, dD, dbias, x.new_empty(0) if h0 is None else slope.to(h0.dtype, copy=True)


def _states_in(dx: Tensor, first: int, rest: int, count: int, state: int) -> Tensor | None:
    """A place for the states at the starts of the later segments: each in its segment's dx, which is written after it is read.

    Args:
        dx: (batch, seq, heads, head_dim), not yet written
        first: tokens of the first segment
        rest: tokens of each other one
        count: their number
        state: width of a state

    Returns:
        fp32 (batch, count, heads, head_dim, state), or None for no other segments
    """
    if count == 0:
        return None
    batch, seq, heads, head_dim = dx.shape
    shape = (batch, count, heads, head_dim, state)
    token = heads * head_dim * dx.element_size() // 4
    if seq * heads * head_dim * dx.element_size() % 16:
        # rows of a batch that fp32 cannot be laid over
        return dx.new_empty(shape, dtype=torch.float32)
    strides = (seq * token, rest * token, head_dim * state, state, 1)
    return dx.view(-1).view(torch.float32).as_strided(shape, strides, first * token)


@_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    h0: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C))
    dD, dbias, dh0 = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (D, dt_bias, h0))
    return dx, ddt, dA, dB, dC, dD, dbias, dh0
