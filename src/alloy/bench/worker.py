"""The process that measures one case: `python -m alloy.bench.worker`, which reads the JSON of a `Task` from standard input.

It writes JSON lines to its standard output: {"begin": [label, name]} before an implementation is tried, its row after.
What stops it (a crash, a poisoned device) thus loses one implementation, and another process goes on with the next.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import TextIO

import torch

from alloy.bench.autotune import tune
from alloy.bench.case import Problems, Task
from alloy.bench.measure import Bench, ceilings, chosen, items
from alloy.core.device import peak_flops


def work(task: Task, out: TextIO) -> None:
    """Measure and write."""

    def say(**line: object) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    quick = task.size != "full"
    if task.case == "ceilings":
        say(ceilings=asdict(ceilings(task.device, quick)), machine=machine(task.device))
        return
    module, _, name = task.target.partition(":")
    problems: Problems = getattr(importlib.import_module(module), name)
    bench = Bench(task.device, quick)
    if task.autotune:
        for found in tune(bench, chosen(problems(task.size), task.only)):
            say(tuned=found)
        return
    for i, item in enumerate(items(task.case, problems(task.size), task.peers, task.only)):
        if i >= task.start:
            say(begin=[item.problem.label, item.name])
            say(row=asdict(bench.measure(item)))


def machine(device: str) -> dict[str, object]:
    """Names and versions of what was measured."""
    import platform
    from datetime import UTC, datetime

    import alloy

    found: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "alloy": alloy.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": processor(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        import triton  # pyright: ignore[reportMissingImports]  comes with torch where there is a GPU

        found |= {
            "device": torch.cuda.get_device_name(),
            "memory_bytes": torch.cuda.mem_get_info()[1],
            "peak_flops": peak_flops(torch.device("cuda"), torch.bfloat16),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return found


def processor() -> str:
    """Name of the CPU."""
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({torch.backends.cpu.get_cpu_capability()})" if names else platform.processor()


def main() -> None:
    """Keep standard output for the protocol: what libraries print goes to standard error. No task: nothing to do."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    line = sys.stdin.readline()
    if line:
        work(Task(**json.loads(line)), out)


if __name__ == "__main__":
    main()
