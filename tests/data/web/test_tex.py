"""LaTeX of pages: cleaning, recognising, macros."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.web.macros import closed, expand_macros, read_macros, without_definitions
from alloy.data.web.tex import clean_tex, formula, looks_like_tex


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (r"{\displaystyle x_{i}}", "x_{i}"),
        (r"{\displaystyle a}+{b}", r"{\displaystyle a}+{b}"),
        (r"{\displaystylex}", r"{\displaystylex}"),
        ("a &amp;lt; b &amp; c", "a < b & c"),
        ("a &lt b&in; c", "a &lt b∈ c"),
        ("&#x3b1;&#960;&#99999999;&nosuch;", "απ&#99999999;&nosuch;"),
        (r"$$\large \frac{a}{b}$$", r"\frac{a}{b}"),
        (r"\[ a \]", "a"),
        (r"$a$ + $b$", r"$a$ + $b$"),
        (r"\(a\) \(b\)", r"\(a\) \(b\)"),
        (r"[tex]x^2[/tex]", "x^2"),
        (r"\dpi{300}\bg_white\fn_jvn \large x^2", "x^2"),
        (r"\inline\color{Blue} x", "x"),
        (r"\largest x", r"\largest x"),
        ("x^2 % the square", "x^2"),
        ("a % one\n+ b", "a\n+ b"),
        (r"5\% x \\% note", r"5\% x \\"),
        ("50% of x", r"50\% of x"),
        ("% <![CDATA[\na & b %]]>", "a & b"),
        ("a\n\n  b \n c", "a\nb\nc"),
        ("x\\ ", "x"),
        ("x\\\\", "x\\\\"),
        (r"\begin{align}a\end{align}", r"\begin{align}a\end{align}"),
        ("", ""),
    ],
)
def test_cleaned_formula_has_only_mathematics(stored: str, expected: str) -> None:
    assert clean_tex(stored) == expected


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (r"\frac{a}{b", r"\frac{a}{b}"),
        ("a}b{c", "ab{c}"),
        (r"\{a", r"\{a"),
        (r"\text{for $q$}", r"\text{for $q$}"),
        ("a $ b", r"a \$ b"),
        ("$a$ and $b$", r"a\text{ and }b"),
        (r"\text{costs $5}", r"\text{costs \$5}"),
        ("a\nb", "a b"),
    ],
)
def test_formula_is_fit_to_stand_between_dollars(stored: str, expected: str) -> None:
    found = formula(stored, False, "tex")
    assert found is not None
    assert found.tex == expected


@given(st.text(alphabet="\\${}%a &;\n[]()_^", max_size=60))
def test_any_formula_is_balanced_and_stays_the_same_when_cleaned_again(text: str) -> None:
    """Braces match, dollars outside braces are escaped, no backslash escapes the dollar behind the formula."""
    found = formula(text, True, "tex")
    if found is None:
        return
    level, at, dollars = 0, 0, 0
    while at < len(found.tex):
        c = found.tex[at]
        level += (c == "{") - (c == "}")
        dollars += c == "$"
        assert level >= 0
        assert c != "$" or level > 0
        at += 2 if c == "\\" else 1
    assert level == 0
    assert dollars % 2 == 0
    assert at == len(found.tex)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\alpha", True), ("x_{i}", True), (r"\R^n", True), (r"\foo{x}", True), ("$x$", True), (r"\(x\)", True),
        (r"C:\temp\new", False), ("snake_case", False), ("a + b", False), (r"line\n", False), ("logo", False),
        (r"\frac{a}{b", False), ("$", False), ("", False),
    ],
)  # fmt: skip
def test_tex_is_told_from_other_text(text: str, expected: bool) -> None:
    assert looks_like_tex(text) is expected


DEFINITIONS = r"""\newcommand{\R}{\mathbb{R}} \newcommand{\RR}{\R^n} \def\abs#1{\left|#1\right|} \DeclareMathOperator*{\argmin}{arg\,min}
\renewcommand\vec[1]{\vec{\boldsymbol#1}} \let\eps=\varepsilon \newcommand{\norm}[2][2]{\|#2\|_{#1}}
\DeclarePairedDelimiter{\size}{\lvert}{\rvert} \newcommand{\open}{never closed"""
SCRIPT = r"""MathJax = {tex: {macros: {bold: ['{\\bf #1}', 1], E: "\\mathbb{E}", 'half': [`\\tfrac12`]}}} // done"""


@pytest.mark.parametrize(
    ("tex", "expected"),
    [
        (r"\RR", r"\mathbb{R}^n"),
        (r"\abs{x+\abs{y}}", r"\left|x+\left|y\right|\right|"),
        (r"\argmin_x", r"\operatorname*{arg\,min}_x"),
        (r"\vec v", r"\vec{\boldsymbol v}"),
        (r"\eps x+\eps", r"\varepsilon x+\varepsilon"),
        (r"\norm[1]{y}\norm z", r"\|y\|_{1}\|z\|_{2}"),
        (r"\size{x}", r"\lvert x \rvert"),
        (r"\bold{q}\E[\half]", r"{\bf q}\mathbb{E}[\tfrac12]"),
        (r"\Rho \\R", r"\Rho \\R"),
        (r"\abs{x", r"\abs{x"),
        (r"\open", r"\open"),
    ],
)
def test_macros_of_a_page_are_written_out(tex: str, expected: str) -> None:
    macros = closed(read_macros([DEFINITIONS], [SCRIPT]))
    assert " ".join(expand_macros(tex, macros).split()) == " ".join(expected.split())


def test_definitions_are_taken_from_a_formula() -> None:
    assert without_definitions(r"\newcommand{\R}{\mathbb{R}} \def\a#1{b} x") == "x"
    assert without_definitions(r"\newcommand{\R}{\mathbb{R}}") == ""


def test_macros_that_grow_without_end_are_left_alone() -> None:
    """Doubling 40 times and naming oneself."""
    doubling = " ".join(
        rf"\def\{c}{{\{d}\{d}}}" for c, d in zip("abcdefghijklmnopqrs", "bcdefghijklmnopqrst", strict=True)
    )
    macros = closed(read_macros([doubling + r"\def\x{\x\y}\def\y{\x}"], []))
    assert len(expand_macros(r"\a\x" * 100, macros)) < 100_000


@pytest.mark.parametrize(
    "piece", [r"\abs{", r"\norm[", "$", "&amp;", "%", "}", r"\text{$", "[tex]", "{\\displaystyle ", "\\large "]
)
def test_hostile_formula_costs_linear_time(piece: str) -> None:
    """100 KB of openings that never close."""
    tex = piece * (100_000 // len(piece))
    macros = closed(read_macros([DEFINITIONS], []))
    start = time.process_time()
    for text in (tex, tex + "}" * tex.count("{")):
        formula(text, True, "tex")
        looks_like_tex(text)
        expand_macros(without_definitions(text), macros)
    assert time.process_time() - start < 3
