"""Cleaning against `alloy serve` itself, with a tiny random model: what it writes is refused by the guards, and nothing is lost."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import alloy
from alloy.data.executors import Executor
from alloy.data.llm import start_server
from alloy.data.pipeline import run_stage
from alloy.data.stages.clean import CleanConfig
from alloy.errors import RecipeError
from tests.engine.conftest import build, byte_tokenizer


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is a process of its own, which must find this package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(alloy.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.multi
def test_a_server_of_our_own_cleans(tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny"
    alloy.save(build("mtp"), checkpoint, byte_tokenizer())
    texts = [
        "Home | About\n\nLet $f(x) = x^2 + 1$ be a function on the line, and $g(x) = f(x) - 1$ another one.",
        "",
        "Text.",
    ]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "rows.parquet")
    prompt = tmp_path / "short.toml"
    prompt.write_text('user = "Clean: {text}"')
    config = CleanConfig(
        mode="llm", server="auto", model=str(checkpoint), prompt=str(prompt), max_tokens=16, timeout_s=60, seed=5
    )
    manifest = run_stage(config, [str(tmp_path / "in")], tmp_path / "out", Executor(workers=1))
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["text"] for row in rows] == texts
    assert [row["clean_status"] for row in rows] == ["failed", "empty", "failed"]
    assert rows[0]["cleaned_text"] == texts[0].partition("\n\n")[2]
    assert "no answer" not in rows[0]["clean_guard"] + rows[2]["clean_guard"]
    assert rows[0]["clean_model"] == "tiny"
    assert manifest["cost"]["answers"] >= 4
    # 16 for each answer, unless it ended by itself
    assert 4 <= manifest["cost"]["completion_tokens"] <= 16 * manifest["cost"]["answers"]
    assert "failed" not in [name.partition("=")[0] for name in manifest["counts"] if name.startswith("llm_failed")]


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`alloy serve .*nowhere` ended before it served: "):
        start_server(str(tmp_path / "nowhere"))
