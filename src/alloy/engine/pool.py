"""How the memory of an engine is split: slots for running sequences and snapshots, blocks for keys and values."""

from dataclasses import dataclass

import torch

from alloy.core.device import free_memory_bytes, memory_bytes
from alloy.errors import ResourceError
from alloy.models import sizes
from alloy.models.base import CausalLM
from alloy.models.paged import blocks_of
from alloy.ops.attention import BLOCK

# share of free memory, and of all memory of a machine, that keys, values and states may take
FREE_FRAC, CPU_FRAC = 0.8, 0.25
MOST_CPU_BYTES = 4 * sizes.GIB
# tokens of a conversation for which slots and blocks run out together, and the snapshots that it leaves
PLAN_TOKENS, PLAN_SNAPSHOTS = 4096, 2
MOST_SNAPSHOTS = 1024


@dataclass(frozen=True)
class PoolPlan:
    """Sizes of a cache.

    Attributes:
        slots: of running sequences and of snapshots
        blocks: of 64 tokens, for all
        max_tokens: of the longest sequence
    """

    slots: int
    blocks: int
    max_tokens: int


def plan_pool(
    model: CausalLM,
    max_seqs: int,
    max_tokens: int,
    state_dtype: str = "float32",
    gib: float | None = None,
    prefix_cache: bool = True,
    shorten: bool = False,
) -> PoolPlan:
    """What fits.

    Args:
        model: whose cache it is
        max_seqs: sequences that run at once
        max_tokens: of the longest sequence
        state_dtype: of recurrent states
        gib: memory for it; None: 0.8 of what is free, on a CPU at most a quarter of the machine's or container's and 4
        prefix_cache: with room for what answers leave
        shorten: lower `max_tokens` to what fits instead of refusing it
    """
    config, device = model.config, model.embed.weight.device
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    block = sizes.kv_bytes(config, 1, BLOCK, dtype, model.has_mtp)
    slot = sizes.state_bytes(config, 1, state_dtype.removesuffix("-sr"), model.has_mtp)
    slot += sizes.conv_bytes(config, 1, dtype, model.has_mtp)
    left = (_default_bytes(device) if gib is None else int(gib * sizes.GIB)) - max_seqs * slot
    if not block:
        extra = min(MOST_SNAPSHOTS, max(0, left) // slot) if slot and prefix_cache else 0
        return PoolPlan(max_seqs + extra, max_seqs, max_tokens)
    room = max(0, left) // block
    if shorten and blocks_of(max_tokens + 1) > room:
        max_tokens = max(1, room * BLOCK - 1)
    longest = blocks_of(max_tokens + 1)
    if longest > room:
        raise ResourceError(
            f"one sequence of {max_tokens:,} tokens needs {longest * block / sizes.GIB:.2f} GiB of keys and values beside the "
            f"states of {max_seqs} sequences, and {max(0, left) / sizes.GIB:.2f} GiB may be used; lower max_model_len or "
            "max_seqs, or raise memory"
        )
    live = max_seqs * longest
    if not prefix_cache:
        return PoolPlan(max_seqs, min(live, room), max_tokens)
    planned = blocks_of(min(max_tokens, PLAN_TOKENS))
    talks = left // (planned * block + PLAN_SNAPSHOTS * slot)
    extra = min(PLAN_SNAPSHOTS * talks, MOST_SNAPSHOTS, (left - longest * block) // slot) if slot else 0
    room = (left - extra * slot) // block
    return PoolPlan(max_seqs + extra, min(room, live + min(talks, MOST_SNAPSHOTS) * planned), max_tokens)


def _default_bytes(device: torch.device) -> int:
    free = int(FREE_FRAC * free_memory_bytes(device))
    return free if device.type == "cuda" else min(MOST_CPU_BYTES, int(CPU_FRAC * memory_bytes(device)), free)
