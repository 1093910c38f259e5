"""Main content of a page: which of its blocks are no navigation, header, footer or advertisement.

Elements are judged by what they say they are (name, role, words of class and id, `sites.toml`), then by how much of them is links.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate
from typing import Literal
from urllib.parse import urlsplit

# hints of elements
NONE, MAIN, ASIDE, NAVIGATION, DROP = range(5)
MainContent = Literal["off", "safe", "strict"]

_TAGS = {"main": MAIN, "article": MAIN, "nav": NAVIGATION, "footer": NAVIGATION, "aside": ASIDE, "header": ASIDE}
_ROLES = {"main": MAIN, "article": MAIN, "navigation": NAVIGATION, "banner": NAVIGATION, "contentinfo": NAVIGATION, "search": NAVIGATION,
          "complementary": ASIDE, "menu": NAVIGATION, "menubar": NAVIGATION, "toolbar": NAVIGATION, "dialog": ASIDE, "doc-toc": ASIDE}  # fmt: skip
_NAVIGATION = frozenset(
    str.split(
        "nav navbar navigation navi menu menubar topnav topbar sidenav sidebar breadcrumb breadcrumbs footer pagefooter pager pagination "
        "paginator toolbar masthead skiplink skiplinks cookie cookies consent gdpr newsletter subscribe share sharing social addthis "
        "sharethis advert advertisement advertising ads adsbygoogle banner promo sponsor sponsored popup modal login signin signup "
        "searchbox searchform related recommended recommendations copyright colophon legal byline-share"
    )
)
_ASIDE = frozenset(
    str.split(
        "header toc tableofcontents contents-list widget widgets meta postmeta tags taglist rating bio author-bio"
    )
)
_MAIN = frozenset(str.split("main content maincontent main-content page-content article post-content entry-content"))
# notes and sources of the text, whatever element holds them
_NOTES = frozenset(
    str.split(
        "footnote footnotes footnote-list endnotes citation citations citation-list references reflist bibliography topic admonition"
    )
)
_NOTE_ROLES = frozenset(str.split("note doc-footnote doc-endnote doc-endnotes doc-biblioentry doc-bibliography"))
_SOURCES = re.compile(
    r"[\W\d]*(?:references|bibliography|works cited|citations|(?:foot|end)?notes|literature|sources|further reading)\W*(?:\[?edit\W*)?",
    re.IGNORECASE,
)
_CONTENTS = re.compile(
    r"(?:table of )?contents|(?:sub)?sections|on this page|in this (?:section|chapter|article|page)|(?:section|page|chapter) contents",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+")
_NOTICE = re.compile(
    r"copyright|©|\(c\) \d{4}|all rights reserved|generated (?:by|on)|produced by|powered by|last (?:updated|modified|edited|changed)"
    r"|(?:created|built|made) (?:using|with)|privacy policy|terms of (?:use|service)|skip to (?:main )?content|^\W*(?:previous|next|prev|up|home)\b.{0,60}$"
    r"|^(?:share|print|email|tweet|reply|report|log ?in|sign ?(?:in|up)|register|search|menu|show source|page source|top|back to top)$",
    re.IGNORECASE,
)  # fmt: skip


@dataclass(slots=True)
class Block:
    """A part of the page's text.

    Attributes:
        kind: text, heading, code or table.
        text: with placeholders for what must not be changed.
        prefix: indentation and quote marks of its lines.
        marker: what stands instead of the end of the prefix on its first line.
        links: characters of it that are links.
        has_math: whether formulas stand in it.
        is_tight: whether no blank line stands before it.
        level: of a heading.
    """

    kind: Literal["text", "heading", "code", "table"]
    text: str
    prefix: str = ""
    marker: str = ""
    links: int = 0
    has_math: bool = False
    is_tight: bool = False
    level: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether it holds what `safe` never removes."""
        return self.has_math or (self.kind == "code" and "\n" in self.text)


@dataclass(slots=True)
class Node:
    """An element around the blocks from `start` to `stop`."""

    tag: str
    hint: int
    start: int
    stop: int = 0


def hint_of(tag: str, attributes: Mapping[str, str]) -> int:
    """What an element says it is: NONE, MAIN, ASIDE, NAVIGATION or DROP (never content)."""
    hint = _TAGS.get(tag, NONE)
    if not attributes:
        return hint
    classes, name = attributes.get("class", ""), attributes.get("id", "")
    role = attributes.get("role", "")
    if role in _NOTE_ROLES:
        return NONE
    hint = _ROLES.get(role, hint)
    if not classes and not name:
        return hint
    names = [f".{word}" for word in classes.split()]
    if name:
        names.append(f"#{name}")
    known = max((_SITES[word] for word in names if word in _SITES), default=NONE)
    # what is a navigation by name is no main content by class
    if known and (known > MAIN or hint <= MAIN):
        return known
    if hint == ASIDE and tag == "aside" and not _NOTES.isdisjoint(classes.lower().split()):
        return NONE
    if hint or tag in ("body", "html"):
        return hint
    for word in names:
        word = word[1:].lower()
        if word in _MAIN:
            hint = MAIN
        words = _WORD.findall(word)
        # the last word says what it is: post-navigation, but not navigation-open
        if words and (
            words[-1] in _NAVIGATION
            or (len(words) > 1 and words[0] in _NAVIGATION and words[0] not in ("menu", "share", "related", "legal"))
        ):
            return NAVIGATION
        if words and words[-1] in _ASIDE:
            hint = hint or ASIDE
    return hint


