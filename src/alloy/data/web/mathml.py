"""Presentation MathML to LaTeX.

Source: MathML 3, W3C Recommendation of 2014, chapter 3; MathML Core for what browsers draw. Elements are those of any parser, as
`Element`: names without a namespace prefix, entities decoded.
"""

import re
from collections.abc import Callable, Sequence

from alloy.data.web.content_mathml import CONTENT, presentation
from alloy.data.web.element import Element
from alloy.data.web.formula import Formula
from alloy.data.web.symbols import (
    FUNCTIONS,
    INVISIBLE,
    LIMITS,
    OVER,
    SYMBOLS,
    UNDER,
    VARIANTS,
    WIDE,
    command,
    of_character,
)
from alloy.data.web.tex import clean_tex, end_of_group, formula, looks_like_tex

# below this depth only the text of elements is kept
DEEPEST = 150
# letters in several places that are one operator
WORDS = {"<=": "\\leq ", ">=": "\\geq ", "!=": "\\neq ", "->": "\\to ", "=>": "\\Rightarrow ", ":=": ":=", "||": "\\|",
         "...": "\\ldots ", "mod": "\\bmod ", "<<": "\\ll ", ">>": "\\gg ", "<->": "\\leftrightarrow "}  # fmt: skip
# operators that put what is below and above them there in displays
LARGE = frozenset("∑∏∐⋂⋃⋁⋀⨁⨂⨀⨄⨆")
INTEGRALS = frozenset("∫∬∭⨌∮∯∰")
OPENING = {"(": "(", "[": "[", "{": "\\{", "|": "|", "‖": "\\|", "∥": "\\|", "⟨": "\\langle ", "〈": "\\langle ",
           "⌈": "\\lceil ", "⌊": "\\lfloor ", "⟦": "\\llbracket ", "<": "<", "": ".", "]": "]", "∣": "|"}  # fmt: skip
CLOSING = {")": ")", "]": "]", "}": "\\}", "|": "|", "‖": "\\|", "∥": "\\|", "⟩": "\\rangle ", "〉": "\\rangle ",
           "⌉": "\\rceil ", "⌋": "\\rfloor ", "⟧": "\\rrbracket ", ">": ">", "": ".", "[": "[", "∣": "|"}  # fmt: skip
MATRICES = {("(", ")"): "pmatrix", ("[", "]"): "bmatrix", ("|", "|"): "vmatrix", ("‖", "‖"): "Vmatrix",
            ("∥", "∥"): "Vmatrix", ("{", "}"): "Bmatrix"}  # fmt: skip
ENCLOSED = {"box": "boxed", "roundedbox": "boxed", "updiagonalstrike": "cancel", "downdiagonalstrike": "bcancel",
            "top": "overline", "bottom": "underline", "radical": "sqrt"}  # fmt: skip
# in text these would be read as commands
ESCAPES = str.maketrans({c: f"\\{c}" for c in "#%&_{}$"} | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}",
                                                             "^": "\\textasciicircum{}", "\u00a0": " "})  # fmt: skip
# spaces, and what decides about the one behind it
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_WORD = re.compile(
    r"\\[A-Za-z]+ +(?=[A-Za-z])|\\[A-Za-z]+|\\\\ *|\\ |\\.|& *|(?P<space> +)(?P<cell>(?=&|\\\\))?", re.DOTALL
)
GROUPS = ("mrow", "mstyle", "mpadded", "math", "merror", "mtd", "msqrt", "menclose", "semantics")


def to_latex(math: Element) -> str:
    """LaTeX of a `math` element or of a part of one, without delimiters."""
    return _tidy(_convert(math, 0))


def math_of(math: Element) -> Formula | None:
    """The formula of a `math` element: the TeX noted in it or beside it, else its markup as LaTeX; None where it is empty."""
    display = math.get("display") == "block" or math.get("mode") == "display"
    content: Element | None = None
    waiting = [math]
    while waiting:
        element = waiting.pop()
        encoding = element.get("encoding").lower()
        if element.tag == "annotation" and ("tex" in encoding.split("/")[-1]):
            what = formula(element.text, display, "mathml-annotation")
            if what is not None:
                return what
        content = element if content is None and element.tag in CONTENT else content
        waiting.extend(reversed(element.children))
    if (noted := math.get("alttext")) and (looks_like_tex(noted) or math.get("class").startswith("ltx_")):
        return formula(noted, display, "mathml-annotation")
    latex = to_latex(math)
    if not latex and noted:
        return formula(noted, display, "mathml-annotation")
    return formula(latex, display, "mathml" if content is None else "mathml-content")


