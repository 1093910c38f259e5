"""The Nemotron hybrids: every block is one mixer (Mamba-2, attention, MLP or MoE) with its own pre-norm and residual.

h = embed(tokens); h = h + mixer(norm(h)) for each block; logits = head(norm(h)). No position embedding of any kind.

Papers: Nemotron-H arXiv:2504.03624, Nemotron Nano 2 arXiv:2508.14444, Nemotron 3 (tech report).
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from alloy.errors import RequestError
from alloy.models.base import CausalLM, InitStyle, Layout, ModelOutput, RouterStats, merge_stats
from alloy.models.blocks import MLP, Attention, Embedding, Linear, RMSNorm
from alloy.models.cache import Cache
from alloy.models.configs import AttentionConfig, HybridConfig, HybridMixer, MambaConfig, Mixer, MLPConfig
from alloy.models.mamba import Mamba
from alloy.models.moe import MoE
from alloy.models.mtp import MTP

COMPAT = "transformers-5.23"


class Block(nn.Module):
    """What mixer(norm(x)) adds to the stream x; `layer` is the block's index in the cache."""

    mixer: Mamba | Attention | MLP | MoE

    def __init__(
        self,
        mixer: HybridMixer,
        layer: int,
        hidden: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden, eps, device=device, dtype=dtype)
        if isinstance(mixer, MambaConfig):
            self.mixer = Mamba(mixer, layer, device, dtype)
        elif isinstance(mixer, AttentionConfig):
            self.mixer = Attention(mixer, layer, device=device, dtype=dtype)
        elif isinstance(mixer, MLPConfig):
            self.mixer = MLP(mixer, device, dtype)
        else:
            self.mixer = MoE(mixer, device, dtype)

    def forward(
        self, residual: Tensor, delta: Tensor | None, layout: Layout, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        """See `Layer`: residual and delta (batch, seq, hidden)."""
        normed, residual = self.norm.add(delta, residual)
        mixer, stats = self.mixer, None
        if isinstance(mixer, MLP):
            y = mixer(normed)
        elif isinstance(mixer, MoE):
            y, stats = mixer(normed, layout)
        else:
            y = mixer(normed, layout, cache)
        return residual, y, stats


class HybridLM(CausalLM):
    """`nemotron_h` and `nemotron_h_puzzle`: dense, MoE and LatentMoE hybrids with multi-token prediction."""

    config: HybridConfig

    def __init__(
        self, config: HybridConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._compat: str | None = None
        width, eps = config.hidden, config.norm_eps
        self.embed = Embedding(config.vocab, width, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Block(mixer, i, width, eps, device, dtype) for i, mixer in enumerate(config.mixers))
        self.norm = RMSNorm(width, eps, device=device, dtype=dtype)
        self.head = Linear(width, config.vocab, device=device, dtype=dtype)
        self.mtp = nn.ModuleList(
            MTP(
                [Block(mixer, i, width, eps, device, dtype) for i, mixer in enumerate(config.mtp_mixers)],
                width,
                eps,
                device,
                dtype,
            )
            for _ in range(config.mtp_depths)
        )
        self.finish()

    @property
    def has_mtp(self) -> bool:
        """Whether the model holds multi-token prediction layers."""
        return len(self.mtp) > 0

    @property
    def compat(self) -> str | None:
        """Another library whose numbers are reproduced: None or "transformers-5.23".

        That version floors dt at time_step_min in prefill and does not clamp it in decode (hybrid-models.md 5.4).
        """
        return self._compat

    @compat.setter
    def compat(self, name: str | None) -> None:
        """The library whose dt handling is reproduced, or None."""
        if name not in (None, COMPAT):
            raise RequestError(f'compat = "{name}" is not known; use None or "{COMPAT}"')
        self._compat = name
        for module in self.modules():
            if isinstance(module, Mamba):
                limit = module.config.time_step_limit
                low = module.config.time_step_min
                module.prefill_limit = (low, math.inf) if name else limit
                module.decode_limit = (-math.inf, math.inf) if name else limit

    def cached_mixers(self) -> tuple[Sequence[Mixer | None], Sequence[Mixer | None]]:
        """See `CausalLM.cached_mixers`."""
        return self.config.mixers, self.config.mtp_mixers if self.has_mtp else ()

    def run_mtp(self, hidden: Tensor, layout: Layout, depths: bool | int) -> tuple[list[Tensor], list[RouterStats]]:
        """Multi-token prediction over whole rows.

        Depth k at position t combines the output of depth k - 1 there (depth 0: the model's) with the token at t + k.

        Args:
            hidden: (batch, seq, hidden) after the final norm, in the layout's order
            layout: of the model call
            depths: True: two if the one stored depth repeats, else all stored; or how many

        Returns:
            per depth k (batch, seq - k, hidden); statistics of the MTP's MoE layers, repeated uses merged
        """
        if not self.has_mtp:
            return super().run_mtp(hidden, layout, depths)
        stored = len(self.mtp)
        if depths is True:
            depths = 2 if stored == 1 and self.config.mtp_repeated else stored
        if depths > stored and not self.config.mtp_repeated:
            raise RequestError(f"return_mtp = {depths}, but {stored} MTP depths are stored and they do not repeat")
        outputs: list[Tensor] = []
        routed: list[list[list[RouterStats]]] = [[] for _ in range(stored)]
        for k in range(1, min(depths, layout.tokens.shape[1] - 1) + 1):
            # the last stored depth is the one that repeats
            index = min(k, stored) - 1
            ahead = layout.ahead(k)
            mtp = cast(MTP, self.mtp[index])
            hidden, stats = mtp(
                self.embed(ahead.tokens), hidden[:, : ahead.tokens.shape[1]], ahead, None, self.run_layer
            )
            outputs.append(hidden)
            routed[index].append(stats)
        # a row too short for a depth has no positions there
        outputs += [hidden[:, :0]] * (depths - len(outputs))
        return outputs, [merge_stats(uses) for depth in routed for uses in zip(*depth, strict=True)]

    def mtp_step(
        self,
        tokens: Tensor,
        hidden: Tensor,
        cache: Cache,
        documents: Tensor | None = None,
        logits: Literal["all", "last"] | Tensor | None = "all",
    ) -> ModelOutput:
        """See `CausalLM.mtp_step`. Drafting always applies the first stored depth, on its own output for further tokens."""
        if not self.has_mtp or cache.mtp is None:
            return super().mtp_step(tokens, hidden, cache, documents, logits)
        layout = Layout(tokens, documents, cache=cache.mtp)
        with torch.no_grad():
            mtp = cast(MTP, self.mtp[0])
            last, _ = mtp(self.embed(layout.tokens), layout.roll(hidden), layout, cache.mtp, self.run_layer)
            cache.mtp.advance(tokens.shape[1] if layout.lengths is None else layout.lengths)
            output = ModelOutput(None, layout.restore(last), cache=cache)
            output.logits = self.compute_logits(last, output.last_hidden, layout, logits)
        return output

    def check_layout(self, layout: Layout) -> None:
        """Warn where a sequence may be longer than those of training: nothing else in the model has a limit."""
        super().check_layout(layout)
        if layout.bound > self.config.max_positions:
            limit = self.config.max_positions
            warnings.warn(f"sequence beyond max_positions = {limit}: the model was not trained for it", stacklevel=3)

    def residual_scale(self, init: InitStyle) -> float:
        """Sqrt of the number of blocks: each writes to the residual stream once."""
        return math.sqrt(len(self.layers)) if init == "megatron" and self.config.rescale_residual else 1.0

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seq) -> the residual stream (batch, seq, hidden), in fp32 if the config says so."""
        x = self.embed(tokens)
        return x.float() if self.config.residual_fp32 else x
