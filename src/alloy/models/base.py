"""What every causal language model shares: the call, the layout of a batch, initialisation, checkpointing.

`Layout` is the one place where `documents` (packing and padding) becomes what layers need. `CausalLM` runs embedding,
blocks, final norm and head; `hybrid.py` and `llama.py` only say which blocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alloy.errors import RequestError
from alloy.models.cache import Cache, DenseCache
from alloy.models.checkpointing import run_block
from alloy.models.configs import AttentionConfig, Checkpointing, DecoderConfig, HybridConfig, MambaConfig, Mixer
from alloy.models.paged import PagedCache
from alloy.ops.documents import Packing, read_packing, segment_ids

InitStyle = Literal["megatron", "transformers"]


@dataclass(slots=True)
class RouterStats:
    """What one MoE layer routed in a training step; padding is left out.

    Attributes:
        counts: (experts,) int64, tokens routed to each expert
        balance: scalar fp32, sequence-balance value before its coefficient (1 at perfect balance), differentiable
        entropy: scalar fp32, mean entropy of the normalised scores in nats
        sequences: scalar int64, how many sequences `balance` is the mean of
    """

    counts: Tensor
    balance: Tensor
    entropy: Tensor
    sequences: Tensor


@dataclass(slots=True)
class ModelOutput:
    """Result of a model call.

    Attributes:
        logits: fp32; (batch, seq, vocab) for "all", (batch, 1, vocab) for "last", (indices, vocab) for indices, or None
        last_hidden: (batch, seq, hidden) after the final norm, what the head and the fused loss take; none of seq with
            `only_cache`
        hidden: with `return_hidden`, one (batch, seq, hidden) per block: the residual stream after it
        mtp_logits: with `return_mtp` and logits="all", [k-1] is (batch, seq - k, vocab): position t predicts t + k + 1
        mtp_hidden: with `return_mtp`, [k-1] is (batch, seq - k, hidden), what the head takes for depth k
        cache: the cache of the call, advanced
        routers: in training mode one entry per MoE layer, in the order of `CausalLM.gates()`
    """

    logits: Tensor | None
    last_hidden: Tensor
    hidden: list[Tensor] | None = None
    mtp_logits: list[Tensor] | None = None
    mtp_hidden: list[Tensor] | None = None
    cache: Cache | None = None
    routers: list[RouterStats] = field(default_factory=list)


class Layout:
    """How the tokens of one call lie in their rows.

    Left padding is rolled to the right once, here, so that every layer sees rows of real tokens followed by padding;
    `restore` rolls outputs back. `documents` is None when there is neither packing nor padding, the fast case.

    Attributes:
        tokens: (batch, seq) int64, rolled, padding replaced by 0
        documents: (batch, seq) int32 rolled, -1 only at the end of a row, no number twice in a row; or None
        packed: some row holds more than one document
        lengths: (batch,) int64 real tokens per row; None: every token is real
        valid: (batch, seq) bool, tokens that count in statistics; None: all
    """

    def __init__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.tokens = tokens
        self.documents: Tensor | None = None
        self.packed = False
        self.lengths: Tensor | None = None
        self.valid: Tensor | None = None
        self.rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self._packing: Packing | None = None
        self._order: Tensor | None = None
        self._inverse: Tensor | None = None
        self._positions = positions
        self._cache = cache
        if cache is not None and cache.batch != tokens.shape[0]:
            raise RequestError(f"tokens have {tokens.shape[0]} rows but the cache was made for {cache.batch}")
        if documents is not None:
            self._read(documents)

    @property
    def positions(self) -> Tensor:
        """(batch or 1, seq) int64: position inside the document, cached tokens counted."""
        if self._positions is None:
            if self._cache is not None:
                self._positions = self._cache.positions(self.tokens.shape[1])
                return self._positions
            index = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
            if self.packed and self.documents is not None:
                starts = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0), value=False)
                index = index - (index * starts).cummax(1).values
            self._positions = index
        return self._positions

    @property
    def bound(self) -> int:
        """No default position reaches this, known without asking the device."""
        return self.tokens.shape[1] + (0 if self._cache is None else self._cache.longest)

    @property
    def blocks(self) -> Tensor | None:
        """`documents` where attention needs it: causal order already hides padding at the end of a row."""
        return self.documents if self.packed else None

    @property
    def packing(self) -> Packing | None:
        """Segments of packed rows, for attention on accelerators."""
        if self._packing is None and self.packed and self.documents is not None and self.documents.is_cuda:
            self._packing = read_packing(self.documents)
        return self._packing

    @property
    def cu_seqlens(self) -> Tensor:
        """(docs + 1,) int32: boundaries of the documents in the real tokens of all rows, one after another."""
        batch, seq = self.tokens.shape
        if self.documents is None:
            return torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32, device=self.tokens.device)
        starts = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0), value=True)
        real = self.documents >= 0
        edges = (starts & real)[real].nonzero()[:, 0]
        return F.pad(edges, (0, 1), value=int(real.sum())).to(torch.int32)

    def restore(self, x: Tensor) -> Tensor:
        """Roll x (batch, up to seq, ...) back to where the caller had its tokens."""
        if self._inverse is None:
            return x
        index = self._inverse[:, : x.shape[1]].clamp(max=x.shape[1] - 1)
        return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))

    def roll(self, x: Tensor) -> Tensor:
        """Bring x (batch, seq, ...) from the caller's order into this one."""
        if self._order is None:
            return x
        return x.gather(1, self._order.view(*self._order.shape, *[1] * (x.dim() - 2)).expand_as(x))

    def last(self, x: Tensor) -> Tensor:
        """The last real position of each row of x (batch, seq, hidden), in rolled order -> (batch, 1, hidden)."""
        if self.lengths is None:
            return x[:, -1:]
        index = (self.lengths - 1).clamp(min=0)[:, None, None]
        return x.gather(1, index.expand(-1, 1, x.shape[2]))

    def ahead(self, offset: int) -> "Layout":
        """The layout of the first seq - offset positions, whose tokens are those `offset` later in the same document.

        Where the document ends before that, the token is 0 and the position does not count.
        """
        layout = Layout(self.tokens[:, offset:])
        layout._inverse = self._inverse
        if self.documents is not None:
            seq = layout.tokens.shape[1]
            layout.documents = self.documents[:, :seq]
            layout.packed = self.packed
            layout.valid = (layout.documents == self.documents[:, offset:]) & (layout.documents >= 0)
            layout.tokens = layout.tokens.masked_fill(~layout.valid, 0)
            layout.lengths = None if self.lengths is None else self.lengths.clamp(max=seq)
        return layout

    def _read(self, documents: Tensor) -> None:
        if documents.shape != self.tokens.shape:
            raise RequestError(f"documents has shape {tuple(documents.shape)} but tokens {tuple(self.tokens.shape)}")
        documents = documents.to(torch.int32)
        padding = documents < 0
        entered = padding[:, :-1] & ~padding[:, 1:]
        if padding.any():
            if ((~padding[:, 0]).long() + entered.sum(1)).max() > 1:
                raise RequestError(
                    "documents has padding (-1) between real tokens; padding belongs at the ends of a row"
                )
            self.lengths = (~padding).sum(1)
            if entered.any():
                index = torch.arange(padding.shape[1], device=padding.device)[None]
                # a row of padding alone needs no roll
                shift = (padding.long().cumprod(1).sum(1) % padding.shape[1])[:, None]
                self._order = order = (index + shift) % padding.shape[1]
                self._inverse = (index - shift) % padding.shape[1]
                documents, padding = documents.gather(1, order), padding.gather(1, order)
                self.tokens = self.tokens.gather(1, order)
                if self._positions is not None:
                    self._positions = self._positions.expand_as(order).gather(1, order)
            self.tokens = self.tokens.masked_fill(padding, 0)
            self.valid = ~padding
        self.packed = bool(((documents[:, 1:] != documents[:, :-1]) & (documents[:, 1:] >= 0)).any())
        if self.packed and self._cache is not None:
            raise RequestError("a cached call takes one document per row; documents holds several")
        if self.packed:
            # a number that comes again after another document means a new one; from here on every number is one document
            segments, real = segment_ids(documents)
            documents = segments.masked_fill(~real, -1).to(torch.int32)
        self.documents = documents if self.packed or self.lengths is not None else None


