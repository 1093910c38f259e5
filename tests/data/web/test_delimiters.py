"""Formulas in running text and the configurations that say how they are marked."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.web.delimiters import DISPLAY, DOLLARS, INLINE, Delimiters, find_formulas, read_configuration

PLAIN = Delimiters()
NAMED = Delimiters(inline=(*INLINE, DOLLARS), is_loaded=True)


def found(text: str, delimiters: Delimiters) -> list[str]:
    return [what.text for _, _, what in find_formulas(text, delimiters)]


@pytest.mark.parametrize(
    ("text", "plain", "named"),
    [
        (r"a \(x\) b \[y_1\] c $$z$$", ["$x$", "$$y_1$$", "$$z$$"], None),
        ("cost $5 and $10 x", [], None),
        ("from $5 to $x_1$ on", ["$x_1$"], None),
        ("$x_i$ and $y$", ["$x_i$"], ["$x_i$", "$y$"]),
        ("$5 million and 3_4$", [], None),
        (r"a \$5, $x^2$, \$", ["$x^2$"], None),
        ("($5-$10), $5/month, $7", [], None),
        ("is $ n $ or $ 2 + k $?", [], ["$n$", "$2 + k$"]),
        (r"$a \text{ if $b$} c_1$ d", [r"$a \text{ if $b$} c_1$"], None),
        (r"\begin{align*} a & b \\[2pt] \begin{align*} c \end{align*}\end{align*} d",
         [r"$$\begin{align*} a & b \\[2pt] \begin{align*} c \end{align*}\end{align*}$$"], None),
        (r"\begin{theorem} \(a\) \end{theorem}", ["$a$"], None),
        (r"\[ \begin{matrix} a \\[4pt] b \end{matrix} \]", [r"$$\begin{matrix} a \\[4pt] b \end{matrix}$$"], None),
        ("see [tex]x^2[/tex] [ITEX]y[/itex]", ["$x^2$", "$y$"], None),
        ("see\n[tex]x^2[/tex]\nand", ["$$x^2$$"], None),
        ("$latex x+y$", ["$x+y$"], None),
        (r"\[1\] and \(see below\)", [], ["$$1$$", "$see below$"]),
        (r"\( x \ne ", [], None),
        (r"$x_1$ and \(y", ["$x_1$"], None),
        (r"\({\) and \(b\)", ["${}$", "$b$"], None),
        ("`x` $$$ a $$$", [], None),
    ],
)  # fmt: skip
def test_formulas_are_found_with_and_without_named_dollars(
    text: str, plain: list[str], named: list[str] | None
) -> None:
    assert found(text, PLAIN) == plain
    assert found(text, NAMED) == (plain if named is None else named)


def test_backticks_are_asciimath_where_it_is_loaded() -> None:
    delimiters = read_configuration([], ["https://x.example/MathJax.js?config=AM_HTMLorMML-full"])
    assert found("if `a != 0` then", delimiters) == [r"$a\ne0$"]
    assert not read_configuration([], ["MathJax.js?config=TeX-AMS_HTML-full"]).is_asciimath
    assert read_configuration([], ["MathJax.js?config=TeX-MML-AM_CHTML"]).is_asciimath


@pytest.mark.parametrize(
    ("script", "inline", "display"),
    [
        ("""MathJax.Hub.Config({tex2jax: {inlineMath: [["$","$"],["\\\\(","\\\\)"]]}});""", (DOLLARS, *INLINE), DISPLAY),
        ("""window.MathJax = {tex: {inlineMath: [ ['@', '@'], /* one */ ], // more
             displayMath: [["!!", "!!"]]}};""", (("@", "@"),), (("!!", "!!"),)),
        ("""MathJax = {tex: {inlineMath: {'[+]': [['$', '$']]}}}""", (*INLINE, DOLLARS), DISPLAY),
        ("""renderMathInElement(document.body, {delimiters: [{left: "$$", right: "$$", display: true},
             {left: "\\\\begin{align}", right: "\\\\end{align}", display: true}, {left: "$", right: "$", display: false}]});""",
         (DOLLARS,), (("$$", "$$"),)),
        ("MathJax.Hub.Config({tex2jax: {inlineMath: pairs()}})", INLINE, DISPLAY),
        ("var a = 1;", INLINE, DISPLAY),
    ],
)  # fmt: skip
def test_configurations_are_read_from_scripts(script: str, inline: object, display: object) -> None:
    delimiters = read_configuration([script], [])
    assert delimiters.inline == inline
    assert delimiters.display == display
    assert delimiters.is_loaded is ("ath" in script)


def test_classes_and_switches_are_read() -> None:
    delimiters = read_configuration(
        [
            'MathJax.Hub.Config({ tex2jax: { processClass: "mathjax|arith", ignoreClass: ".*", processEscapes: false, processEnvironments: false } });'
        ],
        [],
    )
    assert delimiters.takes("big mathjax") is True
    assert delimiters.takes("") is False
    assert PLAIN.takes("x tex2jax_ignore") is False
    assert PLAIN.takes("x") is None
    assert not delimiters.escapes
    assert found(r"\begin{align}a\end{align}", delimiters) == []


@given(st.text(alphabet="\\$()[]{}x_5 `\n", max_size=80))
def test_formulas_stand_in_order_and_apart(text: str) -> None:
    for delimiters in (PLAIN, NAMED):
        end = 0
        for start, stop, what in find_formulas(text, delimiters):
            assert end <= start < stop <= len(text)
            assert what.tex
            end = stop


@pytest.mark.parametrize(
    "piece", [r"\({", r"\({\)", "${", "$x_1${", r"\begin{align}", r"\begin{align}x\end{align}", "$$x$$", "[tex]x[/tex]"]
)
def test_hostile_text_costs_linear_time(piece: str) -> None:
    """A text of four times the length costs about four times the time, not sixteen times."""

    def seconds(count: int) -> float:
        text = piece * (count // len(piece))
        times = []
        for _ in range(3):
            start = time.process_time()
            find_formulas(text, NAMED)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(200_000) < 8 * max(seconds(50_000), 0.05)