def tex_of_glyph_lines(text: str) -> str | None:
    """TeX in the text of KaTeX's MathML whose tags a site dropped: what was its annotation is the last block behind blank lines."""
    blocks = [block for block in _BLANK_LINES.split(text.strip()) if block.strip()]
    if len(blocks) > 1:
        return clean_tex(blocks[-1]) or None
    # without blank lines the glyphs run into the annotation: a text that begins with its own glyphs
    return clean_tex(text) if looks_like_tex(text) else None


def _convert(element: Element, depth: int) -> str:
    if depth > DEEPEST:
        return "".join(map(of_character, element.word()))
    if element.tag in CONTENT:
        element = presentation(element)
    return _RULES.get(element.tag, _row)(element, depth + 1)


def _all(elements: Sequence[Element], depth: int) -> str:
    """A row of elements, with fences that belong together and the tables between them."""
    parts: list[str] = []
    i = 0
    while i < len(elements):
        taken = _fenced_table(elements, i, depth)
        if taken is not None:
            latex, i = taken
            parts.append(latex)
            continue
        parts.append(_convert(elements[i], depth))
        i += 1
    return "".join(parts)


def _row(element: Element, depth: int) -> str:
    children = [child for child in element.children if not _is_nothing(child)]
    if len(children) > 2 and _is_fence(children[0], OPENING) and _is_fence(children[-1], CLOSING):
        inner = children[1:-1]
        if not any(_is_table(child) for child in inner) and any(map(_is_tall, inner)):
            opening, closing = OPENING[children[0].word()], CLOSING[children[-1].word()]
            return f"\\left{opening}{_all(inner, depth)}\\right{closing}"
    return _all(children, depth) or "".join(map(of_character, element.text.strip()))


def _fenced_table(elements: Sequence[Element], i: int, depth: int) -> tuple[str, int] | None:
    """A table behind an opening fence, and where the row goes on; None: there is none at i."""
    if i + 1 >= len(elements) or not _is_fence(elements[i], OPENING) or not _is_table(elements[i + 1]):
        return None
    table, opening = _inner_table(elements[i + 1]), elements[i].word()
    closing = elements[i + 2].word() if i + 2 < len(elements) and _is_fence(elements[i + 2], CLOSING) else None
    if closing is not None and (opening, closing) in MATRICES:
        return _table(table, depth, MATRICES[opening, closing]), i + 3
    if opening == "{" and (closing in (None, "")):
        return _table(table, depth, "cases"), i + (2 if closing is None else 3)
    if closing is not None:
        inner = _table(table, depth, None)
        return f"\\left{OPENING[opening]}{inner}\\right{CLOSING[closing]}", i + 3
    return f"\\left{OPENING[opening]}{_table(table, depth, None)}\\right.", i + 2


def _is_table(element: Element) -> bool:
    return _inner_table(element).tag == "mtable"


def _inner_table(element: Element) -> Element:
    """The only child of groups of one."""
    while element.tag in GROUPS[:3]:
        children = [child for child in element.children if not _is_nothing(child)]
        if len(children) != 1:
            break
        element = children[0]
    return element


def _is_nothing(element: Element) -> bool:
    """Whether it has neither children nor text, such as an invisible operator."""
    if element.tag in ("mspace", "none", "mprescripts", "mglyph", "mrow", "mtd", "mphantom") or element.children:
        return element.tag == "mphantom"
    # an empty fence is a delimiter that is not drawn, and a text of spaces keeps its neighbours apart
    return element.tag != "mo" and not (element.text if element.tag == "mtext" else element.word())


def _is_fence(element: Element, known: dict[str, str]) -> bool:
    return (
        element.tag == "mo"
        and not element.children
        and element.word() in known
        and (bool(element.word()) or element.get("fence") == "true")
    )


