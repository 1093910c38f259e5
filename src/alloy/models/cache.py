"""The dense cache: keys and values of attention layers, recurrent and conv states of Mamba-2 layers, per-row lengths.

Keys and values grow on demand. Recurrent states are slot-major: one row of one arena holds every layer's state of one
sequence, so layers may differ in size, a snapshot is one copy, and each layer sees a strided view.

Speculation: inside `drafting()` a call leaves recurrent states as they were and keeps the layers' small inputs;
`accept` replays the accepted ones (serving.md section 8, form b).

Buffers are ordinary tensors even when they are made inside inference mode, so that calls in any mode may use them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from alloy.errors import RequestError
from alloy.models.configs import AttentionConfig, MambaConfig, Mixer
from alloy.ops.conv import conv_replay
from alloy.ops.ssd import ssd_replay

# keys and values are allocated for a multiple of this many tokens
STEP = 64


@dataclass(frozen=True, slots=True)
class MambaDraft:
    """Inputs of one Mamba-2 layer for tokens that are not accepted yet.

    Attributes:
        conv: (batch, tokens, channels) inputs of the convolution
        x: (batch, tokens, heads, head_dim)
        dt: (batch, tokens, heads), raw
        A: (heads,), and B, C: (batch, tokens, groups, state)
        dt_bias: (heads,)
    """

    conv: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor
    dt_limit: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of some rows of a cache.

    Attributes:
        lengths: (rows,) int64
        ssm: (rows, elements); conv: (rows, elements)
        kv: per attention layer (2, rows, kv_heads, tokens, head_dim); None: keys and values were left in place
    """

    lengths: Tensor
    ssm: Tensor
    conv: Tensor
    kv: dict[int, Tensor] | None
    mtp: "Snapshot | None"


