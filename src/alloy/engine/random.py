"""Counter-based random numbers: one stream per (seed, sample), one number per position, no state.

The draw of a token depends on its own seed and position alone, so batch mates, drafts and preemption cannot change it.

Paper: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), section 3.3, Philox-4x32-10.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox-4x32-10 of many counters under one key.

    Args:
        counters: (4, count), 32-bit words
        key: two 32-bit words

    Returns:
        (4, count), 32-bit words
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (product1 >> SHIFT) ^ c1 ^ np.uint64(k0), (product0 >> SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & LOW, product0 & LOW
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniforms(seed: int, stream: int, start: int, count: int) -> list[float]:
    """Numbers in (0, 1) for positions start .. start + count - 1 of one stream of a seed (53 bits each)."""
    seed &= 0xFFFFFFFFFFFFFFFF
    positions = np.arange(start, start + count, dtype=np.uint64)
    counters = np.stack(
        (positions & LOW, positions >> SHIFT, np.full_like(positions, stream), np.zeros_like(positions))
    )
    high, low, _, _ = philox(counters, (seed & 0xFFFFFFFF, seed >> 32))
    bits = (high >> np.uint64(5)) * np.uint64(1 << 26) + (low >> np.uint64(6))
    return ((bits.astype(np.float64) + 0.5) / 2**53).tolist()