def _is_tall(element: Element) -> bool:
    """Whether it is drawn higher than a line."""
    waiting = [element]
    while waiting:
        element = waiting.pop()
        if element.tag in ("mfrac", "mtable", "munderover", "munder") or (
            element.tag == "mover" and not _accent_of(element)
        ):
            return True
        if element.tag == "mo" and element.word() in LARGE | INTEGRALS:
            return True
        # what covers an accented base is no child that counts
        waiting.extend(element.children)
    return False


def _mi(element: Element, depth: int) -> str:
    word, variant = element.word(), element.get("mathvariant")
    if not word:
        return _all(element.children, depth)
    if word in FUNCTIONS and variant in ("", "normal"):
        return command(word)
    if len(word) == 1:
        return _in_variant(of_character(word), variant, word)
    letters = "".join(map(of_character, word))
    if variant in VARIANTS:
        return f"\\{VARIANTS[variant]}{{{letters}}}"
    if variant == "italic":
        return f"\\mathit{{{letters}}}"
    if not word.replace(" ", "").isalnum() and not any(c.isalpha() for c in word):
        return letters
    # several letters are one name, and names stand upright
    return f"\\mathrm{{{_spaced(word)}}}"


def _in_variant(latex: str, variant: str, character: str) -> str:
    if variant == "normal" and character.isascii() and character.isalpha():
        return f"\\mathrm{{{latex}}}"
    if variant not in VARIANTS or not character.strip():
        return latex
    name = VARIANTS[variant]
    # fonts of \mathbf have no small Greek letters
    name = "boldsymbol" if name == "mathbf" and not character.isascii() else name
    return f"\\{name}{{{latex.strip()}}}"


def _spaced(text: str) -> str:
    return "".join(of_character(c) if c != " " else "\\ " for c in text)


def _mn(element: Element, depth: int) -> str:
    word = element.word()
    latex = "".join(of_character(c) for c in word if c != " ")
    variant = element.get("mathvariant")
    return f"\\{VARIANTS[variant]}{{{latex}}}" if variant in VARIANTS and latex else latex


def _mo(element: Element, depth: int) -> str:
    word = element.word()
    if word in WORDS:
        return WORDS[word]
    if word in FUNCTIONS:
        return command(word)
    if len(word) > 1 and any(c.isalpha() and c not in SYMBOLS for c in word):
        return f"\\operatorname{{{_spaced(word)}}}"
    return "".join(map(of_character, word.replace(" ", "")))


def _mtext(element: Element, depth: int) -> str:
    text = "".join(c for c in element.text if c not in INVISIBLE)
    if element.children:
        return _all(element.children, depth)
    if not text.strip():
        return "\\ " if text else ""
    if not any(c.isalnum() and c not in SYMBOLS for c in text):
        # white space at the ends of a token says nothing, a run of it inside is one space
        return "\\ ".join("".join(map(of_character, word)) for word in text.split())
    left, right = (" " if side.isspace() else "" for side in (text[0], text[-1]))
    return f"\\text{{{left}{' '.join(text.split()).translate(ESCAPES)}{right}}}"


def _ms(element: Element, depth: int) -> str:
    left, right = (element.attributes.get(name, '"') for name in ("lquote", "rquote"))
    return f"\\text{{{left}{element.word().translate(ESCAPES)}{right}}}"


def _mspace(element: Element, depth: int) -> str:
    if element.get("linebreak") == "newline":
        return "\\\\ "
    named = {"thinmathspace": 0.17, "mediummathspace": 0.22, "thickmathspace": 0.28, "veryverythickmathspace": 0.39}
    width = element.get("width")
    if width not in named:
        number, unit = width.rstrip("abcdefghijklmnopqrstuvwxyz%"), width.lstrip("-+.0123456789")
        try:
            size = float(number) * {"em": 1.0, "ex": 0.5, "px": 0.06, "pt": 0.1, "mu": 0.056}.get(unit, 1.0)
        except ValueError:
            return ""
    else:
        size = named[width]
    if size >= 1.9:
        return "\\qquad "
    if size >= 0.9:
        return "\\quad "
    return "\\ " if size >= 0.3 else "\\;" if size > 0.25 else "\\," if size > 0.1 else "\\!" if size < -0.1 else ""


