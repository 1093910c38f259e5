"""What layers keep between calls: keys and values of attention, recurrent and conv states of Mamba-2, lengths of rows.

`Cache` is what a layer sees; `DenseCache` holds a fixed set of rows, whose keys and values grow on demand. Recurrent states
are slot-major: one row of one arena holds every layer's state of one sequence, so layers may differ in size, a snapshot is
one copy, and each layer sees a strided view. Paged keys and values: `models/paged.py`.

Speculation: inside `drafting()` a call leaves recurrent states as they were and keeps the layers' small inputs;
`accept` replays the accepted ones (serving.md section 8, form b).

Buffers are ordinary tensors even when they are made inside inference mode, so that calls in any mode may use them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from alloy.errors import RequestError
from alloy.models.configs import AttentionConfig, MambaConfig, Mixer
from alloy.ops.attention import attention
from alloy.ops.conv import conv_replay
from alloy.ops.slots import Rows, read_slots, write_slots
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


class States:
    """Recurrent states and last convolution inputs of all Mamba-2 layers of a model, slot-major.

    Attributes:
        ssm: (slots, elements of all layers)
        conv: (slots, elements of all layers)
        layers: indices of the Mamba-2 layers
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        mixers: Sequence[Mixer | None],
        slots: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        filled: bool = True,
    ) -> None:
        if not state_dtype.is_floating_point:
            raise RequestError(
                f"state_dtype = {state_dtype}; a recurrent state is floating point, such as torch.float32"
            )
        # per layer: offset in the slot, then the shape of a view
        self._ssm_shapes: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._conv_shapes: dict[int, tuple[int, tuple[int, ...]]] = {}
        ssm = conv = 0
        for i, mixer in enumerate(mixers):
            if isinstance(mixer, MambaConfig):
                self._ssm_shapes[i] = ssm, (mixer.heads, mixer.head_dim, mixer.state)
                # kernels read the channels of a tap side by side
                self._conv_shapes[i] = conv, (mixer.conv_kernel - 1, mixer.channels)
                ssm += mixer.heads * mixer.head_dim * mixer.state
                conv += mixer.channels * (mixer.conv_kernel - 1)
        self.layers = tuple(self._ssm_shapes)
        # whoever clears a slot before its use needs no zeros, and no memory before that
        make = torch.zeros if filled else torch.empty
        self.ssm = make(slots, ssm, device=device, dtype=state_dtype)
        self.conv = make(slots, conv, device=device, dtype=dtype)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's recurrent states (slots, heads, head_dim, state) and conv inputs (slots, channels, kernel - 1)."""
        if layer not in self._views:
            self._views[layer] = self._open(layer)
        return self._views[layer]

    @torch.inference_mode(False)
    def replaced(self, ssm: Tensor, conv: Tensor) -> "States":
        """The same layers in other arenas: ssm and conv (slots, elements)."""
        other = object.__new__(States)
        other.__dict__.update(self.__dict__, ssm=ssm, conv=conv, _views={})
        return other

    def bytes(self) -> int:
        """Bytes of both arenas."""
        return self.ssm.nbytes + self.conv.nbytes

    @torch.inference_mode(False)
    def _open(self, layer: int) -> tuple[Tensor, Tensor]:
        ssm, conv = _slice(self.ssm, *self._ssm_shapes[layer]), _slice(self.conv, *self._conv_shapes[layer])
        return ssm, conv.transpose(1, 2)


