"""What every objective returns: sums with their counts and weights, never means.

A mean over the tokens of one micro-batch cannot be averaged into the mean of the global batch, because micro-batches and
ranks hold different numbers of labels. Sums and counts can, so the training loop divides once, by the global count.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Loss:
    """The loss of one micro-batch in parts; total = sum over parts of weight * sum / (count over the global batch).

    Counts are not here: `Task.counts` gives them before the forward pass, because the whole batch's are needed.

    Attributes:
        sums: scalar fp32 tensors with gradient, one a part.
        weights: factor of each part in the total.
        stats: detached tensors that the loop adds up over micro-batches and ranks and hands to `Task.after_step`.
    """

    sums: dict[str, Tensor]
    weights: dict[str, float]
    stats: dict[str, Tensor] = field(default_factory=dict)
