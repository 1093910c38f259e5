"""How much of a page's formulas, code and prose survives as text, and how much of its navigation.

A folder of truth holds `expected.jsonl`, one page a line (`Page` names the keys), and the pages themselves as `pages/NAME`
or as records of `pages.warc.gz`. Formulas are compared after `normalize`, which takes away what changes nothing for a
reader of LaTeX, so that renderers that write it differently can be compared. Each thing looked for is one `Check`; every
share is a count of checks.
"""

import functools
import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from pydantic import BaseModel, ConfigDict, ValidationError

from alloy.core.device import require
from alloy.data.web.renderers import Render
from alloy.data.web.symbols import FUNCTIONS, PLAIN, SYMBOLS, command, plain_letter
from alloy.errors import DataError

EQUATIONS = ("eq", "eq_delim", "eq_soft", "eq_struct")
METRICS = (*EQUATIONS, "code_exact", "code_text", "prose", "boilerplate")
# shares over families of carriers instead of over formulas
MACRO = {"eq_macro": "eq", "eq_delim_macro": "eq_delim"}
SUMMARY = (*METRICS, *MACRO, "length", "error_rate")

# families of carriers by how their names begin; a name of none is a family of its own
FAMILIES = {
    "tex in text": ("mathjax", "environments", "dollar", "aligned", "tex-in-text"),
    "image": ("image",),
    "katex": ("katex",),
    "mathml with annotation": ("mathml+annotation",),
    "bare mathml": ("mathml",),
    "script": ("script",),
    "asciimath": ("asciimath",),
    "sub/sup and plain": ("sup-sub", "sub-sup", "plain", "unicode", "html-table"),
}
# nothing delimits these formulas
UNDELIMITED = "sub/sup and plain"


class Equation(BaseModel):
    """LaTeX that must survive, in this or another form."""

    model_config = ConfigDict(frozen=True)

    latex: str
    alt: list[str] = []

    @property
    def forms(self) -> list[str]:
        """All that count."""
        return [self.latex, *self.alt]


