"""The pieces of a text row: paragraphs, headings, tables, fenced code and display formulas, and the formulas in them.

A block is what stands between blank lines, but a fence or a `$$` formula is one block whatever it holds.
"""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["prose", "heading", "table", "math", "code"]
Span = tuple[int, int]

_BLANK = re.compile(r"\n[ \t]*(?:\n[ \t]*)*\n")
# what may stand before a fence: indentation, quotes and the mark of a list item
_BEFORE_FENCE = re.compile(r"[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])[ \t]+)*>?[ \t]*")
_ENVIRONMENTS = (
    "equation|align|aligned|alignat|gather|multline|eqnarray|flalign|displaymath|math|cases|[bpvBV]?matrix|array"
)
# a formula, or what may hide a dollar: inline code and escaped characters. An opening dollar stands before a character, a
# closing one behind a character and before no digit, so that prices are none (pandoc's rule). Each branch begins with a
# literal, which lets the engine pass over plain text quickly
FORMULA = re.compile(
    r"\\\((?P<round>(?:(?!\n[ \t]*\n).){1,4000}?)(?<!\\)\\\)"
    r"|\\\[(?P<square>(?:(?!\n[ \t]*\n).){1,20000}?)(?<!\\)\\\]"
    rf"|\\begin\{{(?P<environment>(?:{_ENVIRONMENTS})\*?)\}}.{{1,20000}}?\\end\{{(?P=environment)\}}"
    r"|\\(?P<escaped>.)"
    r"|\$\$(?P<display>(?:[^$\\]|\\.|\$(?!\$)){1,20000})\$\$"
    r"|\$(?P<inline>(?![\s$])(?:[^$\\\n]|\\.|\n(?![ \t]*\n))*?(?<!\s))\$(?!\d)"
    r"|`(?P<code>`*[^`\n]+`+)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a text, as it stands there."""

    kind: Kind
    text: str


def blocks(text: str) -> list[Block]:
    """The blocks of a text in order; joined by blank lines they are the text, but for the number of blank lines."""
    return [Block(kind, text[start:end]) for kind, start, end in block_spans(text)]


def block_spans(text: str) -> list[tuple[Kind, int, int]]:
    """(kind, start, end) of the blocks of a text."""
    whole: list[tuple[Kind, int, int]] = [("code", *span) for span in fences(text)]
    if "$$" in text or "\\begin{" in text:
        whole = sorted(whole + [("math", *span) for span in displays(text, [(s, e) for _, s, e in whole])], key=_start)
    found: list[tuple[Kind, int, int]] = []
    at = 0
    for kind, start, end in [*whole, ("prose", len(text), len(text))]:
        _paragraphs(text, at, start, found)
        if end > start:
            found.append((kind, start, end))
        at = end
    return found


def fences(text: str) -> list[Span]:
    """From the first character of each opening fence's line to the last of its closing one; an open fence reaches to the end."""
    found: list[Span] = []
    opened: tuple[int, str] | None = None
    for start in _fence_lines(text):
        end = text.find("\n", start)
        line = text[start : end if end >= 0 else len(text)]
        before = _BEFORE_FENCE.match(line)
        assert before, "it matches nothing, too"
        mark = line[before.end() :]
        run = mark[: len(mark) - len(mark.lstrip(mark[:1]))] if mark[:3] in ("```", "~~~") else ""
        if opened is None and run and "`" not in mark[len(run) :]:
            opened = (start, run)
        elif opened and run.startswith(opened[1]) and mark.strip() == run:
            found.append((opened[0], start + len(line)))
            opened = None
    return [*found, (opened[0], len(text))] if opened else found


def _fence_lines(text: str) -> list[int]:
    """Where the lines with three backticks or tildes begin."""
    found: set[int] = set()
    for mark in ("```", "~~~"):
        at = text.find(mark)
        while at >= 0:
            found.add(text.rfind("\n", 0, at) + 1)
            end = text.find("\n", at)
            at = text.find(mark, end) if end >= 0 else -1
    return sorted(found)


def displays(text: str, code: list[Span]) -> list[Span]:
    """The formulas outside `code` that hold a blank line."""
    at, found = 0, []
    for start, end in [*code, (len(text), len(text))]:
        piece = text[at:start]
        # a glance, which sees too much rather than too little: every other piece between `$$` is inside a pair
        inside = piece.split("$$")[1::2] + [part.partition("\\end{")[0] for part in piece.split("\\begin{")[1:]]
        if any("\n\n" in part for part in inside):
            spans = (match.span() for match in FORMULA.finditer(text, at, start) if latex(match) is not None)
            found += [span for span in spans if _BLANK.search(text, *span)]
        at = end
    return found


def formulas(text: str) -> list[str]:
    """LaTeX of the formulas outside fenced code, without delimiters, in order."""
    found: list[str] = []
    at = 0
    for start, end in [*fences(text), (len(text), len(text))]:
        for match in FORMULA.finditer(text, at, start):
            inner = latex(match)
            if inner is not None:
                found.append(inner)
        at = end
    return found


def formula_spans(text: str) -> list[Span]:
    """Where the formulas and inline code of a text without fences are."""
    return [match.span() for match in FORMULA.finditer(text) if match["escaped"] is None]


def latex(match: re.Match[str]) -> str | None:
    """What a match of `FORMULA` holds between its delimiters; None where it is no formula."""
    kind = match.lastgroup
    if kind in ("escaped", "code") or kind is None:
        return None
    return match[0] if kind == "environment" else match[kind].strip()


def code_lines(text: str) -> list[str]:
    """The lines inside fences that are not blank, without the fences' own."""
    lines: list[str] = []
    for start, end in fences(text):
        inside = text[start:end].split("\n")[1:]
        if inside and inside[-1].strip(" \t>").startswith(("```", "~~~")):
            inside.pop()
        lines += [line for line in inside if line.strip()]
    return lines


def _paragraphs(text: str, start: int, stop: int, found: list[tuple[Kind, int, int]]) -> None:
    """Add the blocks between two positions, of which neither is inside a fence or formula."""
    for gap in [*(m.span() for m in _BLANK.finditer(text, start, stop)), (stop, stop)]:
        first, last = start, gap[0]
        while first < last and text[first] == "\n":
            first += 1
        while first < last and text[last - 1] == "\n":
            last -= 1
        if first < last and not (text[first] in " \t" and text[first:last].isspace()):
            found.append(("prose" if text[first] not in "#|$" else _kind(text[first:last]), first, last))
        start = gap[1]


def _kind(text: str) -> Kind:
    if text[0] == "#":
        return "heading" if "\n" not in text else "prose"
    if text[0] == "|":
        return "table"
    return "math" if text[:2] == "$$" and text[-2:] == "$$" else "prose"


def _start(block: tuple[Kind, int, int]) -> int:
    return block[1]
