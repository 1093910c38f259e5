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
    hint = _ROLES.get(attributes.get("role", ""), hint)
    if not classes and not name:
        return hint
    names = [f".{word}" for word in classes.split()]
    if name:
        names.append(f"#{name}")
    known = max((_SITES[word] for word in names if word in _SITES), default=NONE)
    if known:
        return known
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
    if mains and held > 0.5 * max(left, 1):
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
    _drop_lists_of_links(blocks, nodes, words, linked, keep)
    _drop_edges(blocks, size, links, keep)
    # a page of nothing but links is its links
    return keep if any(keep) else [True] * len(blocks)


def _drop_lists_of_links(
    blocks: Sequence[Block], nodes: Sequence[Node], words: list[int], linked: list[int], keep: list[bool]
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
                    keep[i] = False


def _drop_edges(blocks: Sequence[Block], size: list[int], links: list[int], keep: list[bool]) -> None:
    """Notices and lone links at both ends."""
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
            if is_notice or links[i] > 0.6 * size[i]:
                keep[i] = False


def _sites() -> dict[str, int]:
    table = tomllib.loads((files("alloy.data.web") / "sites.toml").read_text(encoding="utf-8"))
    names: dict[str, int] = {}
    for key, hint in (("main", MAIN), ("boilerplate", NAVIGATION), ("drop", DROP)):
        for site in table.values():
            names.update(dict.fromkeys(site.get(key, ()), hint))
    return names


_SITES = _sites()
