"""Formulas in running text: which delimiters a page uses, and where they stand in a text.

Sources: the documentation of MathJax 2.7 (tex2jax), 3 and 4 (input/tex, options) and of KaTeX's auto-render extension, whose defaults
are the same but for single dollars, which none of them takes unasked.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

from alloy.data.web import asciimath
from alloy.data.web.formula import Formula
from alloy.data.web.script import read_literal
from alloy.data.web.tex import formula

Pair = tuple[str, str]
INLINE: tuple[Pair, ...] = (("\\(", "\\)"),)
DISPLAY: tuple[Pair, ...] = (("$$", "$$"), ("\\[", "\\]"))
DOLLARS: Pair = ("$", "$")
_ENVIRONMENT_NAMES = (
    "equation align gather multline eqnarray alignat flalign cases dcases rcases matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix "
    "smallmatrix array aligned alignedat gathered split displaymath math subequations dmath CD xalignat prooftree"
)
ENVIRONMENTS = frozenset(_ENVIRONMENT_NAMES.split())
TAGS = ("tex", "itex", "math", "latex", "imath")
# closing delimiters inside braces that are passed over before the first one is taken after all
MOST_INNER = 16
MOST_PAIRS = 16
_KEY = re.compile(
    r"\b(inlineMath|displayMath|delimiters|processEscapes|processEnvironments|ignore(?:Html)?Class|process(?:Html)?Class"
    r"|ignoredClasses)['\"]?\s*[:=]\s*"
)
_LOADERS = re.compile(r"mathjax|katex|asciimath|latexit|mathlive|temml|jsmath|easy/load\.js", re.IGNORECASE)
_ASCIIMATH = re.compile(r"asciimath|config=[^&\"']*\bAM_|-AM_|input/asciimath", re.IGNORECASE)
_CLASSES = re.compile(r"[\w\-|\s]+")
_MARK = re.compile(r"\\[A-Za-z{}|,;!]|[_^]")
_MATHEMATICAL = re.compile(r"[\\^_=<>+*/|(\[{≤≥≠∈∑∫√−×·→]")
_WORD = re.compile(r"[A-Za-z]{3,}")
# 5 million, 5k, 5/month, 5-, and 5, but
_MONEY = re.compile(
    r"\s*\d[\d.,]*\s*(?:[kKmMbB]n?\b|/?\s*(?!sin|cos|tan|log|exp|mod)[A-Za-z]{3,}(?![_^])|[-–+/]?\s*$)|\s*\d[\d.]*[,;:)]\s+[A-Za-z]{2,}"
)
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")
# a formula between single dollars that is nothing else
_MARKED = re.compile(r"(?<![\\$])\$(?![\s$])[^$<>\n]*(?:\\[A-Za-z]|[_^])[^$<>\n]*(?<![\s\\$])\$(?![\d$])")
_NUMBER = re.compile(r"\s*\d[\d.,]*\s*$")


@dataclass(frozen=True)
class Delimiters:
    """How a page marks mathematics in its text.

    Attributes:
        inline, display: opening and closing delimiters.
        is_loaded: whether the page loads a program that typesets them; without one, doubtful formulas are left alone.
        environments: whether `\\begin{align}` and its like are formulas without delimiters.
        escapes: whether `\\$` in the text stands for a dollar.
        is_asciimath: whether text between backticks is AsciiMath.
        ignored, processed: classes of elements whose text is left alone, and taken all the same; `.*` means any.
    """

    inline: tuple[Pair, ...] = INLINE
    display: tuple[Pair, ...] = DISPLAY
    is_loaded: bool = False
    environments: bool = True
    escapes: bool = True
    is_asciimath: bool = False
    ignored: frozenset[str] = frozenset({"tex2jax_ignore", "mathjax_ignore", "tex2math_ignore"})
    processed: frozenset[str] = frozenset({"tex2jax_process", "mathjax_process", "tex2math_process"})

    def takes(self, classes: str) -> bool | None:
        """Whether the text of an element with this `class` attribute is looked at; None: as around it."""
        names = set(classes.split())
        if names & self.processed:
            return True
        return False if names & self.ignored or ".*" in self.ignored else None

    @cached_property
    def pairs(self) -> dict[str, tuple[str, bool]]:
        """Opening delimiter: the closing one, and whether a display is between them."""
        known = {left: (right, False) for left, right in self.inline} | {
            left: (right, True) for left, right in self.display
        }
        # single dollars are always looked at, with more care where the page does not name them
        known.setdefault("$", ("$", False))
        return known | ({"`": ("`", False)} if self.is_asciimath else {})

    @cached_property
    def opening(self) -> re.Pattern[str]:
        """What may open a formula, and escapes that do not."""
        lefts = "|".join(re.escape(left) for left in sorted(self.pairs, key=len, reverse=True))
        return re.compile(
            rf"\\begin\s*\{{(?P<environment>[A-Za-z]+\*?)\}}|\[(?P<tag>(?i:{'|'.join(TAGS)}))\]|\$\$\$+"
            rf"|(?P<left>{lefts})|\\[\\$`]"
        )

    @cached_property
    def is_unusual(self) -> bool:
        """Whether a text without backslashes and dollars may hold a formula, forum tags aside."""
        return not {"\\", "$"}.issuperset(self.marks)

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Characters without which a text holds no formula."""
        return tuple({"\\", "$", *(left[0] for left in self.pairs)})


