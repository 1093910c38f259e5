"""Stochastic rounding to float16: up or down by chance, so that many small changes of a state are right on average.

The chance is Philox-4x32 with five rounds, keyed by the seed; a counter yields four words for eight neighbouring elements,
each of which takes the first or last 13 bits of one: float16 has 13 bits less than float32. Kernels draw the same bits.

Paper: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), section 3.3. Five rounds for states in float16:
NVIDIA's Nemotron repository, notes on the quantisation of Nemotron 3 Super.
"""

import torch
from torch import Tensor

ROUNDS = 5
# elements that share a counter
SHARE = 8
_SMALLEST_NORMAL = 2.0**-14
_LOW = 0xFFFFFFFF


def philox(seed: Tensor, first: Tensor, second: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in 0 .. 2^32 - 1, int64, for each counter (first, second, 0, 0).

    Args:
        seed: int64, one element
        first: int64, shape that broadcasts with that of `second`
        second: int64
        rounds: how often the words are mixed
    """
    keys = [seed.view(()) & _LOW, (seed.view(()) >> 32) & _LOW]
    first, second = torch.broadcast_tensors(first, second)
    words = [first, second, torch.zeros_like(first), torch.zeros_like(first)]
    for _ in range(rounds):
        # products wrap, which leaves all 64 bits as they are without a sign
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [(b >> 32) & _LOW ^ words[1] ^ keys[0], b & _LOW, (a >> 32) & _LOW ^ words[3] ^ keys[1], a & _LOW]
        keys = [(keys[0] + 0x9E3779B9) & _LOW, (keys[1] + 0xBB67AE85) & _LOW]
    return words[0], words[1], words[2], words[3]


def round_to_half(x: Tensor, seed: Tensor, rows: Tensor) -> Tensor:
    """x in float16, each element the neighbour above or below it, with chances that make x the mean.

    Args:
        x: float32 (batch, heads, head_dim, state)
        seed: int64, one element
        rows: int (batch,), which chances each row draws: its slot
    """
    batch, heads, head_dim, state = x.shape
    blocks = -(-state // SHARE)
    first = torch.arange(heads * head_dim * blocks, device=x.device)
    words = torch.stack(philox(seed, first, rows.long()[:, None], ROUNDS), -1)  # (batch, counters, 4)
    chance = torch.stack([words & 0x1FFF, words >> 19], -1)
    chance = chance.view(batch, heads, head_dim, blocks * SHARE)[..., :state].to(torch.int32)
    # float16 below its smallest normal number is evenly spaced, as above it up to twice that number
    size = x.abs()
    offset = torch.where(size < _SMALLEST_NORMAL, _SMALLEST_NORMAL, 0.0)
    bits = ((size + offset).view(torch.int32) + chance) & ~0x1FFF
    return (bits.view(torch.float32) - offset).copysign(x).to(torch.float16)
