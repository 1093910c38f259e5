"""Blocks of a page: code, headings, lists and tables, beside the formulas and the text."""

import re

from alloy.data.web import code, tables
from alloy.data.web.content import Block, Node
from alloy.data.web.markup import end_of, text_of
from alloy.data.web.mathematics import Mathematics
from alloy.data.web.tags import BLOCKS, PARAGRAPHS, Tag

# lists and quotes inside more of them are not indented further
DEEPEST_PREFIX = 40
_SCRIPT = re.compile(r"[_^]\{[^{}]*\}$")


class Layout(Mathematics):
    """A walk that knows every element; `read` makes the blocks."""

    __slots__ = ()

    # code

    def pre(self, tag: Tag, i: int) -> int:
        """Code between fences."""
        self._flush()
        if tag.name in ("xmp", "plaintext"):
            source = self.parts[i - 1]
            text, j = source[source.index(">") + 1 : source.rindex("</")].strip("\n"), i - 1
        else:
            j = end_of(self.parts, i, tag.name)
            text = code.read_code(self.parts, i, j)
        if text.strip():
            language = code.language_of(tag.attributes) or code.inner_language(self.parts, i, j) or self._language
            self._block(Block("code", code.fence(text, language)))
        return j + 1

    def inline_code(self, tag: Tag, i: int) -> int:
        """Code in a line between backticks; of several lines, between fences."""
        j = self._end_of(tag, i)
        tags = self.parts[i + 1 : j : 2]
        if not j or (tags and any(t.startswith(_NO_CODE) for t in tags)):
            return self._pass(i)
        if tags and "br" in tags and text_of(self.parts, i, j).strip():
            return self.pre(tag, i)
        text = text_of(self.parts, i, j)
        if text.count("\n") > 2 and tag.name == "code" and code.language_of(tag.attributes):
            return self.pre(tag, i)
        if self._buffer and self._buffer[-1][-1:] == "}" and _SCRIPT.search(self._buffer[-1][-40:]):
            # goes on with what has scripts
            return self._pass(i)
        shown = code.inline_code(text)
        if shown:
            edges = " " if text[:1].isspace() else "", " " if text[-1:].isspace() else ""
            self._buffer.append(f"{edges[0]}{self._atom(shown)}{edges[1]}")
            if self._link_from < 0 and any(t.startswith("a ") for t in tags):
                self._links += len(text)
        return j + 1

    def code_container(self, tag: Tag, i: int) -> int:
        """An element without `pre` whose lines are code."""
        j = self._end_of(tag, i)
        if not j or any(t == "pre" or t.startswith("pre ") for t in self.parts[i + 1 : j : 2]):
            return self.block_special(tag, i)
        return self.pre(tag, i)

    # structure

    def unspoken(self, tag: Tag, i: int) -> int:
        """What is hidden from readers aloud: a decoration, unless a formula is in it."""
        j = self._end_of(tag, i)
        if j and not any(
            t.startswith(("math", 'script type="math', "img", "annotation", "mjx")) for t in self.parts[i + 1 : j : 2]
        ):
            return j + 1
        return self.block_special(tag, i) if tag.name in BLOCKS or tag.name in PARAGRAPHS else self._pass(i)

    def rule(self, tag: Tag, i: int) -> int:
        """A line across the page is the end of a paragraph."""
        self._flush()
        return i

    def heading(self, tag: Tag, i: int) -> int:
        """A heading."""
        self._flush()
        self._stack.append((self._end_heading, (int(tag.name[1]), len(self.blocks), len(self.nodes))))
        return i

    def _end_heading(self, opened: tuple[int, int, int]) -> None:
        self._flush()
        level, start, node = opened
        inner = self.blocks[start:]
        if not inner or any(block.kind != "text" for block in inner):
            return
        text = " ".join(block.text.replace("\n", " ") for block in inner)
        first = inner[0]
        del self.blocks[start:], self.nodes[node:]
        links = sum(block.links for block in inner)
        has_math = any(block.has_math for block in inner)
        self.blocks.append(Block("heading", text, first.prefix, first.marker, links, has_math, False, level))

    def list_(self, tag: Tag, i: int) -> int:
        """A list."""
        self._flush()
        start = tag.attributes.get("start", "1")
        self._lists.append(
            int(start) if tag.name == "ol" and start.isdecimal() and len(start) < 9 else (1 if tag.name == "ol" else -1)
        )
        self._stack.append((self._end_list, len(self.nodes)))
        self.nodes.append(Node(tag.name, tag.hint, len(self.blocks)))
        return i

    def _end_list(self, at: int) -> None:
        self._flush()
        if self._lists:
            self._lists.pop()
        if at < len(self.nodes):
            self.nodes[at].stop = len(self.blocks)

    def item(self, tag: Tag, i: int) -> int:
        """An item of a list."""
        self._flush()
        self._stack.append((self._end_indented, self._prefix))
        number = self._lists[-1] if self._lists else -1
        if number >= 0:
            self._lists[-1] += 1
        marker = f"{number}. " if number >= 0 else "- "
        if len(self._prefix) < DEEPEST_PREFIX:
            self._prefix += " " * len(marker)
            self._marker = marker
        return i

    def quote(self, tag: Tag, i: int) -> int:
        """A block quote."""
        self._flush()
        self._stack.append((self._end_indented, self._prefix))
        # a bare div inside is how documentation generators indent
        is_indentation = self.parts[i].isspace() and self.parts[i + 1] == "div" if i + 1 < len(self.parts) else False
        if len(self._prefix) < DEEPEST_PREFIX and not is_indentation:
            self._prefix += "> "
        return i

    def _end_indented(self, prefix: str) -> None:
        self._flush()
        self._prefix, self._marker = prefix, ""

    def definition(self, tag: Tag, i: int) -> int:
        """What a term of a list of definitions means; of one paragraph, on the line below the term."""
        self._flush()
        self._stack.append((self._end_definition, len(self.blocks)))
        return i

    def _end_definition(self, start: int) -> None:
        self._flush()
        if len(self.blocks) - start == 1 and self.blocks[start].kind == "text" and not self.blocks[start].marker:
            self.blocks[start].text = f": {self.blocks[start].text}"
            self.blocks[start].is_tight = start > 0

    # tables

    def table(self, tag: Tag, i: int) -> int:
        """A table; whether of data or for layout is known at its end."""
        self._flush()
        classes = tag.attributes.get("class", "").lower().split()
        is_inner = bool(self._tables) and self._tables[-1].is_display
        if "display" in classes and not is_inner and (end := self.display_table(tag, i)):
            self._flush()
            return end
        is_layout = tag.attributes.get("role") in ("presentation", "none") or "layout" in classes
        table = tables.Table(len(self.blocks), len(self.nodes), is_layout, "display" in classes)
        self._stack.append((self._end_table, (table, self._prefix, self._marker, self._lists, len(self.nodes))))
        self.nodes.append(Node("table", tag.hint, len(self.blocks)))
        self._tables.append(table)
        self._lists = []
        return i

    def row(self, tag: Tag, i: int) -> int:
        """A row of a table."""
        self._flush()
        if self._tables:
            self._tables[-1].rows.append([])
        self._stack.append(-1)
        return i

    def cell(self, tag: Tag, i: int) -> int:
        """A cell of a table."""
        self._flush()
        if code.is_gutter(tag.attributes):
            return end_of(self.parts, i, tag.name) + 1
        if not self._tables or not self._tables[-1].rows:
            self._stack.append(-1)
            return i
        cell = tables.Cell(
            len(self.blocks),
            0,
            tables.span(tag.attributes.get("colspan")),
            tables.span(tag.attributes.get("rowspan")),
            tag.name == "th",
        )
        self._tables[-1].rows[-1].append(cell)
        self._tables[-1].num_cells += cell.columns
        self._stack.append((self._end_cell, cell))
        return i

    def _end_cell(self, cell: tables.Cell) -> None:
        self._flush()
        cell.stop = len(self.blocks)

    def _end_table(self, opened: tuple[tables.Table, str, str, list[int], int]) -> None:
        self._flush()
        table, self._prefix, marker, self._lists, node = opened
        if self._tables:
            self._tables.pop()
        if self._tables:
            self._tables[-1].has_inner = True
        rows = [row for row in table.rows if row]
        inner = self.blocks[table.start :]
        if inner and rows:
            if table.is_display or self._is_one_line(table, inner, rows):
                self._joined(table.start, "text", " ".join(b.text.replace("\n", " ") for b in inner), inner, marker)
            elif self._holds_data(table, inner, rows):
                caption = self.blocks[table.start : rows[0][0].start]
                cells = [
                    [
                        (" ".join(b.marker + b.text.replace("\n", " ") for b in self.blocks[c.start : c.stop]), c)
                        for c in row
                    ]
                    for row in rows
                ]
                self._joined(
                    rows[0][0].start,
                    "table",
                    tables.pipe_table(cells),
                    inner[len(caption) :],
                    "" if caption else marker,
                )
        del self.nodes[min(node + 1, len(self.nodes)) :]
        if node < len(self.nodes):
            self.nodes[node].stop = len(self.blocks)

    def _is_one_line(self, table: tables.Table, inner: list[Block], rows: list[list[tables.Cell]]) -> bool:
        """Whether it sets one short line: one row, all of it inline."""
        return (
            len(rows) == 1
            and len(rows[0]) > 1
            and all(b.kind == "text" for b in inner)
            and sum(len(b.text) for b in inner) < 200
            and len(inner) <= len(rows[0])
        )

    def _holds_data(self, table: tables.Table, inner: list[Block], rows: list[list[tables.Cell]]) -> bool:
        width = max(sum(cell.columns for cell in row) for row in rows)
        if table.is_layout or len(rows) < 2 or width < 2 or table.num_cells > self.most_cells:
            return False
        if any(b.kind in ("code", "heading", "table") for b in inner) or any(
            len(b.text) > tables.LONGEST_CELL for b in inner
        ):
            return False
        has_head = any(cell.is_head for row in rows for cell in row)
        filled = sum(1 for row in rows for cell in row if cell.stop > cell.start)
        return (has_head or not table.has_inner) and filled > len(rows) and len(inner) < 4 * filled

    def _joined(self, start: int, kind: str, text: str, inner: list[Block], marker: str) -> None:
        links, has_math = sum(b.links for b in inner), any(b.has_math for b in inner)
        del self.blocks[start:]
        self.blocks.append(Block(kind, text, self._prefix, marker, links, has_math))  # pyright: ignore[reportArgumentType]


_NO_CODE = (
    "math",
    "img",
    "script",
    "p",
    "div",
    "table",
    "ul",
    "ol",
    "pre",
    "h1",
    "h2",
    "h3",
    "li",
    "sub",
    "sup",
    "mjx",
)
