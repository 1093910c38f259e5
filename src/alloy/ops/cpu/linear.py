"""Linear maps of few rows in fp32 on CPU cores.

F.linear of one row reads weights at half of the rate that a sum over them reaches (15 against 35 GB/s on one thread of an
AVX-512 core, torch 2.13 with MKL; of two to four rows at a quarter). The same product as a batch of matrix times vector
reaches 27 GB/s, and weight times x^T serves a few rows at 20 GB/s while x stays in the level-1 cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of x, beyond which the product with x^T is slower than F.linear
_SMALL = 4096


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `alloy.ops.linear`."""
    rows = x.numel() // max(x.shape[-1], 1)
    narrow = rows == 1 or (1 < rows <= 8 and x.numel() <= _SMALL)
    if not narrow or x.dtype != torch.float32 or weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return F.linear(x, weight, bias)
    y = few_rows(x.reshape(rows, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y.add_(bias)


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, inputs) times weight (outputs, inputs) transposed: contiguous (rows, outputs)."""
    if x.shape[0] > 1:
        return torch.mm(weight, x.T).T.contiguous()
    parts = next(n for n in (16, 8, 4, 2, 1) if weight.shape[0] % n == 0)
    return torch.bmm(weight.unflatten(0, (parts, -1)), x.T.expand(parts, -1, -1)).view(1, -1)
