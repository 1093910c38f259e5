"""What a hybrid gains over a model of attention alone of its size: ratios of decode rates within one run."""

from alloy.bench.result import OURS, Row

# hybrid: the other model, what its paper publishes, and how that was measured
PAIRS = {
    "Nano-9B": ("Qwen3-8B", "up to 6x", "whole requests of 8k tokens in and 16k out on one card of 22 GiB, another engine"),
    "Nano-30B": ("Qwen3-30B", "3.3x", "whole requests of 8k tokens in and 16k out on one H200 in FP8, the better of two engines"),
}  # fmt: skip
HERE = "decode steps alone at this context in bf16, both models through alloy"


def pairs(rows: list[Row]) -> list[str]:
    """A sentence for each pair and length of context whose rates are there: at equal batch, and at each one's largest.

    The published ratio stands beside them with what it measured; ours are no reproductions of it."""
    rates: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row.case == "decode" and row.name == OURS and row.tokens_per_s:
            model, length, _, batch = row.label.split()
            rates.setdefault((model, length), {})[int(batch)] = row.tokens_per_s
    found: list[str] = []
    for (model, length), ours in rates.items():
        other, published, how = PAIRS.get(model, ("", "", ""))
        theirs = rates.get((other, length), {})
        shared = [f"{ours[n] / theirs[n]:.2f}x at batch {n}" for n in sorted(ours.keys() & theirs.keys())]
        if theirs and max(ours) != max(theirs):
            ratio = ours[max(ours)] / theirs[max(theirs)]
            shared.append(f"{ratio:.2f}x at the largest batch measured of each, {max(ours)} and {max(theirs)}")
        if shared:
            found.append(
                f"{model} over {other} at {length}: {', '.join(shared)}. Published: {published}, for {how}; here: {HERE}. "
                "Not a reproduction."
            )
    return found
