"""Code in pages: its lines without numbers and buttons, its language, its fence."""

import re
from collections.abc import Mapping

from alloy.data.web.markup import VOID, attributes_of, end_of, name_of, text_of, unescape

# elements without `pre` whose lines are code
CONTAINERS = frozenset(
    str.split(
        "fragment codemirror-code hljs-ln js-file-line-container blob-wrapper code-block codeblock sourcecode verbatim lstlisting"
    )
)
GUTTERS = frozenset(
    str.split(
        "lineno linenos linenodiv line-number line-numbers linenumber linenumbers gutter gutter-line hljs-ln-numbers hljs-ln-line-number "
        "rouge-gutter blob-num line-numbers-rows lnt ln copybtn copy-button btn-clipboard clipboard-copy codehilite-copy"
    )
)
_LINES = frozenset(str.split("div li p tr h1 h2 h3 h4 h5 h6"))
_DROPPED = frozenset(str.split("button script style svg template select"))
_LANGUAGE = re.compile(
    r"(?:^|\s)(?:language-|lang-|highlight-source-|highlight-|brush:\s*|sourcecode\s+|prettyprint\s+lang-|code-|src-)([\w#+.-]+)",
    re.IGNORECASE,
)
_NO_LANGUAGE = frozenset(
    str.split(
        "default none text plain notranslate block wrapper container highlight source code plaintext nohighlight auto box area toolbar "
        "copy line lines numbers body content header title wrap inner example section cell"
    )
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
    text = text_of(parts, i, j) if all(map(_is_plain, tags)) else _read_lines(parts, i, j)
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


def _is_all_code(parts: list[str], i: int, j: int) -> bool:
    """Whether nothing stands beside the `code` elements between two places: each of them is a line then."""
    depth = 0
    for at in range(i, j, 2):
        if not depth and parts[at] and not parts[at].isspace():
            return False
        tag = parts[at + 1]
        depth += (tag == "code" or tag.startswith("code ")) - (tag == "/code")
    return True


def _read_lines(parts: list[str], i: int, j: int) -> str:
    out: list[str] = []
    # for each open element: where its text begins if it is a line
    stack: list[int | None] = []
    # what the last element was whose end ended a line
    ended = ""
    tags = parts[i + 1 : j : 2]
    is_per_line = tags.count("/code") > 1 and _is_all_code(parts, i, j)
    at = i
    while at < j:
        text, tag = parts[at], parts[at + 1]
        at += 2
        if text:
            if ended and text.isspace() and "\n" in text:
                # line ends between elements that are lines
                text = "" if ended in _LINES else text.replace("\n", "", 1)
            if text:
                out.append(unescape(text) if "&" in text else text)
                ended = ""
        if at > j or tag[:1] == "!":
            continue
        name = name_of(tag.removeprefix("/"))
        if tag[:1] == "/":
            start = stack.pop() if stack else None
            if start is not None and (len(out) == start or out[-1][-1:] != "\n"):
                out.append("\n")
            ended = ended if start is None else name
            continue
        attributes = attributes_of(tag)
        if name == "br":
            out.append("\n")
        elif name in ("script", "style") or name in VOID:
            continue
        elif name in _DROPPED or is_gutter(attributes):
            at = end_of(parts, at, name) + 1
        elif name in _LINES or _is_line(attributes) or (name == "code" and is_per_line):
            if out and out[-1][-1:] != "\n":
                out.append("\n")
            stack.append(len(out))
        else:
            stack.append(None)
    return "".join(out)
