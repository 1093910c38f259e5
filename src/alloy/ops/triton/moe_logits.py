# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""The router's product in fp32 from 16-bit operands, whose products are exact in fp32: nothing is widened beforehand.

Gradients are fp32; each is split in two 16-bit parts, which hold 16 of its bits, and both are multiplied.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alloy.ops import moe as reference
from alloy.ops.triton.elementary import power_of_2

# tokens up to which one launch reads the router's matrix little more than once
FEW_TOKENS = 16


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """As `alloy.ops.router_logits`."""
    narrow = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _logits(x, weight) if narrow and x.is_cuda else reference.logits(x, weight)
    if x.shape[0] <= FEW_TOKENS and x.stride(-1) == weight.stride(-1) == 1 and x.dtype != torch.float64:
        return _few_logits(x, weight)
    return _logits(x, weight) if narrow and x.is_cuda else reference.logits(x, weight)


@torch.library.custom_op("alloy::router_logits_few", mutates_args=())
def _few_logits(x: Tensor, weight: Tensor) -> Tensor:
    experts, width = weight.shape
    out = x.new_empty(x.shape[0], experts, dtype=torch.float32)
    if x.shape[0]:
        few_logits_kernel[(experts, x.shape[0])](
            x, weight, out, x.stride(0), weight.stride(0), experts, D=width, BK=min(1024, power_of_2(width))
        )
    return out


@torch.library.custom_op("alloy::router_logits", mutates_args=())
def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@torch.library.custom_op("alloy::router_logits_backward", mutates_args=())
def _logits_backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    high = dlogits.to(x.dtype)
    parts = (high, (dlogits - high).to(x.dtype))
    dx, dweight = (
        sum(torch.mm(left, right, out_dtype=torch.float32) for left, right in products).to(x.dtype)
        for products in ([(part, weight) for part in parts], [(part.t(), x) for part in parts])
    )
    return dx, dweight


@_few_logits.register_fake
@_logits.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@_logits_backward.register_fake
def _(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:
    return _logits_backward(dlogits, *ctx.saved_tensors)


_logits.register_autograd(_backward, setup_context=_setup)


@triton.jit
def few_logits_kernel(x, weight, out, stride_x, stride_weight, experts, D: tl.constexpr, BK: tl.constexpr):
    """One expert's logit of one token."""
    expert = tl.program_id(0)
    token = tl.program_id(1)
    acc = tl.zeros((BK,), tl.float32)
    for k in tl.static_range(0, D, BK):
        at = k + tl.arange(0, BK)
        value = tl.load(x + token * stride_x + at, mask=at < D, other=0).to(tl.float32)
        acc += value * tl.load(weight + expert * stride_weight + at, mask=at < D, other=0).to(tl.float32)
    tl.store(out + token * experts + expert, tl.sum(acc, 0))
