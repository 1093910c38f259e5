"""Does it matter how the engine computes an answer? Nine ways, four families of models, and a trained checkpoint.

    OMP_NUM_THREADS=1 alloy demo --seconds 240 --run-dir DEMO
    python benchmarks/exactness.py --answers 10000 --seed 0 --checkpoint DEMO/train/checkpoint --out benchmarks/results/exactness.json

Every answer (fp32, CPU, greedy) is compared token by token with one plain forward pass over the whole text, without engine
and cache (`alloy.bench.exactness`). A cell says how many answers there were, how many differ, and how many of the rest took
another token where the reference cannot decide: two logits, or routing scores there or before, within 1e-5. Each way must have
happened, too: rows that ran together, pieces of prompts, answers put back, hits of the wanted length, drafts kept and
dropped, budgets spent. The command fails (1) if an answer differs or a way was not taken.

    python benchmarks/exactness.py --device cuda --dtype bfloat16 --quick --checkpoint DEMO/train/checkpoint --out benchmarks/results/exactness_bf16.json

In bf16 the share of tokens that are not the reference's is printed (each given the answer's text before it), and by how much
less the reference likes the first of an answer, apart for those before which a router had two scores within 2^-7 of each other;
differing answers do not fail the command there.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alloy.bench.exactness import MODELS_PER_FAMILY, TIE, WAYS, Cell, Subject, matrix, text_subject
from alloy.bench.worker import machine

# the distance of two neighbours in bf16, from 1 on
ROUNDING = 2**-7


def table(cells: list[Cell]) -> str:
    """Rows are ways, columns families."""
    families = list(dict.fromkeys(cell.family for cell in cells))
    found = {(cell.way, cell.family): cell for cell in cells}
    rows = [["answers / differing / ties", *families]]
    for way in WAYS:
        row = [found.get((way, family)) for family in families]
        rows.append([way, *("-" if c is None else f"{c.answers} / {len(c.differing)} / {len(c.ties)}" for c in row)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def _spread(gaps: list[float]) -> dict[str, float]:
    """Of rising numbers how many, the middle one, and the one below which nine of ten lie."""
    if not gaps:
        return {}
    return {"answers": len(gaps), "median": gaps[len(gaps) // 2], "90%": gaps[len(gaps) * 9 // 10], "largest": gaps[-1]}


def topics() -> list[str]:
    """Python's language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return list(topics.values())


def main() -> int:
    """Run the matrix, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000, help="in all, at least")
    parser.add_argument("--seed", type=int, default=0, help="of models and prompts")
    parser.add_argument(
        "--checkpoint", type=Path, help="a trained model with multi-token prediction, such as the demo's"
    )
    parser.add_argument(
        "--quick", action="store_true", help="144 answers beside the batches of 64, two models a family"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place: dict[str, Any] = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    is_exact = options.dtype == "float32"
    trained: Subject | None = None
    if options.checkpoint is not None:
        trained = text_subject(options.checkpoint, topics(), **place)
    answers, models = (144, 2) if options.quick else (options.answers, MODELS_PER_FAMILY)
    start, cells = time.perf_counter(), list[Cell]()
    for cell in matrix(answers, options.seed, trained, models, **place):
        cells.append(cell)
        shown = ", ".join(f"{name} {number:,}" for name, number in cell.seen.items())
        seconds = time.perf_counter() - start
        print(
            f"{seconds:6.0f} s  {cell.family}, {cell.way}: {cell.answers} answers; {shown}", file=sys.stderr, flush=True
        )
    print(table(cells))
    for name in ("ties", "differing", "missing"):
        for cell in cells if is_exact or name == "missing" else []:
            for line in getattr(cell, name):
                print(f"{name}: {line if name != 'missing' else f'{cell.way}, {cell.family}: {line}'}")
    total, tokens, close, other = (
        sum(counts) for counts in zip(*((c.answers, c.tokens, c.close, c.other) for c in cells), strict=True)
    )
    differing, ties = sum(len(cell.differing) for cell in cells), sum(len(cell.ties) for cell in cells)
    print(
        f"{total:,} answers of {tokens:,} tokens: {differing} differ; {close} have a position whose two best logits are within "
        f"{TIE:g}, and {ties} took another token where the reference cannot decide"
    )
    print(f"{other:,} of {tokens:,} tokens ({other / tokens:.3%}) are not the reference's")
    firsts = [first for cell in cells for first in cell.gaps]
    # a router that rounding tips over computes something else
    clear = sorted(gap for gap, margin in firsts if margin >= ROUNDING)
    tipped = sorted(gap for gap, margin in firsts if margin < ROUNDING)
    shown = {"no router near a tie": _spread(clear), f"a router within {ROUNDING:g} of a tie": _spread(tipped)}
    for name, spread in shown.items():
        text = ", ".join(f"{key} {value:.2g}" for key, value in spread.items())
        print(f"the reference's logits at the first of an answer, {name}: {text or 'none'}")
    if options.out:
        result = {
            "machine": machine(options.device),
            "dtype": options.dtype,
            "command": " ".join(["python", "benchmarks/exactness.py", *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - start),
            "answers": total,
            "tokens": tokens,
            "differing": differing,
            "close": close,
            "ties": ties,
            "other_share": other / tokens,
            "first_gaps": shown,
            "cells": [asdict(cell) for cell in cells],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if (differing and is_exact) or any(cell.missing for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
