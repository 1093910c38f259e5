"""HTML tables that are displays: what HeVeA and old LaTeX2HTML write for fractions, tall fences, sums and matrices.

Observed: a row of cells is a row of mathematics; three rows with an empty or ruled middle are a fraction; a cell of bracket pieces
(U+239B to U+23AE, one a line) is one fence; a large operator between two rows has them as limits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alloy.data.web.element import Element
from alloy.data.web.formula import Formula
from alloy.data.web.subsup import Piece, joined, latex_of_pieces
from alloy.data.web.symbols import FUNCTIONS
from alloy.data.web.tex import formula

OPENING_PIECES = {**dict.fromkeys("⎛⎜⎝", "("), **dict.fromkeys("⎡⎢⎣", "["), **dict.fromkeys("⎧⎨⎩⎪", "\\{")}
CLOSING_PIECES = {**dict.fromkeys("⎞⎟⎠", ")"), **dict.fromkeys("⎤⎥⎦", "]"), **dict.fromkeys("⎫⎬⎭", "\\}")}
_LARGE = frozenset("∑∏∫⋃⋂∮")
# words that no formula has: not functions applied to something
_PROSE = re.compile(r"\b[A-Za-z]{3,}\b(?!\s*[(\[:_^])")
_MARK = re.compile(r"[=<>≤≥≠≈+−*/^∑∏∫√∂∞()\[\]|]")
DEEPEST = 20
MOST_WORDS = 5


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; a cell is a run of pieces and of tables in it, which may stand in a script as a piece does."""

    rows: Sequence[Sequence[Sequence["Piece | Table"]]]
    kind: Literal["text", "sub", "sup"] = "text"


def table_of(element: Element, depth: int = 0) -> Table:
    """The rows and cells of a `table` element, with the tables in them."""
    rows: list[list[list[Piece | Table]]] = []
    waiting = list(reversed(element.children))
    while waiting:
        child = waiting.pop()
        if child.tag == "tr":
            cells = [cell for cell in child.children if cell.tag in ("td", "th")]
            rows.append([_parts(cell, "text", False, depth) for cell in cells])
        elif child.tag != "table":
            waiting.extend(reversed(child.children))
    return Table(rows)


def _parts(element: Element, kind: Literal["text", "sub", "sup"], is_italic: bool, depth: int) -> list["Piece | Table"]:
    """Pieces and tables in an element that stands in a script or in italics, or not."""
    if depth > DEEPEST:
        return []
    if element.tag == "table":
        return [Table(table_of(element, depth + 1).rows, kind)]
    kind = "sub" if element.tag == "sub" else "sup" if element.tag == "sup" else kind
    is_italic = is_italic or element.tag in ("i", "em", "var")
    parts: list[Piece | Table] = [Piece(element.text, kind, is_italic)] if element.text.strip() else []
    for child in element.children:
        if child.tag == "#text":
            parts.append(Piece(child.text, kind, is_italic))
        elif child.text or child.children:
            parts.extend(_parts(child, kind, is_italic, depth + 1))
    return parts


def formula_of_table(table: Table) -> Formula | None:
    """The display that a table is; None: it holds prose, or nothing of mathematics."""
    text = _text(table, 0)
    is_built = any(c in OPENING_PIECES or c in CLOSING_PIECES or c in _LARGE for c in text)
    if sum(word not in FUNCTIONS for word in _PROSE.findall(text)) > MOST_WORDS or not (is_built or _MARK.search(text)):
        return None
    return formula(_latex(table, 0), True, "table")


def _text(table: Table, depth: int) -> str:
    if depth > DEEPEST:
        return ""
    cells = (part for line in table.rows for cell in line for part in cell)
    return " ".join(part.text if isinstance(part, Piece) else _text(part, depth + 1) for part in cells)


def _latex(table: Table, depth: int) -> str:
    if depth > DEEPEST:
        return ""
    lines = [[_cell(cell, depth) for cell in line] for line in table.rows]
    if len(lines) == 3 and all(len([cell for cell in line if cell]) <= 1 for line in lines):
        top, middle, bottom = (joined(line) for line in lines)
        if top and bottom and not middle:
            return f"\\frac{{{top}}}{{{bottom}}}"
        first = "".join(part.text for cell in table.rows[1] for part in cell if isinstance(part, Piece)).strip()
        if first in _LARGE:
            return middle.strip() + (f"_{{{bottom}}}" if bottom else "") + (f"^{{{top}}}" if top else "")
    filled = [shown for line in lines if (shown := [cell for cell in line if cell])]
    if len(filled) < 2:
        return _fenced(filled[0]) if filled else ""
    if all(len(line) < 2 for line in filled):
        return "\\begin{gathered}" + " \\\\ ".join(map("".join, filled)) + "\\end{gathered}"
    return (
        "\\begin{matrix}"
        + " \\\\ ".join(" & ".join(line).rstrip("& ") for line in lines if any(line))
        + "\\end{matrix}"
    )


def _fenced(cells: Sequence[str]) -> str:
    """Cells side by side; fences that come in pairs grow with what they hold."""
    signs = [(OPENING_PIECES.get(cell[:1]), CLOSING_PIECES.get(cell[:1])) for cell in cells]
    depth, is_paired = 0, True
    for opening, closing in signs:
        depth += (opening is not None) - (closing is not None)
        is_paired = is_paired and depth >= 0
    parts: list[str] = []
    for cell, (opening, closing) in zip(cells, signs, strict=True):
        if opening is None and closing is None:
            parts.append(cell)
        else:
            parts.append(
                (("\\left" if opening else "\\right") if is_paired and not depth else "") + (opening or closing or "")
            )
    return joined(parts)


def _cell(cell: Sequence["Piece | Table"], depth: int) -> str:
    """LaTeX of a cell; one of bracket pieces is the first of them."""
    text = "".join(part.text for part in cell if isinstance(part, Piece))
    if (
        (bare := "".join(text.split()))
        and all(c in OPENING_PIECES or c in CLOSING_PIECES for c in bare)
        and len(cell) == sum(isinstance(p, Piece) for p in cell)
    ):
        return bare[0]
    parts: list[str] = []
    run: list[Piece] = []
    for part in cell:
        if isinstance(part, Piece):
            run.append(part)
            continue
        before, latex = latex_of_pieces(run), _latex(part, depth + 1)
        if part.kind == "text":
            parts.extend((before, latex))
        elif run and run[-1].kind == part.kind:
            # goes on with the script before it
            parts.append(f"{before.removesuffix('}')}{latex}}}")
        else:
            parts.append(f"{before}{'_' if part.kind == 'sub' else '^'}{{{latex}}}")
        run = []
    return joined((*parts, latex_of_pieces(run))).strip()