def _group(latex: str) -> str:
    """In braces."""
    return f"{{{latex.strip()}}}"


def _base(element: Element, depth: int) -> str:
    """What carries scripts: in braces where a script would take a part of it alone."""
    latex = _convert(element, depth)
    if not latex.strip():
        return "{}"
    inner = _inner_table(element)
    if inner.tag in ("mi", "mn", "mo", "mtext", "mover", "munder", "mroot", "msqrt", "menclose", "mfenced"):
        # of several digits a script would take the last
        return _group(latex) if inner.tag == "mn" and len(latex) > 1 else latex
    children = [child for child in inner.children if not _is_nothing(child)]
    # parentheses carry what stands behind them
    if children and _is_fence(children[0], OPENING) and _is_fence(children[-1], CLOSING):
        return latex
    return _group(latex)


def _scripts(base: str, below: str, above: str) -> str:
    latex = base
    if below.strip():
        latex += f"_{_group(below)}"
    if above.strip():
        if not above.strip("' ") and not below.strip():
            return latex.rstrip() + above.strip()
        # an apostrophe is a script of its own
        above = above.replace("'", "\\prime ")
        latex += f"^{_group(above)}"
    return latex


def _sub(element: Element, depth: int) -> str:
    base, below, *_ = _padded(element, 2)
    return _scripts(_base(base, depth), _convert(below, depth), "")


def _sup(element: Element, depth: int) -> str:
    base, above, *_ = _padded(element, 2)
    return _scripts(_base(base, depth), "", _convert(above, depth))


def _subsup(element: Element, depth: int) -> str:
    base, below, above, *_ = _padded(element, 3)
    return _scripts(_base(base, depth), _convert(below, depth), _convert(above, depth))


def _padded(element: Element, count: int) -> list[Element]:
    """The children, empty rows for those that are missing."""
    return [*element.children, *(Element("mrow") for _ in range(count - len(element.children)))]


def _accent_of(element: Element) -> str | None:
    """The command of an accent, a brace or a line that covers the base of mover or munder."""
    base, mark = _padded(element, 2)[:2]
    mark = _inner_table(mark)
    if mark.tag not in ("mo", "mi", "mtext", "mn") or mark.children:
        return None
    known = OVER if element.tag == "mover" else UNDER
    word = mark.text.strip() or mark.word()
    name = known.get(word)
    # an arrow or a line over a relation is no accent
    if name is None or (word in "→←" and _inner_table(base).tag == "mo"):
        return None
    is_wide = len(base.word()) > 1 or _inner_table(base).tag not in ("mi", "mn", "mo", "mtext")
    if name == "overline" and not is_wide and word == "\u00af":
        return "bar"
    return WIDE.get(name, name) if is_wide and mark.get("stretchy") != "false" else name


def _has_limits(base: Element) -> bool:
    """Whether LaTeX puts scripts of this base below and above it in displays."""
    inner = _inner_table(base)
    word = inner.word()
    return inner.tag in ("mo", "mi", "mtext") and (word in LARGE or word in LIMITS or word in ("lim inf", "lim sup"))


def _under_over(element: Element, depth: int) -> str:
    kind = element.tag
    base, first, second = _padded(element, 3)[:3]
    below, above = (first, second) if kind == "munderover" else (first, None) if kind == "munder" else (None, first)
    if kind != "munderover" and (name := _accent_of(element)) is not None:
        return f"\\{name}{_group(_convert(base, depth))}"
    low, high = ("" if e is None else _convert(e, depth) for e in (below, above))
    inner = _inner_table(base)
    # a label of a brace is written as its script
    is_brace = inner.tag in ("mover", "munder") and (_accent_of(inner) or "").endswith(("brace", "bracket"))
    if _has_limits(base) or is_brace:
        return _scripts(_convert(base, depth), low, high)
    latex = _convert(base, depth)
    if inner.tag == "mo" and inner.word() in INTEGRALS:
        return _scripts(latex + "\\limits ", low, high)
    if high.strip():
        latex = f"\\overset{_group(high)}{_group(latex)}"
    if low.strip():
        latex = f"\\underset{_group(low)}{_group(latex)}"
    return latex


