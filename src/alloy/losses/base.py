"""What every objective returns: sums with their counts and weights, never means.

A mean over the tokens of one micro-batch cannot be averaged into the mean of the global batch, because micro-batches and
ranks hold different numbers of labels. Sums and counts can, so the training loop divides once, by the global count.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Loss:
    """The loss of one micro-batch in parts; total = sum over parts of weight * sum / (count over the global batch).

    Attributes:
        sums: scalar fp32 tensors with gradient, one a part.
        counts: how many terms each sum has.
        weights: factor of each part in the total.
        stats: detached tensors that the loop adds up over micro-batches and ranks and hands to `Task.after_step`.
    """

    sums: dict[str, Tensor]
    counts: dict[str, int]
    weights: dict[str, float]
    stats: dict[str, Tensor] = field(default_factory=dict)
