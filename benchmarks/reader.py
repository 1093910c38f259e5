"""The reader of token shards against what it feeds: tokens per second of `Mixture.batch` and of a CPU training step.

    OMP_NUM_THREADS=1 python benchmarks/reader.py [--out FILE] [--quick]

Both on one core, by process time, taken in turns so that a machine that changes its speed changes both; medians. Reading is
from one shard of 64 M tokens in shuffled order, warm (its pages in memory) and cold (evicted before every pass, by wall time).
The bound: one copy of the ids as they lie in the file, widened to int64 as tokens and once more as labels (np.copyto).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from alloy.core.recipe import load_recipe
from alloy.data.mixture import Batch, Mixture, Source
from alloy.data.shards import write_shard
from alloy.models.registry import build
from alloy.train.tasks.pretrain import PretrainRecipe

TURNS = 5


def rate(work: Callable[[], object], tokens: int, clock: Callable[[], float] = time.process_time) -> float:
    """Tokens per second of one call."""
    start = clock()
    work()
    return tokens / (clock() - start)


def read(mixture: Mixture, batches: int, rows: int) -> None:
    """Make batches and drop them."""
    for _ in range(batches):
        mixture.batch(rows)


def evict(file: Path) -> None:
    """Drop the file's pages from memory."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
        os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bound(ids: np.ndarray, tokens: int) -> None:
    """Widen ids to int64 twice, a megabyte at a time."""
    out = np.empty(1 << 17, np.int64)
    for start in range(0, tokens, len(out)):
        for _ in range(2):
            part = ids[start : start + len(out)]
            np.copyto(out[: len(part)], part)


class Trainer:
    """Forward, backward and update of a shipped recipe's model on one batch, nothing else."""

    def __init__(self, name: str, batch: Batch) -> None:
        recipe = load_recipe(name, []).recipe
        assert isinstance(recipe, PretrainRecipe)
        self.model = build(recipe.model)  # type: ignore[arg-type]  the recipes here hold sizes
        self.model.train()
        vocab = self.model.config.vocab
        self.batch = Batch(
            batch.tokens % vocab, torch.where(batch.labels < 0, -100, batch.labels % vocab), batch.documents
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self) -> None:
        """One update."""
        logits = self.model(self.batch.tokens, documents=self.batch.documents).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.batch.labels.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The reader against what it feeds.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = 1_000_000 if options.quick else 64_000_000
    turns = 1 if options.quick else TURNS
    rng = np.random.default_rng(0)
    result: dict[str, object] = {"tokens_in_shard": size, "turns": turns, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        lengths = rng.geometric(1 / 600, size // 600)
        shard = Path(name) / "shard"
        write_shard(shard, (rng.integers(0, 60_000, length) for length in lengths))
        for seq in (128, 512, 2048, 8192):
            rows = max(1, 16_384 // seq)
            mixture = Mixture([Source(path=str(shard))], seed=0, seq=seq)
            batch = mixture.batch(rows)
            ids = mixture.sources[0].corpus.shards[0].tokens
            batches = max(1, (500_000 if options.quick else 8_000_000) // (rows * seq))
            tokens = batches * rows * seq
            names = ("pretrain/tiny", "pretrain/demo") if seq == 128 or not options.quick else ()
            few = Batch(*(part[: max(1, 2048 // seq)] for part in (batch.tokens, batch.labels, batch.documents)))
            trainers = {name: Trainer(name, few) for name in names}
            taken: dict[str, list[float]] = {key: [] for key in ("warm", "cold", "bound", *trainers)}
            for trainer in trainers.values():
                trainer.step()
            for _ in range(turns):
                taken["warm"].append(rate(partial(read, mixture, batches, rows), tokens))
                evict(Path(f"{shard}.bin"))
                taken["cold"].append(rate(partial(read, mixture, batches, rows), tokens, time.perf_counter))
                taken["bound"].append(rate(partial(bound, ids, tokens), tokens))
                for name, trainer in trainers.items():
                    taken[name].append(rate(trainer.step, few.tokens.numel()))
            figures = {key: median(values) for key, values in taken.items()}
            ratios = {f"warm / {name}": figures["warm"] / figures[name] for name in trainers}
            row = {"seq": seq, **figures, "warm / bound": figures["warm"] / figures["bound"], **ratios}
            result["rows"].append(row)  # type: ignore[attr-defined]  a list
            print("  ".join(f"{key} {value:,.4g}" for key, value in row.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
