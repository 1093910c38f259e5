"""Mathematics that docutils sets in HTML: fractions, roots, limits, fences and arrays as spans with classes.

Observed in the output of its `math2html`, which old and new versions of it and eLyXer share. The spans become presentation MathML,
of which `mathml.to_latex` makes LaTeX.
"""

import re
import unicodedata

from alloy.data.web.element import Element, operator, row
from alloy.data.web.formula import Formula
from alloy.data.web.math_table import CLOSING_PIECES, OPENING_PIECES
from alloy.data.web.mathml import to_latex
from alloy.data.web.symbols import FUNCTIONS
from alloy.data.web.tex import formula

DEEPEST = 100
MOST_WORDS = 3
_FONTS = {"mathrm": "normal", "mathsf": "sans-serif", "mathtt": "monospace", "mathbf": "bold", "blackboard": "double-struck",
          "scriptfont": "script", "mathscr": "script", "fraktur": "fraktur"}  # fmt: skip
_TEXTS = frozenset(["text", "textrm", "textsf", "texttt", "unit", "mbox"])
_UNSEEN = frozenset(["ignored", "phantom", "radical", "leftdot", "rightdot", "label", "eqnumber"])
_FRACTIONS = frozenset(["fraction", "fullfraction", "textfraction", "nicefrac"])
_TABLES = frozenset(["array", "bracketcases", "cases", "environment", "align", "matrix"])
_LINES = {
    "overline": ("mover", "‾"),
    "underline": ("munder", "_"),
    "overbrace": ("mover", "⏞"),
    "underbrace": ("munder", "⏟"),
}
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]+|\s+|.", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]{3,}")


def formula_of_html(element: Element, display: bool) -> Formula | None:
    """The formula that an element of class `formula` sets; None: it holds prose."""
    if len([word for word in _WORD.findall(_outside_text(element)) if word not in FUNCTIONS]) > MOST_WORDS:
        return None
    return formula(to_latex(Element("math", children=_inner(element, 0))), display, "subsup")


def _outside_text(element: Element) -> str:
    parts, waiting = list[str](), [element]
    while waiting:
        part = waiting.pop()
        if _TEXTS.isdisjoint(classes := part.get("class").split()) and "mathrm" not in classes and part.tag != "i":
            parts.append(part.text)
            waiting.extend(part.children)
    return " ".join(parts)


def _inner(element: Element, depth: int, font: str = "") -> list[Element]:
    """Presentation of what stands in an element; scripts take what stands before them."""
    if depth > DEEPEST:
        return [Element("mtext", text=element.word())]
    out = _glyphs(element.text, font, element.tag == "i")
    for child in element.children:
        classes = set(child.get("class").split())
        if child.tag == "#text":
            out.extend(_glyphs(child.text, font, element.tag == "i"))
        elif child.tag in ("sub", "sup"):
            _attach(out, child.tag, row(*_inner(child, depth + 1, font)))
        elif "scripts" in classes:
            for script in child.children:
                _attach(out, script.tag, row(*_inner(script, depth + 1, font)))
        else:
            out.extend(_one(child, classes, depth + 1, font))
    return out


def _attach(out: list[Element], tag: str, script: Element) -> None:
    """Make the last element one that carries a script, a second one beside the first."""
    base = out.pop() if out else Element("mrow")
    if tag == "sub" and base.tag == "msup":
        out.append(Element("msubsup", children=[base.children[0], script, base.children[1]]))
    elif tag == "sup" and base.tag == "msub":
        out.append(Element("msubsup", children=[*base.children, script]))
    else:
        out.append(Element("msub" if tag == "sub" else "msup", children=[base, script]))