def _fraction(element: Element, depth: int) -> str:
    top, bottom = (_convert(child, depth) for child in _padded(element, 2)[:2])
    if element.get("bevelled") == "true":
        return f"{_group(top)}/{_group(bottom)}"
    thickness = element.get("linethickness")
    if thickness and not thickness.strip("0.empxtin%"):
        return f"\\genfrac{{}}{{}}{{0pt}}{{}}{_group(top)}{_group(bottom)}"
    return f"\\frac{_group(top)}{_group(bottom)}"


def _root(element: Element, depth: int) -> str:
    base, index = (_convert(child, depth) for child in _padded(element, 2)[:2])
    return f"\\sqrt[{index.strip()}]{_group(base)}"


def _fenced(element: Element, depth: int) -> str:
    opening, closing = element.attributes.get("open", "(").strip(), element.attributes.get("close", ")").strip()
    children = [child for child in element.children if not _is_nothing(child)]
    marks = element.attributes.get("separators", ",").replace(" ", "")
    if len(children) == 1 and _is_table(children[0]):
        row = [Element("mo", {"fence": "true"}, text=text) for text in (opening, closing)]
        return _all([row[0], children[0], row[1]], depth)
    parts: list[str] = []
    for i, child in enumerate(children):
        if i and marks:
            parts.append("".join(map(of_character, marks[min(i, len(marks)) - 1])))
        parts.append(_convert(child, depth))
    inner, is_tall = "".join(parts), any(map(_is_tall, children))
    sides = OPENING.get(opening), CLOSING.get(closing)
    left, right = (
        known if known is not None else "".join(map(of_character, word))
        for known, word in zip(sides, (opening, closing), strict=True)
    )
    if is_tall and None not in sides:
        return f"\\left{left}{inner}\\right{right}"
    return f"{left if opening else ''}{inner}{right if closing else ''}"


def _multiscripts(element: Element, depth: int) -> str:
    base, *rest = _padded(element, 1)
    at = next((i for i, child in enumerate(rest) if child.tag == "mprescripts"), len(rest))
    before, behind = rest[at + 1 :], rest[:at]

    def pairs(some: Sequence[Element], start: str) -> str:
        latex = start
        for i in range(0, len(some), 2):
            low, high = (_convert(e, depth) for e in _padded(Element("mrow", children=list(some[i : i + 2])), 2)[:2])
            latex = _scripts(latex if i == 0 else latex + "{}", low, high)
        return latex

    return (pairs(before, "{}") if before else "") + pairs(behind, _base(base, depth))


def _table_rule(element: Element, depth: int) -> str:
    align = element.get("columnalign").split()
    is_aligned = align[:2] == ["right", "left"] and element.get("columnlines") in ("", "none")
    return _table(element, depth, "aligned" if is_aligned else None)


def _table(element: Element, depth: int, environment: str | None) -> str:
    """A table in an environment; None: a matrix, or an array where columns have lines or sides."""
    rows: list[str] = []
    most = 0
    for row in element.children:
        cells = [cell for cell in row.children if cell.tag == "mtd"] if row.tag in ("mtr", "mlabeledtr") else [row]
        label = ""
        if row.tag == "mlabeledtr" and cells:
            label = f"\\tag{_group(cells.pop(0).word().strip('()').translate(ESCAPES))}"
        most = max(most, len(cells))
        rows.append(" & ".join(_convert(cell, depth).strip() for cell in cells) + label)
    align = [side[0] for side in element.get("columnalign").split() if side in ("left", "right", "center")]
    has_lines = element.get("columnlines") not in ("", "none") and "solid" in element.get("columnlines")
    body = " \\\\ ".join(rows)
    if environment is None and (has_lines or set(align) - {"c"}):
        sides = [(align[min(i, len(align) - 1)] if align else "c") for i in range(most)]
        lines = element.get("columnlines").split()
        spec = "".join(
            side + ("|" if has_lines and i + 1 < most and lines[min(i, len(lines) - 1)] == "solid" else "")
            for i, side in enumerate(sides)
        )
        return f"\\begin{{array}}{{{spec}}}{body}\\end{{array}}"
    if environment == "cases" and most > 2:
        return f"\\left\\{{\\begin{{matrix}}{body}\\end{{matrix}}\\right."
    name = environment or "matrix"
    return f"\\begin{{{name}}}{body}\\end{{{name}}}"


