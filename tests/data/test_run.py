"""The shipped chain, from an archive to a trained model."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alloy.core.recipe import RunOptions
from alloy.data.run import DataRecipe
from alloy.data.shards import TokenCorpus
from alloy.data.tokens import load_tokenizer


@pytest.mark.slow
def test_ten_pages_become_a_model(tmp_path: Path) -> None:
    """Formulas of every carrier arrive as LaTeX, the copy and the French page are left out, tokens are the texts, the model is there."""
    result = DataRecipe.load("data/tiny").run(RunOptions(run_dir=tmp_path / "run", quiet=True))
    run = tmp_path / "run"
    rows = {row["url"].rpartition(".example/")[2]: row for row in pq.read_table(run / "04-dedup").to_pylist()}
    assert len(rows) == 10
    carriers = {name: row["math_carriers"] for name, row in rows.items()}
    assert carriers["triangles/pythagoras"] == ["tex"]
    assert carriers["series/geometric"] == ["katex", "mathml"]
    assert carriers["code/newton"] == ["script"]
    assert carriers["chance/birthdays"] == ["image"]
    assert carriers["numbers/primes"] == ["asciimath"]
    assert r"$e^{-n^2/730}$" in rows["chance/birthdays"]["cleaned_text"]
    assert "        guess = (guess + a / guess) / 2\n    return guess" in rows["code/newton"]["cleaned_text"]
    for row in rows.values():
        assert "Home" not in row["cleaned_text"]
        assert "Terms of use" not in row["cleaned_text"]
    assert rows["empty"]["render_status"] == "empty"
    assert {name for name, row in rows.items() if not row["dup_keep"]} < {
        "triangles/pythagoras",
        "triangles/pythagoras-copy",
    }
    assert {name for name, row in rows.items() if row["lang"] == "fr"} == {"fr/suites"}
    corpus = TokenCorpus(run / "05-tokenize")
    tokenizer = load_tokenizer(run / "05-tokenize" / "tokenizer")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in corpus]
    wanted = [r["cleaned_text"] for r in rows.values() if r["lang"] == "en" and r["dup_keep"] and r["cleaned_text"]]
    assert sorted(texts) == sorted(wanted)
    assert result.checkpoint
    assert (result.checkpoint / "model.safetensors").is_file()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert [stage["rows_in"] for stage in manifest["stages"]] == [10, 10, 10, 10, 8]
