"""A cache for many sequences that come and go: keys and values in blocks of 64 tokens, one state slot a sequence.

`PagedCache` owns the arenas and hands out slots and blocks; `PagedView` is the cache of one model call, which names the
slots of its rows. Lengths and block tables live on the device, so that a captured step can read them; the host keeps a
copy and never asks. serving.md section 3.

Blocks are counted by those who hold them. What a block holds up to a sequence's length never changes, so others may read
it while its owner appends behind; who takes over a block that is not full takes a copy.

Paper: PagedAttention (Kwon et al., 2023). arXiv:2309.06180
"""

from bisect import insort
from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor

from alloy.errors import RecipeError, RequestError, ResourceError
from alloy.models.cache import Cache, Snapshot, States
from alloy.models.configs import AttentionConfig, Mixer
from alloy.ops.attention import BLOCK, MAX_QUERIES, attention, attn_decode, gather_kv, kv_append
from alloy.ops.decode import count_tokens
from alloy.ops.slots import consecutive, read_slots, write_slots

# drafts, and padding beside rows that drafts have yet to see, may reach so far beyond the last token that a sequence keeps
SLACK = 24
# names that every command uses; "float16-sr" rounds stochastically
STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float16-sr": torch.float16,
}


class PagedCache:
    """Arenas for `slots` sequences of at most `max_tokens` tokens, which share `blocks` blocks of 64 tokens.

    Build one with `CausalLM.new_paged_cache`. Block 0 exists besides and belongs to no sequence.

    Attributes:
        arenas: per distinct shape of attention layers (layers, blocks + 1, 2, kv_heads, 64, head_dim)
        kv: per attention layer its part of an arena (blocks + 1, 2, kv_heads, 64, head_dim)
        table: int32 (slots + 1, blocks of the longest sequence), the block of each 64 tokens; 0: none
        lengths: int32 (slots + 1,) tokens held; the last entry, like the table's last row, is that of padding rows
        held: the same on the host, without the last
        states: recurrent states of all slots
        mtp: the same for the multi-token prediction blocks, with the same slots
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        mixers: Sequence[Mixer | None],
        slots: int,
        blocks: int,
        max_tokens: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: str = "float32",
        mtp: "PagedCache | None" = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise RecipeError(f'state_dtype = "{state_dtype}" is not known; use one of {", ".join(STATE_DTYPES)}')
        self.slots, self.blocks, self.max_tokens, self.mtp = slots, blocks, max_tokens, mtp
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, mixer in enumerate(mixers):
            if isinstance(mixer, AttentionConfig):
                shapes.setdefault((mixer.num_kv_heads, mixer.head_dim), []).append(i)
        self.arenas: list[Tensor] = []
        self.kv: dict[int, Tensor] = {}
        for (heads, width), layers in shapes.items():
            # not filled: a CPU gives memory when it is written, and nobody reads beyond what a row holds
            arena = torch.empty(len(layers), blocks + 1, 2, heads, BLOCK, width, device=device, dtype=dtype)
            self.arenas.append(arena)
            self.kv.update(zip(layers, arena, strict=True))
        self.table = torch.zeros(
            slots + 1, blocks_of(self.most_tokens) if shapes else 1, device=device, dtype=torch.int32
        )
        self.lengths = torch.zeros(slots + 1, device=device, dtype=torch.int32)
        self.held = [0] * slots
        self.states = States(mixers, slots, device, dtype, STATE_DTYPES[state_dtype], filled=False)
        self.rounding = None
        if state_dtype == "float16-sr":
            # the layer in the upper word, the step in the lower: no two roundings of this cache use one seed
            self.rounding = (torch.arange(len(mixers), device=device) << 32)[:, None].repeat(1, 2)
        self._owned: list[list[int]] = [[] for _ in range(slots)]
        self._free_slots = list(range(slots))[::-1]
        self._free_blocks = list(range(1, blocks + 1))[::-1]
        # how many hold each block
        self._holders = [0] * (blocks + 1)

    @property
    def most_tokens(self) -> int:
        """Tokens that a row may hold, those of its last step's padding and drafts included."""
        return self.max_tokens + SLACK

    @property
    def slots_free(self) -> int:
        """Sequences that may still come."""
        return len(self._free_slots)

    @property
    def blocks_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free_blocks)

    def open(self, count: int) -> list[int]:
        """Slots for `count` new sequences, empty."""
        if count > len(self._free_slots):
            raise ResourceError(
                f"{count} more sequences, but {len(self._free_slots)} of {self.slots} slots are free; "
                "wait until others end, or give the cache more slots"
            )
        slots = [self._free_slots.pop() for _ in range(count)]
        self._clear(slots)
        return slots

    def open_apart(self) -> int:
        """The last free slot, for states alone: running sequences stay neighbours."""
        return self._free_slots.pop(0)

    def close(self, slots: Sequence[int]) -> None:
        """Give slots and their blocks back."""
        for slot in slots:
            insort(self._free_slots, slot, key=lambda free: -free)
        self._release(slots)

    def reset(self) -> None:
        """Give all slots and blocks back."""
        self.close(sorted(set(range(self.slots)) - set(self._free_slots)))

    def view(self, slots: Sequence[int]) -> "PagedView":
        """The cache of a call whose row b is the sequence in slots[b]; -1, in steps of one token: a row of padding."""
        return PagedView(self, slots)

    def reserve(self, slots: Sequence[int], tokens: int) -> None:
        """Room for `tokens` more tokens in each slot (-1 is passed over); all or none."""
        if not self.kv:
            return
        wanted: list[tuple[int, int]] = []
        for slot in slots:
            if slot < 0 or self.held[slot] + tokens <= len(self._owned[slot]) * BLOCK:
                continue
            needed = blocks_of(self.held[slot] + tokens)
            if needed > self.table.shape[1]:
                raise RequestError(
                    f"a sequence of {self.held[slot]} tokens and {tokens} more is longer than max_tokens = "
                    f"{self.max_tokens} of the cache"
                )
            wanted += [(slot, i) for i in range(len(self._owned[slot]), needed)]
        if not wanted:
            return
        if len(wanted) > len(self._free_blocks):
            running = self.slots - len(self._free_slots)
            raise ResourceError(
                f"the cache is full: {len(wanted)} blocks of {BLOCK} tokens are needed, {len(self._free_blocks)} of "
                f"{self.blocks} are free beside {running} sequences; run fewer at once, shorten them, or give the cache "
                "more blocks"
            )
        given = [self._new_block() for _ in wanted]
        for (slot, _), block in zip(wanted, given, strict=True):
            self._owned[slot].append(block)
        self._enter([(slot, i, block) for (slot, i), block in zip(wanted, given, strict=True)])

    def blocks_missing(self, needed: Mapping[int, int]) -> int:
        """Blocks that slots lack to hold so many tokens."""
        if not self.kv:
            return 0
        return sum(max(0, blocks_of(tokens) - len(self._owned[slot])) for slot, tokens in needed.items())

    def owned(self, slot: int) -> Sequence[int]:
        """The blocks of a slot."""
        return self._owned[slot]

    def hold(self, slot: int, first: int = 0) -> list[int]:
        """Hold the blocks of what the slot holds now, from the `first` on, beside it; `drop` gives them back."""
        blocks = self._owned[slot][first : blocks_of(self.held[slot])]
        self.add_holder(blocks)
        return blocks

    def add_holder(self, blocks: Sequence[int]) -> None:
        """One more holds the blocks."""
        for block in blocks:
            self._holders[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """One less holds the blocks; those that nobody holds are free."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free_blocks.append(block)

    def adopt(self, slot: int, blocks: Sequence[int], tokens: int) -> None:
        """Let an empty slot begin with the first `tokens` tokens that lie in `blocks`; one that is not full is copied."""
        full = tokens // BLOCK if self.kv else 0
        owned = list(blocks[:full])
        if self.kv and tokens % BLOCK:
            owned.append(self._new_block())
            for arena in self.arenas:
                arena[:, owned[-1]] = arena[:, blocks[full]]
        self.add_holder(owned[:full])
        self._owned[slot] = owned
        self._enter([(slot, i, block) for i, block in enumerate(owned)])
        self.held[slot] = tokens
        self.lengths[slot] = tokens

    def copy_states(self, source: int, target: int) -> None:
        """Recurrent states of one slot into another, those of multi-token prediction too."""
        for tensor in (self.states.ssm, self.states.conv):
            tensor[target] = tensor[source]
        if self.mtp is not None:
            self.mtp.copy_states(source, target)

    def _new_block(self) -> int:
        if not self._free_blocks:
            raise ResourceError(f"the cache is full: none of its {self.blocks} blocks of {BLOCK} tokens is free")
        block = self._free_blocks.pop()
        self._holders[block] = 1
        return block

    def _enter(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Write (slot, place, block) into the table."""
        if places:
            index = upload([list(place) for place in places], self.table.device)
            self.table[index[:, 0], index[:, 1]] = index[:, 2].to(torch.int32)

    def fork(self, slot: int, count: int) -> list[int]:
        """`count` new slots that hold what `slot` holds; all or none."""
        targets = self.open(count)
        try:
            self._copy(slot, targets)
        except ResourceError:
            self.close(targets)
            raise
        return targets

    def advance(self, slots: Tensor, counts: Tensor | int) -> None:
        """Add counts, one number or (batch,), to the lengths of slots (batch,) on the device; a padding row's stays 0."""
        if isinstance(counts, int):
            count_tokens(self.lengths, slots, counts)
        else:
            index = slots.long()
            self.lengths[index] = (self.lengths[index] + counts * (slots >= 0)).to(self.lengths.dtype)
        if self.rounding is not None:
            self.rounding += 1

    def count(self, slots: Sequence[int], tokens: int | Sequence[int]) -> None:
        """Note on the host that the slots hold `tokens` more, the same number or one for each; the device counts itself."""
        counts = [tokens] * len(slots) if isinstance(tokens, int) else tokens
        for slot, count in zip(slots, counts, strict=True):
            if slot >= 0:
                self.held[slot] += count

    def bytes(self) -> int:
        """Bytes allocated, multi-token prediction included."""
        own = [*self.arenas, self.table, self.lengths]
        return sum(t.nbytes for t in own) + self.states.bytes() + (0 if self.mtp is None else self.mtp.bytes())

    def trim(self, slots: Sequence[int]) -> None:
        """Give back blocks beyond what the slots hold."""
        for slot in slots:
            kept = blocks_of(self.held[slot])
            self.drop(self._owned[slot][kept:])
            del self._owned[slot][kept:]

    def _clear(self, slots: Sequence[int]) -> None:
        for slot in slots:
            for tensor in (self.lengths, self.states.ssm, self.states.conv):
                tensor[slot].zero_()
        if self.mtp is not None:
            self.mtp._clear(slots)

    def _release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.held[slot] = 0
        self.trim(slots)
        if self.mtp is not None:
            self.mtp._release(slots)

    def _copy(self, source: int, targets: Sequence[int]) -> None:
        for target in targets:
            self.adopt(target, self._owned[source], self.held[source])
            for tensor in (self.states.ssm, self.states.conv):
                tensor[target] = tensor[source]
            if self.mtp is not None:
                self.mtp._copy(source, [target])


class PagedView(Cache):
    """Rows of a `PagedCache` for model calls; see `PagedCache.view`.

    Attributes:
        pool: the cache
        rows: the slot of each row, on the host
        places: int32 (batch,), the same on the device
        is_static: the host does not know what the rows hold when the call runs
    """

    is_static = False

    def __init__(self, pool: PagedCache, rows: Sequence[int]) -> None:
        self.pool = pool
        self.rounding = pool.rounding
        self.is_drafting, self.drafts = False, {}
        self.mtp = None if pool.mtp is None else cast(Self, PagedView(pool.mtp, rows))
        self._place(list(rows))

    @property
    def lengths(self) -> Tensor:
        """(batch,) int64 tokens held per row."""
        return self.pool.lengths[self.places.long()].long()

    def positions(self, seq: int) -> Tensor:
        """(batch, seq) int64: where the next `seq` tokens of each row stand."""
        return self.lengths[:, None] + torch.arange(seq, device=self.places.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Cache.attend`: q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim) -> like q."""
        pool, seq = self.pool, q.shape[2]
        self._reserve(seq)
        kv, table, lengths = pool.kv[layer], pool.table, pool.lengths
        kv_append(kv, k.transpose(1, 2), v.transpose(1, 2), table, lengths, self.places)
        if not self.longest:
            # nothing is held: the call is an ordinary causal one
            return attention(q, k, v, window=window)
        # on a CPU gathering is quicker, for rows that stand for something
        if self.is_static or (seq <= MAX_QUERIES and (q.is_cuda or min(self.rows) < 0)):
            parts = [
                attn_decode(
                    part.transpose(1, 2),
                    kv,
                    table,
                    lengths + i * MAX_QUERIES if i else lengths,
                    self.places,
                    window=window,
                )
                for i, part in enumerate(q.split(MAX_QUERIES, 2))
            ]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)
        total = self.longest + seq
        blocks = table[self.places.long(), : blocks_of(total)]
        keys, values = (t[:, :, :total] for t in gather_kv(kv, blocks))
        if self.uniform:
            return attention(q, keys, values, lengths=self.longest, window=window)
        # what others left in blocks need not be finite
        held = self.lengths
        own = torch.arange(total, device=q.device) < held[:, None] + seq
        keys, values = (torch.where(own[:, None, :, None], t, 0) for t in (keys, values))
        return attention(q, keys, values, lengths=held, window=window)

    def mark(self) -> Snapshot:
        """A cheap snapshot of all rows for `rollback` before anything but appending happens: keys stay in place."""
        ssm, conv = (read_slots(t, self._rows_held(), self.batch).clone() for t in (self.states.ssm, self.states.conv))
        return Snapshot(self.lengths, ssm, conv, kv=None, mtp=None)

    def rollback(self, mark: Snapshot) -> None:
        """Return to `mark`."""
        write_slots(self.states.ssm, self._rows_held(), mark.ssm)
        write_slots(self.states.conv, self._rows_held(), mark.conv)
        self._count(mark.lengths - self.lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order, and close the others; a row named again becomes a sequence of its own."""
        kept, seen = [], set[int]()
        for row in rows:
            slot = self.rows[row]
            kept += self.pool.fork(slot, 1) if slot in seen else [slot]
            seen.add(slot)
        self.pool.close([slot for slot in self.rows if slot not in seen])
        self._place(kept)

    def join(self, other: Self) -> None:
        """Append the rows of `other`, another view of the same cache."""
        self._place(self.rows + other.rows)

    def refresh(self) -> None:
        """Look again at the lengths that the host knows."""
        held = [self.pool.held[slot] for slot in self.rows if slot >= 0]
        self.longest = max(held, default=0)
        self.uniform = len(held) == len(self.rows) and all(n == self.longest for n in held)
        if self.mtp is not None:
            self.mtp.refresh()

    def _place(self, rows: list[int]) -> None:
        self.rows, self.batch = rows, len(rows)
        self.places: Tensor = upload(rows, self.pool.table.device, torch.int32)
        states = self.pool.states
        # on a CPU, states of slots that follow each other are rows in order, which costs least
        own = None if self.places.is_cuda else consecutive(rows)
        self.slots = self.places if own is None else None
        self.states = states if own is None else states.replaced(states.ssm[own], states.conv[own])
        self.refresh()
        if self.mtp is not None:
            self.mtp._place(rows)

    def _reserve(self, tokens: int) -> None:
        self.pool.reserve(self.rows, tokens)

    def _count(self, counts: Tensor | int) -> None:
        self.pool.advance(self.places, counts)
        self.pool.count(self.rows, counts if isinstance(counts, int) else counts.tolist())
        if isinstance(counts, Tensor):
            self.pool.trim([slot for slot in self.rows if slot >= 0])
        self.refresh()


class StaticView(PagedView):
    """A view for capture: the slots are read from a buffer when the step runs, and the host counts by itself.

    Room must be reserved before a replay, and `PagedCache.count` called after it.

    Args:
        pool: the cache
        slots: int32 (batch,), the buffer
    """

    is_static = True

    def __init__(self, pool: PagedCache, slots: Tensor) -> None:
        super().__init__(pool, [-1] * len(slots))
        self.places = self.slots = slots
        self.mtp = None if pool.mtp is None else cast(Self, StaticView(pool.mtp, slots))

    def refresh(self) -> None:
        """Rows are taken to hold something, and not all the same."""
        self.longest, self.uniform = 1, False

    def _reserve(self, tokens: int) -> None:
        pass

    def _count(self, counts: Tensor | int) -> None:
        self.pool.advance(self.places, counts)


def blocks_of(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK)


def upload(
    values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Whole numbers of any shape on the device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
