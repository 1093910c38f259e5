"""Deduplication of many documents: speed, memory, and what is found against the truth.

    python benchmarks/dedup.py --documents 100000 --workers 2

Documents of made-up words are written to Parquet files first, which is not timed. Three in ten are copies of another one, some of
them exact, most with words replaced so that their true Jaccard index lies anywhere from 0.3 to 1. Then `alloy data dedup` runs
over them, and on the families of some documents its pairs are held against all pairs by brute force, and against datasketch.
"""

import argparse
import itertools
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alloy.data.decontaminate import Finder, Item
from alloy.data.dedup import BANDS, Index, Signing, sign
from alloy.data.executors import Executor
from alloy.data.minhash import band_keys, collision_probability, signatures
from alloy.data.parts import list_parts, read_part
from alloy.data.pipeline import run_stage
from alloy.data.shingles import Hashes, Words, characters, normalise, shingles
from alloy.data.stages.dedup import DedupConfig

COPIES = 0.3
EXACT = 0.05
FILE_DOCUMENTS = 10_000
GROUP_DOCUMENTS = 2_500
CONFIG = DedupConfig()


@cache
def vocabulary(seed: int) -> tuple[list[str], NDArray[np.float64]]:
    """Words, and the sums of their frequencies (Zipf's law); some with letters beyond ASCII, some formulas."""
    rng = np.random.default_rng(seed)
    pieces = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "or")]
    words = ["".join(rng.choice(pieces, size=rng.integers(1, 5))) for _ in range(50_000)]
    for i in rng.choice(len(words), 200, replace=False):
        words[i] = f"{words[i]}é"
    for i in rng.choice(len(words), 500, replace=False):
        words[i] = f"$x_{{{i % 9}}} + \\{words[i]} = {i}$"
    frequency = np.cumsum(1 / np.arange(5, len(words) + 5))
    return words, frequency / frequency[-1]


