"""Blocks of texts, and texts cut into chunks: nothing is lost, and no fence, table or formula is cut."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.bench.tiny import byte_tokenizer
from alloy.data.blocks import blocks, code_lines, formulas
from alloy.data.chunks import counter, merge, split
from alloy.data.tokens import save_tokenizer

COUNT = counter(None)

PIECES = [
    "# Title",
    "A paragraph with $x_1 + y$ in it. And a second sentence! It costs \\$5, or 6.",
    "```python\nx = 1\n\n\n\tif x:\n```",
    "~~~\n``` is no end\n~~~",
    "$$\na = b\n\nc = d\n$$",
    "before $$e^{i\\pi}$$ after",
    "| a | b |\n|---|---|\n| $x$ | 1 |",
    "- item one\n- item two",
    "word " * 60,
    "Wort" * 90,
    "Ünïcödé 数学。很好！是",
    "$5 and $6 are prices",
]
texts = st.lists(st.sampled_from(PIECES), max_size=9).map("\n\n".join)


def test_blocks_by_hand() -> None:
    text = "# T\n\n\n \nOne\ntwo\n\n```py\na\n\nb\n```\nthree\n\n$$\nx\n\ny\n$$\n\n| a |\n| b |\n\n$$z$$\n\n> ```\n> q\n> ```"
    assert [(b.kind, b.text) for b in blocks(text)] == [
        ("heading", "# T"),
        ("prose", "One\ntwo"),
        ("code", "```py\na\n\nb\n```"),
        ("prose", "three"),
        ("math", "$$\nx\n\ny\n$$"),
        ("table", "| a |\n| b |"),
        ("math", "$$z$$"),
        ("code", "> ```\n> q\n> ```"),
    ]


def test_formulas_by_hand() -> None:
    text = (
        "$a$ and $$b\n\nc$$, \\(d\\) \\[e\\] $5 and $6, \\$f\\$ $g\\$h$\n```\n$no$\n```\n"
        "\\begin{align*}i\\end{align*} `$no$` $j$5 $k$, \\\\[2pt] $ l $ x$$y"
    )
    found = ["a", "b\n\nc", "d", "e", "g\\$h", "\\begin{align*}i\\end{align*}", "k"]
    assert formulas(text) == found


def test_code_lines_by_hand() -> None:
    assert code_lines("a\n```c\n  x;\n\n}\n```\n\n    indented\n~~~\nopen\n") == ["  x;", "}", "open"]


@given(texts, st.integers(1, 60))
@settings(max_examples=200)
def test_chunks_hold_everything_in_order_within_the_limit(text: str, limit: int) -> None:
    """Without white space they are the text; what exceeds the limit is one block that may not be cut."""
    chunks = split(text, limit, COUNT)
    assert "".join("".join(c.text for c in chunks).split()) == "".join(text.split())
    for chunk in chunks:
        assert chunk.fits == (COUNT(chunk.text) <= limit) or not chunk.fits
        if not chunk.fits:
            assert len(blocks(chunk.text)) == 1
            assert re.search(r"```|~~~|\$|\|", chunk.text)
    assert [f for c in chunks for f in formulas(c.text)] == formulas(text)
    assert [line for c in chunks for line in code_lines(c.text)] == code_lines(text)


@given(texts)
def test_a_text_that_fits_is_one_chunk_and_comes_back(text: str) -> None:
    chunks = split(text, 100_000, COUNT)
    assert len(chunks) == bool(text.strip())
    assert merge([c.text for c in chunks]) == text.strip("\n")


def test_cuts_are_at_blank_lines_then_sentences_then_words() -> None:
    text = "One two three. Four five six.\n\nSeven."
    assert [c.text for c in split(text, 8, COUNT)] == ["One two three. Four five six.", "Seven."]
    assert [c.text for c in split(text, 4, COUNT)] == ["One two three.", "Four five six.", "Seven."]
    assert [c.text for c in split("One two three four", 2, COUNT)] == ["One two", "three", "four"]
    assert [c.text for c in split("abcdefghij", 1, COUNT)] == ["ab", "cde", "fg", "hij"]


def test_tokens_of_a_tokenizer_count(tmp_path: object) -> None:
    folder = save_tokenizer(byte_tokenizer(), str(tmp_path))
    count = counter(folder)
    assert count("naïve") == 6
    chunks = split("ab cd. Ef gh.", 7, count)
    assert [(c.text, c.tokens) for c in chunks] == [("ab cd.", 7), ("Ef gh.", 6)]


@pytest.mark.parametrize("text", ["$" * 30_000, "\\(" * 20_000, "\\begin{align}" * 3000, "```\n" * 9999, "`" * 30_000])
def test_hostile_texts_are_read_in_time(text: str) -> None:
    formulas(text)
    assert "".join(b.text for b in blocks(text)).replace("\n", "") == text.replace("\n", "")
