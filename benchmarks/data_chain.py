"""A chain of data stages on a WARC: pages a second, memory, and where the time goes.

    python benchmarks/pages_10k.py --pages 10000 --out /tmp/pages.warc.gz FOLDER...
    python benchmarks/data_chain.py /tmp/pages.warc.gz [--workers 2] [--stages render,clean,score,dedup,tokenize] [--out FILE.json]

The stages run one after the other with their defaults (deduplication as in the CC-Math paper), the tokenizer is trained on the
first texts before the clock starts. Wall time of each stage, start of its processes included; memory is the proportional set size
of the whole tree of processes, looked at ten times a second.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from alloy.data.executors import Executor
from alloy.data.pipeline import STAGES, run_stage
from alloy.data.tokens import save_tokenizer, train_tokenizer

VOCAB = 4096


class Memory(threading.Thread):
    """Largest proportional set size of this process and its descendants, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._stop_now = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stop_now.wait(0.1):
            self.peak = max(self.peak, sum(map(proportional_bytes, tree(os.getpid()))))

    def stop(self) -> int:
        """The peak."""
        self._stop_now.set()
        self.join()
        return self.peak


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in tree(child))]


def proportional_bytes(pid: int) -> int:
    """Of one process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def settings(stage: str, folder: Path) -> dict[str, Any]:
    """What a stage needs besides its defaults."""
    return {"tokenize": {"tokenizer": str(folder / "tok")}, "dedup": {"preset": "ncm"}}.get(stage, {})


def main() -> None:
    """Run the chain and print a table."""
    # not above: processes of the stages import this file, and would load torch
    from alloy.bench.worker import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warc", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", default="render,clean,score,dedup,tokenize")
    parser.add_argument("--part-mib", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.stages.split(",")
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="chain-"))
    source = [str(options.warc)]
    try:
        for index, name in enumerate(names):
            if name == "tokenize":
                texts = [
                    text
                    for file in sorted(Path(source[0]).glob("part-*"))[:1]
                    for text in pq.read_table(file)["text"].to_pylist()
                ]
                save_tokenizer(train_tokenizer(texts[:2000], VOCAB), folder / "tok")
            stage: Any = STAGES.get(name)
            config = stage.Config.model_validate(
                {"stage": name, "part_mib": options.part_mib, **settings(name, folder)}
            )
            memory = Memory()
            memory.start()
            start = time.perf_counter()
            manifest = run_stage(config, source, folder / f"{index}-{name}", Executor(workers=options.workers))
            wall = time.perf_counter() - start
            rows.append(
                {
                    "stage": name, "rows_in": manifest["rows_in"], "rows_out": manifest["rows_out"], "wall_s": round(wall, 2),
                    "work_s": manifest["work_s"], "rows_per_s": round(manifest["rows_in"] / wall, 1), "peak_bytes": memory.stop(),
                    "counts": manifest["counts"], "losses": manifest["losses"],
                }
            )  # fmt: skip
            print(f"{name:<12} {manifest['rows_in']:>8,} -> {manifest['rows_out']:>8,}  {wall:8.1f} s  {rows[-1]['rows_per_s']:>8,.1f} rows/s  {rows[-1]['peak_bytes'] / 2**20:7,.0f} MiB  {manifest['counts']} {manifest['losses']}")  # fmt: skip
            if stage.writes_rows:
                source = [str(folder / f"{index}-{name}")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total = sum(row["wall_s"] for row in rows)
    pages = rows[0]["rows_in"]
    size = options.warc.stat().st_size
    print(
        f"{pages:,} pages in {total:.1f} s: {pages / total:.1f} pages/s, peak {max(row['peak_bytes'] for row in rows) / 2**20:,.0f} MiB"
    )
    if options.out:
        facts = {"machine": machine("cpu"), "warc_bytes": size, "workers": options.workers}
        options.out.write_text(
            json.dumps(
                {**facts, "pages": pages, "wall_s": total, "pages_per_s": pages / total, "stages": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
