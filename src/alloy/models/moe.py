"""Mixture of experts: a router, routed experts, a shared expert, and LatentMoE's narrow routed path.

y = sum_e w_e expert_e(x) + shared(x); with a latent width the routed part is latent_out(sum_e w_e expert_e(latent_in x)),
while router and shared expert see the full width (hybrid-models.md section 6).

Papers: DeepSeekMoE arXiv:2401.06066; aux-loss-free balancing arXiv:2408.15664; Nemotron 3 (LatentMoE).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from alloy.models.base import InitPlan, Layout, RouterStats, keep_fp32
from alloy.models.blocks import MLP, Linear
from alloy.models.configs import MLPConfig, MoEConfig
from alloy.ops.moe import expert_counts, moe_experts, moe_step, route, router_logits, sequence_balance


class Gate(nn.Module):
    """The router's matrix (experts, hidden) and, for sigmoid routers, the fp32 correction bias that balances the load.

    `bias` steers the choice only: it is a buffer, part of checkpoints, and never trained.
    """

    bias: Tensor | None

    def __init__(self, config: MoEConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden, device=device, dtype=dtype))
        has_bias = config.router == "sigmoid"
        bias = torch.zeros(config.num_experts, device=device, dtype=torch.float32) if has_bias else None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> fp32 logits (tokens, experts); never in lower precision."""
        return router_logits(x, self.weight)

    def draw_weights(self, plan: InitPlan) -> None:
        """Normal weights, zero bias."""
        plan.normal(self.weight)
        if self.bias is not None:
            self.bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply: Callable[..., Any] = super()._apply
        keep_fp32(self, () if self.bias is None else ("bias",), lambda: apply(fn, recurse))
        return self


class Experts(nn.Module):
    """Stacked routed experts: up (experts, ffn, width), down (experts, width, ffn), gate like up when gated."""

    gate: nn.Parameter | None

    def __init__(self, config: MoEConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        width = config.latent or config.hidden
        up, down = (config.num_experts, config.ffn, width), (config.num_experts, width, config.ffn)
        self.up = nn.Parameter(torch.empty(up, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(down, device=device, dtype=dtype))
        gate = nn.Parameter(torch.empty(up, device=device, dtype=dtype)) if config.gated else None
        self.register_parameter("gate", gate)
        self.activation = config.activation

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (tokens, width), chosen and weights (tokens, top_k) -> (tokens, width)."""
        return moe_experts(x, chosen, weights, self.up, self.down, self.gate, self.activation)

    def step(self, x: Tensor, chosen: Tensor, weights: Tensor, shared: MLP) -> Tensor:
        """As `forward`, plus the shared expert, whose linear maps are plain matrices."""
        shared_gate = None if self.gate is None else shared.gate_proj.weight
        matrices = (shared.up_proj.weight, shared.down_proj.weight, shared_gate)
        return moe_step(x, chosen, weights, self.up, self.down, self.gate, *matrices, self.activation)

    def draw_weights(self, plan: InitPlan) -> None:
        """Normal; `down` writes to the residual stream."""
        plan.normal(self.up)
        plan.normal(self.down, residual=True)
        if self.gate is not None:
            plan.normal(self.gate)


class MoE(nn.Module):
    """Routes each token to `top_k` experts and adds the shared expert."""

    def __init__(
        self, config: MoEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        # as `alloy.ops.route`; whoever puts another function here chooses the experts
        self.route: Callable[..., tuple[Tensor, Tensor, Tensor]] = route
        self.gate = Gate(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        if config.latent:
            self.latent_in = Linear(config.hidden, config.latent, config.bias, device=device, dtype=dtype)
            self.latent_out = Linear(config.latent, config.hidden, config.bias, device=device, dtype=dtype)
        if config.shared_ffn:
            shared = MLPConfig(
                hidden=config.hidden,
                ffn=config.shared_ffn,
                activation=config.activation,
                gated=config.gated,
                bias=config.bias,
            )
            self.shared = MLP(shared, device, dtype)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, RouterStats | None]:
        """x (batch, seq, hidden) -> the same shape, and statistics for balancing in training mode."""
        config = self.config
        flat = x.flatten(0, 1)
        chosen, weights, scores = self.route(
            self.gate(flat),
            self.gate.bias,
            config.top_k,
            scoring=config.router,
            num_groups=config.num_router_groups,
            top_groups=config.top_router_groups,
            normalize=config.normalize_weights,
            scale=config.router_scale,
        )
        if self._is_step():
            y = self.experts.step(flat, chosen, weights, self.shared)
        else:
            if config.latent:
                y = self.latent_out(self.experts(self.latent_in(flat), chosen, weights))
            else:
                y = self.experts(flat, chosen, weights)
            if config.shared_ffn:
                y = y + self.shared(flat)
        stats = self._stats(scores, chosen, layout) if self.training else None
        return y.view(x.shape), stats

    def _is_step(self) -> bool:
        """Whether routed and shared experts can be computed together: no gradients, and nothing but plain matrices."""
        if torch.is_grad_enabled() or not self.config.shared_ffn or self.config.latent:
            return False
        return all(type(part) is Linear and part.bias is None for part in self.shared.children())

    def _stats(self, scores: Tensor, chosen: Tensor, layout: Layout) -> RouterStats:
        valid, documents = layout.valid, layout.documents
        if valid is not None and documents is not None:
            documents = documents.masked_fill(~valid, -1)
        shape = layout.tokens.shape
        balance = sequence_balance(scores.unflatten(0, shape), chosen.unflatten(0, shape), documents)
        with torch.no_grad():
            # masked, not picked out: a device is not asked how many are left
            kept = None if valid is None else valid.flatten()
            p = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            spread = -torch.special.xlogy(p, p).sum(-1)
            entropy = spread.mean() if kept is None else torch.where(kept, spread, 0).sum() / kept.sum()
            counts = expert_counts(chosen, self.config.num_experts, kept)
        return RouterStats(counts, balance, entropy, _count_sequences(shape, documents, scores.device))


def _count_sequences(shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
    """Documents in the rows of `shape` (batch, seq), as `sequence_balance` tells them apart."""
    if documents is None:
        return torch.full((), shape[0], device=device)
    starts = documents >= 0
    starts[:, 1:] &= documents[:, 1:] != documents[:, :-1]
    return starts.sum()
