"""Tables: whether one holds data, and data as a pipe table."""

import re
from dataclasses import dataclass, field

# copies that one cell makes of itself
WIDEST_SPAN = 50
# a table of longer cells is read as blocks
LONGEST_CELL = 600
_PIPE = re.compile(r"\0d?\d+\0|\|")


@dataclass(slots=True)
class Cell:
    """A cell: the blocks from `start` to `stop`, and how many columns and rows it covers."""

    start: int
    stop: int
    columns: int
    rows: int
    is_head: bool


@dataclass(slots=True)
class Table:
    """A table while its content is read."""

    start: int
    nodes: int
    is_layout: bool
    is_display: bool
    rows: list[list[Cell]] = field(default_factory=list[list[Cell]])
    num_cells: int = 0
    has_inner: bool = False


def span(value: str | None) -> int:
    """A colspan or rowspan within bounds."""
    return min(max(int(value), 1), WIDEST_SPAN) if value and value.isdecimal() and len(value) < 6 else 1


def pipe_table(rows: list[list[tuple[str, Cell]]]) -> str:
    """Rows of texts with their cells as a pipe table, spans written out."""
    grid: list[list[str]] = []
    # column: text and rows that a cell above still covers
    covered: dict[int, tuple[str, int]] = {}
    for row in rows:
        line: list[str] = []

        def fill(line: list[str] = line) -> None:
            while (above := covered.get(len(line))) is not None:
                if above[1] > 1:
                    covered[len(line)] = (above[0], above[1] - 1)
                else:
                    del covered[len(line)]
                line.append(above[0])

        for text, cell in row:
            fill()
            text = _PIPE.sub(lambda m: "\\|" if m[0] == "|" else m[0], text) if "|" in text else text
            for _ in range(cell.columns):
                if cell.rows > 1:
                    covered[len(line)] = (text, cell.rows - 1)
                line.append(text)
        fill()
        grid.append(line)
    width = max(map(len, grid))
    lines = [f"| {' | '.join(line + [''] * (width - len(line)))} |" for line in grid]
    return "\n".join((lines[0], "|" + " --- |" * width, *lines[1:]))