class Page(BaseModel):
    """One line of expected.jsonl; keys that are not read here, as source and licence, may stand there too."""

    model_config = ConfigDict(frozen=True)

    page: str
    url: str = ""
    content_type: str = "text/html"
    # how the page stores its formulas, the main way first
    carriers: list[str] = []
    equations: list[Equation] = []
    code: list[str] = []
    prose: list[str] = []
    boilerplate: list[str] = []
    # the whole text as it should be, where somebody wrote it
    text: str | None = None

    @property
    def family(self) -> str:
        """Of its first carrier."""
        first = self.carriers[0] if self.carriers else "none"
        return next((family for family, starts in FAMILIES.items() if first.startswith(starts)), first)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked for in the text of a page, and whether it is there."""

    metric: str
    wanted: str
    found: bool


@dataclass(frozen=True)
class PageScore:
    """What the text of one page holds."""

    page: Page
    checks: list[Check]
    # characters that are not white space: of the text, and of what the page shows
    chars: int
    visible_chars: int
    # edits per character of the reference text, where there is one
    error_rate: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """All pages of a set under one renderer."""

    pages: list[PageScore]

    def summary(self) -> dict[str, float | None]:
        """Percentages over the whole set, `length` as a ratio, `error_rate`; None where nothing was looked for."""
        shares = {name: share(self.pages, name) for name in METRICS}
        groups = self.groups("carrier").values()
        macro = {name: _mean(share(group, metric) for group in groups) for name, metric in MACRO.items()}
        rates = [score.error_rate for score in self.pages]
        return {**shares, **macro, "length": length_ratio(self.pages), "error_rate": _mean(rates)}

    def groups(self, by: str) -> dict[str, list[PageScore]]:
        """Pages of one family of carriers together, or each "page" alone."""
        groups: dict[str, list[PageScore]] = {}
        for score in self.pages:
            groups.setdefault(score.page.page if by == "page" else score.page.family, []).append(score)
        return groups

    def rows(self, by: str) -> dict[str, dict[str, float | None]]:
        """The shares of each group."""
        return {
            name: {**{metric: share(group, metric) for metric in METRICS}, "length": length_ratio(group)}
            for name, group in self.groups(by).items()
        }

    def misses(self) -> list[dict[str, str]]:
        """What should be there and is not, and boilerplate that is."""
        return [
            {"page": score.page.page, "metric": check.metric, "wanted": check.wanted}
            for score in self.pages
            for check in score.checks
            if check.found == (check.metric == "boilerplate")
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pages": len(self.pages),
            "equations": sum(len(score.page.equations) for score in self.pages),
            "summary": self.summary(),
            "by_carrier": self.rows("carrier"),
            "by_page": self.rows("page"),
            "misses": self.misses(),
        }


def share(scores: list[PageScore], metric: str) -> float | None:
    """Percentage of the checks of one metric that were found."""
    found = [check.found for score in scores for check in score.checks if check.metric == metric]
    return 100 * fmean(found) if found else None


def length_ratio(scores: list[PageScore]) -> float | None:
    """Characters of the texts per character that the pages show."""
    visible = sum(score.visible_chars for score in scores)
    return sum(score.chars for score in scores) / visible if visible else None


def evaluate(expected: str | Path, render: Render) -> Evaluation:
    """Measure a renderer on a folder of truth."""
    return Evaluation(
        [score(page, body, render(body, page.content_type, page.url)) for page, body in read_pages(expected)]
    )


def evaluate_outputs(expected: str | Path, outputs: str | Path) -> Evaluation:
    """Measure texts made elsewhere: for the page `x.html` a file `x.html.txt`, `x.txt`, `x.html.md` or `x.md`."""
    folder = Path(outputs)

    def text(page: Page) -> str:
        names = [stem + suffix for suffix in (".txt", ".md") for stem in (page.page, Path(page.page).stem)]
        for name in names:
            if (folder / name).is_file():
                return (folder / name).read_text("utf-8", "replace")
        raise DataError(f"{folder} has no text of {page.page}; write {names[0]}, empty if nothing came of the page.")

    return Evaluation([score(page, body, text(page)) for page, body in read_pages(expected)])


def read_pages(expected: str | Path) -> Iterator[tuple[Page, bytes]]:
    """The pages of a folder of truth, in the order of its expected.jsonl, and their bytes."""
    folder = Path(expected)
    file = folder / "expected.jsonl"
    if not file.is_file():
        raise DataError(f"{file} does not exist; name a folder with expected.jsonl and pages/ or pages.warc.gz.")
    pages: list[Page] = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                pages.append(Page.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise DataError(f"{file}:{number}: {where}: {first['msg']}. Mend the line.") from error
    if not pages:
        raise DataError(f"{file} names no page.")
    if (folder / "pages").is_dir():
        bodies = {page.page: folder / "pages" / page.page for page in pages}
        missing = [name for name, path in bodies.items() if not path.is_file()]
        if missing:
            raise DataError(f"{folder / 'pages'} lacks {missing[0]}, which expected.jsonl names.")
        yield from ((page, bodies[page.page].read_bytes()) for page in pages)
    else:
        records = _records(folder / "pages.warc.gz")
        for page in pages:
            if page.url not in records:
                raise DataError(f'{folder / "pages.warc.gz"} has no response of "{page.url}" ({page.page}).')
            yield page, records[page.url]


def score(page: Page, body: bytes, text: str) -> PageScore:
    """Look for all that is expected of a page in its text."""
    reference = page.text
    return PageScore(
        page,
        [*_equation_checks(page, text), *_code_checks(page.code, text), *_string_checks(page, text)],
        chars=len("".join(text.split())),
        visible_chars=len("".join(_visible_text(body).split())),
        error_rate=None if reference is None else _error_rate(reference, text),
    )


# what changes nothing that a reader sees, or only its size, place or font
_DROPPED = re.compile(
    r"[,;:!> \n\t{}$]|q?quad|enspace|thinspace|left|right|middle|[bB]igg?[lrm]?|[lr]brace|(?:no)?limits"
    r"|(?:display|text|script|scriptscript)style|rm|bf|it|tt|sf|sl|cal|boldsymbol|bm|pmb|operatorname|[mh]box"
    r"|math(?:bf|rm|it|sf|tt|cal|scr|bb|frak|normal|op|rel|bin|ord|open|close|punct)|text(?:rm|bf|it|tt|sf|normal)?"
)
_SAME = {
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], "\\frac"),
    **dict.fromkeys(["dots", "cdots", "ldots", "dotsc", "dotsb", "dotsm", "dotsi", "dotso", "hdots"], "..."),
    **dict.fromkeys(["mid", "vert", "lvert", "rvert"], "|"),
    **dict.fromkeys(["Vert", "lVert", "rVert"], "\\|"),
    "le": "\\leq", "ge": "\\geq", "ne": "\\neq", "rightarrow": "\\to", "lt": "<", "gt": ">", "ast": "*", "prime": "'",
    "land": "\\wedge", "lor": "\\vee", "lnot": "\\neg", "gets": "\\leftarrow", "colon": ":",
}  # fmt: skip
_COMMAND = re.compile(r"\\(begin|end)\{equation\*?\}|\\(?:left|right)\s*\.|\\operatorname\*|\\([A-Za-z]+|.)", re.DOTALL)
# characters in the place of commands; ASCII is LaTeX already
_UNICODE = str.maketrans(
    {
        **{character: command(name) for character, name in SYMBOLS.items() if not character.isascii()},
        **{character: text for character, text in PLAIN.items() if not character.isascii()},
        **{chr(code): plain_letter(chr(code))[0] for code in range(0x1D400, 0x1D800)},
        "°": "^\\circ ", "⁄": "/", "\u201c": '"', "\u201d": '"',
        # invisible operators and zero-width characters
        **dict.fromkeys("\u2061\u2062\u2063\u2064\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    }
)  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ᵢⱼₙₖ", "0123456789+-=()ijnk", strict=True))
_SCRIPTS = [(re.compile(f"[{''.join(t)}]+"), mark, str.maketrans(t)) for t, mark in ((_RAISED, "^"), (_LOWERED, "_"))]
_REST = re.compile(r"[\s{}$~]+")


def normalize(latex: str) -> str:
    """LaTeX, or text with LaTeX in it, without what may differ between two ways of writing one formula.

    Characters become commands, synonyms one of them; spacing, sizes of fences, fonts, styles, braces, dollars and white
    space go. It is for comparing only: `\\frac{ab}{c}` and `\\frac{a}{bc}` become the same.
    """
    text = html.unescape(html.unescape(latex))
    for pattern, mark, plain in _SCRIPTS:
        text = pattern.sub(lambda m, mark=mark, plain=plain: mark + m[0].translate(plain), text)
    # twice: the plain letters of the alphabets are Greek characters yet
    text = text.translate(_UNICODE).translate(_UNICODE)
    text = _REST.sub("", _COMMAND.sub(_same, text))
    # y^{\prime} is y'
    return text.replace("^'", "'")


def _same(match: re.Match[str]) -> str:
    """What stands for a command."""
    name = match[2]
    if name is None or _DROPPED.fullmatch(name):
        return ""
    return _SAME.get(name) or (name if name in FUNCTIONS else match[0])


_ENVIRONMENTS = "equation|align|alignat|flalign|gather|multline|eqnarray|displaymath|math"
_DELIMITED = re.compile(
    # code first, so that its dollars and brackets open nothing
    r"^[ \t]*(?P<fence>```+|~~~+).*?(?:^[ \t]*(?P=fence)|\Z)"
    r"|(?<!`)`(?!`)[^`\n]{1,200}`(?!`)"
    r"|\\\$"
    r"|\$\$(?P<display>(?:\\.|[^\\])+?)\$\$"
    # a blank line ends a paragraph, and with it an inline formula
    r"|\$(?P<inline>(?:\\.|(?!\n[ \t]*\n)[^\\$])+?)\$"
    # Markdown doubles these backslashes
    r"|\\{1,2}\((?P<round>.+?)\\{1,2}\)"
    r"|\\{1,2}\[(?P<square>.+?)\\{1,2}\]"
    rf"|(?P<environment>\\begin\{{(?P<name>(?:{_ENVIRONMENTS})\*?)\}}.+?\\end\{{(?P=name)\}})",
    re.DOTALL | re.MULTILINE,
)


def delimited(text: str) -> list[str]:
    """What stands in `$ $`, `$$ $$`, `\\( \\)`, `\\[ \\]` or a display environment, outside code."""
    found = (
        m["display"] or m["inline"] or m["round"] or m["square"] or m["environment"] for m in _DELIMITED.finditer(text)
    )
    return [formula for formula in found if formula]


# forms shorter than this are found exactly or not at all
SOFT_CHARS = 12
SOFT_RATIO = 90


def _equation_checks(page: Page, text: str) -> Iterator[Check]:
    if not page.equations:
        return
    fuzz = require("rapidfuzz.fuzz", extra="data", why="eq_soft compares formulas")
    formulas = delimited(text)
    whole, inside = normalize(text), "\0".join(normalize(formula) for formula in formulas)
    structures = {structure(formula) for formula in formulas} - {None}
    for equation in page.equations:
        forms = [normalize(form) for form in equation.forms]
        found = any(form in whole for form in forms)
        close = found or any(
            len(form) >= SOFT_CHARS and fuzz.partial_ratio(form, whole) >= SOFT_RATIO for form in forms
        )
        yield Check("eq", equation.latex, found)
        yield Check("eq_soft", equation.latex, close)
        if page.family != UNDELIMITED:
            yield Check("eq_delim", equation.latex, any(form in inside for form in forms))
            same = any(structure(form) in structures for form in equation.forms)
            yield Check("eq_struct", equation.latex, same)


@functools.lru_cache(maxsize=20_000)
def structure(latex: str) -> tuple[object, ...] | None:
    """The symbols of a formula in order, with the fractions, roots and scripts and how much each holds.

    Two formulas of one structure are typeset alike, whatever braces and synonyms wrote them. None if latex2mathml, which
    reads them, cannot.
    """
    converter = require("latex2mathml.converter", extra="data", why="eq_struct reads formulas")
    try:
        return _symbols(converter.convert_to_element(html.unescape(latex).translate(_UNICODE).strip()))
    # its exceptions have no common base, and formulas cut short end in IndexError, RuntimeError and others
    except Exception:
        return None


def _symbols(element: Element) -> tuple[object, ...]:
    if len(element) == 0:
        text = "".join((element.text or "").split())
        return (text,) if text else ()
    children = [_symbols(child) for child in element]
    inner = tuple(symbol for child in children for symbol in child)
    if element.tag in ("math", "mrow", "mstyle", "mpadded"):
        return inner
    return (element.tag, *(len(child) for child in children), *inner)


def _code_checks(blocks: list[str], text: str) -> Iterator[Check]:
    lines = _code_lines(text)
    places: dict[str, list[int]] = {}
    for number, (_, line) in enumerate(lines):
        places.setdefault(line, []).append(number)
    whole = " ".join(text.split())
    for block in blocks:
        yield Check("code_exact", block, _has_block(_code_lines(block.strip("\n")), lines, places))
        yield Check("code_text", block, " ".join(block.split()) in whole)


def _code_lines(text: str) -> list[tuple[int, str]]:
    """Indentation and content of each line; white space at its end does not count."""
    lines = (line.expandtabs().replace("\u00a0", " ").rstrip() for line in text.split("\n"))
    return [(len(line) - len(line.lstrip(" ")), line.lstrip(" ")) for line in lines]


def _has_block(block: list[tuple[int, str]], lines: list[tuple[int, str]], places: dict[str, list[int]]) -> bool:
    """Whether the lines stand there one after another, all moved by the same number of columns."""
    for start in places.get(block[0][1], []):
        moved = lines[start][0] - block[0][0]
        there = lines[start : start + len(block)]
        if there == [(indent + moved if line else 0, line) for indent, line in block]:
            return True
    return False


# marks of Markdown, which may stand around any word
_MARKS = re.compile(r"[\s`*_\\\u200b\u00ad]+")


def _string_checks(page: Page, text: str) -> Iterator[Check]:
    whole = _MARKS.sub("", text)
    for metric, strings in (("prose", page.prose), ("boilerplate", page.boilerplate)):
        for string in strings:
            yield Check(metric, string, _MARKS.sub("", string) in whole)


def _visible_text(body: bytes) -> str:
    parser = require("selectolax.lexbor", extra="data", why="the length of a page's text is counted")
    tree = parser.LexborHTMLParser(body)
    tree.strip_tags(["script", "style", "noscript", "template", "head"])
    return tree.text(separator=" ") if tree.root else ""


def _error_rate(reference: str, text: str) -> float:
    distance = require(
        "rapidfuzz.distance", extra="data", why="the error rate of a text is counted"
    ).Levenshtein.distance
    expected, have = " ".join(reference.split()), " ".join(text.split())
    return distance(expected, have) / max(len(expected), 1)


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _records(file: Path) -> dict[str, bytes]:
    """Bodies of the responses of a WARC file, by address."""
    if not file.is_file():
        raise DataError(f"{file.parent} has neither a folder pages nor {file.name}; one of them must hold the pages.")
    warc = require("fastwarc.warc", extra="data", why="pages.warc.gz is read")
    with file.open("rb") as stream:
        responses = warc.ArchiveIterator(stream, record_types=warc.WarcRecordType.response)
        return {record.headers["WARC-Target-URI"]: record.reader.read() for record in responses}
