import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shouting import ShoutConfig

from alloy.data.executors import Executor
from alloy.data.pipeline import Waiting, read_manifest, run_stage
from alloy.data.stages.remove import RemoveConfig
from alloy.errors import DataError, RecipeError, ResourceError

SERIAL = Executor(kind="serial")


def make_inputs(folder: Path, files: int = 5, rows: int = 23) -> list[list[str]]:
    """JSONL files of texts; the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [[f"row {row} of {file}" if row else "" for row in range(rows + file)] for file in range(files)]
    for number, rows_of_file in enumerate(texts):
        lines = [json.dumps({"id": f"{number}-{i}", "text": text, "x": i}) for i, text in enumerate(rows_of_file)]
        (folder / f"{number}.jsonl").write_text("".join(line + "\n" for line in lines))
    return texts


def outputs(out: Path) -> dict[str, bytes]:
    """The parts, byte by byte."""
    return {file.name: file.read_bytes() for file in sorted(out.glob("part-*"))}


def test_a_stage_keeps_rows_order_and_columns(tmp_path: Path) -> None:
    """Every row once, in order, extra columns untouched, counts as by hand."""
    texts = make_inputs(tmp_path / "in")
    manifest = run_stage(ShoutConfig(times=2), [str(tmp_path / "in")], tmp_path / "out", SERIAL)
    table = pq.read_table(tmp_path / "out")
    flat = [text for rows in texts for text in rows]
    assert table["cleaned_text"].to_pylist() == [text.upper() * 2 for text in flat]
    assert table["text"].to_pylist() == flat
    assert table["x"].to_pylist() == [i for rows in texts for i in range(len(rows))]
    assert table["place"].to_pylist() == [
        f"{part}:{row} of {len(flat)}" for part, rows in enumerate(texts) for row in range(len(rows))
    ]
    assert manifest["rows_in"] == manifest["rows_out"] == len(flat) == 125
    assert manifest["counts"] == {
        "clean_status=empty": 5,
        "clean_status=ok": 120,
        "letters": sum(map(len, flat)),
    }
    assert [part["rows_in"] for part in manifest["parts"]] == [23, 24, 25, 26, 27]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_the_output_of_a_stage_is_the_input_of_another(tmp_path: Path, form: str) -> None:
    """All formats give back the same rows, and equal runs give equal bytes."""
    texts = make_inputs(tmp_path / "in", files=2)
    for name in ("a", "b"):
        run_stage(ShoutConfig(format=form), [str(tmp_path / "in")], tmp_path / name, SERIAL)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b") != {}
    run_stage(ShoutConfig(format="parquet"), [str(tmp_path / "a")], tmp_path / "c", SERIAL)
    assert pq.read_table(tmp_path / "c")["text"].to_pylist() == [text for rows in texts for text in rows]


@pytest.mark.multi
def test_processes_write_the_bytes_of_a_serial_run(tmp_path: Path) -> None:
    """Whoever works, the parts are the same."""
    make_inputs(tmp_path / "in")
    run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "serial", SERIAL)
    run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "process", Executor(workers=2))
    assert outputs(tmp_path / "serial") == outputs(tmp_path / "process") != {}


@pytest.mark.multi
@pytest.mark.slow
def test_ray_writes_the_bytes_of_a_serial_run(tmp_path: Path) -> None:
    """On a real local Ray, through Ray Data and its actors."""
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'alloy-lm[scale]'")
    make_inputs(tmp_path / "in")
    urls = tmp_path / "urls"
    urls.write_text("nowhere.example\n")
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl").write_text('{"url": "http://nowhere.example/x", "text": "gone"}\n')
    for file in (tmp_path / "in").glob("[0-9].jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**row, "url": f"http://{row['id']}.example"}) + "\n" for row in rows))
    config = RemoveConfig(urls=urls)
    run_stage(config, [str(tmp_path / "in")], tmp_path / "serial", SERIAL)
    manifest = run_stage(config, [str(tmp_path / "in")], tmp_path / "ray", Executor(kind="ray", workers=2))
    assert manifest["rows_in"] - manifest["rows_out"] == 2
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "serial") != {}


def test_tasks_of_an_array_share_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each does its share of each pass; the last one finishes. Schedulers name index and count in the environment."""
    make_inputs(tmp_path / "in")
    run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "serial", SERIAL)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for index in (1, 2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        with pytest.raises(Waiting, match="of 5 parts of lengths are other tasks' work"):
            run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "out", Executor(kind="array"))
    done = 0
    for index in (3, 1, 2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        try:
            run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "out", Executor(kind="array"))
            done = index
        except Waiting:
            assert index != 2
    assert done == 2
    assert outputs(tmp_path / "out") == outputs(tmp_path / "serial")
    assert read_manifest(tmp_path / "out")["status"] == "done"


