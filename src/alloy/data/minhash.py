"""MinHash signatures and their bands: which texts are worth comparing, without comparing all pairs.

A text is the set of its shingles: how often one occurs does not count. A signature has bands x rows values of 32 bits, two
of which agree with the probability of the sets' Jaccard index s. Texts meet if all rows of some band agree: with the
probability 1 - (1 - s^rows)^bands.

Signatures are rensa's: version 2 of its R-MinHash, after Fast Similarity Sketching (Dahlgaard et al., 2017, arXiv:1704.04370),
is unbiased, spreads no more than the binomial of independent hashes, and takes no notice of repeated shingles.

Sources of presets: data.md sections 1 and 7.
Differs: shingles are taken of the normal form of a text (`shingles.normalise`), so that copies that differ in case or spaces
meet for certain; ncm's reference hashes the text as it is. OpenWebMath used SimHash at 0.7; `owm` is the MinHash that turns there.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from alloy.core.device import require
from alloy.core.recipe import Config
from alloy.data.shingles import Hashes, Words, characters, mix, shingles

# characters or words hashed in one call: more leave the processor's cache, fewer pay for the call
BATCH = 1 << 16


class MinHash(Config):
    """What is compared, and how closely."""

    unit: Annotated[Literal["char", "word"], Field(description="Of which shingles are made.")] = "char"
    n: Annotated[int, Field(ge=1, description="Units of a shingle.")] = 24
    bands: Annotated[int, Field(ge=1, description="Bands of a signature.")] = 20
    rows: Annotated[int, Field(ge=1, description="Values of a band.")] = 13
    seed: Annotated[int, Field(ge=0, description="Of the hashes.")] = 42

    @property
    def threshold(self) -> float:
        """About the Jaccard index at which it becomes likely that two texts meet."""
        return (1 / self.bands) ** (1 / self.rows)


PRESETS = {
    # Nemotron-CC-Math
    "ncm": MinHash(),
    "fineweb": MinHash(unit="word", n=5, bands=14, rows=8),
    "megamath": MinHash(unit="word", n=5, bands=11, rows=10),
    "owm": MinHash(unit="word", n=5, bands=16, rows=8),
}


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """How likely two texts of this Jaccard index are to share a band."""
    return 1 - (1 - similarity**rows) ** bands


def codes_of(text: str, unit: Literal["char", "word"], words: Words) -> Hashes:
    """The characters or words of a text, as `shingles` takes them."""
    return characters(text) if unit == "char" else words.hashes(text)


def signatures(codes: Sequence[Hashes], settings: MinHash) -> NDArray[np.uint32]:
    """(texts, bands * rows). A text without shingles has 2^32 - 1 everywhere.

    Args:
        codes: of each text
        settings: of the signature
    """
    sketch = _sketch()
    width = settings.bands * settings.rows
    made = [np.empty((0, width), dtype=np.uint32)]
    start = size = 0
    for stop, code in enumerate(codes, start=1):
        size += len(code)
        if size < BATCH and stop < len(codes):
            continue
        hashes, offsets = shingles(codes[start:stop], settings.n)
        digest = sketch.digest_matrix_from_flat_token_hashes(hashes, offsets, width, settings.seed)
        made.append(np.array(digest.to_rows(), dtype=np.uint32))
        start, size = stop, 0
    return np.concatenate(made)


def algorithm() -> int:
    """The version of rensa's algorithm; another one gives other signatures."""
    return _sketch().ALGORITHM_VERSION


def band_keys(signature: NDArray[np.uint32], settings: MinHash) -> Hashes:
    """(bands, texts): one number for the values of each band; equal values of different bands have different numbers.

    Args:
        signature: (texts, bands * rows)
        settings: of the signature
    """
    # odd random weights: two unlike bands get one key with a probability of about 2^-64
    weights = mix(np.arange(1, settings.bands * settings.rows + 1, dtype=np.uint64)) | np.uint64(1)
    weighted = (signature * weights).reshape(len(signature), settings.bands, settings.rows)
    keys = weighted.sum(axis=2, dtype=np.uint64) + mix(np.arange(settings.bands, dtype=np.uint64))
    return mix(np.ascontiguousarray(keys.T))


def _sketch() -> Any:
    return require("rensa", extra="data", why="fuzzy deduplication makes signatures").RMinHash
