import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shouting import ShoutConfig

from alloy.core.recipe import RunOptions
from alloy.data.card import CardTable, collect, write_card
from alloy.data.executors import Executor
from alloy.data.pipeline import read_manifest, run_stage
from alloy.data.run import DataRecipe
from alloy.data.stages.remove import RemoveConfig
from alloy.data.status import stage_states
from alloy.errors import DataError, RecipeError

SERIAL = Executor(kind="serial")


def rows() -> list[dict[str, object]]:
    """Eleven pages with everything a card counts."""
    return [
        {
            "id": f"page{i}",
            "url": f"https://{'maths' if i % 3 else 'code'}.example:80/p{i}",
            "text": "x" * (2**i),
            "n_math": i,
            "math_carriers": ["tex", "image"] if i % 2 else ["tex"],
            "lang": "en" if i < 8 else "fa",
            "band": ("<3", "3", "4plus")[i % 3],
            "dup_keep": i != 4,
            "contaminated_with": ["gsm8k"] if i == 5 else [],
        }
        for i in range(11)
    ]


def write_rows(folder: Path) -> Path:
    """The rows as JSONL."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


def test_removal_knows_pages_hosts_and_beginnings(tmp_path: Path) -> None:
    """With and without scheme; a host stands for all below it, but not for others that end alike."""
    urls = [
        "http://a.example/x", "https://a.example/x/", "https://a.example/x?q=1", "https://b.example/private/1",
        "https://b.example/privateer", "https://www.c.example/y", "https://notc.example/y", "https://d.example/", "", None,
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"url": url, "n": i}) + "\n" for i, url in enumerate(urls)))
    (tmp_path / "list").write_text(
        "# by request\nhttps://a.example/x\nb.example/private/*\nC.example\nhttps://d.example\n\n"
    )
    manifest = run_stage(RemoveConfig(urls=tmp_path / "list"), [str(tmp_path / "in.jsonl")], tmp_path / "out", SERIAL)
    assert pq.read_table(tmp_path / "out")["n"].to_pylist() == [2, 4, 6, 8, 9]
    assert manifest["counts"] == {"removed": 5}


def test_a_host_alone_is_every_page_of_it(tmp_path: Path) -> None:
    """`https://d.example` is one page, `d.example` is all."""
    (tmp_path / "in.jsonl").write_text('{"url": "https://d.example/"}\n{"url": "https://d.example:8080/q"}\n')
    (tmp_path / "list").write_text("d.example\n")
    manifest = run_stage(RemoveConfig(urls=tmp_path / "list"), [str(tmp_path / "in.jsonl")], tmp_path / "out", SERIAL)
    assert manifest["rows_out"] == 0
    with pytest.raises(DataError, match="there is no such file"):
        run_stage(RemoveConfig(urls=tmp_path / "no"), [str(tmp_path / "in.jsonl")], tmp_path / "other", SERIAL)


def test_a_card_counts_what_is_kept(tmp_path: Path) -> None:
    """Duplicates count as rows, not as text; histograms, values and hosts by hand."""
    run_stage(ShoutConfig(), [str(write_rows(tmp_path / "in"))], tmp_path / "out", SERIAL)
    found = collect(tmp_path / "out", seed=0)
    assert (found.rows, found.kept) == (11, 10)
    # cleaned_text, which the stage made, is what counts
    assert found.chars == sum(2**i for i in range(11) if i != 4)
    assert found.lengths == {2**i: 1 for i in range(11) if i != 4}
    assert found.values["lang"] == {"en": 7, "fa": 3}
    assert found.values["band"] == {"<3": 4, "3": 3, "4plus": 3}
    assert found.values["host"] == {"maths.example": 6, "code.example": 4}
    assert found.values["math_carriers"] == {"tex": 10, "image": 5}
    assert found.values["contaminated_with"] == {"gsm8k": 1}
    assert found.values["dup_keep"] == {"true": 10, "false": 1}
    assert len(found.samples) == 10
    assert {name for name, _, _ in found.samples} <= {f"page{i}" for i in range(11)} - {"page4"}
    assert collect(tmp_path / "out", seed=0).samples == found.samples != collect(tmp_path / "out", seed=1).samples


@pytest.mark.slow
def test_datasets_reads_the_result(tmp_path: Path) -> None:
    """Configs by band as Nemotron-CC-Math has them, column text, without duplicates."""
    datasets = pytest.importorskip("datasets")
    run_stage(ShoutConfig(times=2), [str(write_rows(tmp_path / "in"))], tmp_path / "out", SERIAL)
    write_card([tmp_path / "out"], tmp_path / "card", CardTable(title="A set", license="odc-by"))
    folder = str(tmp_path / "card" / "dataset")
    assert datasets.get_dataset_config_names(folder) == ["3", "4plus"]
    kept = [row for row in rows() if row["dup_keep"]]
    for band in ("3", "4plus"):
        loaded = datasets.load_dataset(folder, band, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded["text"] == [str(row["text"]).upper() * 2 for row in kept if row["band"] == band]
        assert loaded["id"] == [row["id"] for row in kept if row["band"] == band]
    card = (tmp_path / "card" / "dataset" / "README.md").read_text()
    assert "license: odc-by" in card
    assert "| shout |" in card
    page = (tmp_path / "card" / "report.html").read_text()
    assert "clean_status empty" not in page
    assert "maths.example" in page
    # writing it again leaves one copy of each row
    write_card([tmp_path / "out"], tmp_path / "card")
    assert pq.read_table(tmp_path / "card" / "dataset" / "3").num_rows == 3


def test_reasons_come_with_examples(tmp_path: Path) -> None:
    """Which rows a status befell."""
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "", "url": "http://b.example"}\n')
    run_stage(ShoutConfig(), [str(tmp_path / "in.jsonl")], tmp_path / "out", SERIAL)
    write_card([tmp_path / "out"], tmp_path / "card")
    page = (tmp_path / "card" / "report.html").read_text()
    assert "clean_status empty" in page
    assert "http://b.example" in page


def test_a_card_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Unfinished stages, and folders without any."""
    with pytest.raises(DataError, match="no folder of a stage"):
        stage_states(tmp_path)
    write_rows(tmp_path / "in")
    with pytest.raises(DataError, match="cannot shout"):
        run_stage(ShoutConfig(refuse_at="x"), [str(tmp_path / "in")], tmp_path / "out", SERIAL)
    with pytest.raises(DataError, match="is not finished"):
        write_card([tmp_path / "out"], tmp_path / "card")
    assert stage_states(tmp_path / "out")[0]["status"] == "failed"


