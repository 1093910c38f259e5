"""The corpus of the demonstration: what is in it, and that nothing is on both sides."""

import hashlib
import sys
import sysconfig
import textwrap

import pytest

from alloy.data.corpus import is_held_out, num_bytes, python_corpus, text_corpus
from alloy.data.io import Document
from alloy.errors import DataError


@pytest.fixture(scope="module")
def corpus():
    return python_corpus(source_bytes=300_000)


def paragraphs(documents: list[Document]) -> set[str]:
    return {
        " ".join(block.split()) for document in documents for block in document.text.replace("\r", "").split("\n\n")
    }


def test_split_is_by_name(corpus) -> None:
    """No topic or module on both sides, its docstrings and its code on the same one; about one in twelve held out."""
    for part, documents in corpus.train.items():
        names = {document.name for document in documents}
        held_out = {document.name for document in corpus.held_out[part]}
        assert not names & held_out
        assert all(int(hashlib.md5(name.encode()).hexdigest(), 16) % 12 == 0 for name in held_out)
        assert not any(is_held_out(name) for name in names)
    modules = {document.name for part in ("docstrings", "source") for document in corpus.train[part]}
    assert not modules & {document.name for part in ("docstrings", "source") for document in corpus.held_out[part]}


def test_held_out_paragraphs_are_not_in_training(corpus) -> None:
    """A paragraph of 40 characters or more is on one side only, however it is indented."""
    shared = paragraphs(corpus.train_documents) & paragraphs(corpus.held_out_documents())
    assert not [text for text in shared if len(text) >= 40]


def test_sizes(corpus) -> None:
    """Topics and docstrings of any CPython from 3.11 are about 1.8 MB; source stops at the wanted size."""
    counts = corpus.counts()
    known = [part for part in ("topics", "docstrings") if counts[part]["train_bytes"]]
    train, held_out = (sum(counts[part][key] for part in known) for key in ("train_bytes", "held_out_bytes"))
    if known == ["topics", "docstrings"]:
        assert 1_400_000 < train < 2_500_000
        assert 0.05 < held_out / train < 0.15
    assert 300_000 <= counts["source"]["train_bytes"] < 900_000
    assert num_bytes(corpus.train_documents) == sum(count["train_bytes"] for count in counts.values())


def test_docstrings_are_those_of_the_module(corpus) -> None:
    """textwrap's own documentation, in the order of its file; no tests, no generated files."""
    documents = {
        document.name: document.text for part in (corpus.train, corpus.held_out) for document in part["docstrings"]
    }
    text = documents["textwrap.py"]
    assert text.startswith("Text wrapping and filling.")
    assert text.index("Object for wrapping/filling text.") < text.index("Remove any common leading whitespace")
    assert textwrap.TextWrapper.wrap.__doc__.split("\n")[0].rsplit("wrap(text : string)", 1)[-1] in text
    assert not [name for name in documents if set(name.split("/")) & {"test", "tests", "idlelib", "site-packages"}]


def test_python_without_topics_and_sources(monkeypatch, tmp_path) -> None:
    """Each missing part is one line; with neither there is an error that says what to do."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "odd.py").write_bytes(b'"""Not \xff UTF-8."""')
    (tmp_path / "old.py").write_text('"""Python 2."""\nprint "x"')
    with pytest.raises(DataError, match="neither pydoc topics nor library source files; name a text with --text PATH"):
        python_corpus()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text('"""A test."""')
    code = '"""Module a."""\nif True:\n    class A:\n        "Class A."\n        def f(self): "Method f."\n'
    (tmp_path / "a.py").write_text(code)
    corpus = python_corpus()
    assert list(corpus.train) == ["topics", "docstrings"]
    assert [document.text for document in corpus.train_documents] == ["Module a.\n\nClass A.\n\nMethod f.\n"]
    assert len(corpus.notes) == 1
    assert "no pydoc_data.topics" in corpus.notes[0]


def test_user_text_by_file(tmp_path) -> None:
    """Files are whole on one side; the split depends on their names alone."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"This file has the number {i}, and says nothing more than {i}.\n")
    corpus = text_corpus(tmp_path)
    assert len(corpus.train["text"]) + len(corpus.held_out["text"]) == 40
    assert 1 <= len(corpus.held_out["text"]) <= 10
    assert {document.text for document in corpus.held_out["text"]}.isdisjoint(d.text for d in corpus.train["text"])


def test_user_text_in_few_files(tmp_path) -> None:
    """When no name falls into the twelfth, one file is held out all the same."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"Only {name} has this long and quite unusual sentence, number {name}.")
    corpus = text_corpus(tmp_path)
    assert (len(corpus.train["text"]), len(corpus.held_out["text"])) == (2, 1)


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_single_file_is_cut_into_blocks(tmp_path, separator) -> None:
    """At blank lines, lines, or anywhere; without shared paragraphs the blocks hold the whole text."""
    text = separator.join(f"Sentence {i} of the text is about {i * i}, and not about é." for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    corpus = text_corpus(tmp_path / "a.txt")
    documents = corpus.train["text"] + corpus.held_out["text"]
    documents.sort(key=lambda document: int(document.name.partition("#")[2]))
    assert "".join(document.text for document in documents) == text
    assert len(documents) > 12
    assert 0.02 < num_bytes(corpus.held_out["text"]) / len(text.encode()) < 0.25


def test_user_text_too_small_or_repeated(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Short.")
    with pytest.raises(DataError, match="too short to hold a part out: 6 bytes"):
        text_corpus(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("The same sentence again and again, with no end. \n\n" * 4000)
    with pytest.raises(DataError, match="every held-out paragraph also occurs in the training part"):
        text_corpus(tmp_path / "b.txt")
