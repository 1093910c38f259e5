"""Formulas in attributes of elements, and in elements whose name or class says that their text is one."""

import re
from collections.abc import Mapping

from alloy.data.web import asciimath
from alloy.data.web.formula import Formula
from alloy.data.web.symbols import FUNCTIONS
from alloy.data.web.tex import clean_tex, formula, looks_like_tex

# attributes that hold LaTeX and nothing else, and those that may hold a number or a name
SURE = ("data-tex", "data-latex", "data-katex", "data-expr", "mathjax")
UNSURE = ("data-math", "data-formula", "data-equation", "data-content-latex", "tex", "latex")
CLASSES = frozenset(
    ["math", "tex", "latex", "math-container", "texhtml", "asciimath", "math-tex", "equation", "mathjax", "formula"]
)
TAGS = frozenset(
    [
        "tex",
        "latex",
        "equation",
        "math-tex",
        "equation-editor",
        "tex-math",
        "inline-formula",
        "disp-formula",
        "x-equation",
    ]
)
_ATTRIBUTES = frozenset((*SURE, *UNSURE))
_DISPLAYS = frozenset(
    ["display", "block", "displaymath", "math-display", "math-block", "display-math", "katex-display"]
)
_SWITCHES = frozenset(
    [
        "",
        "true",
        "false",
        "1",
        "0",
        "yes",
        "no",
        "inline",
        "block",
        "display",
        "tex",
        "latex",
        "math",
        "katex",
        "mathjax",
    ]
)
_WORD = re.compile(r"[A-Za-z]{3,}")
_IDENTIFIER = re.compile(r"[\w-]*[A-Za-z][\w-]*\d*|\d+|[\w.-]+/[\w./-]+")
_INNER = re.compile(r"\\[()\[\]]|(?<!\\)\$")


def formula_of_attributes(tag: str, attributes: Mapping[str, str]) -> Formula | None:
    """The formula that an element carries in its attributes, its content being a drawing of it; None: it carries none."""
    if not _ATTRIBUTES.isdisjoint(attributes):
        for name in (*SURE, *UNSURE):
            value = (attributes.get(name) or "").strip()
            # a switch or a key is no formula
            if value.lower() in _SWITCHES or value.startswith(("<", '{"')):
                continue
            is_key = len(value) > 1 and _IDENTIFIER.fullmatch(value) is not None
            if name in SURE or looks_like_tex(value) or not is_key:
                return formula(value, _is_display(tag, attributes, value), "attribute")
    names = (attributes.get("class") or "").split()
    if "ql-formula" in names:
        return formula(attributes.get("data-value") or "", False, "attribute")
    if "tex" in names:
        for name in ("title", "alt"):
            if looks_like_tex(value := attributes.get(name) or ""):
                return formula(value, _is_display(tag, attributes, value), "attribute")
    return None


def may_hold_formula(tag: str, classes: str) -> bool:
    """Whether an element's name or `class` says that its text is a formula, so that `formula_of_text` should be asked."""
    return tag in TAGS or (bool(classes) and not CLASSES.isdisjoint(classes.split()))


def formula_of_text(tag: str, attributes: Mapping[str, str], text: str, has_elements: bool = False) -> Formula | None:
    """The formula that is the text of such an element; None: the text is none, or holds formulas between words.

    `text` is all text in the element; with `has_elements` (`sub` and the like in it) only what is LaTeX by itself is taken.
    """
    names = (attributes.get("class") or "").split()
    bare = clean_tex(text)
    if not bare or _INNER.search(bare):
        return None
    display = _is_display(tag, attributes, text)
    if "asciimath" in names:
        return Formula(asciimath.to_latex(bare.strip("`")), display, "asciimath")
    if looks_like_tex(text) or looks_like_tex(bare):
        return formula(bare, display, "tex")
    if has_elements or "texhtml" in names or len(bare) > 200:
        return None
    words = [word for word in _WORD.findall(bare) if word not in FUNCTIONS]
    return None if words else formula(bare, display, "tex")


def _is_display(tag: str, attributes: Mapping[str, str], tex: str) -> bool:
    if tex.lstrip().startswith(
        ("$$", "\\[", "\\begin{equation", "\\begin{align", "\\begin{gather", "\\begin{multline")
    ):
        return True
    values = [
        *(attributes.get("class") or "").lower().split(),
        *(attributes.get(f"data-{name}") or "" for name in ("display", "type", "mode")),
    ]
    if (attributes.get("data-display") or "") == "true":
        return True
    return tag in ("div", "equation", "disp-formula", "p") or not _DISPLAYS.isdisjoint(values)
