"""Quality labels of a whole set: several classifiers, each ranked to twentieths of the set, joined to five labels.

As Nemotron-CC does (Su et al., 2024, arXiv:2412.02595, section 2.2), scores of different classifiers are made comparable by
their rank, and a document is as good as the classifier that thinks best of it says. The paper joins the twenty bins to five labels by
trials of training; here four bins make a label unless told otherwise.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_BINS = 20
LABELS = ("low", "medium-low", "medium", "medium-high", "high")
# first bin of each label
STARTS = (0, 4, 8, 12, 16)

# upper bits of a score that a sketch tells apart: sign, exponent and 11 bits of the fraction, an error of 2^-12 at most
_SHIFT = 12


class Sketch:
    """A histogram of scores from which quantiles are read, the same for any order of adding and joining.

    Counts by the first 20 bits of the float32, so that 8 MiB hold any number of scores: a quantile is off by at most
    1/2048 of its value. Scores are not NaN.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(1 << (32 - _SHIFT), np.int64)

    def add(self, scores: ArrayLike) -> None:
        """Count these scores."""
        bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)
        # order-preserving: negative numbers count downwards
        ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
        self.counts += np.bincount(ordered >> _SHIFT, minlength=len(self.counts))

    def join(self, other: "Sketch") -> None:
        """Count what another sketch has counted."""
        self.counts += other.counts

    def edges(self) -> NDArray[np.float32]:
        """As `exact_edges`."""
        total = int(self.counts.sum())
        places = np.searchsorted(np.cumsum(self.counts), _ranks(total), side="right").astype(np.uint32)
        ordered = places << np.uint32(_SHIFT)
        bits = np.where(ordered >> 31 == 1, ordered & np.uint32((1 << 31) - 1), ~ordered)
        return bits.astype(np.uint32).view(np.float32)


def exact_edges(scores: ArrayLike) -> NDArray[np.float32]:
    """The 19 scores at which the second to the twentieth bin of a set begin: (documents,) -> (19,)."""
    values = np.sort(np.asarray(scores, np.float32))
    return values[_ranks(len(values))]


def bins(scores: ArrayLike, edges: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin, 0 to 19, of each score (documents,); equal scores are in the same one."""
    return np.searchsorted(edges, np.asarray(scores, np.float32), side="right")


def quality_labels(
    scores: Sequence[ArrayLike], edges: Sequence[NDArray[np.float32]] | None = None, starts: Sequence[int] = STARTS
) -> list[str]:
    """A label for each document of a set.

    Args:
        scores: of each classifier, (documents,)
        edges: of each classifier, such as those of sketches over all parts of a set; None: exact, from these scores
        starts: the first bin of each label
    """
    edges = [exact_edges(column) for column in scores] if edges is None else edges
    best = np.max([bins(column, limits) for column, limits in zip(scores, edges, strict=True)], axis=0)
    return [LABELS[index] for index in np.searchsorted(starts, best, side="right") - 1]


def _ranks(total: int) -> NDArray[np.int64]:
    return np.arange(1, NUM_BINS) * total // NUM_BINS
