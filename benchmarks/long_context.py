"""One long prompt and then decoding, on one GPU: does it fit, how fast is it, and was the planner right?

    python benchmarks/long_context.py --out benchmarks/results/long_context.json \\
        nemotron-nano-9b-v2:131072:2048:22 nemotron-3-nano-30b-a3b:1048576:8192

Each argument is PRESET:TOKENS:CHUNK[:GIB]: random weights in bf16, one sequence of TOKENS random tokens read in chunks of CHUNK,
then 64 captured decode steps. With GIB the process may take no more of the GPU than that, driver included. Planned and measured
peaks are those of `alloy model info --gpu-mem`; all tokens are drawn at random, so that only sizes and speed mean something.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alloy.bench.worker import machine
from alloy.models import sizes
from alloy.models.graphs import DecodeGraphs
from alloy.models.paged import blocks_of
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import build

STEPS = 64


@torch.inference_mode()
def measure(name: str, tokens: int, chunk: int, gib: float | None) -> dict[str, Any]:
    """Prefill and decode one sequence; bytes, seconds, and what the planner said."""
    config = preset(name)
    device_bytes = torch.cuda.mem_get_info()[1] if gib is None else int(gib * sizes.GIB)
    planned = sizes.memory(config, 1, tokens + STEPS, sizes.Setting(mtp=False, prefill_chunk=chunk), device_bytes)
    if gib is not None:
        torch.cuda.set_per_process_memory_fraction((device_bytes - sizes.CONTEXT_BYTES) / torch.cuda.mem_get_info()[1])
    torch.cuda.reset_peak_memory_stats()
    model = build(config, "cuda", torch.bfloat16).eval()
    pool = model.new_paged_cache(1, blocks_of(tokens + STEPS), tokens + STEPS)
    rows = pool.open(1)
    prompt = torch.randint(0, config.vocab, (1, tokens), device="cuda")
    start = last = time.perf_counter()
    logits = None
    for at in range(0, tokens, chunk):
        piece = prompt[:, at : at + chunk]
        logits = model(piece, cache=pool.view(rows), logits="last" if at + chunk >= tokens else None).logits
        if time.perf_counter() - last > 5 or at + chunk >= tokens:
            torch.cuda.synchronize()
            last = time.perf_counter()
            print(f"{name}: {at + piece.shape[1]:,} tokens, {last - start:.1f} s", file=sys.stderr, flush=True)
    assert logits is not None, "the last piece asked for logits"
    prefill_s = time.perf_counter() - start
    first = int(logits.argmax())
    prefill_peak = torch.cuda.max_memory_allocated()
    graphs = DecodeGraphs(model, pool, [1])
    seconds, finite = [], bool(logits.isfinite().all())
    for number in range(STEPS):
        begun = time.perf_counter()
        step = graphs.step(rows, [first] if number == 0 else None)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        finite &= bool(step.logits.isfinite().all())
    free, total = torch.cuda.mem_get_info()
    allocated = planned.total - planned.reserved
    peak = torch.cuda.max_memory_allocated()
    return {
        "model": name,
        "tokens": tokens,
        "chunk": chunk,
        "limit_bytes": None if gib is None else device_bytes,
        "logits_finite": finite,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": tokens / prefill_s,
        "prefill_flops": tokens * sizes.flops_per_token(config, tokens),
        "decode_ms": statistics.median(seconds) * 1e3,
        "planned": asdict(planned),
        "planned_allocated": allocated,
        "measured_allocated": peak,
        "measured_over_planned": peak / allocated,
        "prefill_allocated": prefill_peak,
        "reserved_by_the_allocator": torch.cuda.max_memory_reserved(),
        "taken_of_the_device": total - free,
        "planned_of_the_device": planned.total,
    }


def setting(text: str) -> tuple[str, int, int, float | None]:
    """One argument, taken apart."""
    match = re.fullmatch(r"([\w.-]+):([1-9]\d*):([1-9]\d*)(?::(\d+(?:\.\d+)?))?", text)
    if match is None or match[1] not in PRESETS:
        raise argparse.ArgumentTypeError(f'"{text}" is not PRESET:TOKENS:CHUNK[:GIB], such as tiny-moe:300:64:20')
    return match[1], int(match[2]), int(match[3]), float(match[4]) if match[4] else None


def main() -> None:
    """Measure each argument; the file is whole after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=setting, help="PRESET:TOKENS:CHUNK[:GIB]")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and there is none")
    rows: list[dict[str, Any]] = []
    for run in options.runs:
        rows.append(measure(*run))
        print(json.dumps(rows[-1], indent=1))
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps({"machine": machine("cuda"), "runs": rows}, indent=1) + "\n")
        part.replace(options.out)
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
