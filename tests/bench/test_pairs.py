"""Ratios of a hybrid's decode rates to an attention model's, from the rows of one run."""

from alloy.bench.pairs import pairs
from alloy.bench.result import Row


def row(label: str, rate: float | None, name: str = "alloy", case: str = "decode") -> Row:
    """A row of `alloy bench decode`."""
    return Row(case, label, name, tokens_per_s=rate)


def test_equal_batches_and_the_largest_of_each() -> None:
    """By hand: 200/100 and 900/300; only what both have, and only ours."""
    found = pairs(
        [
            row("Nano-9B 8k batch 1", 200.0),
            row("Nano-9B 8k batch 64", None),
            row("Nano-9B 8k batch 384", 900.0),
            row("Nano-9B 16k batch 1", 190.0),
            row("Qwen3-8B 8k batch 1", 100.0),
            row("Qwen3-8B 8k batch 1", 5.0, name="transformers"),
            row("Qwen3-8B 8k batch 96", 300.0),
        ]
    )
    assert len(found) == 1
    assert found[0].startswith(
        "Nano-9B over Qwen3-8B at 8k: 2.00x at batch 1, 3.00x at the largest batch measured of each, 384 and 96. "
    )
    assert "Published: up to 6x" in found[0]
    assert found[0].endswith("Not a reproduction.")


def test_nothing_without_both() -> None:
    """One model alone, or rows of another case."""
    assert pairs([row("Nano-30B 16k batch 1", 400.0), row("tiny-moe 70 batch 3", 10.0)]) == []
    assert pairs([row("Nano-9B 8k", 4.0, case="prefill"), row("Qwen3-8B 8k", 4.0, case="prefill")]) == []