def read_configuration(scripts: Iterable[str], sources: Iterable[str]) -> Delimiters:
    """Delimiters of a page from the texts of its scripts and the addresses of those it loads."""
    scripts, addresses = list(scripts), " ".join(sources)
    inline, display = list(INLINE), list(DISPLAY)
    flags: dict[str, bool] = {}
    ignored, processed = set(Delimiters.ignored), set(Delimiters.processed)
    is_loaded, is_asciimath = _LOADERS.search(addresses) is not None, _ASCIIMATH.search(addresses) is not None
    for script in scripts:
        if not (
            "ath" in script
            and ("MathJax" in script or "atex" in script or "renderMath" in script or "delimiters" in script)
        ):
            continue
        is_loaded = is_loaded or "MathJax" in script or "katex" in script.lower() or "renderMath" in script
        is_asciimath = is_asciimath or "asciimath2jax" in script or "input/asciimath" in script.lower()
        for found in _KEY.finditer(script):
            name, value = found[1], read_literal(script, found.end())
            if name in ("inlineMath", "displayMath"):
                _set_pairs(inline if name == "inlineMath" else display, value)
            elif name == "delimiters":
                _set_katex(inline, display, value)
            elif name == "ignoredClasses" and isinstance(value, list):
                ignored |= {word for word in value if isinstance(word, str)}
            elif name.endswith("Class") and isinstance(value, str):
                classes = (
                    {".*"} if value == ".*" else set(value.split("|")) if _CLASSES.fullmatch(value) else set[str]()
                )
                (ignored if name.startswith("ignore") else processed).update(word.strip() for word in classes)
            elif isinstance(value, bool):
                flags[name] = value
    return Delimiters(
        tuple(inline),
        tuple(display),
        is_loaded,
        flags.get("processEnvironments", True),
        flags.get("processEscapes", True),
        is_asciimath,
        frozenset(ignored),
        frozenset(processed),
    )


def with_dollars(delimiters: Delimiters, html: str) -> Delimiters:
    """Single dollars named as well, where a page that loads a program for it has two formulas with TeX between them."""
    if not delimiters.is_loaded or DOLLARS in delimiters.inline or html.count("$") < 4:
        return delimiters
    marked = _MARKED.finditer(html)
    next(marked, None)
    return delimiters if next(marked, None) is None else replace(delimiters, inline=(*delimiters.inline, DOLLARS))


def find_formulas(text: str, delimiters: Delimiters) -> list[tuple[int, int, Formula]]:
    """Where formulas with their delimiters stand in a text, in order and apart from each other, and what they are."""
    for mark in delimiters.marks:
        if mark in text:
            break
    else:
        if "[" not in text or "[/" not in text:
            return []
    formulas: list[tuple[int, int, Formula]] = []
    # delimiters that no longer occur, so that they are looked for once
    gone: set[str] = set()
    at = 0
    while (found := delimiters.opening.search(text, at)) is not None:
        start, at = found.start(), found.end()
        if found["environment"]:
            taken = _environment(text, found, gone) if delimiters.environments else None
        elif found["tag"]:
            taken = _tagged(text, found, gone)
        elif found["left"]:
            taken = _delimited(text, found, delimiters, gone)
        else:
            continue
        if taken is not None:
            stop, what = taken
            formulas.append((start, stop, what))
            at = stop
    return formulas


def _delimited(text: str, found: re.Match[str], delimiters: Delimiters, gone: set[str]) -> tuple[int, Formula] | None:
    left, start = found["left"], found.end()
    right, display = delimiters.pairs[left]
    end = -1 if right in gone else _closing(text, start, right)
    if end < 0:
        gone.add(right)
        return None
    inner, stop = text[start:end], end + len(right)
    if left == "`":
        source = inner.strip()
        return (stop, Formula(asciimath.to_latex(source), False, "asciimath")) if source else None
    if left == "$":
        inner = inner.removeprefix("latex ")
        if len(inner) == end - start and not _is_math(inner, text[stop : stop + 1], DOLLARS in delimiters.inline):
            return None
    elif not delimiters.is_loaded and (
        not _MATHEMATICAL.search(inner) and (_WORD.search(inner) or _NUMBER.match(inner))
    ):
        return None
    what = formula(inner, display, "tex")
    return None if what is None else (stop, what)


