"""Formulas rebuilt from what KaTeX and MathJax drew: small trees as they write them, and real pages with their TeX as truth."""

import html
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alloy.data.web.element import Element
from alloy.data.web.glyphs import formula_of_katex, formula_of_mathjax

latex2mathml = pytest.importorskip("latex2mathml.converter")


class Tree(HTMLParser):
    """HTML as elements; what is not closed stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("root")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if len(self.open) > 1:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1].children:
            self.open[-1].children.append(Element("#text", text=data))
        else:
            self.open[-1].text += data


def tree(markup: str) -> Element:
    parser = Tree()
    parser.feed(markup)
    return parser.open[0]


def span(classes: str, *inner: str, top: str = "") -> str:
    style = f' style="top:{top}em;"' if top else ""
    return f'<span class="{classes}"{style}>{"".join(inner)}</span>'


def vlist(*layers: tuple[str, str], below: bool = False) -> str:
    rows = "".join(span("", span("pstrut"), inner, top=top) for top, inner in layers)
    return span(
        "vlist-t vlist-t2" if below else "vlist-t",
        span("vlist-r", span("vlist", rows), span("vlist-s", "\u200b") if below else ""),
    )


def letter(name: str) -> str:
    return span("mord mathnormal", name)


def small(inner: str) -> str:
    return span("sizing reset-size6 size3 mtight", inner)


LINE = span("frac-line")


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        (letter("x") + span("mspace") + span("mrel", "=") + span("mord", "1") + span("mord", "2"), "x=12"),
        (span("mord", letter("x"), span("msupsub", vlist(("-2.4", small(letter("i"))), ("-3.1", small(span("mord", "2"))), below=True))), "x_{i}^{2}"),
        (span("mord", letter("x"), span("msupsub", vlist(("-3.1", small(span("mord", "2")))))), "x^{2}"),
        (span("mord", letter("x"), span("msupsub", vlist(("-2.5", small(letter("i"))), below=True))), "x_{i}"),
        (span("mord", span("mopen nulldelimiter"), span("mfrac", vlist(("-2.3", letter("b")), ("-3.2", LINE), ("-3.6", letter("a")), below=True))),
         r"\frac{a}{b}"),
        (span("mop op-limits", vlist(("-1.8", small(letter("i"))), ("-3.0", span("", span("mop op-symbol large-op", "∑"))), ("-4.3", small(letter("n"))), below=True)),
         r"\sum_{i}^{n}"),
        (span("mord sqrt", vlist(("-3", letter("x")), ("-2.8", span("hide-tail", "<svg></svg>")))), r"\sqrt{x}"),
        (span("mord accent", vlist(("-3", letter("x")), ("-3.1", span("accent-body", span("mord", "^"))))), r"\hat{x}"),
        (span("minner", span("mopen delimcenter", span("delimsizing size1", "(")),
              span("mfrac", vlist(("-2.3", letter("b")), ("-3.2", LINE), ("-3.6", letter("a")))), span("mclose delimcenter", span("delimsizing size1", ")"))),
         r"\left(\frac{a}{b}\right)"),
        (span("mord mathbb", "R") + span("mop", "sin") + letter("x"), r"\mathbb{R}\sin x"),
        (span("mord text", span("mord", "if ")) + letter("x"), r"\text{if }x"),
        ("", None),
    ],
)  # fmt: skip
def test_katex_glyphs(markup: str, expected: str | None) -> None:
    what = formula_of_katex(tree(markup), True)
    assert (what and what.tex) == expected


def mjx(name: str, *inner: str, glyph: str = "") -> str:
    return f"<mjx-{name}>{f'<mjx-c class={chr(34)}mjx-c{glyph} TEX-I{chr(34)}></mjx-c>' if glyph else ''}{''.join(inner)}</mjx-{name}>"


X, N2, SUM = mjx("mi", glyph="1D465"), mjx("mn", glyph="32"), mjx("mo", glyph="2211")


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (X + mjx("mo", glyph="2264") + N2, r"x\leq2"),
        (mjx("msup", X, mjx("script", N2)), "x^{2}"),
        (mjx("msubsup", X, mjx("script", N2, mjx("spacer"), mjx("mi", glyph="1D456"))), "x_{i}^{2}"),
        (mjx("mfrac", mjx("frac", mjx("num", mjx("nstrut"), X), mjx("dbox", mjx("dtable", mjx("line"), mjx("row", mjx("den", mjx("dstrut"), N2)))))),
         r"\frac{x}{2}"),
        (mjx("munderover", mjx("over", X), mjx("box", mjx("munder", mjx("row", mjx("base", SUM)), mjx("row", mjx("under", N2))))), r"\sum_{2}^{x}"),
        (mjx("msqrt", mjx("sqrt", mjx("surd", mjx("mo", glyph="221A")), mjx("box", N2))), r"\sqrt{2}"),
        (mjx("mrow", mjx("mo", glyph="28"), mjx("mtable", mjx("table", mjx("itable", mjx("mtr", mjx("mtd", X), mjx("mtd", N2))))), mjx("mo", glyph="29")),
         r"\begin{pmatrix}x & 2\end{pmatrix}"),
        ('<svg><defs></defs><g data-mml-node="math"><g data-mml-node="msup"><g data-mml-node="mi"><use data-c="1D465"></use></g>'
         '<g data-mml-node="mn"><use data-c="32"></use></g></g></g></svg>', "x^{2}"),
        ('<span class="mjx-msubsup"><span class="mjx-base"><span class="mjx-mi"><span class="mjx-char MJXc-TeX-math-I">x</span></span></span>'
         '<span class="mjx-sub"><span class="mjx-mn"><span class="mjx-char">2</span></span></span></span>', "x_{2}"),
        ("<mjx-math data-latex='\\alpha'></mjx-math>", r"\alpha"),
        (f"{X}<mjx-assistive-mml><math><mi>y</mi></math></mjx-assistive-mml>", "y"),
    ],
)  # fmt: skip
def test_mathjax_glyphs(inner: str, expected: str) -> None:
    what = formula_of_mathjax(tree(f"<mjx-container display='true'>{inner}</mjx-container>").children[0])
    assert what is not None
    assert (what.tex, what.display) == (expected, True)


def tokens(tex: str) -> list[str]:
    """What latex2mathml shows, one bar being as good as another."""
    shown = re.findall(r">([^<>]+)<", latex2mathml.convert(tex))
    return [word for part in shown if (word := html.unescape(part).replace("∣", "|").replace("\u00a0", "").strip())]


def test_katex_of_real_pages_gives_its_tex_back() -> None:
    """Nine of ten formulas of the shared pages have the tokens of their annotation."""
    folder = os.environ.get("ALLOY_TEST_DATA")
    if not folder:
        pytest.skip("set ALLOY_TEST_DATA to a folder with math-pages")
    right, seen = 0, 0
    for name in ("katex-biweight.html", "katex-page-trend-test.html"):
        page = (Path(folder) / "math-pages" / "pages" / name).read_text()
        for markup in re.split(r'(?=<span class="katex-mathml">)', page)[1:]:
            annotation = re.search(r"<annotation[^>]*>(.*?)</annotation>", markup, re.DOTALL)
            start = markup.find('<span class="katex-html"')
            if annotation is None or start < 0:
                continue
            what = formula_of_katex(tree(markup[start:]).children[0], False)
            seen += 1
            right += what is not None and tokens(what.tex) == tokens(html.unescape(annotation[1]))
    assert seen > 20
    assert right >= 0.9 * seen


def test_deep_glyphs_end() -> None:
    nested = Element("span", text="x")
    for _ in range(5000):
        nested = Element("span", {"class": "mord"}, [nested])
    assert formula_of_katex(nested, False) is not None
    container = Element("mjx-container", children=[nested])
    assert formula_of_mathjax(container) is not None
