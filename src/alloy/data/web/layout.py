"""One walk over the texts and tags of a page: formulas, code, tables, lists and headings as blocks of text."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from alloy.data.web import asciimath, code, tables
from alloy.data.web.attributes import formula_of_attributes, formula_of_text, may_hold_formula
from alloy.data.web.content import ASIDE, DROP, NONE, Block, Node, hint_of
from alloy.data.web.delimiters import Delimiters, find_formulas
from alloy.data.web.element import Element
from alloy.data.web.formula import Formula
from alloy.data.web.glyphs import formula_of_katex, formula_of_mathjax
from alloy.data.web.images import formula_of_image, is_math_image
from alloy.data.web.markup import VOID, attributes_of, element_of, end_of, name_of, split, text_of, unescape
from alloy.data.web.mathml import math_of, tex_of_glyph_lines
from alloy.data.web.subsup import Piece, formula_of_texhtml, is_script_of
from alloy.data.web.tex import formula

BREAK = "\u2028"
# lists and quotes inside more of them are not indented further
DEEPEST_PREFIX = 40
_ATOM = re.compile(r"\0d?(\d+)\0")
_DISPLAY = re.compile(r"\s*(\0d\d+\0)\s*")
_DOLLAR = re.compile(r"(?<!\\)\$")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)

# kinds of tags; from SPECIAL on they have a method
INLINE, BREAKING, EMPTY, LINK, BLOCK, PARAGRAPH, SKIP, SPECIAL = range(8)
_INLINE = frozenset(
    str.split(
        "span i em b strong u s small big font abbr acronym cite dfn var q ins del strike mark bdi bdo nobr label time data ruby rb center "
        "picture map wbr slot noindex"
    )
) - {"center"}
_BLOCKS = frozenset(
    str.split(
        "html head body div section article main nav aside header footer address center details fieldset figure form hgroup dl menu dir "
        "colgroup tbody thead tfoot frameset noframes object applet dialog search"
    )
)
_PARAGRAPHS = frozenset(str.split("p dt summary figcaption caption legend optgroup marquee"))
_SKIPPED = frozenset(
    str.split(
        "title style template svg audio video canvas select button textarea datalist rp rt iframe noembed noframes option meter progress noscript"
    )
)
_METHODS: dict[str, str] = {
    **dict.fromkeys(("pre", "listing", "xmp", "plaintext"), "pre"),
    **dict.fromkeys(("code", "tt", "kbd", "samp"), "inline_code"),
    **dict.fromkeys(("sub", "sup"), "script_text"), **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "heading"),
    **dict.fromkeys(("ul", "ol"), "list_"), **dict.fromkeys(("td", "th"), "cell"),
    "li": "item", "dd": "definition", "blockquote": "quote", "table": "table", "tr": "row", "hr": "rule", "img": "image",
    "math": "math", "script": "script", "mjx-container": "mathjax",
}  # fmt: skip


@dataclass(slots=True)
class Tag:
    """What a tag that opens an element means."""

    kind: int
    name: str
    attributes: dict[str, str]
    hint: int = NONE
    method: str = ""
    language: str = ""


@dataclass(slots=True)
class Layout:
    """Blocks of a page, made by `read`.

    Attributes:
        parts: texts and tags of `markup.split`.
        atoms: formulas and inline code that the blocks hold as `\\0index\\0`.
        lost: formulas that were seen but not understood.
    """

    parts: list[str]
    delimiters: Delimiters
    keep_alt: bool = False
    most_cells: int = 200_000
    has_scripts: bool = False
    blocks: list[Block] = field(default_factory=list[Block])
    nodes: list[Node] = field(default_factory=list[Node])
    atoms: list[Formula | str] = field(default_factory=list["Formula | str"])
    lost: int = 0
    _buffer: list[str] = field(default_factory=list[str])
    _stack: list["Closing"] = field(default_factory=list["Closing"])
    _prefix: str = ""
    _marker: str = ""
    _links: int = 0
    _link_from: int = -1
    _lists: list[int] = field(default_factory=list[int])
    _tables: list[tables.Table] = field(default_factory=list[tables.Table])
    _language: str = ""
    _is_searched: bool = True
    _work: int = 0
    _math_at: int = -100

    def read(self) -> None:
        """Walk over the page."""
        parts, buffer, stack = self.parts, self._buffer, self._stack
        push, pop, add, flush, known = stack.append, stack.pop, buffer.append, self._flush, _KNOWN
        i, last = 0, len(parts) - 1
        while i < last:
            text = parts[i]
            if text:
                add(text)
            tag = parts[i + 1]
            i += 2
            if tag[:1] == "/":
                if not stack:
                    continue
                closing = pop()
                if closing is None:
                    continue
                if closing.__class__ is int:
                    flush()
                    if closing >= 0:  # pyright: ignore[reportOperatorIssue]
                        self.nodes[closing].stop = len(self.blocks)  # pyright: ignore[reportArgumentType, reportCallIssue]
                else:
                    closing[0](closing[1])  # pyright: ignore[reportIndexIssue]
                continue
            opened = known.get(tag)
            if opened is None:
                opened = _classify(tag)
            kind = opened.kind
            if kind == INLINE:
                push(None)
            elif kind == LINK:
                push((self._end_link, None))
                if self._link_from < 0:
                    self._link_from = len(buffer)
            elif kind == BLOCK:
                flush()
                push(len(self.nodes))
                self.nodes.append(Node(opened.name, opened.hint, len(self.blocks)))
            elif kind == PARAGRAPH:
                flush()
                push(-1)
            elif kind == BREAKING:
                add(BREAK)
            elif kind == SKIP:
                i = end_of(parts, i, opened.name) + 1
            elif kind == SPECIAL:
                i = getattr(self, opened.method)(opened, i)
        add(parts[last])
        flush()
        while stack:
            closing = pop()
            if isinstance(closing, int) and closing >= 0:
                self.nodes[closing].stop = len(self.blocks)
            elif isinstance(closing, tuple):
                closing[0](closing[1])

    # text

    def _flush(self) -> None:
        """What was read since the last block as a block."""
        buffer = self._buffer
        if not buffer:
            return
        text = "".join(buffer)
        if self._link_from >= 0:
            self._links += sum(map(len, buffer[self._link_from :]))
            self._link_from = 0
        buffer.clear()
        if not text or text.isspace():
            return
        text = unescape(text) if "&" in text else text
        if not text.isascii():
            text = _INVISIBLE.sub("", text)
        if self._is_searched:
            text = self._with_formulas(text)
        if "$" in text:
            text = _DOLLAR.sub(r"\\$", text)
        if BREAK in text:
            text = "\n".join(filter(None, (" ".join(line.split()) for line in text.split(BREAK))))
        else:
            text = " ".join(text.split())
        if "\0d" in text:
            text = _DISPLAY.sub(r"\n\1\n", text).strip().replace("\n\n", "\n")
        if text:
            has_math = "\0" in text and any(isinstance(self.atoms[int(at)], Formula) for at in _ATOM.findall(text))
            self.blocks.append(Block("text", text, self._prefix, self._marker, self._links, has_math))
            self._marker = ""
        self._links = 0

    def _with_formulas(self, text: str) -> str:
        found = find_formulas(text, self.delimiters)
        if not found:
            return text
        parts, at = list[str](), 0
        for start, stop, what in found:
            parts += (text[at:start], self._atom(what))
            at = stop
        return "".join(parts) + text[at:]

    def _atom(self, what: Formula | str) -> str:
        self.atoms.append(what)
        mark = "d" if isinstance(what, Formula) and what.display else ""
        return f"\0{mark}{len(self.atoms) - 1}\0"

    def _end_link(self, _: object) -> None:
        if self._link_from >= 0:
            self._links += sum(map(len, self._buffer[self._link_from :]))
            self._link_from = -1

    def _end_of(self, tag: Tag, i: int) -> int:
        """Place of the closing tag of an element whose content is looked at as a whole; 0 where too much was looked at twice."""
        if self._work > 10 * len(self.parts) + 10_000:
            return 0
        j = end_of(self.parts, i, tag.name)
        self._work += j - i
        return j

    def _pass(self, i: int) -> int:
        """Read on inside an element that has no meaning of its own."""
        self._stack.append(None)
        return i

    # mathematics

    def _put(self, what: Formula | None) -> bool:
        if what is not None:
            self._buffer.append(self._atom(what))
        return what is not None

    def math(self, tag: Tag, i: int) -> int:
        """`math`, also with a prefix."""
        j = end_of(self.parts, i, tag.name)
        self._math_at = j
        if (noted := self._annotation(i, j)) is not None:
            display = "block" in (
                tag.attributes.get("display", ""),
                tag.attributes.get("mode", "").replace("display", "block"),
            )
            self._put(formula(noted, display, "mathml-annotation"))
        elif (
            not self._put(math_of(element_of(self.parts, i, j, self.parts[i - 1])))
            and text_of(self.parts, i, j).strip()
        ):
            self.lost += 1
        return j + 1

    def _annotation(self, i: int, j: int) -> str | None:
        """TeX that an annotation between two places notes."""
        for at in range(i + 1, j, 2):
            tag = self.parts[at]
            if tag.startswith("annotation ") and "tex" in tag.lower() and self.parts[at + 1].strip():
                return unescape(self.parts[at + 1])
        return None

    def script(self, tag: Tag, i: int) -> int:
        """Scripts that hold formulas; others are left out."""
        kind = tag.attributes.get("type", "").lower()
        if not kind.startswith("math/"):
            return i
        source = self.parts[i - 1]
        source = source[source.index(">") + 1 : source.rindex("</")]
        display = "mode=display" in kind.replace(" ", "")
        if kind.startswith("math/tex"):
            self._put(formula(source.removeprefix("<![CDATA[").removesuffix("]]>"), display, "script"))
        elif kind.startswith("math/asciimath"):
            self._put(Formula(asciimath.to_latex(source), display, "asciimath") if source.strip() else None)
        elif kind.startswith("math/mml"):
            parts = split(source, 4096, 100_000)
            start = next((at for at in range(1, len(parts), 2) if name_of(parts[at]).rpartition(":")[2] == "math"), 0)
            if start:
                inner = element_of(parts, start + 1, end_of(parts, start + 1, name_of(parts[start])), parts[start])
                self._put(math_of(inner))
        return i

    def katex(self, tag: Tag, i: int) -> int:
        """What KaTeX typeset: the TeX in its MathML, also where a site dropped the tags."""
        j = self._end_of(tag, i)
        if not j:
            return self._pass(i)
        display = "katex-display" in tag.attributes.get("class", "").split()
        if (noted := self._annotation(i, j)) is not None:
            display = display or any(
                ' display="block"' in t for t in self.parts[i + 1 : j : 2] if t.startswith("math ")
            )
            return self._typeset(formula(noted, display, "katex"), i, j)
        element = element_of(self.parts, i, j, self.parts[i - 1])
        what: Formula | None = None
        for inner in _walk(element):
            names = inner.get("class").split()
            if inner.tag == "math" and (what := math_of(inner)) is not None:
                what = Formula(what.tex, display or what.display, "katex")
            elif "katex-mathml" in names:
                tex = tex_of_glyph_lines("".join(e.text for e in _walk(inner)))
                what = formula(tex, display, "katex") if tex else None
            elif "katex-html" in names:
                what = formula_of_katex(inner, display)
            if what is not None:
                break
        return self._typeset(what, i, j)

    def mathjax(self, tag: Tag, i: int) -> int:
        """What MathJax typeset; dropped where the page holds the source as well."""
        if self.has_scripts:
            return end_of(self.parts, i, tag.name) + 1
        j = self._end_of(tag, i)
        if not j:
            return self._pass(i)
        return self._typeset(formula_of_mathjax(element_of(self.parts, i, j, self.parts[i - 1])), i, j)

    def _typeset(self, what: Formula | None, i: int, j: int) -> int:
        """Put a formula in place of the elements that draw it; without one they are read as text."""
        if self._put(what):
            return j + 1
        if text_of(self.parts, i, j).strip():
            self.lost += 1
        return self._pass(i)

    def attribute(self, tag: Tag, i: int) -> int:
        """An element that may carry a formula in its attributes or be the text of one."""
        j = self._end_of(tag, i) if tag.name not in VOID else i - 1
        if not j:
            return self.block_special(tag, i) if tag.name in _BLOCKS or tag.name in _PARAGRAPHS else self._pass(i)
        what = formula_of_attributes(tag.name, tag.attributes)
        is_block = tag.name in _BLOCKS or tag.name in _PARAGRAPHS
        tags = self.parts[i + 1 : j : 2]
        if what is None and not any(
            t.startswith(("math", 'script type="math', "img", "table", "/p", "mjx")) for t in tags
        ):
            text = text_of(self.parts, i, j)
            if len(text) < 20_000:
                what = formula_of_text(tag.name, tag.attributes, text, bool(tags))
            if what is None and "texhtml" in tag.attributes.get("class", ""):
                what = formula_of_texhtml(self._pieces(i, j))
        if what is None:
            if tag.name in VOID:
                return i
            return self.block_special(tag, i) if is_block else self._pass(i)
        if is_block:
            self._flush()
        self._put(what)
        if is_block:
            self._flush()
        return j + 1

    def _pieces(self, i: int, j: int) -> list[Piece]:
        pieces: list[Piece] = []
        names: list[str] = []
        for at in range(i, j, 2):
            if self.parts[at]:
                kind = next((name for name in reversed(names) if name in ("sub", "sup")), "text")
                text = unescape(self.parts[at])
                pieces.append(Piece(text, kind, not {"i", "em", "var"}.isdisjoint(names), "a" in names))  # pyright: ignore[reportArgumentType]
            tag = self.parts[at + 1]
            if tag[:1] == "/":
                if names:
                    names.pop()
            elif (name := name_of(tag)) not in VOID:
                names.append(name)
        return pieces

    def image(self, tag: Tag, i: int) -> int:
        """Images of formulas; others leave their text only if asked to."""
        # what is drawn beside the MathML of the same formula
        if i - self._math_at < 10 and is_math_image(tag.attributes):
            return i
        if not self._put(formula_of_image(tag.attributes)):
            if is_math_image(tag.attributes):
                self.lost += 1
            elif self.keep_alt:
                self._buffer.append(f" {tag.attributes.get('alt', '')} ")
        return i

    def script_text(self, tag: Tag, i: int) -> int:
        """`sub` and `sup`, written as in mathematics where they are that."""
        self._stack.append((self._end_script, (tag.name, len(self._buffer), self._links, self._link_from)))
        return i

    def _end_script(self, opened: tuple[str, int, int, int]) -> None:
        name, at, links, link_from = opened
        if at > len(self._buffer):
            return
        if len(self._buffer) - at > 20:
            return
        content = "".join(self._buffer[at:])
        before = "".join(self._buffer[max(at - 3, 0) : at])[-100:]
        is_link = link_from >= 0 or self._links != links
        kind = "sub" if name == "sub" else "sup"
        if "\0" not in content and is_script_of(unescape(before), Piece(unescape(content), kind, False, is_link)):
            del self._buffer[at:]
            self._buffer.append(f"{'_' if kind == 'sub' else '^'}{{{content.strip()}}}")

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
        if not j or any(t.startswith(_NO_CODE) for t in tags):
            return self._pass(i)
        if "br" in tags and text_of(self.parts, i, j).strip():
            return self.pre(tag, i)
        text = text_of(self.parts, i, j)
        if text.count("\n") > 2 and tag.name == "code" and code.language_of(tag.attributes):
            return self.pre(tag, i)
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

    def block_special(self, tag: Tag, i: int) -> int:
        """A block that names the language of the code in it, or whose formulas are left alone."""
        self._flush()
        self._stack.append((self._end_special, (len(self.nodes), self._language, self._is_searched)))
        self.nodes.append(Node(tag.name, tag.hint, len(self.blocks)))
        self._language = tag.language or self._language
        taken = self.delimiters.takes(tag.attributes.get("class", ""))
        self._is_searched = self._is_searched if taken is None else taken
        return i

    def _end_special(self, opened: tuple[int, str, bool]) -> None:
        self._flush()
        at, self._language, self._is_searched = opened
        if at < len(self.nodes):
            self.nodes[at].stop = len(self.blocks)

    # structure

    def unspoken(self, tag: Tag, i: int) -> int:
        """What is hidden from readers aloud: a decoration, unless a formula is in it."""
        j = self._end_of(tag, i)
        if j and not any(
            t.startswith(("math", 'script type="math', "img", "annotation", "mjx")) for t in self.parts[i + 1 : j : 2]
        ):
            return j + 1
        return self.block_special(tag, i) if tag.name in _BLOCKS or tag.name in _PARAGRAPHS else self._pass(i)

    def _block(self, block: Block) -> None:
        # quote marks would be part of the code
        block.prefix, block.marker, self._marker = self._prefix.replace("> ", ""), self._marker, ""
        self.blocks.append(block)

    def rule(self, tag: Tag, i: int) -> int:
        """A line across the page is the end of a paragraph."""
        self._flush()
        return i

    def heading(self, tag: Tag, i: int) -> int:
        """A heading."""
        self._flush()
        self._stack.append((self._end_heading, (int(tag.name[1]), len(self.blocks))))
        return i

    def _end_heading(self, opened: tuple[int, int]) -> None:
        self._flush()
        level, start = opened
        inner = self.blocks[start:]
        if not inner or any(block.kind != "text" for block in inner):
            return
        text = " ".join(block.text.replace("\n", " ") for block in inner)
        first = inner[0]
        del self.blocks[start:]
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


Closing = tuple[Callable[..., None], object] | int | None
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
_KNOWN: dict[str, Tag] = {}


def _walk(element: Element) -> list[Element]:
    """An element and all below it, in order."""
    found: list[Element] = []
    waiting = [element]
    while waiting:
        found.append(waiting.pop())
        waiting.extend(reversed(found[-1].children))
    return found


def _classify(tag: str) -> Tag:
    name = name_of(tag)
    if name == "a" and "class=" not in tag and "hidden" not in tag and "display" not in tag:
        return _A if ' href="' in tag else _SPAN
    opened = _read(tag, name)
    if len(tag) < 80:
        if len(_KNOWN) > 50_000:
            _KNOWN.clear()
        _KNOWN[tag] = opened
    return opened


def _read(tag: str, name: str) -> Tag:
    if not name or name[0] == "!" or name == "/":
        return Tag(EMPTY, name, {})
    attributes = attributes_of(tag[: tag.index(">")] if ">" in tag else tag)
    local = name.rpartition(":")[2]
    if local == "math" or name == "script":
        return Tag(SPECIAL, name, attributes, method=local)
    if name == "br":
        return Tag(BREAKING, name, attributes)
    classes = attributes.get("class", "")
    if classes and (method := _typeset(classes)) and name not in VOID:
        return Tag(SPECIAL, name, attributes, method=method)
    if name in _SKIPPED or _is_hidden(attributes):
        return Tag(EMPTY if name in VOID or ">" in tag else SKIP, name, attributes)
    if name in VOID and name not in _METHODS:
        return Tag(EMPTY, name, attributes)
    hint = (
        hint_of(name, attributes)
        if attributes or name in ("nav", "footer", "aside", "header", "main", "article")
        else NONE
    )
    if hint == DROP and name not in ("body", "html", *VOID):
        return Tag(SKIP, name, attributes)
    if (
        name not in ("code", "pre", "img")
        and attributes
        and (
            may_hold_formula(name, classes)
            or any(key.startswith(("data-", "mathjax", "tex", "latex")) for key in attributes if key != "class")
        )
        and (may_hold_formula(name, classes) or formula_of_attributes(name, attributes) is not None)
    ):
        return Tag(SPECIAL, name, attributes, hint, "attribute")
    if attributes.get("aria-hidden") == "true" and name not in VOID:
        return Tag(SPECIAL, name, attributes, hint, "unspoken")
    if name in ("div", "figure", "section", "table") or name in _INLINE:
        language = code.language_of(attributes) if classes and name not in _INLINE else ""
        if classes and name in ("div", "table") and not code.CONTAINERS.isdisjoint(classes.lower().split()):
            return Tag(SPECIAL, name, attributes, hint, "code_container", language)
        if (language or "ignore" in classes or "process" in classes) and name != "table" and name not in _INLINE:
            return Tag(SPECIAL, name, attributes, hint, "block_special", language)
    if (method := _METHODS.get(name)) is not None:
        return Tag(SPECIAL, name, attributes, hint, method)
    if name in _BLOCKS:
        return Tag(BLOCK, name, attributes, hint)
    if name in _PARAGRAPHS:
        return Tag(PARAGRAPH if hint in (NONE, ASIDE) else BLOCK, name, attributes, hint)
    if name == "a" and "href" in attributes:
        return Tag(LINK, name, attributes)
    return Tag(INLINE, name, attributes)


def _typeset(classes: str) -> str:
    """Method for what KaTeX and MathJax made, by the classes of the element."""
    if "katex" in classes:
        names = classes.split()
        return "katex" if "katex" in names or "katex-display" in names else ""
    if "MathJax" in classes or "MJX" in classes or "MJXc" in classes:
        if "MathJax_Preview" in classes:
            return "mathjax"
        return (
            "mathjax" if any(name.startswith(("MathJax", "MJXc-display", "mjx-")) for name in classes.split()) else ""
        )
    return ""


def _is_hidden(attributes: Mapping[str, str]) -> bool:
    if "hidden" in attributes and attributes["hidden"] != "until-found":
        return True
    style = attributes.get("style", "")
    # MediaWiki hides MathML from sight only
    if "mwe-math" in attributes.get("class", ""):
        return False
    return bool(style) and ("none" in style or "hidden" in style) and _HIDDEN.search(style) is not None


_A, _SPAN = Tag(LINK, "a", {}), Tag(INLINE, "span", {})
