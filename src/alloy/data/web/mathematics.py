"""Formulas of a page that elements hold: what their tags mean for the walk."""

import re

from alloy.data.web import asciimath
from alloy.data.web.attributes import formula_of_attributes, formula_of_text
from alloy.data.web.element import Element
from alloy.data.web.formula import Formula
from alloy.data.web.glyphs import formula_of_katex, formula_of_mathjax
from alloy.data.web.html_math import formula_of_html
from alloy.data.web.images import formula_of_image, is_math_image
from alloy.data.web.markup import VOID, element_of, end_of, name_of, split, text_of, unescape
from alloy.data.web.math_table import formula_of_table, table_of
from alloy.data.web.mathml import math_of, tex_of_glyph_lines
from alloy.data.web.subsup import Piece, formula_of_texhtml, is_script_of
from alloy.data.web.tags import BLOCKS, PARAGRAPHS, Tag
from alloy.data.web.tex import formula
from alloy.data.web.walk import Walk

_TYPESET = ("math", "script", "img", "pre", "ul", "ol", "mjx")
_ATOM = re.compile(r"\0(\d+)\0")
_DELIMITER = re.compile(r"\$|\\[(\[]")


class Mathematics(Walk):
    """A walk that knows the elements of mathematics."""

    __slots__ = ()

    def less_than(self, tag: Tag, i: int) -> int:
        """A formula that was taken for a tag: the page must be parsed again."""
        self.is_cut = True
        return i

    def _put(self, what: Formula | None) -> bool:
        if what is not None:
            self._buffer.append(self._atom(what))
        return what is not None

    def _put_for(self, what: Formula, i: int, j: int) -> int:
        """Put a formula in place of the content from `i` to `j`, with the white space at the ends of that outside."""
        if self.parts[i][:1].isspace() and j > i:
            self._buffer.append(" ")
        self._put(what)
        if self.parts[j - 1][-1:].isspace() and j > i:
            self._buffer.append(" ")
        return j + 1

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
            self._put(_math_in(source))
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
        if "data-mathml" in tag.attributes:
            return self._typeset(_math_in(tag.attributes["data-mathml"]), i, j)
        return self._typeset(formula_of_mathjax(element_of(self.parts, i, j, self.parts[i - 1])), i, j)

    def _typeset(self, what: Formula | None, i: int, j: int) -> int:
        """Put a formula in place of the elements that draw it; without one they are read as text."""
        if what is not None:
            return self._put_for(what, i, j)
        if text_of(self.parts, i, j).strip():
            self.lost += 1
        return self._pass(i)

    def attribute(self, tag: Tag, i: int) -> int:
        """An element that may carry a formula in its attributes or be the text of one."""
        j = self._end_of(tag, i) if tag.name not in VOID else i - 1
        if not j:
            return self.block_special(tag, i) if tag.name in BLOCKS or tag.name in PARAGRAPHS else self._pass(i)
        what = formula_of_attributes(tag.name, tag.attributes)
        is_block = tag.name in BLOCKS or tag.name in PARAGRAPHS
        tags = self.parts[i + 1 : j : 2]
        if what is None and not any(
            t.startswith(("math", 'script type="math', "img", "table", "/p", "mjx")) for t in tags
        ):
            text = text_of(self.parts, i, j)
            if len(text) < 20_000:
                what = formula_of_text(tag.name, tag.attributes, text, bool(tags))
            names = tag.attributes.get("class", "").split()
            if what is None and "formula" in names and tags and not _DELIMITER.search(text):
                what = formula_of_html(element_of(self.parts, i, j, self.parts[i - 1]), is_block)
            if what is None and "texhtml" in tag.attributes.get("class", ""):
                what = formula_of_texhtml(self._pieces(i, j))
        if what is None:
            if tag.name in VOID:
                return i
            return self.block_special(tag, i) if is_block else self._pass(i)
        if is_block:
            self._flush()
        end = self._put_for(what, i, j)
        if is_block:
            self._flush()
        return end

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

    def display_table(self, tag: Tag, i: int) -> int:
        """Place behind a table that is a display, its formula put; 0 where it is none."""
        j = self._end_of(tag, i)
        if not j or any(t.startswith(_TYPESET) for t in self.parts[i + 1 : j : 2]):
            return 0
        what = formula_of_table(table_of(element_of(self.parts, i, j, "table")))
        return self._put_for(what, i, j) if what is not None else 0

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
        content = self._without_code("".join(self._buffer[at:]))
        base = self._without_code(self._buffer[at - 1]) if at else ""
        before = ("".join(self._buffer[max(at - 3, 0) : max(at - 1, 0)]) + base)[-100:]
        is_link = link_from >= 0 or self._links != links
        kind = "sub" if name == "sub" else "sup"
        if "\0" not in content and is_script_of(unescape(before), Piece(unescape(content), kind, False, is_link)):
            del self._buffer[max(at - 1, 0) :]
            self._buffer += (base, f"{'_' if kind == 'sub' else '^'}{{{content.strip()}}}")

    def _without_code(self, text: str) -> str:
        """Text with the letters of code in it: code that has scripts is mathematics."""
        return _ATOM.sub(self._letters, text) if "\0" in text else text

    def _letters(self, found: re.Match[str]) -> str:
        atom = self.atoms[int(found[1])]
        return found[0] if isinstance(atom, Formula) or "``" in atom else atom.strip("`").replace("&", "&amp;")


def _math_in(source: str) -> Formula | None:
    """The formula of MathML that is a text by itself."""
    parts = split(source, 4096, 100_000)
    for at in range(1, len(parts), 2):
        if name_of(parts[at]).rpartition(":")[2] == "math":
            return math_of(element_of(parts, at + 1, end_of(parts, at + 1, name_of(parts[at])), parts[at]))
    return None


def _walk(element: Element) -> list[Element]:
    """An element and all below it, in order."""
    found: list[Element] = []
    waiting = [element]
    while waiting:
        found.append(waiting.pop())
        waiting.extend(reversed(found[-1].children))
    return found