def _is_math(inner: str, behind: str, is_named: bool) -> bool:
    """Whether what stands between single dollars is a formula and not what stands between two prices."""
    if not inner.strip() or _PARAGRAPH.search(inner):
        return False
    is_close = not inner[0].isspace() and not inner[-1].isspace() and not behind.isdigit()
    is_money, has_mark = _MONEY.match(inner) is not None, _MARK.search(inner) is not None
    if not is_named:
        return has_mark and is_close and not is_money
    has_words = len(_WORD.findall(inner)) > 1
    if is_close:
        return not (is_money and has_words and "\\" not in inner)
    return not (is_money or inner[0].isdigit() or (has_words and not has_mark))


def _closing(text: str, start: int, right: str) -> int:
    """Where a delimiter closes: the first outside braces, or the first at all where braces do not match; -1: nowhere."""
    level, first, inner = 0, -1, 0
    for found in _closings(right).finditer(text, start):
        token = found[0]
        if token == right:
            if level <= 0:
                return found.start()
            first = found.start() if first < 0 else first
            inner += 1
            if inner > MOST_INNER:
                break
        elif token == "{":
            level += 1
        elif token == "}":
            level -= 1
    return first


@lru_cache(256)
def _closings(right: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(right)}|\\.|[{{}}]", re.DOTALL)


def _environment(text: str, found: re.Match[str], gone: set[str]) -> tuple[int, Formula] | None:
    """An environment with those of its name inside it; where ends are missing, up to the last."""
    name = found["environment"]
    if name.rstrip("*") not in ENVIRONMENTS or f"{{{name}" in gone:
        return None
    open_, stop = 1, -1
    for mark in _ends(name).finditer(text, found.end()):
        open_ += 1 if mark[1] == "begin" else -1
        stop = mark.end() if mark[1] == "end" else stop
        if not open_:
            break
    if stop < 0:
        gone.add(f"{{{name}")
        return None
    what = formula(text[found.start() : stop], True, "tex")
    return None if what is None else (stop, what)


@lru_cache(256)
def _ends(name: str) -> re.Pattern[str]:
    return re.compile(rf"\\(begin|end)\s*\{{{re.escape(name)}\}}")


def _tagged(text: str, found: re.Match[str], gone: set[str]) -> tuple[int, Formula] | None:
    """A formula between tags of a forum; a display where it has its line for itself."""
    tag = found["tag"].lower()
    closing = None if f"[/{tag}" in gone else _tag_end(tag).search(text, found.end())
    if closing is None:
        gone.add(f"[/{tag}")
        return None
    line = text[max(0, found.start() - 80) : found.start()].rsplit("\n", 1)[-1]
    behind = text[closing.end() : closing.end() + 80].split("\n", 1)[0]
    display = tag in ("tex", "latex", "math") and not line.strip() and not behind.strip()
    what = formula(text[found.end() : closing.start()], display, "tex")
    return None if what is None else (closing.end(), what)


@cache
def _tag_end(tag: str) -> re.Pattern[str]:
    return re.compile(rf"\[/{tag}\]", re.IGNORECASE)


def _set_pairs(pairs: list[Pair], value: Any) -> None:
    """MathJax: `[[left, right], ...]`, or in version 4 an object that adds to them or takes from them."""
    if isinstance(value, dict):
        added, removed = _read_pairs(value.get("[+]")), _read_pairs(value.get("[-]"))
        pairs[:] = [pair for pair in (*pairs, *added) if pair not in removed]
    elif isinstance(value, list):
        pairs[:] = _read_pairs(value)


def _read_pairs(value: Any) -> list[Pair]:
    if not isinstance(value, list):
        return []
    return [
        (pair[0], pair[1])
        for pair in value[:MOST_PAIRS]
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, str) and side.strip() for side in pair)
    ]


def _set_katex(inline: list[Pair], display: list[Pair], value: Any) -> None:
    """KaTeX: `[{left, right, display}, ...]`; environments are known without being named."""
    entries = [entry for entry in value if isinstance(entry, dict)][:MOST_PAIRS] if isinstance(value, list) else []
    named = [(entry.get("left"), entry.get("right"), entry.get("display") is True) for entry in entries]
    read = [(a, b, is_display) for a, b, is_display in named if isinstance(a, str) and isinstance(b, str) and a and b]
    if read:
        inline[:] = [(a, b) for a, b, is_display in read if not is_display]
        display[:] = [(a, b) for a, b, is_display in read if is_display and not a.startswith("\\begin")]