def _enclosed(element: Element, depth: int) -> str:
    latex = _row(element, depth)
    for name in (element.get("notation") or "longdiv").split():
        if name in ENCLOSED:
            latex = f"\\{ENCLOSED[name]}{_group(latex)}"
        elif name == "longdiv":
            latex = f"\\overline{{){latex.strip()}}}"
    return latex


def _chosen(element: Element, depth: int) -> str:
    number = element.get("selection")
    i = int(number) - 1 if number.isdecimal() else 0
    return _convert(element.children[i], depth) if 0 <= i < len(element.children) else ""


def _semantics(element: Element, depth: int) -> str:
    """What is shown: the first child, or presentation in an annotation where the first is content."""
    if not element.children:
        return ""
    first = element.children[0]
    if first.tag in CONTENT:
        for child in element.children[1:]:
            if child.tag == "annotation-xml" and "Presentation" in child.get("encoding"):
                return _row(child, depth)
    return _convert(first, depth)


def _nothing(element: Element, depth: int) -> str:
    return ""


_RULES: dict[str, Callable[[Element, int], str]] = {
    "mi": _mi, "mn": _mn, "mo": _mo, "mtext": _mtext, "ms": _ms, "mspace": _mspace, "mfrac": _fraction,
    "msqrt": lambda e, d: f"\\sqrt{_group(_row(e, d))}", "mroot": _root, "msub": _sub, "msup": _sup,
    "msubsup": _subsup, "munder": _under_over, "mover": _under_over, "munderover": _under_over,
    "mmultiscripts": _multiscripts, "mfenced": _fenced, "mtable": _table_rule, "menclose": _enclosed,
    "maction": _chosen, "semantics": _semantics, "annotation": _nothing, "annotation-xml": _nothing,
    "mphantom": _nothing, "none": _nothing, "mprescripts": _nothing, "maligngroup": _nothing, "malignmark": _nothing,
    "mglyph": lambda e, d: f"\\text{{{e.get('alt').translate(ESCAPES)}}}" if e.get("alt") else "",
}  # fmt: skip


def _tidy(latex: str) -> str:
    """Without spaces that say nothing; binomials where fences hold a fraction without a line."""
    for opening, closing in (("\\left(", "\\right)"), ("(", ")")):
        start = f"{opening}\\genfrac{{}}{{}}{{0pt}}{{}}"
        at = latex.find(start)
        while at >= 0:
            end = _end_of_groups(latex, at + len(start), 2)
            if end is not None and latex.startswith(closing, end):
                latex = f"{latex[:at]}\\binom{latex[at + len(start) : end]}{latex[end + len(closing) :]}"
            at = latex.find(start, at + 1)
    return _WORD.sub(_kept, _outside_text(latex)).replace("\x00", " ").strip()


def _kept(found: re.Match[str]) -> str:
    word = found[0]
    # a space ends a command before a letter, and stands around what parts cells; elsewhere it is not needed
    if found["space"] is None:
        return word.rstrip(" ") + " " if word[-1] == " " else word
    return " " if found["cell"] is not None else ""


def _outside_text(latex: str) -> str:
    """With the spaces inside \\text{} as a sign that tidying leaves alone."""
    parts, at = list[str](), 0
    while (start := latex.find("\\text{", at)) >= 0:
        end = end_of_group(latex, start + 5) or len(latex)
        parts.extend((latex[at:start], latex[start:end].replace(" ", "\x00")))
        at = end
    return "".join((*parts, latex[at:]))


def _end_of_groups(latex: str, at: int, count: int) -> int | None:
    """Where `count` groups in braces that begin at `at` end; None: they do not."""
    for _ in range(count):
        end = end_of_group(latex, at) if latex.startswith("{", at) else None
        if end is None:
            return None
        at = end
    return at
