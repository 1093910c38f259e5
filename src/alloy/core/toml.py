"""TOML beyond `tomllib`: on which line each key stands, and writing a table back as text.

`tomllib` gives values without positions. `key_lines` walks text that `tomllib` has accepted and needs only to know where
a key, a string or a bracket begins and ends.
"""

import datetime as dt
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

Key = tuple[str | int, ...]
# what TOML holds: strings, numbers, booleans, dates, lists and tables of them
Table = dict[str, Any]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"{3,5}(?!")', re.DOTALL),
    re.compile(r"'''.*?'{3,5}(?!')", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\])*"'),
    re.compile(r"'[^']*'"),
)


def key_lines(text: str) -> dict[Key, int]:
    """Line (from 1) of every table, key and array element of a valid TOML document, by path."""
    return _Scanner(text).document()


def dump_toml(data: Table, comment: Callable[[Key], str | None] | None = None) -> str:
    """`data` as TOML text; keys whose value is None are left out.

    Args:
        data: tables, lists, strings, numbers, booleans, dates.
        comment: path of a key -> text to put behind it, or None.
    """
    lines: list[str] = []
    _write_table(data, (), lines, comment or (lambda key: None))
    return "\n".join(lines).strip("\n") + "\n"


def is_table(value: object) -> TypeGuard[Table]:
    """Whether a TOML or JSON value is a table."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a TOML or JSON value is a list."""
    return isinstance(value, list)


def dotted(key: Sequence[str | int]) -> str:
    """A path as a user writes it: ("data", "sources", 0, "path") -> data.sources.0.path."""
    return ".".join(str(part) for part in key)


def value_at(value: Any, key: Key) -> Any:
    """The value at a path, or None where there is none."""
    for part in key:
        if is_table(value):
            value = value.get(str(part))
        elif is_list(value) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return None
    return value


class _Scanner:
    """One pass over a document; `at` is the position of the next unread character."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.lines: dict[Key, int] = {}
        # number of elements met so far of each array of tables
        self.elements: dict[Key, int] = {}

    def document(self) -> dict[Key, int]:
        table: Key = ()
        self.blank()
        while self.at < len(self.text):
            if self.text.startswith("[[", self.at):
                table = self.header(2)
            elif self.text[self.at] == "[":
                table = self.header(1)
            else:
                self.pair(table)
            self.blank()
        return self.lines

    def header(self, brackets: int) -> Key:
        """`[a.b]` or `[[a.b]]` -> path of the table it opens."""
        self.at += brackets
        *parents, last = self.key()
        self.at += brackets
        path: Key = ()
        for part in parents:
            path = self.current((*path, part))
            self.mark(path)
        path = (*path, last)
        self.mark(path)
        if brackets == 2:
            self.elements[path] = self.elements.get(path, 0) + 1
        path = self.current(path)
        self.mark(path)
        return path

    def current(self, path: Key) -> Key:
        """`path`, or its newest element where it is an array of tables."""
        count = self.elements.get(path, 0)
        return (*path, count - 1) if count else path

    def pair(self, table: Key) -> None:
        path = table
        for part in self.key():
            path = (*path, part)
            self.mark(path)
        self.at += 1
        self.value(path)

    def key(self) -> list[str]:
        """A dotted key, up to the `=` or `]` behind it."""
        parts: list[str] = []
        while True:
            self.blank()
            if bare := _BARE.match(self.text, self.at):
                parts.append(bare.group())
                self.at = bare.end()
            else:
                parts.append(_unquote(self.string()))
            self.blank()
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def value(self, path: Key) -> None:
        self.blank()
        self.mark(path)
        opening = self.text[self.at]
        if opening in "\"'":
            self.string()
        elif opening == "[":
            self.items("]", lambda index: self.value((*path, index)))
        elif opening == "{":
            self.items("}", lambda index: self.pair(path))
        else:
            scalar = _SCALAR.match(self.text, self.at)
            assert scalar, "text was not checked by tomllib first"
            self.at = scalar.end()

    def items(self, closing: str, item: Callable[[int], None]) -> None:
        """The comma-separated inside of an array or inline table, and its closing bracket."""
        self.at += 1
        index = 0
        self.blank()
        while self.text[self.at] != closing:
            item(index)
            index += 1
            self.blank()
            if self.text[self.at] == ",":
                self.at += 1
                self.blank()
        self.at += 1

    def string(self) -> str:
        for pattern in _STRINGS:
            if found := pattern.match(self.text, self.at):
                self.at = found.end()
                return found.group()
        raise AssertionError("text was not checked by tomllib first")

    def blank(self) -> None:
        found = _BLANK.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def mark(self, path: Key) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)


def _unquote(quoted: str) -> str:
    """The text of a quoted key."""
    if quoted[0] == "'":
        return quoted[1:-1]
    # \UXXXXXXXX is the one escape of TOML that JSON lacks
    wide = re.sub(r"\\U([0-9A-Fa-f]{8})", lambda found: json.dumps(chr(int(found[1], 16)))[1:-1], quoted)
    return json.loads(wide, strict=False)


def _write_table(table: Table, path: Key, lines: list[str], comment: Callable[[Key], str | None]) -> None:
    """Plain keys first, then sub-tables, as TOML demands."""
    inner: list[tuple[str, Any]] = []
    for name, value in table.items():
        if is_table(value) or _is_tables(value):
            inner.append((name, value))
        elif value is not None:
            remark = comment((*path, name))
            lines.append(f"{_name(name)} = {_value(value)}" + (f"  # {remark}" if remark else ""))
    for name, value in inner:
        here = (*path, name)
        header = ".".join(_name(part) for part in here if isinstance(part, str))
        if is_table(value):
            if not value or any(not (is_table(v) or _is_tables(v)) for v in value.values()):
                lines += ["", f"[{header}]"]
            _write_table(value, here, lines, comment)
        else:
            for index, element in enumerate(value):
                lines += ["", f"[[{header}]]"]
                _write_table(element, (*here, index), lines, comment)


def _is_tables(value: Any) -> bool:
    return is_list(value) and bool(value) and all(is_table(element) for element in value)


def _name(name: str | int) -> str:
    text = str(name)
    return text if _BARE.fullmatch(text) else _string(text)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but JSON lets DEL through
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if is_table(value):
        return "{" + ", ".join(f"{_name(name)} = {_value(v)}" for name, v in value.items() if v is not None) + "}"
    if is_list(value):
        return "[" + ", ".join(_value(element) for element in value) + "]"
    raise TypeError(f"{type(value).__name__} has no form in TOML: {value!r}")
