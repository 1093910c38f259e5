"""Long documents: order of files by hand, repetition by length, chains, and questions that need their spans."""

import json
import re

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alloy.data.executors import Executor
from alloy.data.io import Document
from alloy.data.longdoc import (
    chain_documents,
    join_repository,
    keep_long,
    order_files,
    repetitions,
    same_answer,
    sample_spans,
)
from alloy.data.pipeline import run_stage
from alloy.data.stages.longdoc import LongdocConfig
from alloy.errors import DataError
from tests.core.endpoint import Endpoint
from tests.data.test_data_cli import run


def words(text: str) -> int:
    return len(text.split())


def test_long_documents_are_kept_whole() -> None:
    documents = [Document("a " * n, str(n)) for n in (3, 9, 10, 40)]
    assert [(d.name, n) for d, n in keep_long(documents, words, 10)] == [("10", 10), ("40", 40)]


def test_python_files_stand_after_what_they_import(tmp_path) -> None:
    """Absolute, relative and package imports, a cycle, a file that is no Python; paths head the files."""
    files = {
        "a.py": "import pkg.deep\n",
        "pkg/__init__.py": "",
        "pkg/deep.py": "from . import base\nfrom .sub import leaf\n",
        "pkg/base.py": "x = 1\n",
        "pkg/sub/leaf.py": "from ..base import x\n",
        "README.md": "hello\n",
        "bad.py": "def (\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    order = order_files({name: text for name, text in files.items() if text})
    place = {name: order.index(name) for name in order}
    assert place["pkg/base.py"] < place["pkg/sub/leaf.py"] < place["pkg/deep.py"] < place["a.py"]
    assert sorted(order) == sorted(name for name, text in files.items() if text)
    joined = join_repository(tmp_path).text
    assert joined.index("# pkg/base.py\nx = 1\n") < joined.index("# pkg/deep.py\n") < joined.index("# a.py\n")
    assert order_files({"x.py": "import y", "y.py": "import x"}) == ["y.py", "x.py"]


def test_includes_of_c() -> None:
    files = {
        "src/main.c": '#include "util.h"\n#include <stdio.h>\n',
        "src/util.c": '# include "util.h"',
        "src/util.h": "",
    }
    assert order_files(files) == ["src/util.h", "src/main.c", "src/util.c"]


@given(st.dictionaries(st.integers(0, 30), st.sets(st.integers(0, 30)), max_size=20))
def test_any_graph_has_an_order(graph) -> None:
    """Every file once; without cycles every file after all that it imports. (A chain of thousands does not recurse.)"""
    acyclic = {a: {b for b in targets if b > a and b in graph} for a, targets in graph.items()}
    order = order_files({f"m{a}.py": "".join(f"import m{b}\n" for b in targets) for a, targets in acyclic.items()})
    assert sorted(order) == sorted(f"m{a}.py" for a in graph)
    for a, targets in acyclic.items():
        assert all(order.index(f"m{b}.py") < order.index(f"m{a}.py") for b in targets)


def test_repetition_by_length() -> None:
    """Factors of the highest bucket reached; fractions come true for their share of the names."""
    buckets = {100: 1.0, 1000: 2.5, 5000: 0.0}
    assert [repetitions(n, buckets, 0, "x") for n in (50, 100, 999, 5000)] == [1, 1, 1, 0]
    counts = [repetitions(1000, buckets, 0, str(i)) for i in range(2000)]
    assert set(counts) == {2, 3}
    assert abs(sum(counts) / 2000 - 2.5) < 0.05


def test_chains_hold_the_document_and_fit() -> None:
    distractors = [Document(f"d{i} " * 10, f"d{i}") for i in range(9)]
    made = chain_documents(Document("me " * 15, "me"), [*distractors, Document("x " * 99, "x")], 60, words, seed=1)
    assert "me " * 15 in made.text
    assert words(made.text) == 15 + 40
    assert made == chain_documents(
        Document("me " * 15, "me"), [*distractors, Document("x " * 99, "x")], 60, words, seed=1
    )
    assert chain_documents(Document("me " * 99, "me"), distractors, 60, words, seed=1).text == "me " * 99


def test_spans_are_far_apart() -> None:
    """One in each third, at sentences, never overlapping."""
    text = "".join(f"Sentence number {i} is here. " for i in range(400))
    for seed in range(20):
        spans = sample_spans(text, 3, 200, seed)
        assert [start * 3 // len(text) for start, _ in spans] == [0, 1, 2]
        assert all(text[start:stop].startswith("Sentence") and 150 < stop - start < 350 for start, stop in spans)
    with pytest.raises(DataError, match="too short for 3 spans"):
        sample_spans(text[:500], 3, 200, 0)


def model(prompt: str, n: int) -> str:
    """Writes a question for two keys; knows them only where both are shown; of "easy" passages one is enough."""
    if "Write one question" in prompt:
        return "I cannot." if "mute" in prompt else "Question: Which keys?\nAnswer: red blue"
    found = set(re.findall(r"key (\w+)", prompt))
    return "The answer is red blue." if len(found) >= (1 if "easy" in prompt else 2) else "unknown"


def test_the_stage_asks_and_checks(tmp_path) -> None:
    """Over a server: questions that need two spans are kept, at the end or start; others are counted with their reason."""
    filler = "Nothing is said here. " * 20
    texts = {
        name: f"{name}: key red. {filler}" * 2 + f"{name}: key blue. {filler}" * 2 for name in ("good", "easy", "mute")
    }
    texts["none"] = filler * 5
    texts["short"] = "key"
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": k, "text": v, "x": 1}) + "\n" for k, v in texts.items())
    )
    settings = {"min_tokens": 100, "questions": 1, "spans": 2, "span_chars": 450, "repeat": ["300=2"]}
    with Endpoint(model) as server:
        config = LongdocConfig.model_validate({**settings, "endpoint": server.url, "backoff_s": 0.001})
        made = run_stage(config, [str(tmp_path / "rows.jsonl")], tmp_path / "out", Executor(kind="serial"))
    counts = made["counts"]
    assert (counts["question=kept"], counts["question=one-span"], counts["question=unreadable"]) == (1, 1, 1)
    assert (counts["question=not-answered"], counts["too-short"]) == (1, 1)
    rows = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert [(row["source_id"], row["x"], row["answer"]) for row in rows] == [("good", 1, "red blue")] * 2
    for row in rows:
        assert texts["good"].strip() in row["text"]
        assert row["text"].endswith("Answer: red blue\n")
        assert row["text"].count("Question: Which keys?") == 1
    with pytest.raises(ValidationError, match="neither an endpoint nor a server"):
        LongdocConfig(questions=1)
    with pytest.raises(ValidationError, match="not a list of TOKENS=FACTOR"):
        LongdocConfig(repeat=("many",))


def test_the_stage_without_a_model(tmp_path) -> None:
    """Long rows among short ones of their part, the number of tokens with them."""
    rows = [{"id": str(i), "text": f"word{i} " * n} for i, n in enumerate((200, 3, 4, 5))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LongdocConfig(min_tokens=100, chain_tokens=1000)
    run_stage(config, [str(tmp_path / "rows.jsonl")], tmp_path / "out", Executor(kind="serial"))
    (row,) = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert row["n_tokens"] == -(-len(row["text"]) // 4)
    assert all(other["text"].strip() in row["text"] for other in rows)


def test_repositories_on_the_command_line(capsys, tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("import b\n")
        (tmp_path / name / "b.py").write_text("y = 1\n")
    code, _, _ = run(capsys, "data", "join-repo", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "r.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (code, [row["name"] for row in rows]) == (0, ["one", "two"])
    assert rows[0]["text"] == "# b.py\ny = 1\n\n# a.py\nimport b\n"


def test_answers_are_compared_by_words() -> None:
    assert same_answer("The answer is 42.", "42")
    assert not same_answer("142", "42")
    assert not same_answer("", "42")