def chain(tmp_path: Path, **more: object) -> DataRecipe:
    """Remove, then remove again."""
    for name, line in (("list", "code.example\n"), ("list2", "https://maths.example:80/p1\n")):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(line)
    stages = [
        {"stage": "remove", "input": str(tmp_path / "in"), "urls": str(tmp_path / "list")},
        {"stage": "remove", "urls": str(tmp_path / "list2"), "only": 'lang == "en"'},
    ]
    return DataRecipe.model_validate({"executor": {"kind": "serial"}, "stages": stages, **more})


def test_a_chain_feeds_each_stage_by_the_one_before(tmp_path: Path) -> None:
    """And leaves a report, statistics, a data set, and states that add up."""
    write_rows(tmp_path / "in")
    result = chain(tmp_path).run(RunOptions(run_dir=tmp_path / "run", quiet=True))
    assert result.dir == tmp_path / "run"
    states = stage_states(tmp_path / "run")
    assert [(s["stage"], s["status"], s["parts"], s["rows_in"], s["rows_out"]) for s in states] == [
        ("remove", "done", "1/1", 11, 7),
        ("remove", "done", "1/1", 5, 4),
    ]
    assert read_manifest(tmp_path / "run" / "02-remove")["losses"] == {"not asked for": 2}
    assert pq.read_table(tmp_path / "run" / "02-remove")["id"].to_pylist() == ["page2", "page4", "page5", "page7"]
    assert json.loads((tmp_path / "run" / "stats.json").read_text())["kept"] == 3
    assert pa.concat_tables(
        [pq.read_table(tmp_path / "run" / "dataset" / band) for band in ("3", "4plus")]
    )["id"].to_pylist() == ["page7", "page2", "page5"]  # fmt: skip


def test_a_chain_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A recipe with other settings is refused for the same folder."""
    write_rows(tmp_path / "in")
    recipe = chain(tmp_path)
    (tmp_path / "list2").unlink()
    with pytest.raises(DataError, match="no such file"):
        recipe.run(RunOptions(run_dir=tmp_path / "run", quiet=True))
    first = (tmp_path / "run" / "01-remove" / "part-00000.parquet").stat().st_mtime_ns
    chain(tmp_path).run(RunOptions(run_dir=tmp_path / "run", resume="auto", quiet=True))
    assert (tmp_path / "run" / "01-remove" / "part-00000.parquet").stat().st_mtime_ns == first
    with pytest.raises(RecipeError, match="holds a run already"):
        chain(tmp_path).run(RunOptions(run_dir=tmp_path / "run", quiet=True))


def test_recipes_are_checked_by_stage(tmp_path: Path) -> None:
    """Unknown stages and keys by file and line, with the nearest that exist."""
    file = tmp_path / "r.toml"
    file.write_text('command = "data run"\n[[stages]]\nstage = "remov"\ninput = "x"\n')
    with pytest.raises(RecipeError, match=r"r.toml:3.*remov"):
        DataRecipe.load(file)
    file.write_text('command = "data run"\n[[stages]]\nstage = "remove"\ninput = "x"\nurl = "y"\nurls = "z"\n')
    with pytest.raises(RecipeError, match=r'r.toml:5: unknown key.*url.*Did you mean "stages.0.urls"'):
        DataRecipe.load(file)
    file.write_text('command = "data run"\n[[stages]]\nstage = "remove"\nurls = "z"\n')
    with pytest.raises(RecipeError, match=r"stages\[0\] has no input"):
        DataRecipe.load(file)
