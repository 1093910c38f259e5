"""Positions in TOML text, and writing TOML."""

import datetime as dt
import math
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.core.toml import dotted, dump_toml, key_lines, value_at

DOCUMENT = '''# a comment with [brackets] and x = 1
top = 1 # trailing "quote"
"quoted key" = 2
a.b.c = 3
'single.dot'.d = 4
multi = """
[not.a.table]
y = 2
"""
literal = \'\'\'
it's = "here"\'\'\'
ends = """five quotes"""""
array = [
  11,  # first
  [12, 13],
  # only a comment
  { x = 14, y.z = 15 },
]
when = 2024-01-02 03:04:05

[table]
key = "a # no comment"
[table.inner]
t = true
[[list]]
n = 21
[[list.sub]]
m = 22
[[list.sub]]
m = 23
[[list]]
n = 24
[list.more]
o = 25
[[list.sub]]
m = 26
'''

LINES = {
    ("top",): 2,
    ("quoted key",): 3,
    ("a", "b", "c"): 4,
    ("a", "b"): 4,
    ("single.dot", "d"): 5,
    ("multi",): 6,
    ("literal",): 10,
    ("ends",): 12,
    ("array",): 13,
    ("array", 0): 14,
    ("array", 1): 15,
    ("array", 1, 1): 15,
    ("array", 2): 17,
    ("array", 2, "y", "z"): 17,
    ("when",): 19,
    ("table",): 21,
    ("table", "key"): 22,
    ("table", "inner", "t"): 24,
    ("list", 0): 25,
    ("list", 0, "n"): 26,
    ("list", 0, "sub", 1, "m"): 30,
    ("list", 1, "n"): 32,
    ("list", 1, "more", "o"): 34,
    ("list", 1, "sub", 0, "m"): 36,
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_key_lines_of_every_form_of_key(newline: str) -> None:
    """Dotted, quoted, inline, multi-line, nested tables and arrays of tables: counted by hand above."""
    lines = key_lines(DOCUMENT.replace("\n", newline))
    assert {key: lines.get(key) for key in LINES} == LINES


def test_key_lines_covers_exactly_what_tomllib_reads() -> None:
    """No path too many, none missing."""
    assert set(key_lines(DOCUMENT)) == set(_paths(tomllib.loads(DOCUMENT)))


def _paths(value: Any, key: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [path for name, element in inner for path in _paths(element, (*key, name))]
    return [key, *below] if key else below


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_SCALARS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    _TEXTS,
    st.dates(),
    st.times(),
    st.datetimes(),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)
_TABLES = st.dictionaries(_TEXTS, _VALUES, max_size=5)


@given(_TABLES)
@settings(max_examples=60, deadline=None)
def test_written_toml_reads_back(table: dict[str, Any]) -> None:
    """tomllib reads what dump_toml wrote, and the scan finds the same paths as tomllib."""
    text = dump_toml(table)
    assert tomllib.loads(text) == table
    assert set(key_lines(text)) == set(_paths(table))


@given(st.lists(st.integers(100, 10**6), unique=True, min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_lines_hold_the_values(numbers: list[int], random: Any) -> None:
    """Each number stands on the line that the scan gives for its key, wherever comments and blank lines fall."""
    text = ""
    for index, number in enumerate(numbers):
        text += random.choice(["", "\n", "# x = [1]\n", f's{index} = """\n[a]\n"""\n'])
        text += random.choice(
            [f"[[t]]\nk = {number}\n", f"[u{index}]\nk = {number}\n", f"[v{index}]\nk = [\n1,\n{number}]\n"]
        )
    rows = text.split("\n")
    found = {
        int(value) for key, line in key_lines(text).items() if key[-1] in ("k", 1) for value in _ints(rows[line - 1])
    }
    assert set(numbers) <= found


def _ints(row: str) -> list[int]:
    return [int(part) for part in row.replace("]", " ").replace("=", " ").split() if part.isdigit()]


def test_special_values() -> None:
    """Infinities, NaN, dates and keys that need quotes; None is left out."""
    text = dump_toml({"a b": math.inf, "c": -math.inf, "d": math.nan, "e": None, "f": dt.date(2024, 5, 6), "g": 1e-9})
    assert text == '"a b" = inf\nc = -inf\nd = nan\nf = 2024-05-06\ng = 1e-09\n'
    with pytest.raises(TypeError, match="set has no form in TOML"):
        dump_toml({"a": {1}})


def test_comments_stand_behind_their_keys() -> None:
    """The comment function sees whole paths, list indices included."""
    text = dump_toml({"a": 1, "t": [{"b": 2}, {"b": 3}]}, lambda key: dotted(key))
    assert text.splitlines() == ["a = 1  # a", "", "[[t]]", "b = 2  # t.0.b", "", "[[t]]", "b = 3  # t.1.b"]


def test_value_at() -> None:
    """A path that leads nowhere gives None."""
    data = {"a": [{"b": 5}]}
    assert value_at(data, ("a", 0, "b")) == 5
    assert value_at(data, ("a", 1, "b")) is None
    assert value_at(data, ("a", "b")) is None
