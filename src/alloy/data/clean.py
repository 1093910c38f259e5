"""Cleaning by rules: what of a page's text is the site's and not the author's goes, and mathematics gets one notation.

Lines and blocks are removed where they say what only sites say (a list of phrases), are bars and menus of links, stand on
most pages of their host, or repeat a paragraph. Nothing that holds a formula or code is removed. The same text always gives
the same result, and it takes a fraction of a millisecond, so most of a page must be passed by a glance.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alloy.data.blocks import FORMULA, Kind, block_spans, fences, formula_spans, formulas, latex

# a paragraph of so many characters is content, and what stands before the first or behind the last one is an edge of the page
PARAGRAPH = 140
# lines that are longer say something
LONGEST_LINE = 160
# pages of a host before what they share is known to be the site's, and the share of them that must have it
HOST_PAGES, HOST_SHARE = 4, 0.5
# paragraphs from this length on are kept once
REPEATED = 60


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# lines that a site writes, without their punctuation
_LINES = frozenset(
    """about|about us|accept|accept all|accept cookies|account|ad|ads|add a comment|add comment|add to cart|advertise|
    advertisement|advertisements|all rights reserved|archive|archives|article|back|back to top|blog|bookmark|browse|
    categories|cite this page|click here|close|close menu|comments|community portal|contact|contact page|contact us|contents|
    continue reading|contributions|cookie policy|cookie settings|cookies|copy|copy link|copyright|create account|
    current events|disclaimer|disclaimers|discussion|donate|download as pdf|download pdf|edit|edit page|edit source|
    edit this page|email|email this|email this post|email to a friend|facebook|faq|faqs|featured content|feedback|follow us|
    forgot password|forgot your password|forum|forums|google|help|hide|history|home|home page|homepage|imprint|index|instagram|
    jump to content|jump to navigation|jump to search|languages|learn more|leave a comment|leave a reply|legal|legal notice|
    linkedin|list of all members|load more|log in|log out|login|logo|logout|main menu|main page|menu|mobile view|more|
    more articles|more from|my account|navigation|navigation menu|new posts|newer posts|newsletter|next|next article|
    next chapter|next page|next post|next topic|no comments|not logged in|older posts|on this page|open menu|
    page information|page source|permalink|permanent link|personal tools|pinterest|popular posts|post a comment|
    post comment|prev|previous|previous article|previous chapter|previous page|previous post|previous topic|print|
    print this|print this page|printable version|privacy|privacy policy|quick search|random article|read|read more|
    recent changes|recent comments|recent posts|reddit|register|related articles|related changes|related links|
    related posts|related questions|related topics|reply|report|rss|rss feed|save|search|search this site|share|
    share on facebook|share on linkedin|share on twitter|share this|share this post|show all|show comments|show more|
    show source|sidebar|sign in|sign out|sign up|site map|sitemap|skip navigation|skip navigation links|skip to content|
    skip to main content|sponsored|submit|subscribe|suggested articles|table of contents|tag cloud|tags|talk|terms|
    terms and conditions|terms of service|terms of use|this page|toc|toggle navigation|toggle sidebar|toggle table of contents|tools|
    top|trackbacks|tweet|twitter|unsubscribe|up|upload file|user menu|view all|view history|view more|view page source|
    view source|views|what links here|whatsapp|widgets|youtube""".replace("\n    ", "").split("|")
)
# what it says with other words around: at the beginning of a line, and anywhere
_OPENINGS = re.compile(
    r"""(?:©|\(c\)|copyright\b)\W{0,4}(?:copyright\W{0,4})?(?:\(c\)|©|by|the|\d{4})
    |(?:skip|jump)\ to\b
    |(?:terms\ (?:of|and)|by\ using\ this\ (?:site|website)|use\ of\ this\ (?:site|website))\b.{0,60}\b(?:use|service|conditions|terms|agree)\b
    |(?:log|sign)\ ?(?:in|up|out)\b.{0,30}$
    |(?:share|tweet|pin|print|email|e-mail|bookmark|report|like)\ (?:this|on|via|it|to)\b.{0,30}$
    |(?:follow|like|find|join|visit)\ us\b
    |(?:powered|generated|created|produced|built|made|hosted|designed|developed)\ (?:by|with|using|on)\b.{0,80}$
    |(?:this\ )?(?:page|site|article|document)?\ ?(?:was\ )?last\ (?:updated|modified|edited|changed|revised|build)\b
    |(?:back|return|go|scroll)\ to\ (?:the\ )?(?:top|home|homepage|main\ page|index|list)\b
    |(?:leave|post|add|write|submit)\ a\ (?:comment|reply|review)\b
    |\d[\d,.]*k?\ (?:comments?|replies|likes?|shares?|views?|votes?|followers?|answers)\b.{0,20}$
    |(?:view|show|edit|see|read)\ (?:this|the|full|all|page|more|on)\b.{0,40}$
    |(?:related|popular|recent|latest|trending|recommended|more)\ (?:posts?|articles?|links|pages|topics|questions|stories|news)\b.{0,30}$
    |(?:posted|filed|tagged|published|categori[sz]ed)\ (?:in|under|by|on|at|with)\b.{0,100}$
    |from\ .{1,40},\ the\ free\ encyclopedia
    |(?:click|tap)\ here\b
    |report\ (?:this|abuse|a\ problem|an\ error)\b""",
    re.VERBOSE,
)
_SAYINGS = re.compile(
    r"""(?:all|some|no)\ rights\ reserved
    |\b(?:privacy|cookies?)\ (?:policy|notice|settings|preferences|statement)\b
    |\b(?:uses?|using|accept|allow|enable|these)\b.{0,30}\bcookies\b
    |\b(?:subscribe|sign\ up)\b.{0,40}\b(?:newsletter|mailing\ list|updates|feed|inbox|rss)\b
    |\b(?:log|logged|sign|signed|register)\ ?(?:in|up)?\ to\ (?:post|reply|comment|vote|edit|continue|add|access|view)\b
    |\bjavascript\b.{0,40}\b(?:enabled?|disabled|required|browser)\b|\benable\ javascript\b""",
    re.VERBOSE,
)
# names of languages in themselves: two in a short line or block are a choice of languages
_LANGUAGES = _words(
    """english deutsch français español português italiano nederlands polski svenska norsk dansk suomi čeština magyar română
    türkçe русский українська български ελληνικά العربية فارسی עברית हिन्दी বাংলা ไทย tiếng việt 中文 简体中文 繁體中文 日本語 한국어
    indonesia català euskara galego slovenčina slovenščina hrvatski српски lietuvių latviešu eesti"""
)
# punctuation around what a line says, and before it
_MARKS = " \t-*•·|»«\u203a\u2039→←↑¶:.,;()[]{}<>0123456789#_\"'!?…\u00a0"
_OPENING = " \t-*•·|»«\u203a\u2039→←↑"
# how lines begin that get a second look, and what else draws it
_FIRST = (
    _words(
        """© all answers bookmark built by categorised categorized category click comment created designed developed document
        filed find followers follow from generated go hosted join jump last latest like likes made no pin popular posted
        powered produced published replies return scroll see shares skip some submit tagged tap this trending use view
        views visit votes write you please enable"""
    )
    .union(line.partition(" ")[0] for line in _LINES)
    .union(_LANGUAGES)
)
_NEEDLES = ("rights reserved", "cookie", "newsletter")
_WORD = re.compile(r"\w+")
_BAR = re.compile(r"\s*[|»\u203a·•\u2039«→]\s*|\s{3,}|\s[/\u2013\u2014]\s")
_LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\([^)\n]*\)|\[\d{1,4}\](?=\w)|https?://\S+")
_CODE_LIKE = re.compile(
    r"^(?: {4}|\t|>>> |\.\.\. |\$ |In \[|#include|import |from \w+ import|def |return\b)|[;{}=]\s*$|\w\(.*\)$", re.M
)
_ITEM = re.compile(r"\s*(?:[-*•◦▪+]|\d{1,3}[.)])\s")
_SENTENCE_END = (".", "!", "?", ":", ";", "。", ",", "=")
_RULE = re.compile(r"^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
_INVISIBLE = ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text by the rules, and the characters of the lines and blocks that were removed."""

    text: str
    removed: int


