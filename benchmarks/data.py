"""Speed of the data path on this machine: tokenizing, and batches from memory-mapped shards.

    python benchmarks/data.py

Wall and process time; the corpus is the demonstration's with 8 MB of source code, and a shard of 30 M random tokens in
documents of 600 tokens on average.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from alloy.data.corpus import python_corpus
from alloy.data.mixture import Mixture, Pack, Source
from alloy.data.shards import write_shard
from alloy.data.tokens import tokenize_corpus, train_tokenizer
from alloy.eval.baselines import kneser_ney_bits_per_byte

BATCH_ROWS = 16
BATCH_TOKENS = 10_000_000


def timed(name: str, tokens: int, work: Callable[[], object]) -> None:
    """Print the rate of `work`."""
    wall, process = time.perf_counter(), time.process_time()
    work()
    wall, process = time.perf_counter() - wall, time.process_time() - process
    print(
        f"{name:<40} {wall:6.2f} s  {tokens / wall / 1e6:7.2f} M tok/s  ({tokens / process / 1e6:.2f} of process time)"
    )


def mix(mixture: Mixture, batches: int) -> None:
    """Make batches and drop them."""
    for _ in range(batches):
        mixture.batch(BATCH_ROWS)


def main() -> None:
    """Train, tokenize, mix."""
    corpus = python_corpus(source_bytes=8_000_000)
    documents = corpus.train_documents
    tokenizer = train_tokenizer([document.text for document in documents], 2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = tokenize_corpus(documents, tokenizer, folder / "warm")["tokens"]
        timed("tokenize", tokens, lambda: tokenize_corpus(documents, tokenizer, folder / "text"))
        rng = np.random.default_rng(0)
        write_shard(folder / "random", [rng.integers(0, 60_000, length) for length in rng.geometric(1 / 600, 50_000)])
        sources = [Source(path=str(folder / "text"), weight=0.6), Source(path=str(folder / "random"), weight=0.4)]
        packs: list[Pack] = ["concat", "best_fit"]
        for pack in packs:
            for seq in (256, 2048):
                start = time.perf_counter()
                mixture = Mixture(sources, seed=0, seq=seq, pack=pack)
                mixture.batch(BATCH_ROWS)
                setup = time.perf_counter() - start
                batches = BATCH_TOKENS // (BATCH_ROWS * seq)
                name = f"mix {pack}, seq {seq} (setup {setup:.2f} s)"
                timed(name, batches * BATCH_ROWS * seq, partial(mix, mixture, batches))
    train = [document.text for part in ("topics", "docstrings") for document in corpus.train[part]]
    held_out = [document.text for document in corpus.held_out_documents("topics", "docstrings")]
    timed("Kneser-Ney of topics and docstrings", 563_111, lambda: kneser_ney_bits_per_byte(held_out, train, tokenizer))


if __name__ == "__main__":
    main()
