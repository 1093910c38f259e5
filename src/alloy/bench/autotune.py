"""`alloy bench --autotune`: times the candidates of every kernel that a problem uses, and keeps the fastest right one."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from alloy.bench.case import Problem
from alloy.bench.measure import Bench, Item
from alloy.bench.result import OURS
from alloy.ops.triton import tuning


def tune(bench: Bench, problems: Iterator[Problem]) -> Iterator[dict[str, object]]:
    """The best configuration of each "op/key", one dict each: entry, config, and the time of each candidate relative to it.

    Several problems may share a key: each candidate's times, relative to the best of the problem, are added up, and a later
    dict of the same entry replaces an earlier one. A candidate that is wrong once is out.
    """
    totals: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for problem in problems:
        item = Item("autotune", problem, OURS, problem.ours)
        tuning.PICKED.clear()
        problem.ours(bench.draw(problem))
        for op, key in sorted(tuning.PICKED):
            candidates = tuning.CANDIDATES[op]
            times = [_time(bench, item, op, config) for config in candidates]
            best = min(times)
            before = totals[op, key] or [0.0] * len(times)
            totals[op, key] = [
                old + (ms / best if ms < math.inf else math.inf) for old, ms in zip(before, times, strict=True)
            ]
            score = totals[op, key]
            if min(score) < math.inf:
                chosen = candidates[score.index(min(score))]
                relative = [round(value / min(score), 3) if value < math.inf else None for value in score]
                yield {"entry": f"{op}/{key}", "config": dict(chosen), "relative": relative}


def _time(bench: Bench, item: Item, op: str, config: tuning.Config) -> float:
    """Milliseconds of the problem with `op` in this configuration; infinite where its numbers are wrong."""
    with tuning.override(op, config):
        errors = bench.errors(item.problem, item.run)
        if any(not error <= item.problem.limit(output) for output, error in errors.items()):
            return math.inf
        return bench.time(item)["ms"]


def table_path() -> Path:
    """Where this machine's table is, or would be."""
    return tuning.TABLES / f"{tuning.arch()}.json"


def merged_table(entries: Mapping[str, tuning.Config]) -> str:
    """This machine's table with `entries`, as the text of its file."""
    merged = {**tuning.table(tuning.arch()), **entries}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(dict(merged[key]))}" for key in sorted(merged))
    return "{\n" + lines + "\n}\n"
