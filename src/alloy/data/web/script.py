"""Literal values in JavaScript: what the configurations of MathJax and KaTeX in a page say, without running them."""

import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(
    r"(?:\s+|//[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)|(?P<mark>[\[\]{},:])"
    r"|(?P<string>'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`(?:\\.|[^`\\])*`)|(?P<name>[\w$.+-]+)",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_WORDS = {"true": True, "false": False, "null": None}
# larger literals are no configuration
LONGEST = 50_000
DEEPEST = 12


def read_literal(script: str, at: int) -> Any:
    """The array, object, string, number or truth value that begins at `at`: lists, dicts, str, bool; None: it is none of these.

    What is computed or a regular expression ends the reading; arrays and objects are then returned as far as they were read.
    """
    tokens = _tokens(script, at, min(len(script), at + LONGEST))
    return _value(tokens, next(tokens, ("", "")), 0)


def _tokens(script: str, at: int, stop: int) -> Iterator[tuple[str, str]]:
    """Kind (mark, string, name) and text, up to where no literal goes on."""
    while at < stop and (found := _TOKEN.match(script, at, stop)) is not None:
        at = found.end()
        if found.lastgroup is not None:
            yield found.lastgroup, found[found.lastgroup]


def _value(tokens: Iterator[tuple[str, str]], token: tuple[str, str], depth: int) -> Any:
    kind, text = token
    if kind == "string":
        return _ESCAPE.sub(_of_escape, text[1:-1])
    if kind == "name":
        return _WORDS.get(text, text)
    if text not in ("[", "{") or depth > DEEPEST:
        return None
    items: list[Any] = []
    entries: dict[str, Any] = {}
    for kind, word in tokens:
        if word in "]}" and kind == "mark":
            break
        if kind == "mark" and word in ",:":
            continue
        if text == "[":
            items.append(_value(tokens, (kind, word), depth + 1))
        elif kind != "mark" and next(tokens, None) == ("mark", ":"):
            key = word[1:-1] if kind == "string" else word
            entries[key] = _value(tokens, next(tokens, ("", "")), depth + 1)
        else:
            break
    return items if text == "[" else entries


def _of_escape(found: re.Match[str]) -> str:
    name = found[1]
    return chr(int(name[1:], 16)) if len(name) > 1 else _NAMED.get(name, name)
