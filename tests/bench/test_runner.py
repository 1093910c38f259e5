"""The harness: what counts as right, what a crash costs, what is written, and how runs are compared."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from alloy.bench import peers
from alloy.bench.case import CASES, Case, Task
from alloy.bench.measure import Bench, items, relative_error
from alloy.bench.plot import draw
from alloy.bench.result import Ceilings, Row, Run, read_run, slower
from alloy.bench.runner import Plan, Workers, run_cases
from alloy.errors import DataError, ResourceError
from tests.bench import fake

ROOT = Path(__file__).parents[2]


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the package and the fake cases."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")


def run(*names: str, peer_names: list[str] | None = None) -> tuple[Run, list[str]]:
    """The fake cases of these names, in processes, and what was said meanwhile."""
    said: list[str] = []
    cases = {name: Case(f"tests.bench.fake:{name}", "any", "") for name in names}
    return run_cases(Plan(cases, "cpu", "quick", peer_names), said.append, lambda run: None), said


@pytest.mark.slow
def test_rows_of_right_and_wrong_peers(imports: None) -> None:
    """Ours and a right peer have times, a wrong peer and an absent one have none; what follows is computed."""
    found, said = run("good")
    rows = {(row.label, row.name): row for row in found.rows}
    assert {key: row.status for key, row in rows.items()} == {
        ("one", "alloy"): "ok",
        ("one", "torch"): "ok",
        ("one", "torch/wrong"): "failed",
        ("one", "fla"): "absent",
        ("two", "alloy"): "ok",
    }
    ours, peer, wrong = rows["one", "alloy"], rows["one", "torch"], rows["one", "torch/wrong"]
    assert ours.ms
    assert peer.ms
    assert wrong.ms is None
    assert wrong.error == pytest.approx(0.05, rel=1e-3)
    assert peer.ratio == pytest.approx(peer.ms / ours.ms)
    assert peer.version == torch.__version__
    assert ours.tokens_per_s == pytest.approx(100 / ours.ms * 1e3)
    floor = max(800 / found.ceilings.bytes_per_s, 100 / found.ceilings.flops_per_s["float32"]) * 1e3
    assert ours.fraction == pytest.approx(floor / ours.ms)
    assert said[:3] == ["ceilings", "good one alloy", "good one torch"]
    assert found.machine["torch"] == torch.__version__


@pytest.mark.slow
def test_a_crash_costs_one_row(imports: None) -> None:
    """Wrong numbers and NaN give no time; after an exception or an abort another process goes on with the next."""
    found, _ = run("bad")
    rows = {(row.label, row.name): row for row in found.rows}
    assert [row.status for row in found.rows] == ["failed", "failed", "error", "ok", "error", "ok"]
    assert rows["nan", "alloy"].error == float("inf")
    assert rows["crash", "alloy"].message == "RuntimeError: device-side assert"
    assert rows["crash", "torch"].status == "ok"
    assert rows["crash", "torch"].ratio is None
    assert "abort" in (rows["abort", "alloy"].message or "").lower() or "-6" in (rows["abort", "alloy"].message or "")
    assert all(row.ms is None for row in found.rows if row.status != "ok")


@pytest.mark.slow
def test_a_case_that_cannot_go_on_says_so(imports: None) -> None:
    """Its rows stay, and its error is a row."""
    found, _ = run("broken", peer_names=[])
    assert [(row.label, row.status) for row in found.rows] == [("first", "ok"), ("", "error")]
    assert found.rows[1].message == "ValueError: no such shape"


@pytest.mark.slow
def test_a_spare_process_does_the_next_task(imports: None) -> None:
    """With a spare the same rows come, and no process is left."""
    with Workers(spare=True) as workers:
        for start, expected in ((0, 2), (1, 1)):
            lines = list(workers.lines(Task("good", "tests.bench.fake:good", "cpu", "tiny", start, peers=[])))
            assert [key for line in lines for key in line] == ["begin", "row"] * expected
        last = workers._spare
        assert last is not None
        assert last.process.poll() is None
    assert last.process.poll() is not None


def test_ceilings_that_fail_are_an_error(imports: None) -> None:
    """There is nothing to compare with then."""
    with pytest.raises(ResourceError, match="ceilings of cuda could not be measured"):
        run_cases(Plan({}, "cuda", "quick"), lambda line: None, lambda run: None)


def test_items_are_chosen_by_peer_and_label() -> None:
    """`wanted` names peers, `only` parts of labels."""
    chosen = items("good", fake.good("tiny"), ["torch"], ["one"])
    assert [(item.problem.label, item.name) for item in chosen] == [
        ("one", "alloy"),
        ("one", "torch"),
        ("one", "torch/wrong"),
    ]
    assert [item.problem.label for item in items("good", fake.good("tiny"), [], ["w"])] == ["two"]


def test_errors_are_relative_and_never_hide_nan() -> None:
    """|a - b| / |b| in float64; a shape of its own is a mistake of the case."""
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    with pytest.raises(ValueError, match=r"an output is \(1, 2\); the reference is \(2,\)"):
        relative_error(expected[None], expected)


def test_outputs_of_both_sides_must_be_the_same() -> None:
    """An output that the reference does not know is not silently skipped."""
    problem = fake.problem("extra", ours=lambda x: {"y": 2 * x, "z": x})
    with pytest.raises(ValueError, match=r"\['z'\] are not computed by both sides"):
        Bench("cpu", True).errors(problem, problem.ours)


@pytest.mark.parametrize("name", CASES)
def test_cases_are_right_where_they_are_small(name: str) -> None:
    """Every case, at its tiny size on this machine: ours and the installed peers compute what the reference does."""
    module, _, function = CASES[name].target.partition(":")
    problems = getattr(importlib.import_module(module), function)
    bench, labels = Bench("cpu", True), []
    for item in items(name, problems("tiny")):
        row = bench.measure(item)
        assert row.status in ("ok", "absent"), row
        assert row.status == "absent" or row.bytes > 0, row
        if item.name == "alloy":
            labels.append(item.problem.label)
    assert labels
    assert len(set(labels)) == len(labels), "labels must tell problems apart"


def test_full_and_quick_problems_have_floors_and_labels_of_their_own() -> None:
    """The published shapes can be described without a GPU; quick ones are among the full ones."""
    for name, case in CASES.items():
        module, _, function = case.target.partition(":")
        problems = getattr(importlib.import_module(module), function)
        full, quick = ([p.label for p in problems(size)] for size in ("full", "quick"))
        assert len(set(full)) == len(full), name
        assert quick, name
        assert len(quick) <= len(full), name


def some_run(ms: float = 2.0, status: str = "ok") -> Run:
    """One row of ours, one of decode, one peer."""
    found = Run({"device": "test", "date": "2026-11-22"}, Ceilings(1e12, {"bfloat16": 1e14}))
    good = status == "ok"
    found.add(Row("ssd-fwd", "a", "alloy", status=status, ms=ms if good else None, bytes=1e9, flops=1e10))
    found.add(Row("ssd-fwd", "a", "fla", ms=8.0, bytes=1e9, flops=1e10))
    for batch in (1, 8):
        label, rate = f"Nano-9B 8k batch {batch}", batch * 100.0
        found.add(Row("decode", label, "alloy", ms=10.0, tokens_per_s=rate, bytes=8e9, flops=batch * 1e9))
    return found


def test_floor_and_ratio_follow_from_the_run() -> None:
    """The larger of bytes / bandwidth (1 ms) and flops / rate (0.1 ms), over the time."""
    ours, peer = some_run().rows[:2]
    assert (ours.fraction, ours.bound) == (pytest.approx(0.5), "bytes")
    assert peer.ratio == pytest.approx(4.0)
    assert ours.ratio is None


def test_json_lines_come_back_the_same(tmp_path: Path) -> None:
    """A head with machine and ceilings, then rows, all plain JSON."""
    path = tmp_path / "deep" / "run.jsonl"
    some_run().write(path)
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["kind"] == "run"
    assert head["ceilings"] == {"bytes_per_s": 1e12, "flops_per_s": {"bfloat16": 1e14}}
    assert {row["kind"] for row in rows} == {"row"}
    assert {"case", "label", "name", "status", "ms", "ratio", "fraction", "bound", "peak_bytes", "error"} <= rows[
        0
    ].keys()
    assert read_run(path) == some_run()


@pytest.mark.parametrize("row", [None, '{"case": "a"}', '{"case": "a", "label": "b", "name": "c", "ms": "1"}'])
def test_what_is_no_result_is_refused(row: str | None, tmp_path: Path) -> None:
    """The message names the file; so too where a row is damaged."""
    path = tmp_path / "x.jsonl"
    head = '{"kind": "run", "ceilings": {"bytes_per_s": 1.0, "flops_per_s": {}}}'
    path.write_text('{"a": 1}\n' if row is None else f"{head}\n{row}\n")
    with pytest.raises(DataError, match=r"x.jsonl is not a result of `alloy bench --json`"):
        read_run(path)


def test_slower_rows_are_named() -> None:
    """More than 5% counts, by the share of the floor; a failure counts; other ceilings do not."""
    old = some_run().rows
    assert slower(some_run(2.08).rows, old) == []
    assert slower(some_run(1.0).rows, old) == []
    (line,) = slower(some_run(3.0).rows, old)
    assert line.startswith("ssd-fwd a: 50% slower, 0.333 of the floor (3 ms), was 0.500 (2 ms)")
    assert slower(some_run(status="failed").rows, old) == ["ssd-fwd a: failed, was 2 ms"]
    half = Run({}, Ceilings(0.5e12, {"bfloat16": 1e14}))
    half.add(Row("ssd-fwd", "a", "alloy", ms=4.0, bytes=1e9, flops=1e10))
    assert slower(half.rows, old) == []


def test_plot_shows_cases_and_decode(tmp_path: Path) -> None:
    """An SVG with the name of each case and model."""
    draw(some_run(), tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert text.startswith("<?xml")
    # the roof of the dtype that the rows compute in, in a unit in which a CPU's is not 0
    assert "<!-- 100 TFLOP/s bfloat16 -->" in text
    draw(Run({}, Ceilings(1e12, {"bfloat16": 1e14})), tmp_path / "empty.svg")
    assert (tmp_path / "empty.svg").exists()


def test_versions_of_peers() -> None:
    """Installed ones say theirs; labels carry a variant after the slash."""
    assert peers.version("torch/F.conv1d") == torch.__version__
    assert (peers.version("mamba-ssm/c128") is None) == (importlib.util.find_spec("mamba_ssm") is None)


@pytest.mark.slow
def test_the_cpu_case_runs_quickly() -> None:
    """As `alloy bench cpu --quick` runs it: the scan, right, timed and against their floors."""
    plan = Plan({"cpu": CASES["cpu"]}, "cpu", "quick", [], ["scan 1 x 1024 fwd"])
    rows = run_cases(plan, lambda line: None, lambda run: None).rows
    assert [row.label for row in rows] == ["ssd_scan 1 x 1024 fwd", "ssd_scan 1 x 1024 fwd+bwd"]
    assert all(row.status == "ok" and row.ms and row.fraction and row.tokens_per_s for row in rows)
