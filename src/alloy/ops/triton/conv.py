# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
"""The causal depthwise convolution, forward and backward.

One program walks some tokens of `BLOCK` channels, each thread with channels of its own. The last kernel - 1 inputs stay in
registers, so every input is read once (and the few before a program's first token again); in the backward the unfinished
gradients of the last kernel - 1 inputs stay there too. The loads of the next `UNROLL` tokens are in flight while those
before them are computed. Where all tokens at hand are of one document, which is the rule, nothing is masked.

The backward computes the values before the activation again. Each program writes its own share of the weight's gradient,
and a second kernel adds the shares up: no atomics, equal bits on repetition.

Rates: docs/performance.md (`alloy bench conv`).

Formulas: `alloy.ops.conv`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops.precision import wide
from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import accumulator, num_blocks, sigmoid

# tokens: how far a program walks, a multiple of UNROLL
tuning.register(
    "causal_conv1d",
    {"BLOCK": 128, "UNROLL": 8, "tokens": 128, "num_warps": 1},
    {"BLOCK": 128, "UNROLL": 8, "tokens": 256, "num_warps": 1},
    {"BLOCK": 128, "UNROLL": 16, "tokens": 128, "num_warps": 1},
    {"BLOCK": 256, "UNROLL": 8, "tokens": 128, "num_warps": 1},
    {"BLOCK": 256, "UNROLL": 4, "tokens": 128, "num_warps": 1},
    {"BLOCK": 512, "UNROLL": 4, "tokens": 64, "num_warps": 2},
)
tuning.register(
    "causal_conv1d_backward",
    {"BLOCK": 128, "UNROLL": 8, "tokens": 256, "num_warps": 1},
    {"BLOCK": 128, "UNROLL": 8, "tokens": 512, "num_warps": 1},
    {"BLOCK": 128, "UNROLL": 4, "tokens": 256, "num_warps": 1},
    {"BLOCK": 256, "UNROLL": 4, "tokens": 256, "num_warps": 1},
    {"BLOCK": 256, "UNROLL": 8, "tokens": 256, "num_warps": 2},
    {"BLOCK": 256, "UNROLL": 2, "tokens": 256, "num_warps": 1},
)
# programs that keep a GPU busy: where there are fewer, each walks fewer tokens
_PROGRAMS = 4096
MOST_TAPS = 4


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    init: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """As `alloy.ops.causal_conv1d` without a final state."""
    if weight.shape[1] > MOST_TAPS:
        raise ValueError(
            f"the conv kernel has {weight.shape[1]} taps, at most {MOST_TAPS}; use_backend('torch') has more"
        )
    return _conv(_adjacent(x), weight, bias, init, documents, activation == "silu")


def _adjacent(x: Tensor) -> Tensor:
    """x with its channels next to each other, as they always are but in gradients that were expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("alloy::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, init: Tensor | None, documents: Tensor | None, silu: bool
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        config, grid, arguments = _plan("causal_conv1d", x, weight, bias, init, documents)
        _forward_kernel[grid](y, *arguments, SILU=silu, **config)
    return y


@torch.library.custom_op("alloy::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    init: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinit = x.new_zeros(0 if init is None else init.shape)
    channels, kernel = weight.shape
    total = torch.zeros(kernel + 1, channels, dtype=wide(x), device=x.device)
    if dx.numel():
        config, grid, arguments = _plan("causal_conv1d_backward", x, weight, bias, init, documents)
        # a weight's gradient for each tap, then the bias's
        shares = torch.empty(
            grid[0] * grid[1] // config["BLOCKS"], kernel + 1, channels, dtype=wide(x), device=x.device
        )
        _backward_kernel[grid](
            dx, None if init is None else dinit, shares, dy, dy.stride(0), dy.stride(1), *arguments, SILU=silu, **config
        )
        total = shares.sum(0)
    return dx, weight.new_empty(weight.shape).copy_(total[:kernel].t()), total[kernel].to(weight.dtype), dinit


@_conv.register_fake
def _(x, weight, bias, init, documents, silu):
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(dy, x, weight, bias, init, documents, silu):
    dinit = x.new_empty(0 if init is None else init.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), dinit


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, init, documents = ctx.saved_tensors
    dx, dweight, dbias, dinit = _conv_backward(_adjacent(dy), x, weight, bias, init, documents, ctx.silu)
    return (
        dx,
        dweight,
        None if bias is None else dbias.to(bias.dtype),
        None if init is None else dinit.to(init.dtype),
        None,
        None,
    )


_conv.register_autograd(_differentiate, setup_context=_save)


def _plan(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, init: Tensor | None, documents: Tensor | None
) -> tuple[dict[str, Any], tuple[int, int], tuple[Any, ...]]:
    """A kernel's constants, its grid, and the arguments that both kernels end with."""
    batch, seq, channels = x.shape
    config = dict(tuning.pick(op, f"{channels}-{x.element_size() * 8}"))
    blocks = num_blocks(channels, config["BLOCK"])
    tokens = config.pop("tokens")
    while tokens > 2 * config["UNROLL"] and batch * blocks * num_blocks(seq, tokens) < _PROGRAMS:
        tokens //= 2
    grid = blocks * num_blocks(seq, tokens), batch
    strides = (0, 0, 0) if init is None else init.stride()
    documents = None if documents is None else documents.contiguous()
    config |= {"BLOCKS": blocks, "KERNEL": weight.shape[1], "WIDE": accumulator(x.dtype)}
    arguments = x, x.stride(0), x.stride(1), weight.contiguous(), bias, init, *strides, documents, seq, channels, tokens
    return config, grid, arguments


@triton.jit
def _load_rows(x, stride, first, stop, inside, COUNT: tl.constexpr):
    """Tokens first, first + 1, ... below `stop`, each [BLOCK]."""
    rows = ()
    for i in tl.static_range(COUNT):
        t = first + i
        rows = rows + (tl.load(x + t.to(tl.int64) * stride, mask=inside & (t < stop), other=0.0),)
    return rows


@triton.jit
def _load_numbers(documents, first, seq, COUNT: tl.constexpr):
    """Document numbers of the token before `first`, of `first`, ...; those outside the row are its nearest token's."""
    numbers = ()
    for i in tl.static_range(COUNT + 1):
        t = tl.minimum(tl.maximum(first + i - 1, 0), seq - 1)
        numbers = numbers + (tl.load(documents + t).to(tl.int32),)
    return numbers


@triton.jit
def _one_document(numbers, COUNT: tl.constexpr):
    """Whether all of them are equal and none is padding."""
    same = numbers[0] >= 0
    for i in tl.static_range(COUNT):
        same = same & (numbers[i + 1] == numbers[0])
    return same


@triton.jit
def _cut(window, fresh, COUNT: tl.constexpr):
    """The window without what precedes a document's first token."""
    kept = ()
    for k in tl.static_range(COUNT):
        kept = kept + (tl.where(fresh, 0.0, window[k]),)
    return kept


@triton.jit
def _begin(
    x, x_token, weight, bias, init, init_token, documents, start, seq, channel, inside,
    KERNEL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a program holds before token `start`: the weights [BLOCK] of each tap, the bias, the inputs before the token,
    oldest first, and how many of them are of its predecessor's document (kernel - 1 stands for all and more)."""
    weights = ()
    for k in tl.static_range(KERNEL):
        weights = weights + (tl.load(weight + channel * KERNEL + k, mask=inside, other=0.0).to(WIDE),)
    if bias is not None:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(WIDE)
    else:
        shift = tl.zeros(channel.shape, WIDE)
    window = ()
    age = start * 0 + (KERNEL - 1)
    for k in tl.static_range(KERNEL - 1):
        t = start + (k - KERNEL + 1)
        real = t >= 0
        if documents is not None:
            number = tl.load(documents + tl.maximum(t, 0))
            real = real & (number >= 0)
        value = tl.load(x + t.to(tl.int64) * x_token, mask=inside & real, other=0.0).to(WIDE)
        if init is not None:
            # tokens -kernel + 1 .. -1 are entries 0 .. kernel - 2
            place = init + (t + KERNEL - 1).to(tl.int64) * init_token
            value += tl.load(place, mask=inside & (t < 0), other=0.0).to(WIDE)
        if documents is not None:
            fresh = number != tl.load(documents + tl.maximum(t - 1, 0))
            window = _cut(window, fresh, k)
            age = tl.where(fresh, 0, age + 1)
        window = window + (value,)
    return weights, shift, window, age


@triton.jit
def _forward_block(
    values, numbers, window, weights, shift, y, first, stop, channels, inside,
    COUNT: tl.constexpr, KERNEL: tl.constexpr, SILU: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(COUNT):
        t = first + i
        value = values[i].to(WIDE)
        if MASKED:
            value = tl.where(numbers[i + 1] >= 0, value, 0.0)
            window = _cut(window, numbers[i + 1] != numbers[i], KERNEL - 1)
        window = window + (value,)
        out = shift
        for k in tl.static_range(KERNEL):
            out += weights[k] * window[k]
        if SILU:
            out *= sigmoid(out)
        if MASKED:
            out = tl.where(numbers[i + 1] >= 0, out, 0.0)
        tl.store(y + t.to(tl.int64) * channels, out.to(y.dtype.element_ty), mask=inside & (t < stop))
        window = window[1:]
    return window


@triton.jit
def _forward_kernel(
    y, x, x_batch, x_token, weight, bias, init, init_batch, init_channel, init_token, documents, seq, channels, tokens,
    SILU: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    BLOCKS: tl.constexpr, KERNEL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # neighbours in time are neighbours in channels: they read and write whole rows together
    channel = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    start = (tl.program_id(0) // BLOCKS) * tokens
    stop = tl.minimum(start + tokens, seq)
    row = tl.program_id(1).to(tl.int64)
    x += row * x_batch + channel
    y += row * seq * channels + channel
    if init is not None:
        init += row * init_batch + channel * init_channel
    if documents is not None:
        documents += row * seq
    weights, shift, window, _ = _begin(
        x, x_token, weight, bias, init, init_token, documents, start, seq, channel, inside, KERNEL, WIDE
    )
    values, numbers = _load_rows(x, x_token, start, stop, inside, UNROLL), ()
    if documents is not None:
        numbers = _load_numbers(documents, start, seq, UNROLL)
    for t in range(start, stop, UNROLL):
        values_ahead = _load_rows(x, x_token, t + UNROLL, stop, inside, UNROLL)
        if documents is not None:
            numbers_ahead = _load_numbers(documents, t + UNROLL, seq, UNROLL)
            if _one_document(numbers, UNROLL):
                window = _forward_block(
                    values, numbers, window, weights, shift, y, t, stop, channels, inside,
                    UNROLL, KERNEL, SILU, False, WIDE,
                )  # fmt: skip
            else:
                window = _forward_block(
                    values, numbers, window, weights, shift, y, t, stop, channels, inside,
                    UNROLL, KERNEL, SILU, True, WIDE,
                )  # fmt: skip
            numbers = numbers_ahead
        else:
            window = _forward_block(
                values, numbers, window, weights, shift, y, t, stop, channels, inside,
                UNROLL, KERNEL, SILU, False, WIDE,
            )  # fmt: skip
        values = values_ahead


@triton.jit
def _backward_block(
    values, grads, numbers, window, age, pending, sums, weights, shift, dx, dinit, first, start, stop, channels, inside,
    COUNT: tl.constexpr, KERNEL: tl.constexpr, SILU: tl.constexpr, OWN: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`pending`: the unfinished gradients of the last kernel - 1 tokens, oldest first. Tokens that are not the program's
    OWN, those after its last, only finish them."""
    for i in tl.static_range(COUNT):
        value, grad = values[i].to(WIDE), grads[i].to(WIDE)
        age += 1
        if MASKED:
            value = tl.where(numbers[i + 1] >= 0, value, 0.0)
            grad = tl.where(numbers[i + 1] >= 0, grad, 0.0)
            fresh = numbers[i + 1] != numbers[i]
            window = _cut(window, fresh, KERNEL - 1)
            age = tl.where(fresh, 0, age)
        window = window + (value,)
        if SILU:
            out = shift
            for k in tl.static_range(KERNEL):
                out += weights[k] * window[k]
            gate = sigmoid(out)
            grad *= gate * (1.0 + out * (1.0 - gate))
        if OWN:
            added = ()
            for k in tl.static_range(KERNEL):
                added = added + (sums[k] + grad * window[k],)
            sums = added + (sums[KERNEL] + grad,)
        pending = pending + (tl.zeros_like(grad),)
        reached = ()
        for k in tl.static_range(KERNEL):
            share = grad
            if MASKED:
                share = tl.where(age >= KERNEL - 1 - k, grad, 0.0)
            reached = reached + (pending[k] + weights[k] * share,)
        t = first + (i - KERNEL + 1)
        place = dx + t.to(tl.int64) * channels
        tl.store(place, reached[0].to(dx.dtype.element_ty), mask=inside & (t >= start) & (t < stop))
        if dinit is not None:
            before = (start == 0) & (t < 0)
            tl.store(dinit + (t + KERNEL - 1), reached[0].to(dinit.dtype.element_ty), mask=inside & before)
        window, pending = window[1:], reached[1:]
    return window, age, pending, sums


@triton.jit
def _backward_kernel(
    dx, dinit, shares, dy, dy_batch, dy_token,
    x, x_batch, x_token, weight, bias, init, init_batch, init_channel, init_token, documents, seq, channels, tokens,
    SILU: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    BLOCKS: tl.constexpr, KERNEL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channel = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    chunk = tl.program_id(0) // BLOCKS
    start = chunk * tokens
    stop = tl.minimum(start + tokens, seq)
    row = tl.program_id(1).to(tl.int64)
    x += row * x_batch + channel
    dy += row * dy_batch + channel
    dx += row * seq * channels + channel
    if init is not None:
        init += row * init_batch + channel * init_channel
        dinit += (row * channels + channel) * (KERNEL - 1)
    if documents is not None:
        documents += row * seq
    weights, shift, window, age = _begin(
        x, x_token, weight, bias, init, init_token, documents, start, seq, channel, inside, KERNEL, WIDE
    )
    pending, sums = (), (tl.zeros(channel.shape, WIDE),)
    for _ in tl.static_range(KERNEL):
        sums = sums + (tl.zeros(channel.shape, WIDE),)
    for _ in tl.static_range(KERNEL - 1):
        pending = pending + (tl.zeros(channel.shape, WIDE),)
    values, numbers = _load_rows(x, x_token, start, stop, inside, UNROLL), ()
    grads = _load_rows(dy, dy_token, start, stop, inside, UNROLL)
    if documents is not None:
        numbers = _load_numbers(documents, start, seq, UNROLL)
    for t in range(start, stop, UNROLL):
        values_ahead = _load_rows(x, x_token, t + UNROLL, stop, inside, UNROLL)
        grads_ahead = _load_rows(dy, dy_token, t + UNROLL, stop, inside, UNROLL)
        if documents is not None:
            numbers_ahead = _load_numbers(documents, t + UNROLL, seq, UNROLL)
            if _one_document(numbers, UNROLL) & (age >= KERNEL - 1):
                window, age, pending, sums = _backward_block(
                    values, grads, numbers, window, age, pending, sums, weights, shift, dx, dinit,
                    t, start, stop, channels, inside, UNROLL, KERNEL, SILU, True, False, WIDE,
                )  # fmt: skip
            else:
                window, age, pending, sums = _backward_block(
                    values, grads, numbers, window, age, pending, sums, weights, shift, dx, dinit,
                    t, start, stop, channels, inside, UNROLL, KERNEL, SILU, True, True, WIDE,
                )  # fmt: skip
            numbers = numbers_ahead
        else:
            window, age, pending, sums = _backward_block(
                values, grads, numbers, window, age, pending, sums, weights, shift, dx, dinit,
                t, start, stop, channels, inside, UNROLL, KERNEL, SILU, True, False, WIDE,
            )  # fmt: skip
        values, grads = values_ahead, grads_ahead
    # the tokens after the program's last, the first of which is a multiple of UNROLL away from its first
    after = start + tl.cdiv(stop - start, UNROLL) * UNROLL
    values = _load_rows(x, x_token, after, seq, inside, KERNEL - 1)
    grads = _load_rows(dy, dy_token, after, seq, inside, KERNEL - 1)
    if documents is not None:
        numbers = _load_numbers(documents, after, seq, KERNEL - 1)
    _backward_block(
        values, grads, numbers, window, age, pending, sums, weights, shift, dx, dinit,
        after, start, stop, channels, inside, KERNEL - 1, KERNEL, SILU, False, documents is not None, WIDE,
    )  # fmt: skip
    shares += (row * tl.cdiv(seq, tokens) + chunk) * (KERNEL + 1) * channels + channel
    for k in tl.static_range(KERNEL + 1):
        tl.store(shares + k * channels, sums[k], mask=inside)
