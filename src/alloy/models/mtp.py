"""Multi-token prediction: a small stack that predicts one token further from a hidden state and the next token.

h' = final_norm(blocks(eh_proj([enorm(embed(next token)); hnorm(h)]))); the model's embedding and head are shared
(hybrid-models.md section 7).

Papers: DeepSeek-V3 (2024), section 2.2. arXiv:2412.19437; Nemotron 3 Super (tech report).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from alloy.models.base import Layer, Layout, RouterStats, RunLayer
from alloy.models.blocks import Linear, RMSNorm
from alloy.models.cache import Cache


class MTP(nn.Module):
    """One depth of multi-token prediction."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        hidden: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.enorm = RMSNorm(hidden, eps, device=device, dtype=dtype)
        self.hnorm = RMSNorm(hidden, eps, device=device, dtype=dtype)
        self.eh_proj = Linear(2 * hidden, hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(layers)
        self.final_norm = RMSNorm(hidden, eps, device=device, dtype=dtype)

    def forward(
        self, embedding: Tensor, hidden: Tensor, layout: Layout, cache: Cache | None, run_layer: RunLayer
    ) -> tuple[Tensor, list[RouterStats]]:
        """Combine and run the blocks.

        Args:
            embedding: (batch, seq, hidden) of the next tokens
            hidden: (batch, seq, hidden) of the model or the depth before
            layout: of these positions
            cache: of the MTP blocks, or None
            run_layer: runs one block (with activation checkpointing if the model wants it)

        Returns:
            (batch, seq, hidden), what the head takes; statistics of the MoE blocks in training mode
        """
        residual, delta = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)), None
        routers: list[RouterStats] = []
        for layer in self.layers:
            residual, delta, stats = run_layer(cast(Layer, layer), residual, delta, layout, cache)
            if stats is not None:
                routers.append(stats)
        return self.final_norm.add(delta, residual)[0], routers