def clean_texts(texts: Sequence[str], hosts: Sequence[str] | None = None) -> list[Cleaned]:
    """Every text cleaned; what most pages of a host share is removed, where `hosts` names those of the texts."""
    unified = [unify(normalise(text)) for text in texts]
    pages = [block_spans(text) for text in unified]
    shared: dict[str, set[str]] = {}
    for host, count in Counter(hosts or ()).items():
        if host and count >= HOST_PAGES:
            on = Counter(
                block
                for text, spans, other in zip(unified, pages, hosts or (), strict=True)
                if other == host
                for block in {text[s:e] for kind, s, e in spans if kind in ("prose", "table") and e - s < 2000}
            )
            shared[host] = {block for block, number in on.items() if number >= max(3, HOST_SHARE * count)}
    none: set[str] = set()
    of = [shared.get(host, none) for host in hosts] if hosts else [none] * len(texts)
    return [_clean(text, spans, known) for text, spans, known in zip(unified, pages, of, strict=True)]


def clean_text(text: str) -> Cleaned:
    """One text cleaned by itself."""
    return clean_texts([text])[0]


def normalise(text: str) -> str:
    """Line ends, spaces and invisible characters; code keeps its spaces."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = text.replace("\u00a0", " ")
        # joiners spell some scripts; elsewhere they are left over from layout
        for mark in _INVISIBLE:
            if mark in text and not (mark in "\u200c\u200d" and re.search("[\u0600-\u0fff]", text)):
                text = text.replace(mark, "")
    if " \n" in text or "\t\n" in text:
        text = _outside(text, fences(text), lambda piece: "\n".join([line.rstrip(" \t") for line in piece.split("\n")]))
    return text


def unify(text: str) -> str:
    """Formulas in `$` and `$$`: what stands in `\\( \\)` and `\\[ \\]`, and environments that stand alone."""
    if "\\(" not in text and "\\[" not in text and "\n\\begin{" not in text and not text.startswith("\\begin{"):
        return text

    def dollars(match: re.Match[str]) -> str:
        inner = latex(match) if match.lastgroup in ("round", "square", "environment") else None
        # a dollar inside would end it, and so would a blank line
        if not inner or "$" in inner or ("\n\n" in inner and match["round"]):
            return match[0]
        if match["environment"] and not _stands_alone(match):
            return match[0]
        if match["round"] is None:
            return f"$${inner}$$"
        after = match.string[match.end() : match.end() + 1]
        return f"${' '.join(inner.splitlines())}$" + (" " if after.isdigit() else "")

    unified = _outside(text, fences(text), lambda piece: FORMULA.sub(dollars, piece))
    # a dollar that was astray before must not pair with a new one
    return unified if _squeezed(unified) == _squeezed(text) else text


def repair_table(table: str) -> str:
    """A pipe table with a rule below its head and rows of one length; empty columns at its end go."""
    lines = [line.strip() for line in table.split("\n")]
    if len(lines) < 2 or any(not line.startswith("|") for line in lines):
        return table
    is_ruled = _RULE.match(lines[1]) is not None
    is_plain = "$" not in table and "`" not in table and "\\" not in table
    if is_ruled and is_plain and len({line.count("|") for line in lines}) == 1:
        return table
    rows = [_cells(line) for line in lines]
    if is_ruled and len({len(row) for row in rows}) == 1:
        return table
    if is_ruled:
        del rows[1]
    width = max((i + 1 for row in rows for i, cell in enumerate(row) if cell.strip()), default=1)
    filled = [[*row[:width], *[" "] * (width - len(row))] for row in rows]
    filled.insert(1, ["---"] * width)
    return "\n".join("|" + "|".join(cell or " " for cell in row) + "|" for row in filled)


def _clean(text: str, spans: list[tuple[Kind, int, int]], shared: set[str]) -> Cleaned:
    kept: list[str] = []
    removed = 0
    seen: set[str] = set()
    first, last = _core(text, spans)
    suspects = _suspects(text)
    has_links = "](" in text or "http" in text
    for i, (kind, start, end) in enumerate(spans):
        block = text[start:end]
        if kind == "prose":
            is_edge = i < first or i > last
            is_one = "\n" not in block
            if is_one and end - start >= REPEATED and "$$" not in block:
                if block in seen:
                    removed += end - start
                    continue
                seen.add(block)
            if shared and block in shared and not _is_precious(block):
                removed += end - start
                continue
            is_suspect = block in suspects if is_one else is_edge or not suspects.isdisjoint(block.split("\n"))
            if is_suspect or (has_links and ("](" in block or "http" in block)):
                left = _lines(block, is_edge, suspects)
                removed += end - start - len(left)
                block = left
        elif kind == "table":
            block = _table(block, i < first or i > last, suspects, shared)
            removed += 0 if block else end - start
        elif kind == "heading" and block in suspects and block.strip(_MARKS).lower() in _LINES:
            removed += end - start
            continue
        if block:
            kept.append(block)
    return Cleaned("\n\n".join(kept), removed)


def _core(text: str, spans: list[tuple[Kind, int, int]]) -> tuple[int, int]:
    """Numbers of the first and the last block of content; without any, nothing is an edge."""

    def is_content(kind: Kind, start: int, end: int) -> bool:
        if kind in ("code", "math") or (kind == "table" and text.find("\n", start, end) >= 0):
            return True
        is_sentence = end - start >= PARAGRAPH and text[end - 1] in ".!?:\u3002"
        return (is_sentence and text.find("\n", start, start + PARAGRAPH) < 0) or text.find("$", start, end) >= 0

    numbers = range(len(spans))
    first = next((i for i in numbers if is_content(*spans[i])), -1)
    return (first, next(i for i in reversed(numbers) if is_content(*spans[i]))) if first >= 0 else (-1, len(spans))


def _suspects(text: str) -> set[str]:
    """The lines at which a second look is taken: those that begin like what a site writes, or name what is its business."""
    lower = text.lower()
    lines, lows = text.split("\n"), lower.split("\n")
    found = {
        line
        for line, low in zip(lines, lows, strict=True)
        if low and len(low) <= LONGEST_LINE and low.strip(_MARKS).partition(" ")[0] in _FIRST
    }
    for needle in _NEEDLES:
        if needle in lower:
            found.update(line for line, low in zip(lines, lows, strict=True) if needle in low)
    return found


def _lines(block: str, is_edge: bool, suspects: set[str]) -> str:
    """What is left of a block of prose."""
    lines = block.split("\n")
    is_menu = is_edge and len(lines) >= 3 and _is_menu(block, lines)
    has_links = block.count("](") + block.count("http") >= 3
    if (is_menu or (has_links and _link_share(block) > (0.5 if is_edge else 0.8))) and not _is_precious(block):
        return ""
    goes = [line in suspects and _is_site_line(line, is_edge) for line in lines]
    if not any(goes):
        return block
    if len(lines) > 1 and ("$" in block or "`" in block):
        # a line in the middle of a formula is its own
        spans, at = formula_spans(block), 0
        for i, line in enumerate(lines):
            goes[i] = goes[i] and not any(start < at + len(line) and at < end for start, end in spans)
            at += len(line) + 1
    return "\n".join(line for line, gone in zip(lines, goes, strict=True) if not gone).strip("\n")


def _table(block: str, is_edge: bool, suspects: set[str], shared: set[str]) -> str:
    """What is left of a table; one of a single row may be a bar of links."""
    is_one = "\n" not in block
    if (is_one and block in suspects and _is_site_line(block, is_edge)) or (
        block in shared and not _is_precious(block)
    ):
        return ""
    return block if is_one else repair_table(block)


def _is_site_line(line: str, is_edge: bool) -> bool:
    """Whether only a site would write it."""
    lower = line.lower()
    said = lower.strip(_MARKS)
    return (said in _LINES or _is_sites(line, lower, is_edge)) and not _is_precious(line)


def _is_sites(line: str, lower: str, is_edge: bool) -> bool:
    """As `_is_site_line`, for what is not in the list."""
    if len(line) > LONGEST_LINE:
        # a notice
        return is_edge and len(line) <= 4 * LONGEST_LINE and "cookie" in lower and _SAYINGS.search(lower) is not None
    item = _ITEM.match(lower)
    text = lower[item.end() :] if item else lower.lstrip(_OPENING)
    if _OPENINGS.match(text) or _SAYINGS.search(text):
        # an author may say it in a sentence
        return is_edge or not (len(_WORD.findall(lower)) > 12 and line.rstrip()[-1:] == ".")
    if is_edge and len(_LANGUAGES.intersection(_WORD.findall(lower))) >= 2:
        return True
    parts = [part for part in (part.strip(_MARKS) for part in _BAR.split(lower)) if part]
    known = sum(part in _LINES for part in parts)
    return len(parts) >= 2 and known * (2 if is_edge else 1.5) >= len(parts)


def _is_menu(block: str, lines: list[str]) -> bool:
    """Whether a block of short lines at an edge is a list of links: hardly any ends like a sentence or reads like one."""
    if len(block) > 50 * len(lines):
        return False
    items = sum(1 for line in lines if _ITEM.match(line))
    ends = sum(1 for line in lines if line.rstrip().endswith(_SENTENCE_END))
    is_known = any(line.lower().strip(_MARKS) in _LINES for line in lines)
    return ends * 4 <= len(lines) and (items * 2 >= len(lines) >= 5 or is_known)


def _link_share(block: str) -> float:
    """Share of a block's characters that are links and their marks, if there are three or more."""
    links = [len(match[0]) for match in _LINK.finditer(block)]
    return sum(links) / len(block) if len(links) >= 3 else 0.0


