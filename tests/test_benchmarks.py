"""The scripts in benchmarks/ whose figures the documents quote run, in small, and say what they should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, out: Path, *options: str) -> dict[str, Any]:
    """What `--quick` writes; an exit code other than 0 fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *options, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_exactness(tmp_path: Path) -> None:
    """Nine ways, four families, no answer that differs, and each way was taken."""
    result = run("exactness.py", tmp_path / "out.json")
    assert len(result["cells"]) == 9 * 4
    assert all(cell["answers"] >= 2 and not cell["missing"] for cell in result["cells"])
    assert result["differing"] == 0
    assert result["answers"] == sum(cell["answers"] for cell in result["cells"])


@pytest.mark.slow
def test_prefix_cache(tmp_path: Path) -> None:
    """Every resend finds all but one token; a bounded cache serves no more than one that never evicts."""
    result = run("prefix_cache.py", tmp_path / "out.json")
    assert [row["wrong"] for row in result["resend"]["rows"]] == [[], []]
    assert all(row["process_time"]["median"] > 0 for row in result["cost"]["rows"])
    assert {row["template"] for row in result["chats"]["rows"]} == {"keeps history", "drops thoughts"}
    assert all(0 < row["served"] <= row["unbounded"] < row["prompt_tokens"] for row in result["chats"]["rows"])


@pytest.mark.slow
def test_streams(tmp_path: Path) -> None:
    """A row for the engine and one for the server, which fails no request; eight streams are more than one."""
    result = run("streams.py", tmp_path / "out.json", "--only", "hybrid", "--no-peer")
    assert [row["way"] for row in result["rows"]] == ["alloy engine", "alloy serve"]
    assert result["rows"][1]["failed"] == 0
    assert all(row["ratio"] == row["eight"] / row["one"] > 1 for row in result["rows"])


def test_copies_of_pages_differ_in_words_and_numbers_alone(tmp_path: Path) -> None:
    """Tags, entities, code and commands of TeX stay; the records are what a WARC reader gives back."""
    warc = pytest.importorskip("fastwarc.warc")
    tex = r"\(\frac{x_{12}}{\alpha}\)"
    page = f"<p class='number 12'>Some words of prose &alpha; 2024, with {tex} in them<pre>make the {{x}} 345</pre><img alt='$y_1$'>"
    (tmp_path / "a.html").write_text(page)
    command = [sys.executable, str(ROOT / "benchmarks" / "pages_10k.py"), str(tmp_path / "out.warc.gz"), str(tmp_path)]
    subprocess.run([*command, "--count", "20"], check=True, capture_output=True)
    with (tmp_path / "out.warc.gz").open("rb") as file:
        bodies = [record.reader.read().decode() for record in warc.ArchiveIterator(file, parse_http=True)]
    assert len(set(bodies)) == 20
    pattern = (
        r"<p class='number 12'>Some [a-z]+ of [a-z]+ &alpha; \d{4}, [a-z]+ \\\(\\frac\{x_\{\d\d\}\}\{\\alpha\}\\\) in [a-z]+"
        r"<pre>make the \{x\} \d{3}</pre><img alt='\$y_1\$'>"
    )
    assert [body for body in bodies if not re.fullmatch(pattern, body)] == []


@pytest.mark.slow
def test_reader(tmp_path: Path) -> None:
    """Reading is never above its bound."""
    result = run("reader.py", tmp_path / "out.json")
    assert [row["seq"] for row in result["rows"]] == [128, 512, 2048, 8192]
    assert all(min(row["cold"], row["warm"]) > 0 and row["warm"] < row["bound"] for row in result["rows"])
    assert result["rows"][0]["warm / pretrain/tiny"] > 0