class Cache(ABC):
    """The rows of one model call.

    Attributes:
        batch: rows
        states: recurrent states; row b's are in slot slots[b], or in slot b
        longest: the largest number of tokens that a row holds, known without asking the device
        uniform: all rows are known to hold the same number
        mtp: the cache of the multi-token prediction blocks, which has its own lengths
        slots: int32 (batch,), -1 for a row that stands for nothing; None: rows in order
        rounding: int64 (layers, 2), first a layer's seed of the stochastic rounding of its states (the second makes places
            of 16 bytes); None: they are rounded to nearest
    """

    batch: int
    states: States
    longest: int
    uniform: bool
    mtp: Self | None
    is_drafting: bool
    drafts: dict[int, MambaDraft]
    slots: Tensor | None = None
    rounding: Tensor | None = None
    _drafted: int = 0

    def seed(self, layer: int) -> Tensor | None:
        """int64 (1,), what decides how the states of a layer are rounded; None: they are rounded to nearest."""
        return None if self.rounding is None else self.rounding[layer, :1]

    @abstractmethod
    def positions(self, seq: int) -> Tensor:
        """(batch or 1, seq) int64: where the next `seq` tokens of each row stand."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Store keys and values behind each row's length, which `advance` moves later, and attend to all.

        Args:
            layer: index of the attention layer
            q: (batch, heads, seq, head_dim)
            k: (batch, kv_heads, seq, head_dim)
            v: (batch, kv_heads, seq, head_dim)
            window: keys that a query sees, itself included; None: all

        Returns:
            (batch, heads, seq, head_dim)
        """

    @abstractmethod
    def mark(self) -> Snapshot:
        """A cheap snapshot of all rows for `rollback` before anything but appending happens: keys stay in place."""

    @abstractmethod
    def rollback(self, mark: Snapshot) -> None:
        """Return to `mark`."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order; a row may be named more than once."""

    @abstractmethod
    def join(self, other: Self) -> None:
        """Append the rows of `other`, a cache of the same model, which must not be used after that."""

    @abstractmethod
    def _count(self, counts: Tensor | int) -> None:
        """Add tokens to the lengths: the same number for all rows, or (batch,) int64."""

    def ssm(self, layer: int) -> Tensor:
        """Recurrent states of a Mamba-2 layer: a view (slots, heads, head_dim, state)."""
        return self.states.view(layer)[0]

    def conv(self, layer: int) -> Tensor:
        """Last inputs of a layer's convolution, oldest first: a view (slots, channels, kernel - 1)."""
        return self.states.view(layer)[1]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's recurrent states (batch, heads, head_dim, state) and conv inputs (batch, channels, kernel - 1)."""
        rows = self._rows_held()
        return read_slots(self.ssm(layer), rows, self.batch), read_slots(self.conv(layer), rows, self.batch)

    def write(self, layer: int, ssm: Tensor, conv: Tensor) -> None:
        """Put back what `read` gives."""
        rows = self._rows_held()
        write_slots(self.ssm(layer), rows, ssm)
        write_slots(self.conv(layer), rows, conv)

    def _rows_held(self) -> Rows:
        """The slots of the rows."""
        return None if self.slots is None else self.slots.long()

    def advance(self, counts: Tensor | int) -> None:
        """Count tokens just computed: the same for all rows, or (batch,) int64. Nothing happens while drafting."""
        if not self.is_drafting:
            self._count(counts)
            return
        if self._drafted:
            raise RequestError("a draft is verified by one call; accept it before the next")
        self._drafted = counts if isinstance(counts, int) else int(counts.max())

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
        self.keep(counts)

    def keep(self, counts: Tensor) -> None:
        """As `accept`, without looking at the counts."""
        for layer, draft in self.drafts.items():
            conv_replay(self.conv(layer), draft.conv, counts, self.slots)
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
                slots=self.slots,
                sr_seed=self.seed(layer),
            )
        self._count(counts)