@dataclass(frozen=True)
class InitPlan:
    """How weights are drawn; each module's `draw_weights` reads what it needs.

    Attributes:
        std: standard deviation of matrices
        residual_std: the same for matrices that write to the residual stream
        num_layers: blocks of the model
        dt_range: smallest and largest initial step size of Mamba-2; None: the config's
    """

    std: float
    residual_std: float
    num_layers: int
    style: InitStyle
    generator: torch.Generator | None
    dt_range: tuple[float, float] | None

    def normal(self, weight: Tensor, residual: bool = False) -> None:
        """Fill `weight` from the normal distribution."""
        weight.normal_(0.0, self.residual_std if residual else self.std, generator=self.generator)

    def uniform(self, weight: Tensor, low: float, high: float) -> None:
        """Fill `weight` from the uniform distribution."""
        weight.uniform_(low, high, generator=self.generator)


@runtime_checkable
class Drawn(Protocol):
    """A module that draws its own parameters (not those of its children)."""

    def draw_weights(self, plan: InitPlan) -> None:
        """Fill the parameters as the plan says."""
        ...


class Layer(Protocol):
    """A block. Between blocks the residual stream is residual + delta, both (batch, seq, hidden): a block adds the two
    in its norm and hands on the sum with what it adds itself, and router statistics in training. No delta: nothing to add.
    """

    def __call__(
        self, residual: Tensor, delta: Tensor | None, layout: Layout, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]: ...


