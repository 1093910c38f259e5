"""AdamW and Muon, who gets which, and the learning-rate schedule.

Muon orthogonalises the momentum of every weight matrix of the blocks; embeddings, head, router, convolution and everything
one-dimensional go to AdamW. It is written here rather than taken from `torch.optim.Muon`, which refuses anything but 2-D
parameters (stacked experts are (experts, out, in)), orthogonalises one matrix at a time, always in bf16, and knows no
sharded tensors. Here all matrices of one shape, experts included, are one batched matmul. Measured on one core with AMX: 48
experts of 128 x 128 take 8 ms in one batch and 18 ms one by one; bf16 takes a quarter of the time of fp32.

Papers: Muon (Jordan et al., 2024), Muon is Scalable (Liu et al., 2025) arXiv:2502.16982; WSD: MiniCPM arXiv:2404.06395.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from alloy.ops.precision import wide

# quintic Newton-Schulz iteration: x <- a x + (b A + c A A) x with A = x x^T (Jordan et al., 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

Schedule = Literal["wsd", "cosine", "linear", "constant"]
DecayShape = Literal["linear", "minus_sqrt"]


def lr_factor(
    progress: float,
    schedule: Schedule = "wsd",
    *,
    warmup: float = 0.0,
    decay: float = 0.0,
    shape: DecayShape = "linear",
    floor: float = 0.0,
) -> float:
    """Learning rate as a part of its peak.

    Args:
        progress: part of the run that has passed, 0 to 1: of its steps, or of its wall-clock time
        schedule: "wsd" is flat between warm-up and decay; "cosine" and "linear" fall from the end of the warm-up
        warmup: part of the run in which the rate rises linearly from 0
        decay: last part of the run in which "wsd" falls
        shape: how "wsd" falls; "minus_sqrt" is 1 - sqrt(t) (Nemotron 3)
        floor: lowest rate, as a part of the peak
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    start = 1.0 - decay if schedule == "wsd" else warmup
    if progress <= start or start >= 1.0:
        return 1.0
    t = min(1.0, (progress - start) / (1.0 - start))
    if schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * t))
    elif schedule == "wsd" and shape == "minus_sqrt":
        left = 1.0 - math.sqrt(t)
    else:
        left = 1.0 - t
    return floor + (1.0 - floor) * left


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, over all ranks' shards, with sums in fp32 whatever the gradients are held in.

    `nn.utils.get_total_norm` rounds each tensor's norm to the gradients' dtype and adds the squares up in it: 0.3% in bf16.

    Args:
        gradients: any shapes, dtypes mixed

    Returns:
        () fp32, on their device; nothing waits for it. 0 without gradients
    """
    by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_dtype[gradient.dtype].append(gradient)
    norms: list[Tensor] = []
    for members in by_dtype.values():
        # what get_total_norm calls, too
        norms += torch._foreach_norm(members, 2.0, dtype=wide(members[0]))  # pyright: ignore[reportPrivateImportUsage]
    if not norms:
        return torch.zeros(())
    norm = torch.stack([norm.float() for norm in norms]).norm()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(gradients: list[Tensor], norm: float, limit: float) -> None:
    """Scale gradients, any shapes, whose `gradient_norm` is above `limit` down to it.

    `nn.utils.clip_grad_norm_` scales by a tensor in fp32, which for gradients in bf16 takes a slow launch each."""
    if norm > limit:
        torch._foreach_mul_(gradients, limit / norm)  # pyright: ignore[reportPrivateImportUsage]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz; the step of a matrix is lr * max(1, out / in) ** 0.5.

    Parameters are (out, in) or stacks (..., out, in) of matrices, which count as separate. Sharded parameters are gathered
    for the iteration, which every rank then does in full; momentum stays sharded.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(
                        f"Muon takes matrices and stacks of matrices, not a tensor of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would mean a second loop
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: defaultdict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1.0 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                full = update.full_tensor() if isinstance(update, DTensor) else update
                wide = full.flatten(0, -3) if full.ndim > 3 else full.view(-1, *full.shape[-2:])
                if wide.shape[1] > wide.shape[2]:
                    wide = wide.mT
                shapes[wide.shape[1], wide.shape[2]].append((p, wide))
            for members in shapes.values():
                self._update(group, members)

    def _update(self, group: dict[str, Any], members: list[tuple[nn.Parameter, Tensor]]) -> None:
        stack = torch.cat([wide for _, wide in members]).to(self.dtype)
        done = orthogonalize(stack).split([len(wide) for _, wide in members])
        for (p, _), update in zip(members, done, strict=True):
            rows, cols = p.shape[-2:]
            if rows > cols:
                update = update.mT
            update = update.reshape(p.shape)
            if isinstance(p, DTensor):
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1.0 - group["lr"] * group["weight_decay"])
            p.add_(update.to(p.dtype), alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by values near 1 (0.7 to 1.2), keeping its singular vectors.

    Args:
        matrices: (count, rows, cols), rows <= cols

    Returns:
        same shape and dtype
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: matrices of the blocks, except router (`gate`) and convolution; not embedding and head."""
    owner = name.split(".")[-2] if "." in name else name
    return parameter.ndim >= 2 and owner not in ("embed", "head", "gate", "conv")


class Optimizers:
    """The optimizers of a run behind one handle, with named state for checkpoints.

    Weight decay goes to everything with two or more dimensions (embeddings and convolution weights included) and to
    nothing one-dimensional (Nemotron-H; hybrid-models facts, section 8).
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["adamw", "muon"],
        *,
        lr: float,
        muon_lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        muon_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        muon = [p for p, name in self.names.items() if kind == "muon" and is_muon_parameter(name, p)]
        rest = [p for p in self.names if not any(p is m for m in muon)]
        matrices, vectors = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            self.parts.append(Muon(muon, lr=muon_lr, weight_decay=weight_decay, dtype=muon_dtype))
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True))
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def set_lr(self, factor: float) -> None:
        """Set every rate to `factor` of its peak."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        """Update the parameters and drop their gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """State tensors by "parameter name/field"; creates the state of parameters that have had no step yet."""
        found: dict[str, Tensor] = {}
        for part, p in self._parameters():
            state = part.state[p]
            if not state and isinstance(part, Muon):
                state["momentum"] = torch.zeros_like(p)
            elif not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            found |= {f"{self.names[p]}/{key}": value for key, value in state.items()}
        return found

    def _parameters(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
        for part in self.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    yield part, p