def uses_dollars(url: str) -> bool:
    """Whether a page is of a host that typesets what stands between single dollars, whatever the page loads."""
    host = urlsplit(url).hostname if url.startswith("http") and "[" not in url else None
    return host is not None and f".{host}".endswith(tuple(f".{name}" for name in _HOSTS))


def kept_blocks(blocks: Sequence[Block], nodes: Sequence[Node], mode: MainContent) -> list[bool]:
    """For each block, whether it is content."""
    if mode == "off" or not blocks:
        return [True] * len(blocks)
    size = [len(block.text) for block in blocks]
    links = [min(block.links, n) for block, n in zip(blocks, size, strict=True)]
    words = list(accumulate((n - k for n, k in zip(size, links, strict=True)), initial=0))
    linked = list(accumulate(links, initial=0))
    total = words[-1]
    keep = [True] * len(blocks)

    def drop(start: int, stop: int) -> None:
        for i in range(start, stop):
            keep[i] = keep[i] and blocks[i].is_kept

    for node in nodes:
        text, link = words[node.stop] - words[node.start], linked[node.stop] - linked[node.start]
        if node.hint in (NAVIGATION, ASIDE) and node.stop > node.start and text <= 0.4 * total:
            # what is called a sidebar may be the text's own: long, with few links
            is_prose = text > 600 and link < 0.2 * text and node.tag not in ("nav", "footer")
            if not is_prose and (node.hint == NAVIGATION or mode == "strict" or link > 0.5 * (text + link)):
                drop(node.start, node.stop)
    mains, covered = list[Node](), 0
    for node in nodes:
        if node.hint == MAIN and node.start >= covered and node.stop > node.start:
            mains.append(node)
            covered = node.stop
    held = sum(words[node.stop] - words[node.start] for node in mains)
    left = sum(n - k for n, k, kept in zip(size, links, keep, strict=True) if kept)
    is_known = bool(mains) and held > 0.5 * max(left, 1)
    if is_known:
        has_title = any(
            blocks[i].kind == "heading" and blocks[i].level == 1 for node in mains for i in range(node.start, node.stop)
        )
        at = 0
        for node in mains:
            for i in range(at, node.start):
                if not has_title and blocks[i].kind == "heading" and blocks[i].level == 1:
                    has_title = True
                else:
                    drop(i, i + 1)
            at = node.stop
        drop(at, len(blocks))
    _drop_contents(blocks, size, keep)
    is_source = _sources(blocks)
    if not is_known or mode == "strict":
        _drop_lists_of_links(blocks, nodes, words, linked, keep, is_source)
    _drop_edges(blocks, size, links, keep, is_known and mode != "strict", is_source)
    # a page of nothing but links is its links
    return keep if any(keep) else [True] * len(blocks)


def _drop_contents(blocks: Sequence[Block], size: list[int], keep: list[bool]) -> None:
    """Lists of the page's own headings: items that are links under a word that says so."""
    for i, block in enumerate(blocks):
        if size[i] < 30 and block.kind != "code" and _CONTENTS.fullmatch(block.text.strip(" :.#")):
            stop = i + 1
            while stop < len(blocks) and blocks[stop].prefix and blocks[stop].links > 0.8 * size[stop]:
                stop += 1
            if stop > i + 1:
                keep[i:stop] = [False] * (stop - i)


def _sources(blocks: Sequence[Block]) -> list[bool]:
    """For each block, whether it stands under a heading such as References."""
    inside, found = False, list[bool]()
    for block in blocks:
        if block.kind == "heading":
            inside = len(block.text) < 40 and _SOURCES.fullmatch(block.text) is not None
        found.append(inside)
    return found


def _drop_lists_of_links(
    blocks: Sequence[Block],
    nodes: Sequence[Node],
    words: list[int],
    linked: list[int],
    keep: list[bool],
    is_source: list[bool],
) -> None:
    """Elements that hold little but links, before the first and behind the last prose."""
    prose = [i for i, block in enumerate(blocks) if keep[i] and (block.is_kept or len(block.text) - block.links > 80)]
    if not prose:
        return
    first, last = prose[0], prose[-1]
    for node in nodes:
        if node.stop <= first or node.start > last:
            text, link = words[node.stop] - words[node.start], linked[node.stop] - linked[node.start]
            if link > 20 and link > 2 * text:
                for i in range(node.start, node.stop):
                    keep[i] = keep[i] and is_source[i]


def _drop_edges(
    blocks: Sequence[Block], size: list[int], links: list[int], keep: list[bool], is_known: bool, is_source: list[bool]
) -> None:
    """Notices at both ends, and lone links unless the page says where its content is."""
    for order in (range(len(blocks)), range(len(blocks) - 1, -1, -1)):
        seen = 0
        for i in order:
            if not keep[i]:
                continue
            block = blocks[i]
            is_notice = block.kind != "heading" and size[i] < 400 and _NOTICE.search(block.text) is not None
            if block.is_kept or (block.kind == "heading" and links[i] == 0) or seen > 6:
                break
            if not is_notice and size[i] - links[i] > 100:
                break
            seen += 1
            if is_notice or (links[i] > 0.6 * size[i] and not is_known and not is_source[i]):
                keep[i] = False


def _read_sites() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((files("alloy.data.web") / "sites.toml").read_text(encoding="utf-8"))


def _names_of_sites() -> dict[str, int]:
    names: dict[str, int] = {}
    for key, hint in (("main", MAIN), ("boilerplate", NAVIGATION), ("drop", DROP)):
        for site in _TABLE.values():
            names.update(dict.fromkeys(site.get(key, ()), hint))
    return names


_TABLE = _read_sites()
_SITES = _names_of_sites()
_HOSTS = tuple(host for site in _TABLE.values() for host in site.get("dollars", ()))