class RunLayer(Protocol):
    """As `CausalLM.run_layer`."""

    def __call__(
        self, layer: Layer, residual: Tensor, delta: Tensor | None, layout: Layout, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]: ...


class Adds(Protocol):
    """A norm of a sum."""

    def add(self, delta: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """delta and residual (..., width) -> (norm of their sum, the sum)."""
        ...


def keep_fp32(module: nn.Module, names: Sequence[str], apply: Callable[[], object]) -> None:
    """Run `apply` (a dtype or device move of `module`), then give the named tensors back in fp32 without a rounding.

    hybrid-models.md section 14: some tensors stay fp32 in a model of any dtype.
    """
    before = {name: cast(Tensor, getattr(module, name)).detach() for name in names}
    apply()
    for name, old in before.items():
        tensor = cast(Tensor, getattr(module, name))
        if tensor.dtype != old.dtype:
            tensor.data = old.to(tensor.device)


class CausalLM(nn.Module):
    """A causal language model: embedding, blocks, final norm, head.

    Subclasses build `embed`, `layers`, `norm` and `head`, then call `finish`.
    """

    config: HybridConfig | DecoderConfig
    # another library whose numbers are reproduced, set by the loader
    compat: str | None = None
    # low precision of the matrices, set by `models.quant.quantize_weights`
    weights: str | None = None
    embed: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        # what of each block's activations is kept for the backward pass
        self.checkpointing: Checkpointing = "none"
        # unknown keys of a foreign config.json, written back on save
        self.foreign: dict[str, object] = {}
        # content of generation_config.json, written back on save
        self.generation: dict[str, object] = {}

    def finish(self) -> None:
        """Tie the head if asked and draw weights, unless the model is on the meta device."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        if not self.embed.weight.is_meta:
            self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        logits: Literal["all", "last"] | Tensor | None = "all",
        return_hidden: bool = False,
        return_mtp: bool | int = False,
        only_cache: bool = False,
    ) -> ModelOutput:
        """Run the model.

        Args:
            tokens: (batch, seq) int64
            cache: keys, values and states of earlier tokens; the call appends to it. Cached calls take no gradient.
            documents: (batch, seq) int32; equal numbers are one document, -1 is padding at either end of a row
            positions: (batch, seq) int64, RoPE models only; default: position inside the document
            logits: which logits to compute: "all", "last" (last real token of each row), None, or int64 flat indices
            return_hidden: also return the residual stream after every block
            return_mtp: also run multi-token prediction; True: two depths if one is stored and repeats, else all stored;
                an int: that many depths
            only_cache: fill the cache and return nothing: blocks behind the last one that keeps something are left out
        """
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(tokens, cache, documents, positions, logits, return_hidden, return_mtp, only_cache)
        if cache is not None and return_mtp:
            raise RequestError("return_mtp works without a cache; with one, call mtp_step")
        if only_cache and (cache is None or return_hidden):
            raise RequestError("only_cache needs a cache, and returns no hidden states")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise RequestError(f"tokens must be (batch, seq) with seq >= 1, but have shape {tuple(tokens.shape)}")
        layout = Layout(tokens, documents, positions, cache)
        self.check_layout(layout)
        residual, delta = self.embed_tokens(layout.tokens), None
        hidden: list[Tensor] = []
        routers: list[RouterStats] = []
        for layer in islice(self.layers, self._count_cached() if only_cache else None):
            residual, delta, stats = self.run_layer(cast(Layer, layer), residual, delta, layout, cache)
            if stats is not None:
                routers.append(stats)
            if return_hidden:
                hidden.append(layout.restore(residual if delta is None else residual + delta))
        if cache is not None:
            cache.advance(tokens.shape[1] if layout.lengths is None else layout.lengths)
        if only_cache:
            return ModelOutput(None, residual[:, :0], cache=cache)
        last, _ = cast(Adds, self.norm).add(delta, residual)
        output = ModelOutput(
            None, layout.restore(last), hidden if return_hidden else None, cache=cache, routers=routers
        )
        output.logits = self.compute_logits(last, output.last_hidden, layout, logits)
        if return_mtp:
            ahead, stats = self.run_mtp(last, layout, return_mtp)
            output.mtp_hidden = [layout.restore(h) for h in ahead]
            output.routers = routers + stats
            if isinstance(logits, str) and logits == "all":
                output.mtp_logits = [self.head(h).float() for h in output.mtp_hidden]
        return output

    def mtp_step(
        self,
        tokens: Tensor,
        hidden: Tensor,
        cache: Cache,
        documents: Tensor | None = None,
        logits: Literal["all", "last"] | Tensor | None = "all",
    ) -> ModelOutput:
        """Advance the multi-token prediction of `cache.mtp`: from `hidden` at t and the token t + 1, predict t + 2.

        Args:
            tokens: (batch, seq) int64, each the token after the position of `hidden`
            hidden: (batch, seq, hidden): `last_hidden` of the model, or of the step before when drafting further
            cache: a cache of this model; its `mtp` part is appended to
            documents: (batch, seq) int32, padding only
            logits: as in `forward`
        """
        raise RequestError(f"a {self.config.kind} model without MTP layers cannot draft; check model.has_mtp")

    def run_mtp(self, hidden: Tensor, layout: Layout, depths: bool | int) -> tuple[list[Tensor], list[RouterStats]]:
        """Multi-token prediction over whole rows; hidden (batch, seq, hidden) in the layout's order."""
        raise RequestError(f"return_mtp was asked for but this {self.config.kind} model has no MTP layers")

    @property
    def has_mtp(self) -> bool:
        """Whether the model holds multi-token prediction layers."""
        return False

    def new_cache(
        self, batch: int, capacity: int = 0, dtype: torch.dtype | None = None, state_dtype: torch.dtype = torch.float32
    ) -> DenseCache:
        """An empty cache for `batch` rows with room for `capacity` tokens (it grows on demand).

        Args:
            batch: rows
            capacity: tokens per row allocated at once
            dtype: of keys, values and conv inputs; default: the model's
            state_dtype: of the recurrent state; fp32 is the only one known to be without loss
        """
        mixers, mtp_mixers = self.cached_mixers()
        device, dtype = self.embed.weight.device, dtype or self.embed.weight.dtype
        mtp = None
        if mtp_mixers:
            mtp = DenseCache.new(mtp_mixers, batch, capacity, device=device, dtype=dtype, state_dtype=state_dtype)
        return DenseCache.new(mixers, batch, capacity, device=device, dtype=dtype, state_dtype=state_dtype, mtp=mtp)

    def new_paged_cache(
        self,
        slots: int,
        blocks: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        state_dtype: str = "float32",
    ) -> PagedCache:
        """A cache for `slots` sequences of at most `max_tokens` tokens that share `blocks` blocks of 64 tokens.

        Args:
            slots: sequences at once
            blocks: of keys and values, for all sequences together
            max_tokens: of one sequence
            dtype: of keys, values and conv inputs; default: the model's
            state_dtype: of the recurrent states: float32, bfloat16, float16, or float16-sr (rounded stochastically)
        """
        mixers, mtp_mixers = self.cached_mixers()
        device, dtype = self.embed.weight.device, dtype or self.embed.weight.dtype
        mtp = None
        if mtp_mixers:
            mtp = PagedCache(mtp_mixers, slots, blocks, max_tokens, device=device, dtype=dtype, state_dtype=state_dtype)
        return PagedCache(
            mixers, slots, blocks, max_tokens, device=device, dtype=dtype, state_dtype=state_dtype, mtp=mtp
        )

    def cached_mixers(self) -> tuple[Sequence[Mixer | None], Sequence[Mixer | None]]:
        """The mixers that a cache keeps something for, by layer, of the model and of its MTP blocks (empty: none)."""
        raise NotImplementedError

    def _count_cached(self) -> int:
        """Layers up to the last one that a cache keeps something for."""
        mixers = self.cached_mixers()[0]
        return max((i + 1 for i, m in enumerate(mixers) if isinstance(m, MambaConfig | AttentionConfig)), default=0)

    def gates(self) -> list[nn.Module]:
        """The routers of the MoE layers, MTP's last; their `bias` balances the load without gradient."""
        return [cast(nn.Module, m.gate) for m in self.modules() if hasattr(m, "gate") and hasattr(m, "experts")]

    @torch.no_grad()
    def init_weights(
        self,
        generator: torch.Generator | int | None = None,
        init: InitStyle = "megatron",
        dt_range: tuple[float, float] | None = None,
    ) -> None:
        """Draw all weights as hybrid-models.md section 8 says; also after `to_empty`.

        Args:
            generator: a seed or a generator on the model's device; None: torch's default generator
            init: "megatron" (published runs) or "transformers" (that library's own scheme)
            dt_range: initial step sizes of Mamba-2 when they differ from the config's time_step_min and _max
        """
        if isinstance(generator, int):
            generator = torch.Generator(self.embed.weight.device).manual_seed(generator)
        std = self.config.std
        plan = InitPlan(std, std / self.residual_scale(init), len(self.layers), init, generator, dt_range)
        _draw(self, plan)

    def residual_scale(self, init: InitStyle) -> float:
        """By how much matrices that write to the residual stream start smaller."""
        return math.sqrt(2 * len(self.layers)) if init == "megatron" else 1.0

    def check_layout(self, layout: Layout) -> None:
        """Refuse a call the model cannot serve: here, token ids it has no embedding for."""
        # a look at the ids costs a synchronisation on accelerators, which report a bad one themselves
        if layout.tokens.device.type == "cpu" and layout.tokens.shape[1] > 1:
            low, high = (int(t) for t in layout.tokens.aminmax())
            if low < 0 or high >= self.config.vocab:
                wrong = low if low < 0 else high
                raise RequestError(f"token id {wrong} is outside the vocabulary of {self.config.vocab}")

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seq) -> the residual stream (batch, seq, hidden)."""
        return self.embed(tokens)

    def run_layer(
        self, layer: Layer, residual: Tensor, delta: Tensor | None, layout: Layout, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        """One block, partly computed again in the backward pass if `checkpointing` says so; residual and delta
        (batch, seq, hidden)."""
        mode = self.checkpointing if self.training else "none"
        if mode == "full" and delta is not None:
            # one tensor to keep instead of two
            residual, delta = residual + delta, None
        return run_block(mode, layer, residual, delta, layout, cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # `to_empty` and moves to another device give the two names a tensor each
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        return self

    def compute_logits(
        self, rolled: Tensor, last_hidden: Tensor, layout: Layout, logits: Literal["all", "last"] | Tensor | None
    ) -> Tensor | None:
        """The logits asked for; `rolled` is `last_hidden` (batch, seq, hidden) in the layout's order."""
        if logits is None:
            return None
        if isinstance(logits, Tensor):
            return self.head(last_hidden.flatten(0, 1)[logits]).float()
        return self.head(last_hidden if logits == "all" else layout.last(rolled)).float()


def _draw(module: nn.Module, plan: InitPlan) -> None:
    """Children first, so that a module may redraw what it knows better."""
    for child in module.children():
        _draw(child, plan)
    if isinstance(module, Drawn):
        module.draw_weights(plan)


def merge_stats(stats: Sequence[RouterStats]) -> RouterStats:
    """Several uses of one MoE layer in a step (a repeated MTP depth) as one: counts add up, the balance is that of all sequences."""
    if len(stats) == 1:
        return stats[0]
    sequences = torch.stack([s.sequences for s in stats])
    weighted = torch.stack([s.balance for s in stats]) * sequences
    return RouterStats(
        counts=torch.stack([s.counts for s in stats]).sum(0),
        balance=weighted.sum() / sequences.sum().clamp_min(1),
        entropy=torch.stack([s.entropy for s in stats]).mean(),
        sequences=sequences.sum(),
    )