@dataclass
class DenseCache:
    """Keys, values and states of `batch` rows. Build one with `CausalLM.new_cache`.

    Attributes:
        lengths: (batch,) int64 tokens held per row
        longest: the largest of them, known without asking the device
        uniform: all rows hold the same number
        mtp: the cache of the multi-token prediction blocks, which has its own lengths
    """

    batch: int
    lengths: Tensor
    ssm_arena: Tensor
    conv_arena: Tensor
    kv: dict[int, Tensor]
    # per Mamba-2 layer: (offset in ssm_arena, heads, head_dim, state) and (offset in conv_arena, channels, kernel - 1)
    ssm_shapes: dict[int, tuple[int, int, int, int]]
    conv_shapes: dict[int, tuple[int, int, int]]
    mtp: "DenseCache | None" = None
    longest: int = 0
    uniform: bool = True
    is_drafting: bool = False
    drafts: dict[int, MambaDraft] = field(default_factory=dict)
    _drafted: int = 0
    _views: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    @torch.inference_mode(False)
    def new(
        cls,
        mixers: Sequence[Mixer | None],
        batch: int,
        capacity: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        mtp: "DenseCache | None" = None,
    ) -> Self:
        """An empty cache for layers whose mixers are `mixers`, by layer index (None: nothing to keep)."""
        kv: dict[int, Tensor] = {}
        ssm_shapes: dict[int, tuple[int, int, int, int]] = {}
        conv_shapes: dict[int, tuple[int, int, int]] = {}
        ssm_size = conv_size = 0
        for i, mixer in enumerate(mixers):
            if isinstance(mixer, AttentionConfig):
                shape = (2, batch, mixer.num_kv_heads, _round_up(capacity), mixer.head_dim)
                kv[i] = torch.zeros(shape, device=device, dtype=dtype)
            elif isinstance(mixer, MambaConfig):
                ssm_shapes[i] = (ssm_size, mixer.heads, mixer.head_dim, mixer.state)
                conv_shapes[i] = (conv_size, mixer.channels, mixer.conv_kernel - 1)
                ssm_size += mixer.heads * mixer.head_dim * mixer.state
                conv_size += mixer.channels * (mixer.conv_kernel - 1)
        return cls(
            batch=batch,
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            ssm_arena=torch.zeros(batch, ssm_size, device=device, dtype=state_dtype),
            conv_arena=torch.zeros(batch, conv_size, device=device, dtype=dtype),
            kv=kv,
            ssm_shapes=ssm_shapes,
            conv_shapes=conv_shapes,
            mtp=mtp,
        )

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values behind each row's length, which `advance` moves later.

        Args:
            layer: index of the attention layer
            k: (batch, kv_heads, seq, head_dim)
            v: (batch, kv_heads, seq, head_dim)

        Returns:
            all keys and values, (batch, kv_heads, longest + seq, head_dim) each, views
        """
        start, end = self.longest, self.longest + k.shape[2]
        held = self._room(layer, end)
        keys, values = held[0, :, :, :end], held[1, :, :, :end]
        if self.uniform:
            keys[:, :, start:] = k
            values[:, :, start:] = v
        else:
            index = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)
            index = index[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        return keys, values

    def ssm(self, layer: int) -> Tensor:
        """Recurrent state of a Mamba-2 layer: a view (batch, heads, head_dim, state)."""
        return self._view(layer)[0]

    def conv(self, layer: int) -> Tensor:
        """Last inputs of a layer's convolution, oldest first: a view (batch, channels, kernel - 1)."""
        return self._view(layer)[1]

    def advance(self, counts: Tensor | int) -> None:
        """Count tokens just computed: the same for all rows, or (batch,) int64. Nothing happens while drafting."""
        if self.is_drafting:
            if self._drafted:
                raise RequestError("a draft is verified by one call; accept it before the next")
            self._drafted = counts if isinstance(counts, int) else int(counts.max())
        elif isinstance(counts, int):
            self.lengths = self.lengths + counts
            self.longest += counts
        else:
            self._set_lengths(self.lengths + counts)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Verify drafted tokens: the one call inside leaves states and lengths unchanged until `accept`."""
        self.drafts, self._drafted = {}, 0
        self.is_drafting = True
        try:
            yield
        finally:
            self.is_drafting = False

    def accept(self, counts: Tensor) -> None:
        """Keep the first counts[b] of row b's drafted tokens; counts (batch,) int64."""
        if int(counts.max()) > self._drafted:
            raise RequestError(f"accept of {int(counts.max())} tokens, but {self._drafted} were drafted")
        for layer, draft in self.drafts.items():
            conv_replay(self.conv(layer), draft.conv, counts)
            ssd_replay(
                self.ssm(layer),
                draft.x,
                draft.dt,
                draft.A,
                draft.B,
                draft.C,
                counts,
                dt_bias=draft.dt_bias,
                dt_limit=draft.dt_limit,
            )
        self.drafts, self._drafted = {}, 0
        self._set_lengths(self.lengths + counts)

    @torch.inference_mode(False)
    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep the given rows, in the given order; a row may be named more than once."""
        index = self._rows(rows)
        self.batch = len(index)
        self.kv = {layer: held[:, index] for layer, held in self.kv.items()}
        self.ssm_arena, self.conv_arena = self.ssm_arena[index], self.conv_arena[index]
        self._views = {}
        self._set_lengths(self.lengths[index])
        if self.mtp is not None:
            self.mtp.select(index)

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Empty the given rows, or all."""
        index = self._rows(rows)
        self.ssm_arena[index] = 0
        self.conv_arena[index] = 0
        self._set_lengths(self.lengths.index_fill(0, index, 0))
        if self.mtp is not None:
            self.mtp.reset(index)

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first lengths[b] tokens of row b; a recurrent state cannot do that."""
        if self.ssm_shapes and not torch.equal(lengths, self.lengths):
            raise RequestError("a cache with recurrent states cannot be truncated; take a snapshot or draft instead")
        if bool((lengths > self.lengths).any()):
            raise RequestError(f"truncate to {lengths.tolist()} tokens, but the rows hold {self.lengths.tolist()}")
        self._set_lengths(lengths.to(self.lengths))

    def snapshot(self, rows: Tensor | Sequence[int] | None = None) -> Snapshot:
        """A copy of the given rows, or all, which `restore` puts back into any cache of the same model."""
        index = self._rows(rows)
        lengths = self.lengths[index]
        tokens = int(lengths.max()) if len(index) else 0
        return Snapshot(
            lengths=lengths,
            ssm=self.ssm_arena[index],
            conv=self.conv_arena[index],
            kv={layer: held[:, index, :, :tokens] for layer, held in self.kv.items()},
            mtp=None if self.mtp is None else self.mtp.snapshot(index),
        )

    def restore(self, snapshot: Snapshot, rows: Tensor | Sequence[int] | None = None) -> None:
        """Put a snapshot back into the given rows, or all; a snapshot of one row fills any number."""
        index = self._rows(rows)
        if len(snapshot.lengths) not in (1, len(index)):
            raise RequestError(f"a snapshot of {len(snapshot.lengths)} rows cannot fill {len(index)}")
        self.ssm_arena[index] = snapshot.ssm
        self.conv_arena[index] = snapshot.conv
        for layer, saved in (snapshot.kv or {}).items():
            tokens = saved.shape[3]
            held = self._room(layer, tokens)
            held[:, index, :, :tokens] = saved
        lengths = self.lengths.clone()
        lengths[index] = snapshot.lengths
        self._set_lengths(lengths)
        if self.mtp is not None and snapshot.mtp is not None:
            self.mtp.restore(snapshot.mtp, index)

    def mark(self) -> Snapshot:
        """A cheap snapshot of all rows for `rollback` before anything but appending happens: keys stay in place."""
        return Snapshot(self.lengths.clone(), self.ssm_arena.clone(), self.conv_arena.clone(), kv=None, mtp=None)

    def rollback(self, mark: Snapshot) -> None:
        """Return to `mark`."""
        self.restore(mark)

    @torch.inference_mode(False)
    def clone(self) -> "DenseCache":
        """An independent copy."""
        return replace(
            self,
            lengths=self.lengths.clone(),
            ssm_arena=self.ssm_arena.clone(),
            conv_arena=self.conv_arena.clone(),
            kv={layer: held.clone() for layer, held in self.kv.items()},
            mtp=None if self.mtp is None else self.mtp.clone(),
            drafts={},
            _drafted=0,
            _views={},
        )

    def bytes(self) -> int:
        """Bytes allocated, multi-token prediction included."""
        tensors = [self.ssm_arena, self.conv_arena, *self.kv.values()]
        return sum(t.nbytes for t in tensors) + (0 if self.mtp is None else self.mtp.bytes())

    def _room(self, layer: int, tokens: int) -> Tensor:
        """Keys and values of a layer, with room for `tokens`."""
        if tokens > self.kv[layer].shape[3]:
            self._grow(layer, tokens)
        return self.kv[layer]

    @torch.inference_mode(False)
    def _grow(self, layer: int, tokens: int) -> None:
        held = self.kv[layer]
        # by at least half, so that many steps copy little
        grown = held.new_zeros(*held.shape[:3], _round_up(max(tokens, held.shape[3] * 3 // 2)), held.shape[4])
        grown[:, :, :, : held.shape[3]] = held
        self.kv[layer] = grown

    def _view(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._views:
            self._views[layer] = self._open(layer)
        return self._views[layer]

    @torch.inference_mode(False)
    def _open(self, layer: int) -> tuple[Tensor, Tensor]:
        offset, heads, head_dim, state = self.ssm_shapes[layer]
        ssm = self.ssm_arena[:, offset : offset + heads * head_dim * state].unflatten(1, (heads, head_dim, state))
        offset, channels, taps = self.conv_shapes[layer]
        conv = self.conv_arena[:, offset : offset + channels * taps].unflatten(1, (channels, taps))
        return ssm, conv

    def _rows(self, rows: Tensor | Sequence[int] | None) -> Tensor:
        if rows is None:
            return torch.arange(self.batch, device=self.lengths.device)
        return torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device)

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        held = lengths.tolist()
        self.longest = max(held, default=0)
        self.uniform = all(n == self.longest for n in held)


def _round_up(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
