"""The SSD scan on NVIDIA GPUs as an operator of PyTorch, opaque to compilers, with its backward.

Only the inputs are kept for the backward, which computes the chunks' products and states again: bytes saved are bytes read.
Legend as in `alloy.ops.ssd`.
"""

from typing import Any

import torch
from torch import Tensor

from alloy.ops.precision import wide
from alloy.ops.ssd import _ssd_scan as reference
from alloy.ops.triton import ssd_backward, ssd_forward, ssd_prep

# tokens of a chunk in the kernels, whatever the caller's: the result does not depend on it
CHUNK = 64


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
) -> tuple[Tensor, Tensor]:
    """As `alloy.ops.ssd_scan`; x, B and C in one of bf16, fp16 and fp32, their last dimension contiguous.

    `chunk` is a hint for backends that have no size of their own. float64, for checks of gradients, is the reference's,
    and so is a batch without rows.
    """
    if wide(x) == torch.float64 or not x.shape[0]:
        return reference(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, h0, documents, chunk, return_state)
    for name, t in (("x", x), ("B", B), ("C", C)):
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(
                f"ssd_scan: {name} has stride {t.stride(-1)} in its last dimension; pass {name}.contiguous()"
            )
    B, C = B.to(x.dtype), C.to(x.dtype)
    low, high = dt_limit
    parts = num_parts(x.shape[3], B.shape[3], x.dtype)
    if parts > 1:
        # columns of a head know nothing of each other: a wide head is several heads with the same steps and decays
        x = x.unflatten(3, (parts, -1)).flatten(2, 3)
        dt = dt.repeat_interleave(parts, 2)
        A = A.repeat_interleave(parts)
        D, dt_bias = (None if t is None else t.repeat_interleave(parts) for t in (D, dt_bias))
        h0 = None if h0 is None else h0.unflatten(2, (parts, -1)).flatten(1, 2)
    y, state = torch.ops.alloy.ssd_scan(x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, h0, documents)
    if parts > 1:
        y, state = (t.unflatten(dim, (-1, parts)).flatten(dim + 1, dim + 2) for t, dim in ((y, 2), (state, 1)))
    return y, state


def num_parts(head_dim: int, state: int, dtype: torch.dtype) -> int:
    """In how many equal parts a head goes through the kernels, which hold all of a part and its state in shared memory."""
    most = 64 if dtype == torch.float32 and state > 128 else 128
    return next(n for n in range(1, head_dim + 1) if head_dim % n == 0 and head_dim // n <= most)


@torch.library.custom_op("alloy::ssd_scan", mutates_args=())
def _forward(
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
) -> tuple[Tensor, Tensor]:
    prep = ssd_prep.prepare(dt, A, dt_bias, dt_softplus, (low, high), documents, CHUNK)
    products = ssd_prep.products(B, C, CHUNK, prep.lengths)
    y, state, _ = ssd_forward.scan(x, prep, B, C, products, D, h0, CHUNK)
    return y, state


@_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    y = x.new_empty(x.shape)
    return y, x.new_empty(batch, heads, head_dim, B.shape[-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, dt, A, B, C, D, dt_bias, ctx.dt_softplus, ctx.low, ctx.high, h0, documents = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, h0, documents)


def _differentiate(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, dt_bias, h0, documents = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dbias, dh0 = ssd_backward.backward(
        dy, dstate, x, dt, A, B, C, D, dt_bias, ctx.dt_softplus, (ctx.low, ctx.high), h0, documents, CHUNK
    )
    return dx, ddt, dA, dB, dC, dD, dbias, None, None, None, dh0, None


_forward.register_autograd(_differentiate, setup_context=_save)
