"""Long documents: order of files by hand, repetition by length, chains, and questions that need their spans."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.io import Document
from alloy.data.longdoc import (
    ask_about,
    chain_documents,
    join_repository,
    keep_long,
    order_files,
    question_text,
    repetitions,
    same_answer,
    sample_spans,
)
from alloy.errors import DataError


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


class Model:
    """A stand-in for a language model that knows how many keys a question takes, and which passages hold one."""

    def __init__(self, keys: int, written: str = "Question: Which keys?\nAnswer: red blue", knows: str = "") -> None:
        self.keys, self.written, self.knows = keys, written, knows

    def __call__(self, prompt: str) -> str:
        if prompt.startswith("Here are"):
            return self.written
        found = set(re.findall(r"key (\w+)", prompt))
        return "the answer is red blue." if len(found) >= self.keys else self.knows or "unknown"


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (Model(2), None),
        (Model(1), "one span alone answers it"),
        (Model(3), "the spans do not answer it"),
        (Model(2, knows="red blue"), "answered without the document"),
        (Model(2, written="I cannot."), "no question in the model's answer"),
    ],
)
def test_questions_need_their_spans(model, refused) -> None:
    """Kept only if the answer changes when spans are left out."""
    text = "a key red here" + " " * 100 + "and a key blue there"
    asked = ask_about(text, [(0, 20), (100, len(text))], model)
    assert asked.refused == refused
    if refused is None:
        assert question_text(text, asked, at_start=True).startswith("Question: Which keys?\n\na key red")
        assert question_text(text, asked, at_start=False).endswith("Question: Which keys?\n\nAnswer: red blue\n")


def test_answers_are_compared_by_words() -> None:
    assert same_answer("The answer is 42.", "42")
    assert not same_answer("142", "42")
    assert not same_answer("", "42")
