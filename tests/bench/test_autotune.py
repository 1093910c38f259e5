"""Tables of kernel configurations: the fastest candidate that is right everywhere."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alloy.bench.autotune import merged_table, table_path, tune
from alloy.bench.case import Outputs, Problem
from alloy.bench.measure import Bench
from alloy.ops.triton import tuning
from tests.bench import fake

SLOW, FAST, WRONG = {"wait": 3, "factor": 2}, {"wait": 0, "factor": 2}, {"wait": 0, "factor": 3}


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An op with three candidates, and tables of its own."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setitem(tuning.CANDIDATES, "double", (SLOW, FAST, WRONG))
    return tmp_path / f"{tuning.arch()}.json"


def double(x: torch.Tensor) -> Outputs:
    """x times what the configuration says, after a wait in milliseconds."""
    config = tuning.pick("double", str(len(x)))
    time.sleep(config["wait"] * 1e-3)
    return {"y": x * config["factor"]}


def problems() -> Iterator[Problem]:
    """Two of one key."""
    for label in ("a", "b"):
        yield fake.problem(label, ours=double)


def test_the_fastest_right_candidate_wins() -> None:
    """The slow one is right, the wrong one is quick; both problems of the key agree."""
    found = list(tune(Bench("cpu", True), problems()))
    assert [row["entry"] for row in found] == ["double/100"] * 2
    assert found[-1]["config"] == FAST
    relative = found[-1]["relative"]
    assert isinstance(relative, list)
    assert relative[0] > 1.5
    assert relative[1:] == [1.0, None]


def test_tables_are_merged(table: Path) -> None:
    """New entries replace old ones of the same key, and are picked from then on."""
    assert table_path() == table
    table.write_text(merged_table({"double/100": SLOW, "other/1": {"BLOCK": 1}}))
    table.write_text(merged_table({"double/100": FAST}))
    assert json.loads(table.read_text()) == {"double/100": FAST, "other/1": {"BLOCK": 1}}
    tuning._pick.cache_clear()
    assert tuning.pick("double", "100") == FAST
    tuning._pick.cache_clear()
