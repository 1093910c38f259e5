"""Code in pages: its lines without numbers and buttons, its language, its fence."""

import re
from collections.abc import Mapping

from alloy.data.web.markup import VOID, attributes_of, end_of, name_of, text_of, unescape

# elements without `pre` whose lines are code
CONTAINERS = frozenset(
    "fragment codemirror-code hljs-ln js-file-line-container blob-wrapper code-block codeblock sourcecode verbatim lstlisting".split()
)
GUTTERS = frozenset(
    "lineno linenos linenodiv line-number line-numbers linenumber linenumbers gutter gutter-line hljs-ln-numbers hljs-ln-line-number "
    "rouge-gutter blob-num line-numbers-rows lnt ln copybtn copy-button btn-clipboard clipboard-copy codehilite-copy".split()
)
_LINES = frozenset("div li p tr h1 h2 h3 h4 h5 h6".split())
_DROPPED = frozenset("button script style svg template select".split())
_LANGUAGE = re.compile(
    r"(?:^|\s)(?:language-|lang-|highlight-source-|highlight-|brush:\s*|sourcecode\s+|prettyprint\s+lang-|code-|src-)([\w#+.-]+)",
    re.IGNORECASE,
)
_NO_LANGUAGE = frozenset(
    "default none text plain notranslate block wrapper container highlight source code plaintext nohighlight auto box area toolbar "
    "copy line lines numbers body content header title wrap inner example section cell".split()
)
_SHOWN = re.compile(r"\n+|[^\n]+")


def language_of(attributes: Mapping[str, str]) -> str:
    """Language that an element's class or data says its code is in; empty: none."""
    named = attributes.get("data-lang") or attributes.get("data-language") or ""
    if named and re.fullmatch(r"[\w#+.-]{1,20}", named):
        return named.lower()
    classes = attributes.get("class", "")
    for found in _LANGUAGE.finditer(classes):
        name = found[1].rstrip(";,.").lower()
        if name not in _NO_LANGUAGE and len(name) <= 20:
            return {"ipython3": "python", "python3": "python", "pycon": "python", "pycon3": "python"}.get(name, name)
    return ""


def inner_language(parts: list[str], i: int, j: int) -> str:
    """Language that a `code` at the beginning of a `pre` names."""
    tag = parts[i + 1] if i + 1 < j else ""
    return language_of(attributes_of(tag)) if tag.startswith(("code ", "span ", "samp ")) else ""


def read_code(parts: list[str], i: int, j: int) -> str:
    """Lines of the code between the places `i` and `j`: exact but for numbers, buttons and blank lines around it."""
    tags = set(parts[i + 1 : j : 2])
    if all(_is_plain(tag) for tag in tags):
        text = text_of(parts, i, j)
    else:
        text = _read_lines(parts, i, j)
    if "\xa0" in text or "\u200b" in text or "\r" in text:
        text = text.replace("\xa0", " ").replace("\u200b", "").replace("\r\n", "\n").replace("\r", "\n")
    # the first line keeps its indentation
    lines = text.rstrip().split("\n")
    first = 0
    while first < len(lines) and not lines[first].strip():
        first += 1
    return "\n".join(lines[first:])


def fence(code: str, language: str) -> str:
    """Code between fences that it does not hold itself."""
    ticks = "```"
    if ticks in code:
        ticks = "`" * (max(map(len, re.findall(r"`{3,}", code))) + 1)
    return f"{ticks}{language}\n{code}\n{ticks}"


def inline_code(code: str) -> str:
    """Code between backticks in a line."""
    code = " ".join(code.split())
    if "`" not in code:
        return f"`{code}`" if code else ""
    ticks = "`" * (max(map(len, re.findall(r"`+", code))) + 1)
    return f"{ticks} {code} {ticks}"


def is_gutter(attributes: Mapping[str, str]) -> bool:
    """Whether an element holds line numbers or a button instead of code."""
    return not GUTTERS.isdisjoint(attributes.get("class", "").lower().split())


_PLAIN: dict[str, bool] = {}


def _is_plain(tag: str) -> bool:
    """Whether a tag says nothing about lines."""
    known = _PLAIN.get(tag)
    if known is None:
        name = name_of(tag.removeprefix("/"))
        known = (
            name not in _LINES and name not in _DROPPED and name not in ("br", "code", "table", "td", "ol", "ul", "img")
        )
        if known and 'class="' in tag:
            attributes = attributes_of(tag)
            known = not (is_gutter(attributes) or _is_line(attributes))
        if len(tag) < 60 and len(_PLAIN) < 20_000:
            _PLAIN[tag] = known
    return known


def _is_line(attributes: Mapping[str, str]) -> bool:
    names = attributes.get("class", "").lower().split()
    return "line" in names or "code-line" in names or "hljs-ln-line" in names or "view-line" in names


def _read_lines(parts: list[str], i: int, j: int) -> str:
    out: list[str] = []
    # for each open element: whether it is a line
    stack: list[bool] = []
    at = i
    # a `code` for each line
    is_per_line = sum(1 for tag in parts[i + 1 : j : 2] if tag == "/code") > 1
    while at < j:
        text, tag = parts[at], parts[at + 1]
        at += 2
        if text:
            out.append(unescape(text) if "&" in text else text)
        if at - 1 >= j or tag[0] == "!":
            continue
        if tag[0] == "/":
            if stack and stack.pop() and (not out or out[-1][-1:] != "\n"):
                out.append("\n")
            continue
        name = name_of(tag)
        if name == "br":
            out.append("\n")
            continue
        if name in VOID:
            continue
        attributes = attributes_of(tag)
        if name in _DROPPED or is_gutter(attributes):
            if name not in ("script", "style"):
                at = end_of(parts, at, name) + 1
            continue
        is_line = name in _LINES or _is_line(attributes) or (name == "code" and is_per_line)
        # lines that are told apart by line ends and elements at once
        if is_line and out and out[-1].isspace() and "\n" in out[-1] and name != "code":
            out[-1] = "\n"
        if is_line and out and out[-1][-1:] != "\n":
            out.append("\n")
        stack.append(is_line)
        if name in ("td", "th") and out and out[-1][-1:] not in ("\n", ""):
            out.append(" ") if not out[-1].isspace() else None
    text = "".join(out)
    return text