def test_an_array_without_a_scheduler_is_refused(tmp_path: Path) -> None:
    """Its index must come from somewhere."""
    make_inputs(tmp_path / "in", files=1)
    with pytest.raises(RecipeError, match=r"executor\.array_index"):
        run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "out", Executor(kind="array"))


def test_a_rerun_does_what_is_missing(tmp_path: Path) -> None:
    """A part with its marker is left alone; one without is made again, to the same bytes."""
    make_inputs(tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="cannot shout"):
        run_stage(ShoutConfig(refuse_at="row 5 of 3"), [str(tmp_path / "in")], out, SERIAL)
    assert read_manifest(out)["status"] == "failed"
    assert sorted(outputs(out)) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert not list(out.glob(".*tmp"))
    with pytest.raises(RecipeError, match="refuse_at = row 5 of 3, not"):
        run_stage(ShoutConfig(), [str(tmp_path / "in")], out, SERIAL)
    run_stage(ShoutConfig(), [str(tmp_path / "in")], out, SERIAL, overwrite=True)
    whole = outputs(out)
    kept = (out / "part-00001.parquet").stat().st_mtime_ns
    (out / "_done" / "part-00002.json").write_text("{cut off")
    (out / "_done" / "part-00004.json").unlink()
    manifest = json.loads((out / "_manifest.json").read_text())
    (out / "_manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (out / "part-00004.parquet").unlink()
    again = run_stage(ShoutConfig(), [str(tmp_path / "in")], out, SERIAL)
    assert outputs(out) == whole
    assert (out / "part-00001.parquet").stat().st_mtime_ns == kept
    assert again["rows_out"] == 125


def test_a_changed_input_is_refused(tmp_path: Path) -> None:
    """Half of the parts from old rows and half from new ones would be nobody's data."""
    make_inputs(tmp_path / "in")
    run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "out", SERIAL)
    with (tmp_path / "in" / "0.jsonl").open("a") as file:
        file.write('{"id": "new", "text": "one more", "x": 1}\n')
    with pytest.raises(RecipeError, match="other inputs, or they have changed"):
        run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "out", SERIAL)


@pytest.mark.multi
def test_a_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    """Its part is done again; one that dies again is named."""
    make_inputs(tmp_path / "in")
    run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "serial", SERIAL)
    once = ShoutConfig(die_at="row 5 of 3", die_once=str(tmp_path / "died"))
    manifest = run_stage(once, [str(tmp_path / "in")], tmp_path / "out", Executor(workers=2))
    assert (tmp_path / "died").exists()
    assert manifest["rows_out"] == 125
    assert outputs(tmp_path / "out") == outputs(tmp_path / "serial")
    with pytest.raises(ResourceError, match=r"3\.jsonl \(part-00003\): the process that worked on it died twice"):
        run_stage(ShoutConfig(die_at="row 5 of 3"), [str(tmp_path / "in")], tmp_path / "bad", Executor(workers=2))


@pytest.mark.multi
def test_an_error_in_a_worker_is_the_users_error(tmp_path: Path) -> None:
    """What a stage says reaches the main process."""
    make_inputs(tmp_path / "in")
    with pytest.raises(DataError, match="cannot shout row 3 of 1"):
        run_stage(ShoutConfig(refuse_at="row 3 of 1"), [str(tmp_path / "in")], tmp_path / "out", Executor(workers=2))


