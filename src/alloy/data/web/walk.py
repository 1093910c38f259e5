"""One walk over the texts and tags of a page: running text as blocks, with the formulas between their delimiters."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from alloy.data.web import tables
from alloy.data.web.content import Block, Node
from alloy.data.web.delimiters import Delimiters, find_formulas
from alloy.data.web.formula import Formula
from alloy.data.web.markup import end_of, unescape
from alloy.data.web.tags import BLOCK, BREAKING, CLOSING, INLINE, KNOWN, LINK, PARAGRAPH, SKIP, SPECIAL, Tag, classify

BREAK = "\u2028"
_ATOM = re.compile(r"\0d?(\d+)\0")
_DISPLAY = re.compile(r"\s*(\0d\d+\0)\s*")
_DOLLAR = re.compile(r"(?<!\\)\$")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")


@dataclass(slots=True)
class Walk:
    """Blocks of a page, made by `read`.

    Attributes:
        parts: texts and tags of `markup.split`.
        atoms: formulas and inline code that the blocks hold as `\\0index\\0`.
        is_cut: whether a less-than sign in a formula was taken for the beginning of a tag.
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
    is_cut: bool = False
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
        push, pop, add, flush, known = stack.append, stack.pop, buffer.append, self._flush, KNOWN
        i, last = 0, len(parts) - 1
        while i < last:
            text = parts[i]
            # white space between blocks is not kept for the next one
            if text and (buffer or not text.isspace()):
                add(text)
            tag = parts[i + 1]
            i += 2
            opened = known.get(tag)
            if opened is None:
                opened = classify(tag)
            kind = opened.kind
            if kind == INLINE:
                push(None)
            elif kind == CLOSING:
                if not stack:
                    continue
                closing = pop()
                if closing is None:
                    continue
                if closing.__class__ is int:
                    if buffer:
                        flush()
                    if closing >= 0:  # pyright: ignore[reportOperatorIssue]
                        self.nodes[closing].stop = len(self.blocks)  # pyright: ignore[reportArgumentType, reportCallIssue]
                else:
                    closing[0](closing[1])  # pyright: ignore[reportIndexIssue]
            elif kind == LINK:
                push((self._end_link, None))
                if self._link_from < 0:
                    self._link_from = len(buffer)
            elif kind == BLOCK:
                if buffer:
                    flush()
                push(len(self.nodes))
                self.nodes.append(Node(opened.name, opened.hint, len(self.blocks)))
            elif kind == PARAGRAPH:
                if buffer:
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
        text = buffer[0] if len(buffer) == 1 else "".join(buffer)
        if self._link_from >= 0:
            self._links += sum(map(len, buffer[self._link_from :]))
            self._link_from = 0
        buffer.clear()
        if not text or text.isspace():
            return
        text = unescape(text) if "&" in text else text
        if not text.isascii():
            text = _INVISIBLE.sub("", text)
        if self._is_searched and ("\\" in text or "$" in text or "[/" in text or self.delimiters.is_unusual):
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

    def _block(self, block: Block) -> None:
        # quote marks would be part of the code
        block.prefix, block.marker, self._marker = self._prefix.replace("> ", ""), self._marker, ""
        self.blocks.append(block)


Closing = tuple[Callable[..., None], object] | int | None
