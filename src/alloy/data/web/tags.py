"""What the tags of pages mean for the layout: by name, class, role and style, each kind of tag read once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from alloy.data.web import code
from alloy.data.web.attributes import formula_of_attributes, may_hold_formula
from alloy.data.web.content import ASIDE, DROP, NONE, hint_of
from alloy.data.web.markup import VOID, attributes_of, name_of

_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# the end of a formula outside a value: the tag is what stands behind a less-than sign
_END_OF_TEX = re.compile(r"^[^\"]*(?:\\[)\]]|\$\$)")
# kinds of tags; from SPECIAL on they have a method
INLINE, CLOSING, BREAKING, EMPTY, LINK, BLOCK, PARAGRAPH, SKIP, SPECIAL = range(9)
_INLINE = frozenset(
    str.split(
        "span i em b strong u s small big font abbr acronym cite dfn var q ins del strike mark bdi bdo nobr label time data ruby rb center "
        "picture map wbr slot noindex"
    )
) - {"center"}
BLOCKS = frozenset(
    str.split(
        "html head body div section article main nav aside header footer address center details fieldset figure form hgroup dl menu dir "
        "colgroup tbody thead tfoot frameset noframes object applet dialog search"
    )
)
PARAGRAPHS = frozenset(str.split("p dt summary figcaption caption legend optgroup marquee"))
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


def classify(tag: str) -> Tag:
    """Meaning of a tag that KNOWN does not hold, and there from now on."""
    name = name_of(tag)
    if name[:1] == "/":
        opened = KNOWN[tag] = _END
        return opened
    if name == "a" and "class=" not in tag and "hidden" not in tag and "display" not in tag:
        return _A if ' href="' in tag else _SPAN
    opened = _read(tag, name)
    if len(tag) < 80:
        if len(KNOWN) > 50_000:
            KNOWN.clear()
        KNOWN[tag] = opened
    return opened


def _read(tag: str, name: str) -> Tag:
    if not name or name[0] == "!" or name == "/":
        return Tag(EMPTY, name, {})
    if ("\\" in tag or "$$" in tag) and _END_OF_TEX.search(tag):
        return Tag(SPECIAL, name, {}, method="less_than")
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
    if name in BLOCKS:
        return Tag(BLOCK, name, attributes, hint)
    if name in PARAGRAPHS:
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


KNOWN: dict[str, Tag] = {}
_A, _SPAN, _END = Tag(LINK, "a", {}), Tag(INLINE, "span", {}), Tag(CLOSING, "", {})