def original(seed: int, number: int, chars: int) -> list[str]:
    """The words of a document that is no copy."""
    words, frequency = vocabulary(seed)
    rng = np.random.default_rng([seed, number])
    chosen = [words[i] for i in np.searchsorted(frequency, rng.random(chars // 4))]
    ends = np.cumsum([len(word) + 1 for word in chosen])
    return chosen[: int(np.searchsorted(ends, chars)) + 1]


def base_of(seed: int, number: int) -> int:
    """The document that this one is made from, possibly itself."""
    rng = np.random.default_rng([seed, number, 1])
    base = number
    if number and rng.random() < COPIES:
        base = int(rng.integers(number))
        base = base_of(seed, base)
    return base


def document(seed: int, number: int, chars: int) -> str:
    """The text of a document; a copy has as many words replaced as its Jaccard index wants."""
    base = base_of(seed, number)
    words = original(seed, base, chars)
    rng = np.random.default_rng([seed, number, 2])
    if base != number and rng.random() > EXACT:
        similarity = rng.uniform(0.3, 1)
        lost = (1 - similarity) / (1 + similarity)
        # a word that is replaced alone takes 24 shingles and its own length with it
        edits = int(-math.log(1 - lost) * chars / 30)
        pool, frequency = vocabulary(seed)
        for place in rng.choice(len(words), min(edits, len(words)), replace=False):
            words[place] = pool[int(np.searchsorted(frequency, rng.random()))]
    return " ".join(words)[:chars]


def write_file(path: Path, numbers: range, chars: int, seed: int) -> None:
    """A Parquet file of documents."""
    with pq.ParquetWriter(path, pa.schema([("id", pa.string()), ("text", pa.large_string())])) as writer:
        for start in range(0, len(numbers), GROUP_DOCUMENTS):
            own = numbers[start : start + GROUP_DOCUMENTS]
            texts = pa.array([document(seed, number, chars) for number in own], pa.large_string())
            writer.write_table(pa.table({"id": [f"{number:08d}" for number in own], "text": texts}))


class Memory(threading.Thread):
    """The most that this process and those below it held together, in bytes, each shared page counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._ended = 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.25):
            self.peak = max(self.peak, _proportional_bytes(os.getpid()))

    def end(self) -> int:
        """Stop looking."""
        self._ended.set()
        self.join()
        return self.peak


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return own + sum(_proportional_bytes(int(child)) for child in below)


def true_pairs(sets: Sequence[Hashes]) -> dict[tuple[int, int], float]:
    """Jaccard index of all pairs that share a shingle."""
    hashes = np.concatenate(sets)
    owner = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    order = np.argsort(hashes, kind="stable")
    hashes, owner = hashes[order], owner[order]
    shared: Counter[tuple[int, int]] = Counter()
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    for start, stop in itertools.pairwise([*starts, len(hashes)]):
        if stop - start > 1:
            shared.update(itertools.combinations(owner[start:stop].tolist(), 2))
    return {(a, b): n / (len(sets[a]) + len(sets[b]) - n) for (a, b), n in shared.items()}


def key_pairs(keys: Hashes) -> set[tuple[int, int]]:
    """Pairs that share a band; keys: (bands, documents)."""
    pairs: set[tuple[int, int]] = set()
    for row in keys:
        buckets: dict[int, list[int]] = {}
        for document_, key in enumerate(row.tolist()):
            buckets.setdefault(key, []).append(document_)
        for bucket in buckets.values():
            pairs.update(itertools.combinations(bucket, 2))
    return pairs


def datasketch_pairs(sets: Sequence[Hashes], bands: int, rows: int) -> set[tuple[int, int]]:
    """Pairs that datasketch's LSH finds."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    pairs: set[tuple[int, int]] = set()
    for number, hashes in enumerate(sets):
        sketch = MinHash(num_perm=bands * rows, seed=7)
        sketch.update_batch([value.tobytes() for value in hashes])
        pairs.update((other, number) for other in lsh.query(sketch))
        lsh.insert(number, sketch)
    return pairs


def judge(name: str, found: set[tuple[int, int]], truth: dict[tuple[int, int], float], bands: int, rows: int) -> None:
    """Print what was found of the truth, and what the curve wants."""
    met = {pair: collision_probability(s, bands, rows) for pair, s in truth.items()}
    expected, spread = sum(met.values()), math.sqrt(sum(p * (1 - p) for p in met.values()))
    near = {pair for pair, s in truth.items() if s >= 0.8}
    sure = sum(met[pair] for pair in near) / len(near)
    precise = sum(truth.get(pair, 0) >= 0.8 for pair in found) / len(found)
    likely = sum(met[pair] for pair in near) / expected
    print(
        f"{name}: {len(found)} pairs, the curve wants {expected:.0f} +- {spread:.0f}; recall of those of 0.8 and above "
        f"{len(found & near) / len(near):.4f} (curve {sure:.4f}), precision {precise:.4f} (curve {likely:.4f})"
    )
    for low in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        inside = [pair for pair, s in truth.items() if low <= s < low + (0.2 if low == 0.3 else 0.1)]
        if inside:
            share = sum(pair in found for pair in inside) / len(inside)
            print(
                f"    {low:.1f}.. {len(inside):5d} pairs, met {share:.4f}, curve {np.mean([met[p] for p in inside]):.4f}"
            )


def steps(file: Path) -> None:
    """Print what one document costs, by step."""
    minhash = CONFIG.minhash
    clock = time.process_time
    part = list_parts([file], 1 << 30)[0]
    began = clock()
    tables = list(itertools.islice(read_part(part, 256), 12))
    texts = [text for table in tables for text in table["text"].to_pylist()]
    marks = [("read", clock() - began)]

    def timed(name: str) -> None:
        marks.append((name, clock() - began - sum(spent for _, spent in marks)))

    normal = [normalise(text) for text in texts]
    timed("normalise")
    codes = [characters(text) for text in normal]
    timed("code points")
    for start in range(0, len(codes), 16):
        shingles(codes[start : start + 16], minhash.n)
    timed("(shingles alone)")
    made = signatures(codes, minhash)
    timed("shingles and signatures")
    band_keys(made, minhash)
    timed("bands")
    words = Words()
    for table in tables:
        sign(table, Signing(minhash=minhash), words)
    timed("all of it (sign)")
    print(
        "microseconds of one document, one process: " + ", ".join(f"{n} {s / len(texts) * 1e6:.0f}" for n, s in marks)
    )


def contamination(file: Path, seed: int) -> None:
    """Print how fast 20,000 test items of about 60 words are looked for; one in a hundred is of these documents."""
    texts = pq.read_table(file, columns=["text"])["text"].to_pylist()[:2_000]
    items = [" ".join(original(seed + 1, number, 360)) for number in range(19_800)]
    items += [text[1_000:1_360] for text in texts[::10]]
    for name, fuzzy in (("runs of 13 words", None), ("and rephrased ones", 0.7)):
        began = time.process_time()
        finder = Finder([Item(0, number, text) for number, text in enumerate(items)], fuzzy=fuzzy)
        ready = time.process_time()
        hits = [hit for start in range(0, len(texts), 256) for hit in finder.find(texts[start : start + 256])]
        spent = time.process_time() - ready
        print(
            f"decontamination, {name}: {ready - began:.1f} s for {len(items)} items, then {len(texts) / spent:.0f} "
            f"documents/s in one process; {sum(map(bool, hits))} documents hit, {len({h.item for d in hits for h in d})} items"
        )


def main() -> None:
    """Make, deduplicate, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--chars", type=int, default=4_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--families", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        run(Path(name), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """One size."""
    count, seed = arguments.documents, arguments.seed
    data, out = folder / "data", folder / "out"
    data.mkdir()
    began = time.perf_counter()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for first in range(0, count, FILE_DOCUMENTS):
            numbers = range(first, min(count, first + FILE_DOCUMENTS))
            pool.submit(write_file, data / f"{first:08d}.parquet", numbers, arguments.chars, seed)
    size = sum(file.stat().st_size for file in data.iterdir())
    print(
        f"made {count} documents in {time.perf_counter() - began:.0f} s (not counted), {size / 1e6:.0f} MB of Parquet"
    )
    steps(sorted(data.iterdir())[0])
    contamination(sorted(data.iterdir())[0], seed)

    memory = Memory()
    memory.start()
    began, start = time.perf_counter(), time.time()
    before = os.times()
    manifest = run_stage(CONFIG, [str(data)], out, Executor(kind="process", workers=arguments.workers))
    wall, after = time.perf_counter() - began, os.times()
    peak = memory.end()
    signed = max(file.stat().st_mtime for file in (out / "_work" / "sign").iterdir()) - start
    grouped = (out / "_work" / "groups" / "done.json").stat().st_mtime - start
    cpu = sum(after[:4]) - sum(before[:4])
    print(
        f"{wall:.1f} s on {arguments.workers} workers, {count / wall:.0f} documents/s: sign {signed:.1f} s, "
        f"group {grouped - signed:.1f} s, write {wall - grouped:.1f} s; {cpu:.0f} s of processors; "
        f"{peak / 2**30:.2f} GiB at most; {manifest['dedup']['copies']} copies in {manifest['dedup']['groups']} groups"
    )
    quality(out, arguments)


def quality(out: Path, arguments: argparse.Namespace) -> None:
    """Pairs and groups of some families against brute force."""
    count, seed, minhash = arguments.documents, arguments.seed, CONFIG.minhash
    families: dict[int, list[int]] = {}
    for number in range(count):
        families.setdefault(base_of(seed, number), []).append(number)
    large = [family for family in families.values() if len(family) > 1]
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(large), min(arguments.families, len(large)), replace=False)
    numbers = sorted(number for i in chosen for number in large[i])
    codes = [characters(normalise(document(seed, number, arguments.chars))) for number in numbers]
    sets = [np.unique(shingles([code], minhash.n)[0]) for code in codes]
    truth = true_pairs(sets)
    made = signatures(codes, minhash)
    width = minhash.bands * minhash.rows
    errors = [
        ((made[a] == made[b]).mean() - s) / math.sqrt(s * (1 - s) / width) for (a, b), s in truth.items() if 0.1 < s < 1
    ]
    print(
        f"{len(numbers)} documents of {len(chosen)} families, {len(truth)} pairs with a shingle in common; error of "
        f"Jaccard estimates in units of the binomial's: mean {np.mean(errors):+.3f}, spread {np.std(errors):.3f}"
    )
    signing = Signing(minhash=minhash, score=CONFIG.score, source=CONFIG.source)
    entries = Index(out / "_work" / "index", signing).entries()
    keys = np.concatenate([entry.keys()[BANDS:] for entry in entries], axis=1)
    judge("ours", key_pairs(keys[:, numbers]), truth, minhash.bands, minhash.rows)
    judge("datasketch", datasketch_pairs(sets, minhash.bands, minhash.rows), truth, minhash.bands, minhash.rows)
    marks = pa.concat_tables(
        pq.read_table(f, columns=["dup_group", "dup_keep"]) for f in sorted(out.glob("part-*.parquet"))
    )
    group = marks["dup_group"].take(pa.array(numbers)).to_pylist()
    pairs = {(a, b) for a, b in truth if group[a] is not None and group[a] == group[b]}
    judge("groups", pairs, truth, minhash.bands, minhash.rows)
    twins = {pair for pair, s in truth.items() if s == 1}
    print(f"pairs of equal shingles in one group: {len(pairs & twins)} of {len(twins)}")


if __name__ == "__main__":
    main()