def _one(node: Element, classes: set[str], depth: int, font: str) -> list[Element]:
    if classes & _UNSEEN:
        return []
    if classes & _TEXTS:
        return [
            Element("mtext", text=node.word().join((" " * node.text[:1].isspace(), " " * node.text[-1:].isspace())))
        ]
    if classes & _FRACTIONS:
        return [Element("mfrac", children=[_part(node, name, depth, font) for name in ("numerator", "denominator")])]
    if "binom" in classes or "binomial" in classes:
        parts = [row(*_inner(child, depth, font)) for child in node.children if child.word()]
        return [Element("mfrac", {"linethickness": "0"}, parts[:2])]
    if "sqrt" in classes:
        under = [c for c in node.children if c.tag == "span" and "root" in c.get("class").split()]
        index = [c for c in node.children if c.tag == "sup" and c.word()]
        inner = [row(*_inner(c, depth, font)) for c in (*under, *index)]
        return [Element("mroot" if index else "msqrt", children=inner)]
    if "limits" in classes:
        base = _part(node, "limit", depth, font, "span")
        scripts = {c.tag: row(*_inner(c, depth, font)) for c in node.children if c.tag in ("sub", "sup") and c.word()}
        out = [base]
        for tag, script in scripts.items():
            _attach(out, tag, script)
        return out
    if "embellished" in classes or "stackrel" in classes:
        base = next((c for c in node.children if {"base", "downstackrel"} & _below(c)), None)
        marks = [c for c in node.children if c is not base]
        if base is None or not marks:
            return _inner(node, depth, font)
        tag = "munder" if marks[0].tag == "sub" else "mover"
        mark = operator("\u00af") if marks[0].word() == "‒" else row(*_inner(marks[0], depth, font))
        return [Element(tag, children=[row(*_inner(base, depth, font)), mark])]
    for name, (tag, mark) in _LINES.items():
        if name in classes:
            return [Element(tag, children=[row(*_inner(node, depth, font)), operator(mark)])]
    if "boxed" in classes or "fbox" in classes:
        return [Element("menclose", {"notation": "box"}, _inner(node, depth, font))]
    if "bigdelimiter" in classes or "stretchy" in classes:
        return [operator(node.word(), True)]
    if classes & _TABLES and any("arrayrow" in c.get("class").split() for c in node.children):
        return [_array(node, depth, font)]
    if node.tag == "b" or classes & {"boldsymbol", "bold"}:
        return _inner(node, depth, "bold")
    return _inner(node, depth, next((_FONTS[name] for name in classes if name in _FONTS), font))


def _below(element: Element) -> set[str]:
    """Classes of an element and of its only child."""
    inner = element.children[0].get("class") if len(element.children) == 1 else ""
    return {*element.get("class").split(), *inner.split()}


def _part(node: Element, name: str, depth: int, font: str, tag: str = "") -> Element:
    found = [c for c in node.children if name in c.get("class").split() and c.tag == (tag or c.tag)]
    return row(*_inner(found[0], depth, font)) if found else Element("mrow")


def _array(node: Element, depth: int, font: str) -> Element:
    """A table; a fence where all of it is pieces of a bracket."""
    word = node.word().replace(" ", "")
    for pieces in (OPENING_PIECES, CLOSING_PIECES):
        if word and all(c in pieces for c in word):
            return operator(pieces[word[0]].removeprefix("\\"), True)
    lines = [
        Element("mtr", children=[Element("mtd", children=_inner(cell, depth, font)) for cell in line.children])
        for line in node.children
        # docutils sets an empty row between two
        if "arrayrow" in line.get("class").split() and line.word()
    ]
    return Element("mtable", children=lines)


def _glyphs(text: str, font: str, is_italic: bool) -> list[Element]:
    if not text or text.isspace():
        return []
    out: list[Element] = []
    variant = {"mathvariant": font} if font else {}
    for token in _TOKEN.findall(unicodedata.normalize("NFD", text)):
        if token.isspace():
            continue
        if token[0].isdigit() and token.isascii():
            out.append(Element("mn", variant, text=token))
        elif unicodedata.combining(token[0]) and out and out[-1].tag != "mo":
            out[-1] = Element("mover", children=[out[-1], operator(token)])
        elif not token.isalpha():
            out.append(operator("'" if token == "’" else unicodedata.normalize("NFC", token)))
        elif is_italic or (len(token) == 1 and not font):
            out.extend(Element("mi", variant, text=letter) for letter in token)
        else:
            out.append(Element("mi", variant, text=token))
    return out