@dataclass
class DenseCache(Cache):
    """Keys, values and states of a fixed set of rows. Build one with `CausalLM.new_cache`.

    Attributes:
        lengths: (batch,) int64 tokens held per row
        kv: per attention layer (2, batch, kv_heads, tokens, head_dim)
    """

    batch: int
    lengths: Tensor
    states: States
    kv: dict[int, Tensor]
    mtp: Self | None = None
    longest: int = 0
    uniform: bool = True
    is_drafting: bool = False
    drafts: dict[int, MambaDraft] = field(default_factory=dict)

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
        mtp: Self | None = None,
    ) -> Self:
        """An empty cache for layers whose mixers are `mixers`, by layer index (None: nothing to keep)."""
        kv = {
            i: torch.zeros(
                (2, batch, mixer.num_kv_heads, _round_up(capacity), mixer.head_dim), device=device, dtype=dtype
            )
            for i, mixer in enumerate(mixers)
            if isinstance(mixer, AttentionConfig)
        }
        lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(batch, lengths, States(mixers, batch, device, dtype, state_dtype), kv, mtp)

    def positions(self, seq: int) -> Tensor:
        """(batch or 1, seq) int64: where the next `seq` tokens of each row stand."""
        past = self.longest if self.uniform else self.lengths[:, None]
        return torch.arange(seq, device=self.lengths.device)[None] + past

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Cache.attend`: q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim) -> like q."""
        keys, values = self.append(layer, k, v)
        if not self.longest:
            # an empty cache needs no look at lengths: the call is an ordinary causal one
            return attention(q, keys, values, window=window)
        return attention(q, keys, values, lengths=self.longest if self.uniform else self.lengths, window=window)

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

    @torch.inference_mode(False)
    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep the given rows, in the given order; a row may be named more than once."""
        if not isinstance(rows, Tensor) and list(rows) == list(range(self.batch)):
            return
        index = self._rows(rows)
        self.batch = len(index)
        self.kv = {layer: held[:, index] for layer, held in self.kv.items()}
        self.states = self.states.replaced(self.states.ssm[index], self.states.conv[index])
        self._set_lengths(self.lengths[index])
        if self.mtp is not None:
            self.mtp.select(index)

    @torch.inference_mode(False)
    def join(self, other: Self) -> None:
        """Append the rows of `other`, a cache of the same model."""
        self.batch += other.batch
        for layer, held in self.kv.items():
            width = max(held.shape[3], other.kv[layer].shape[3])
            self.kv[layer] = torch.cat([_widen(held, width), _widen(other.kv[layer], width)], 1)
        own, new = self.states, other.states
        self.states = own.replaced(torch.cat([own.ssm, new.ssm]), torch.cat([own.conv, new.conv]))
        self._set_lengths(torch.cat([self.lengths, other.lengths]))
        if self.mtp is not None and other.mtp is not None:
            self.mtp.join(other.mtp)

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Empty the given rows, or all."""
        index = self._rows(rows)
        self.states.ssm[index] = 0
        self.states.conv[index] = 0
        self._set_lengths(self.lengths.index_fill(0, index, 0))
        if self.mtp is not None:
            self.mtp.reset(index)

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first lengths[b] tokens of row b; a recurrent state cannot do that."""
        if self.states.layers and not torch.equal(lengths, self.lengths):
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
            ssm=self.states.ssm[index],
            conv=self.states.conv[index],
            kv={layer: held[:, index, :, :tokens] for layer, held in self.kv.items()},
            mtp=None if self.mtp is None else self.mtp.snapshot(index),
        )

    def restore(self, snapshot: Snapshot, rows: Tensor | Sequence[int] | None = None) -> None:
        """Put a snapshot back into the given rows, or all; a snapshot of one row fills any number."""
        index = self._rows(rows)
        if len(snapshot.lengths) not in (1, len(index)):
            raise RequestError(f"a snapshot of {len(snapshot.lengths)} rows cannot fill {len(index)}")
        self.states.ssm[index] = snapshot.ssm
        self.states.conv[index] = snapshot.conv
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
        return Snapshot(self.lengths.clone(), self.states.ssm.clone(), self.states.conv.clone(), kv=None, mtp=None)

    def rollback(self, mark: Snapshot) -> None:
        """Return to `mark`."""
        self.restore(mark)

    @torch.inference_mode(False)
    def clone(self) -> "DenseCache":
        """An independent copy."""
        return replace(
            self,
            lengths=self.lengths.clone(),
            states=self.states.replaced(self.states.ssm.clone(), self.states.conv.clone()),
            kv={layer: held.clone() for layer, held in self.kv.items()},
            mtp=None if self.mtp is None else self.mtp.clone(),
            drafts={},
        )

    def bytes(self) -> int:
        """Bytes allocated, multi-token prediction included."""
        kv = sum(held.nbytes for held in self.kv.values())
        return kv + self.states.bytes() + (0 if self.mtp is None else self.mtp.bytes())

    def _room(self, layer: int, tokens: int) -> Tensor:
        """Keys and values of a layer, with room for `tokens`."""
        if tokens > self.kv[layer].shape[3]:
            self._grow(layer, tokens)
        return self.kv[layer]

    @torch.inference_mode(False)
    def _grow(self, layer: int, tokens: int) -> None:
        held = self.kv[layer]
        # by at least half, so that many steps copy little
        self.kv[layer] = _widen(held, _round_up(max(tokens, held.shape[3] * 3 // 2)))

    def _count(self, counts: Tensor | int) -> None:
        if isinstance(counts, int):
            self.lengths = self.lengths + counts
            self.longest += counts
        else:
            self._set_lengths(self.lengths + counts)

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


def _widen(held: Tensor, tokens: int) -> Tensor:
    """held (2, rows, kv_heads, at most `tokens`, head_dim) with zeros up to `tokens`."""
    grown = held.new_zeros(*held.shape[:3], tokens, held.shape[4])
    grown[:, :, :, : held.shape[3]] = held
    return grown


def _slice(arena: Tensor, offset: int, shape: tuple[int, ...]) -> Tensor:
    """The part of each slot of arena (slots, elements) that begins at `offset`, as (slots, *shape)."""
    return arena[:, offset : offset + math.prod(shape)].unflatten(1, shape)
