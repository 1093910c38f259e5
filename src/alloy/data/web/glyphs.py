"""Formulas of which a page holds only the drawing: glyph trees of KaTeX and of MathJax 2 (CommonHTML), 3 and 4 (CHTML, SVG).

They are rebuilt as presentation MathML. Observed in the output of KaTeX 0.19 and MathJax 3.2; elements are those of the HTML tree as
`Element`, text behind a child as a child named `#text`.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from alloy.data.web.element import Element, operator, row
from alloy.data.web.formula import Formula
from alloy.data.web.mathml import math_of, to_latex
from alloy.data.web.tex import formula

DEEPEST = 100
_TOP = re.compile(r"top:\s*(-?[\d.]+)em")
_CODE = re.compile(r"mjx-c([0-9A-F]{2,5})\b")
_WIDTH = re.compile(r"margin-right:\s*([\d.]+)em")
# KaTeX draws nothing that is text with these
_UNSEEN = frozenset(
    [
        "strut",
        "pstrut",
        "nulldelimiter",
        "vlist-s",
        "frac-line",
        "hide-tail",
        "overline-line",
        "underline-line",
        "mathml",
        "rule",
        "arraycolsep",
    ]
)
_FONTS = {"mathbf": "bold", "mathbb": "double-struck", "amsrm": "double-struck", "mathcal": "script", "mathscr": "script", "mathfrak": "fraktur",
          "mathsf": "sans-serif", "mathtt": "monospace", "mathrm": "normal", "boldsymbol": "bold-italic", "textbf": "bold"}  # fmt: skip
# pieces that tall fences are put together from
_PIECES = {**dict.fromkeys("⎛⎜⎝", "("), **dict.fromkeys("⎞⎟⎠", ")"), **dict.fromkeys("⎡⎢⎣", "["), **dict.fromkeys("⎤⎥⎦", "]"),
           **dict.fromkeys("⎧⎨⎩⎪", "{"), **dict.fromkeys("⎫⎬⎭", "}"), "⏐": "|", "∣": "|", "∥": "‖"}  # fmt: skip
# and the first piece of horizontal braces
_STRETCHED = {"\ue152": "⏟", "\ue150": "⏞"}
# widths of the boxes that KaTeX draws fences without text in: the fences of both sides
_SIDES = {"667": "[]", "875": "()", "889": "{}", "333": "||", "556": "‖‖"}
# heights of the boxes that wide accents without text are drawn in
_ACCENTS = {
    "714": "→",
    "239": "^",
    "300": "^",
    "360": "^",
    "420": "^",
    "260": "~",
    "286": "~",
    "306": "~",
    "312": "~",
    "522": "→",
}


def formula_of_katex(html: Element, display: bool) -> Formula | None:
    """The formula that a `.katex-html` element draws."""
    return formula(to_latex(Element("math", children=_katex(html.children, 0))), display, "katex-glyphs")


def formula_of_mathjax(container: Element) -> Formula | None:
    """The formula that an `mjx-container` draws; the MathML or LaTeX that it has for readers aloud comes first."""
    display = container.get("display") == "true" or "MJXc-display" in container.get("class")
    for element in _all(container):
        if element.tag == "math":
            what = math_of(element)
            return None if what is None else Formula(what.tex, display or what.display, what.carrier)
        if (tex := element.get("data-latex")) and element.tag in ("mjx-container", "mjx-math", "g", "svg"):
            return formula(tex, display, "attribute")
    return formula(to_latex(Element("math", children=_mathjax(container, 0))), display, "mathjax-glyphs")


def _all(root: Element) -> Iterator[Element]:
    waiting = [root]
    while waiting:
        element = waiting.pop()
        yield element
        waiting.extend(reversed(element.children))


def _classes(element: Element) -> set[str]:
    return {name.removeprefix("katex-") for name in element.get("class").split()}


def _katex(nodes: Sequence[Element], depth: int) -> list[Element]:
    """Presentation of neighbours; scripts take what stands before them."""
    out: list[Element] = []
    for node in nodes:
        classes = _classes(node)
        if "msupsub" in classes:
            base = row(*out) if out else Element("mrow")
            out = [_scripted(base, node, depth + 1)]
        else:
            out.extend(_katex_node(node, classes, depth + 1))
    return _joined(out)


def _katex_node(node: Element, classes: set[str], depth: int) -> list[Element]:
    if classes & _UNSEEN or node.tag == "svg":
        return []
    if depth > DEEPEST:
        return [Element("mtext", text=node.word())]
    if "mspace" in classes and not node.children:
        width = _WIDTH.search(node.get("style"))
        return [Element("mspace", {"width": f"{width[1]}em"})] if width and float(width[1]) >= 1 else []
    if classes & {"mopen", "mclose"} and [_classes(child) & {"delimsizing"} for child in node.children] == [
        {"delimsizing"}
    ]:
        return [_delimiter(node, depth)]
    for kind, build in _DRAWN.items():
        if kind in classes:
            return [build(node, depth)]
    if "\ue020" in node.text or (classes & {"mrel"} and "\ue020" in node.word()):
        return [operator("≠")]
    if "text" in classes:
        return [Element("mtext", text="".join(part.text for part in _all(node)).replace("\u200b", ""))]
    if (
        "mop" in classes
        and len(word := node.word()) > 1
        and "vlist" not in {name for part in _all(node) for name in part.get("class").split()}
    ):
        return [operator(word)]
    if not node.children:
        return _glyphs(node.text, classes)
    return _glyphs(node.text, classes) + _katex(node.children, depth)


def _glyphs(text: str, classes: set[str]) -> list[Element]:
    text = "".join(c for c in text if c not in "\u200b\n")
    if not text.strip():
        return []
    font = next((variant for name, variant in _FONTS.items() if name in classes), "")
    given = {"mathvariant": font} if font else {}
    if classes & {
        "mrel",
        "mbin",
        "mopen",
        "mclose",
        "mpunct",
        "mop",
        "delimsizing",
        "small-op",
        "large-op",
        "op-symbol",
    }:
        return [operator(_PIECES.get(text, text))]
    if font == "normal" and len(text) > 1:
        return [Element("mi", given, text=text)]
    return [_glyph(c, given) for c in text]


def _glyph(character: str, given: dict[str, str]) -> Element:
    if character.isdecimal() or character == ".":
        return Element("mn", given, text=character)
    character = _PIECES.get(character, character)
    return Element("mi" if character.isalpha() else "mo", dict(given) if character.isalpha() else {}, text=character)


def _joined(elements: list[Element]) -> list[Element]:
    """With digits that stand together as one number."""
    out: list[Element] = []
    for element in elements:
        last = out[-1] if out else None
        if last is not None and last.tag == element.tag == "mn" and last.attributes == element.attributes:
            out[-1] = Element("mn", last.attributes, text=last.text + element.text)
        else:
            out.append(element)
    return out


def _layers(node: Element) -> list[tuple[float, Element]]:
    """What the first vertical list below a node stacks, from the top, with its heights."""
    waiting = [node]
    while waiting:
        element = waiting.pop(0)
        if "vlist" in element.get("class").split():
            layers: list[tuple[float, Element]] = []
            for child in element.children:
                top = _TOP.search(child.get("style"))
                if child.children:
                    layers.append((float(top[1]) if top else 0.0, child))
            return sorted(layers, key=lambda layer: layer[0])
        waiting.extend(element.children)
    return []


def _content(layer: Element, depth: int) -> Element:
    return row(*_katex(layer.children, depth))


def _visible(node: Element, depth: int) -> list[Element]:
    return [content for _, layer in _layers(node) if (content := _content(layer, depth)).word() or content.children]


def _scripted(base: Element, node: Element, depth: int) -> Element:
    found = _visible(node, depth)
    if len(found) > 1:
        return Element("msubsup", children=[base, found[-1], found[0]])
    if not found:
        return base
    # room is kept below the line where something hangs there
    is_below = any("vlist-t2" in part.get("class").split() for part in node.children)
    return Element("msub" if is_below else "msup", children=[base, found[0]])


def _fraction(node: Element, depth: int) -> Element:
    found = _visible(node, depth)
    has_line = any("frac-line" in _classes(part) for part in _all(node)) if len(found) > 1 else True
    own = [part for _, layer in _layers(node) for part in layer.children if "frac-line" in _classes(part)]
    parts = [*found, Element("mrow"), Element("mrow")][:2]
    return Element("mfrac", {} if own and has_line else {"linethickness": "0"}, children=parts)


def _limits(node: Element, depth: int) -> Element:
    low: Element | None = None
    high: Element | None = None
    base = Element("mrow")
    seen_base = False
    for _, layer in _layers(node):
        is_small = any("sizing" in _classes(child) for child in layer.children)
        if not is_small:
            base, seen_base = _content(layer, depth), True
        elif seen_base:
            low = _content(layer, depth)
        else:
            high = _content(layer, depth)
    if low is not None and high is not None:
        return Element("munderover", children=[base, low, high])
    script = high if low is None else low
    return base if script is None else Element("munder" if high is None else "mover", children=[base, script])


def _stretched(node: Element, depth: int) -> Element:
    """A brace below or above a base, or the base with its label."""
    layers = _layers(node)
    brace = next((layer for _, layer in layers if any("stretchy" in _classes(child) for child in layer.children)), None)
    if brace is None:
        return _limits(node, depth)
    base = row(*(content for _, layer in layers if layer is not brace and (content := _content(layer, depth)).word()))
    is_below = "munder" in _classes(node)
    return Element("munder" if is_below else "mover", children=[base, operator("⏟" if is_below else "⏞")])


def _accent(node: Element, depth: int) -> Element:
    base, mark = Element("mrow"), ""
    for _, layer in _layers(node):
        body = next((child for child in layer.children if "accent-body" in _classes(child)), None)
        boxes = [part.get("viewbox") or part.get("viewBox") for part in _all(layer) if part.tag == "svg"]
        if body is not None and body.word():
            mark = body.word()
        elif boxes:
            mark = _ACCENTS.get(boxes[0].split(" ")[-1], "→")
        else:
            base = _content(layer, depth)
    return Element("mover", children=[base, operator(mark or "^")])


def _root(node: Element, depth: int) -> Element:
    index = [child for child in node.children if "root" in _classes(child)]
    body = Element("span", children=[child for child in node.children if child not in index])
    inside = row(*_visible(body, depth))
    return (
        Element("mroot", children=[inside, *_visible(index[0], depth)[:1]])
        if index
        else Element("msqrt", children=[inside])
    )


def _lined(tag: str, mark: str) -> Callable[[Element, int], Element]:
    def build(node: Element, depth: int) -> Element:
        return Element(tag, children=[row(*_visible(node, depth)), operator(mark)])

    return build


def _boxed(node: Element, depth: int) -> Element:
    return row(*_katex(node.children, depth))


def _arrow(node: Element, depth: int) -> Element:
    return Element("mover", children=[operator("→"), row(*_visible(node, depth))])


def _delimiter(node: Element, depth: int) -> Element:
    word = node.word()[:1]
    if word:
        return operator(_PIECES.get(word, word), True)
    box = next((part.get("viewbox") or part.get("viewBox") for part in _all(node) if part.tag == "svg"), "")
    sides = _SIDES.get(box.split(" ")[2] if box.count(" ") == 3 else "", "||")
    return operator(sides["mclose" in _classes(node)], True)


def _array(node: Element, depth: int) -> Element:
    columns: list[list[Element]] = []
    sides: list[str] = []
    for child in node.children:
        name = next((name for name in _classes(child) if name.startswith("col-align-")), None)
        if name is not None:
            columns.append([_content(layer, depth) for _, layer in _layers(child)])
            sides.append({"l": "left", "r": "right"}.get(name[-1], "center"))
    count = max(map(len, columns), default=0)
    rows = [
        Element("mtr", children=[Element("mtd", children=[column[i]] if i < len(column) else []) for column in columns])
        for i in range(count)
    ]
    return Element("mtable", {"columnalign": " ".join(sides)} if set(sides) != {"center"} else {}, children=rows)


_DRAWN = {
    "mfrac": _fraction, "op-limits": _limits, "munder": _stretched, "mover": _stretched, "accent": _accent, "sqrt": _root,
    "overline": _lined("mover", "‾"), "underline": _lined("munder", "_"), "mtable": _array, "delimsizing": _delimiter,
    "x-arrow": _arrow,
}  # fmt: skip


# MathJax: the tree is that of MathML, with boxes between its elements
_DROPPED = frozenset(
    [
        "surd",
        "nstrut",
        "dstrut",
        "tstrut",
        "strut",
        "line",
        "spacer",
        "assistive-mml",
        "defs",
        "speech",
        "copytext",
        "mark",
    ]
)
_TOKENS = frozenset(["mi", "mo", "mn", "mtext", "ms"])
_SCRIPTED = frozenset(["msub", "msup", "msubsup", "munder", "mover", "munderover", "mfrac", "mroot"])


def _name(element: Element) -> str:
    """The MathML element that a box stands for."""
    name = element.get("data-mml-node") or (element.tag[4:] if element.tag.startswith("mjx-") else "")
    if not name:
        name = next(
            (word[4:] for word in element.get("class").split() if word.startswith("mjx-") and not _CODE.match(word)),
            element.tag,
        )
    return name.lower() if name.lower() in ("texatom",) else name


def _mathjax(element: Element, depth: int) -> list[Element]:
    """Presentation of a box: itself, or what is in it."""
    name = _name(element)
    if name in _DROPPED or element.tag in ("rect", "defs", "style") or element.get("data-mjx-hidden"):
        return []
    if depth > DEEPEST:
        return [Element("mtext", text=_drawn_text(element))]
    if name in _TOKENS:
        text = _drawn_text(element)
        # version 2 names the font, later ones have italic letters
        is_italic = any("MJXc-TeX-math-I" in part.get("class") for part in element.children)
        variant = "normal" if name == "mi" and len(text) == 1 and text.isascii() and not is_italic else ""
        if any(
            "TEX-C" in part.get("class").split() or "-TEX-C-" in part.get("xlink:href") for part in element.children
        ):
            variant = "script"
        return [Element(name, {"mathvariant": variant} if variant else {}, text=text)]
    if name in _SCRIPTED:
        return [_mathjax_scripted(element, name, depth + 1)]
    if name == "msqrt":
        inner = [part for child in element.children if _name(child) != "mo" for part in _mathjax(child, depth + 1)]
        return [Element("msqrt", children=inner)]
    inner = [part for child in element.children for part in _mathjax(child, depth + 1)]
    if name == "mtable":
        # what is aligned begins each second column with an empty identifier
        second = [line.children[1].children for line in inner if len(line.children) > 1]
        is_aligned = any(cell and cell[0].tag == "mi" and not cell[0].text for cell in second)
        return [Element(name, {"columnalign": "right left"} if is_aligned else {}, children=inner)]
    if name in ("mtr", "mtd", "menclose", "mlabeledtr"):
        return [
            Element(name, {"notation": element.get("notation") or "box"} if name == "menclose" else {}, children=inner)
        ]
    if name == "mspace":
        return []
    return [Element("mrow", children=inner)] if name in ("mrow", "texatom", "mstyle") and len(inner) != 1 else inner


def _drawn_text(element: Element) -> str:
    """Characters of a token, from its text or from the names of its glyphs; of one put together from pieces the whole sign."""
    codes: list[str] = []
    waiting = [element]
    while waiting:
        part = waiting.pop()
        found = _CODE.search(part.get("class"))
        if code := part.get("data-c") or (found[1] if found else ""):
            codes.append(chr(int(code, 16)) if len(code) < 6 and code.isalnum() and int(code, 16) < 0x110000 else "")
        else:
            codes.append(part.text)
            waiting.extend(reversed(part.children))
    text = "".join(codes)
    whole = {_PIECES[c] for c in text if c in _PIECES}
    if len(whole) == 1 and (len(text) > 1 or text not in "∣∥"):
        return whole.pop()
    return _STRETCHED.get(text[:1], next((c for c in text if c in "→←↔⇒⇐"), text)) if len(text) > 1 else text


_PARTS = {"base": "base", "op": "base", "under": "under", "over": "over", "num": "num", "den": "den", "numerator": "num", "denominator": "den",
          "sub": "under", "sup": "over", "root": "over"}  # fmt: skip


def _mathjax_scripted(element: Element, name: str, depth: int) -> Element:
    """Scripts, limits, fractions and roots: their parts by the names of the boxes, else by their order."""
    parts: dict[str, Element] = {}
    waiting = list(element.children)
    loose: list[Element] = []
    while waiting:
        child = waiting.pop(0)
        kind = _name(child)
        if kind in _PARTS:
            parts[_PARTS[kind]] = row(*(p for c in child.children for p in _mathjax(c, depth)))
        elif kind in ("box", "row", "frac", "dbox", "dtable", "stack", "itable") or (
            kind == "munder" and name == "munderover" and child.tag == "mjx-munder"
        ):
            waiting = [*child.children, *waiting]
        elif kind == "script":
            loose.extend(row(*_mathjax(c, depth)) for c in child.children if _name(c) not in _DROPPED)
        elif kind not in _DROPPED and child.tag != "rect":
            loose.append(row(*_mathjax(child, depth)))
    if name == "mfrac":
        found = [parts[key] for key in ("num", "den") if key in parts] or loose
        has_line = any(_name(part) == "line" or part.tag == "rect" for part in _all(element))
        return Element("mfrac", {} if has_line else {"linethickness": "0"}, children=found[:2])
    base = parts.get("base") or (loose.pop(0) if loose else Element("mrow"))
    if name == "mroot":
        return Element("mroot", children=[base, parts.get("over") or row(*loose[:1])])
    low, high = parts.get("under"), parts.get("over")
    if low is None and high is None:
        # a script above comes before the one below
        low, high = (loose[-1], loose[0]) if len(loose) > 1 else (loose[0], loose[0]) if loose else (None, None)
        if name == "munderover" and len(loose) > 1:
            low, high = loose[0], loose[1]
    wanted = {"msub": [low], "munder": [low], "msup": [high], "mover": [high]}.get(name, [low, high])
    return Element(name, children=[base, *(part or Element("mrow") for part in wanted)])
