"""A page as a flat list of texts and tags: what the layout walks over, without a tree of Python objects.

The parser's serialisation is well formed: elements nest, implied tags are there, attributes stand in double quotes with `<` and `>`
escaped, and the content of scripts stands between its tags. So one pattern splits it exactly, and one stack follows it.
"""

import re

from selectolax.lexbor import LexborHTMLParser

from alloy.data.web.element import Element

VOID = frozenset(
    str.split("area base basefont bgsound br col embed frame hr img input keygen link meta param source track wbr")
)
# their content is text whatever it looks like; they are one tag with it
RAW = ("script", "style", "iframe", "noembed", "noframes", "xmp", "plaintext")
_TAG = re.compile(rf"<(!--.*?--|{'|'.join(f'{name}(?=[ >])[^>]*>.*?</{name}' for name in RAW)}|[^>]*)>", re.DOTALL)
_ATTRIBUTE = re.compile(r' ([^\s=]+?)="([^"]*)"')
# elements for each of which the parser looks up all that are open
_BLOCK = re.compile(
    r"<(/?)(?:address|article|aside|blockquote|center|details|dir|div|dl|fieldset|figure|figcaption|footer|form|header|hgroup|li|dd|dt"
    r"|listing|main|menu|nav|ol|pre|section|summary|table|td|ul|p)\b[^>]*>",
    re.IGNORECASE,
)
# XML up to its first element
_SUBSET = re.compile(
    r"(\s*(?:<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*)<!DOCTYPE[^>\[]*\[(.*?)\]\s*>", re.DOTALL | re.IGNORECASE
)
_ENTITY = re.compile(r"<!ENTITY\s+([\w.-]+)\s+([\"'])(.{0,64}?)\2\s*>")
_XML = re.compile(
    r"<(?P<raw>script|style)\b[^<>]*(?<!/)>.*?(?:</(?P=raw)\s*>|\Z)|<!--.*?(?:-->|\Z)|<!\[CDATA\[(?P<data>.*?)(?:\]\]>|\Z)"
    r"|<(?P<name>[A-Za-z][\w:.-]*)(?P<rest>(?=[\s/])[^<>]*)/>",
    re.DOTALL,
)
# times that an entity of a page's own is written out
MOST_ENTITIES = 10_000


def of_xhtml(html: str, is_xml: bool = False) -> str:
    """A page that says it is XML as HTML: without entities of its own, CDATA, and elements without content in one tag."""
    declared = _SUBSET.match(html) if "[" in html[:2000] else None
    if declared is not None:
        html = f"{declared[1]}<!DOCTYPE html>{html[declared.end() :]}"
        for name, _, value in _ENTITY.findall(declared[2])[:100]:
            html = html.replace(f"&{name};", value, MOST_ENTITIES)
    start = html[:100].lstrip("\ufeff \t\r\n")
    if not is_xml and not start.startswith("<?xml"):
        return html
    # without its declaration it is HTML from here on
    return _XML.sub(_of_xml, html[html.find("?>") + 2 :] if start.startswith("<?xml") else html)


def _of_xml(found: re.Match[str]) -> str:
    if found["data"] is not None:
        return found["data"].replace("&", "&amp;").replace("<", "&lt;")
    name = found["name"]
    if name is None or name.lower() in VOID:
        return found[0]
    return f"<{name}{found['rest']}></{name}>"


# formulas longer than this are not looked through for a `<` that is no tag
LONGEST_TEX = 2000
_LESS = re.compile(
    r"<(?![A-Za-z][\w:-]{2,}(?:\s[^<>]*)?/?>|(?:[abipsuq]|h[1-6r]|br|em|li|d[ldt]|t[dhrt]|[uo]l|r[pt]|m[inos])(?:\s[^<>]*)?/?>)(?=[A-Za-z])",
    re.IGNORECASE,
)