SCRIPT = """
import sys
from pathlib import Path
from shouting import ShoutConfig
from alloy.cli import main
from alloy.data.executors import Executor
from alloy.data.pipeline import run_stage
from alloy.errors import AlloyError
if __name__ == "__main__":
    try:
        run_stage(ShoutConfig(slow_s=0.02), [sys.argv[1]], Path(sys.argv[2]), Executor(kind=sys.argv[3], workers=2))
    except AlloyError as error:
        sys.exit(error.exit_code)
"""


def start(tmp_path: Path, kind: str) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, slow enough to be stopped, once two parts are there."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / "out"), kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while len(list((tmp_path / "out" / "_done").glob("*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    return process


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["serial", "process"])
def test_ctrl_c_leaves_whole_parts(tmp_path: Path, kind: str) -> None:
    """130, no temporary file, and the same command goes on to the bytes of a run that nobody stopped."""
    make_inputs(tmp_path / "in", files=9)
    process = start(tmp_path, kind)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert read_manifest(tmp_path / "out")["status"] == "interrupted"
    assert not list((tmp_path / "out").glob(".*tmp"))
    run_stage(ShoutConfig(slow_s=0.02), [str(tmp_path / "in")], tmp_path / "out", SERIAL)
    run_stage(ShoutConfig(slow_s=0.02), [str(tmp_path / "in")], tmp_path / "whole", SERIAL)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_missing_column_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    """Before anything is written."""
    (tmp_path / "a.jsonl").write_text('{"url": "http://x", "binary_content": ""}\n')
    with pytest.raises(
        DataError, match=r'a.jsonl has no column "text", which shout needs; `alloy data render` makes it'
    ):
        run_stage(ShoutConfig(), [str(tmp_path / "a.jsonl")], tmp_path / "out", SERIAL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a.jsonl:2: not JSON"),
        ('{"text": "a"}\n[1]\n', r"a.jsonl:2: a JSON list where an object is wanted"),
        ('{"text": "a"}\n{"text": 5}\n', r"a.jsonl:1-2: .*one type"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    """File and line."""
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        run_stage(ShoutConfig(), [str(tmp_path / "a.jsonl")], tmp_path / "out", SERIAL)


def test_no_input_is_refused(tmp_path: Path) -> None:
    """By what was named."""
    with pytest.raises(DataError, match="there is no such file"):
        run_stage(ShoutConfig(), [str(tmp_path / "nothing*.jsonl")], tmp_path / "out", SERIAL)
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no file ends in"):
        run_stage(ShoutConfig(), [str(tmp_path / "in")], tmp_path / "out", SERIAL)


def test_row_groups_are_parts(tmp_path: Path) -> None:
    """A large Parquet file is cut at row groups, and rows without an id get one that does not depend on the cut."""
    table = pa.table({"text": [f"{i} " * 9000 for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=13, compression="none")
    manifest = run_stage(ShoutConfig(part_mib=1), [str(tmp_path / "a.parquet")], tmp_path / "out", SERIAL)
    assert manifest["num_parts"] > 2
    run_stage(ShoutConfig(part_mib=1000), [str(tmp_path / "a.parquet")], tmp_path / "one", SERIAL)
    many, one = pq.read_table(tmp_path / "out"), pq.read_table(tmp_path / "one")
    assert many["id"].to_pylist() == one["id"].to_pylist()
    assert len(set(many["id"].to_pylist())) == 100
    assert many["cleaned_text"] == one["cleaned_text"]


def test_an_empty_file_is_an_empty_part(tmp_path: Path) -> None:
    """With the columns that others have."""
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    manifest = run_stage(ShoutConfig(), [str(tmp_path / "a.parquet")], tmp_path / "out", SERIAL)
    assert manifest["rows_out"] == 0
    assert "cleaned_text" in pq.read_table(tmp_path / "out" / "part-00000.parquet").column_names


def test_a_list_of_urls_is_rows(tmp_path: Path) -> None:
    """One a line, compressed or not; comments and blank lines are none."""
    text = "# wanted\nhttps://a.example/x\n\n  https://b.example/y \nhttps://c.example/z\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "gone").write_text("b.example\n")
    config = RemoveConfig(urls=tmp_path / "gone")
    run_stage(config, [str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz")], tmp_path / "out", SERIAL)
    assert pq.read_table(tmp_path / "out")["url"].to_pylist() == 2 * ["https://a.example/x", "https://c.example/z"]