def _is_precious(text: str) -> bool:
    """Whether a piece may hold a formula or code."""
    return (
        "$" in text
        or "\\" in text
        or "`" in text
        or "^{" in text
        or "_{" in text
        or _CODE_LIKE.search(text) is not None
    )


def _squeezed(text: str) -> list[str]:
    return ["".join(formula.split()) for formula in formulas(text)]


def _stands_alone(match: re.Match[str]) -> bool:
    """Whether a match has its lines for itself, but for a mark of punctuation."""
    text, start, end = match.string, match.start(), match.end()
    before = text[text.rfind("\n", 0, start) + 1 : start]
    stop = text.find("\n", end)
    return not before.strip() and not text[end : stop if stop >= 0 else len(text)].strip(" \t.,;")


def _cells(row: str) -> list[str]:
    """The cells of a table's row; a pipe in a formula or in code, or behind a backslash, is none of its own."""
    inner = row.strip()[1:]
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    held = formula_spans(inner) if "$" in inner or "`" in inner else []
    cells, at = [], 0
    for place in (i for i, c in enumerate(inner) if c == "|" and (i == 0 or inner[i - 1] != "\\")):
        if not any(start < place < end for start, end in held):
            cells.append(inner[at:place])
            at = place + 1
    return [*cells, inner[at:]]


def _outside(text: str, code: list[tuple[int, int]], change: Callable[[str], str]) -> str:
    """`text` with what is not in `code` changed."""
    if not code:
        return change(text)
    pieces, at = [], 0
    for start, end in code:
        pieces += [change(text[at:start]), text[start:end]]
        at = end
    return "".join([*pieces, change(text[at:])])