def with_less_than(html: str) -> str:
    """A page whose `\\(x<y\\)` a parser does not take for a tag."""
    for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$")):
        parts, at, start = list[str](), 0, html.find(left)
        while start >= 0:
            stop = html.find(right, start + 2, start + LONGEST_TEX)
            if stop >= 0 and html.find("<", start, stop) >= 0:
                parts += (html[at:start], _LESS.sub("&lt;", html[start:stop]))
                at = stop
            start = html.find(left, start + 2 if stop < 0 else stop + 2)
        html = "".join(parts) + html[at:] if parts else html
    return html


def split(html: str, deepest: int, most: int) -> list[str]:
    """Texts at even places, tags without their angle brackets at odd ones, beginning and ending with a text.

    Args:
        html: the page; NUL characters are dropped.
        deepest: blocks inside more blocks than this are flattened.
        most: tags behind which the page is cut.
    """
    if "\0" in html:
        html = html.replace("\0", "")
    if html.count("<") > 4 * deepest:
        html = _flattened(html, deepest)
    parts = _TAG.split(LexborHTMLParser(html).html or "", maxsplit=most)
    if len(parts) > 2 * most:
        parts[-1] = ""
    return parts


def name_of(tag: str) -> str:
    """Name of the element that a tag opens."""
    space, end = tag.find(" "), tag.find(">")
    if 0 <= end < space or space < 0:
        return tag if end < 0 else tag[:end]
    return tag[:space]


def attributes_of(tag: str) -> dict[str, str]:
    """Attributes of a tag, unescaped."""
    if '="' not in tag:
        return {}
    return {name: unescape(value) if "&" in value else value for name, value in _ATTRIBUTE.findall(tag)}


def unescape(text: str) -> str:
    """Text without the five entities that a serialisation holds."""
    text = text.replace("&nbsp;", "\xa0").replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    return text.replace("&amp;", "&")


def end_of(parts: list[str], i: int, name: str) -> int:
    """Place of the closing tag of an element `name` whose content begins at `i`."""
    closing, opening = f"/{name}", f"{name} "
    if i + 1 < len(parts) and parts[i + 1] == closing:
        return i + 1
    depth = 1
    while True:
        at = i
        while True:
            try:
                at = parts.index(closing, at)
            except ValueError:
                return len(parts) - 2 if len(parts) % 2 else len(parts) - 1
            if at % 2:
                break
            at += 1
        depth -= 1
        if at > i + 1:
            between = parts[i + 1 : at : 2]
            depth += between.count(name) + sum([tag.startswith(opening) for tag in between])
        if depth == 0:
            return at
        i = at + 1


def text_of(parts: list[str], i: int, j: int) -> str:
    """Text between the places `i` and `j`."""
    text = parts[i] if j == i + 1 else "".join(parts[i:j:2])
    return unescape(text) if "&" in text else text


def element_of(parts: list[str], i: int, j: int, tag: str) -> Element:
    """The element that `tag` opens, whose content goes from `i` to its closing tag at `j`."""
    root = Element(name_of(tag).rpartition(":")[2], attributes_of(tag))
    stack = [root]
    for at in range(i, j, 2):
        text = parts[at]
        if text:
            text = unescape(text) if "&" in text else text
            if not stack[-1].children:
                stack[-1].text = text
            elif not text.isspace():
                stack[-1].children.append(Element("#text", text=text))
        tag = parts[at + 1]
        if at + 1 == j or tag[0] == "!":
            continue
        if tag[0] == "/":
            if len(stack) > 1:
                stack.pop()
            continue
        name = name_of(tag)
        child = Element(name.rpartition(":")[2], attributes_of(tag))
        stack[-1].children.append(child)
        if name not in VOID and name not in RAW:
            stack.append(child)
    return root


def _flattened(html: str, deepest: int) -> str:
    """Without the tags of blocks that are nested too deeply, for which the parser takes time squared."""
    parts: list[str] = []
    depth = dropped = start = 0
    for found in _BLOCK.finditer(html):
        if not found[1]:
            depth += 1
            if depth <= deepest:
                continue
            dropped += 1
        elif dropped:
            dropped -= 1
            depth -= 1
        else:
            depth = max(depth - 1, 0)
            continue
        parts.append(html[start : found.start()])
        start = found.end()
    return "".join(parts) + html[start:]
