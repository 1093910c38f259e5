"""AsciiMath to LaTeX: formulas of the language's own documentation, and what nobody means."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.data.web.asciimath import BINARY, CLOSING, OPENING, SYMBOLS, UNARY, to_latex


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("sum_(i=1)^n i^3=((n(n+1))/2)^2", r"\sum_{i=1}^{n}i^{3}=\left(\frac{n(n+1)}{2}\right)^{2}"),
        ("x=(-b+-sqrt(b^2-4ac))/(2a)", r"x=\frac{-b\pm\sqrt{b^{2}-4ac}}{2a}"),
        ("[[a,b],[c,d]]((n),(k))", r"\begin{bmatrix}a & b \\ c & d\end{bmatrix}\begin{pmatrix}n \\ k\end{pmatrix}"),
        ("{(2x,if x>=0),(1,if x<0):}", r"\begin{cases}2x & \text{if }x\ge0 \\ 1 & \text{if }x<0\end{cases}"),
        ("int_0^oo e^(-x^2)dx", r"\int_{0}^{\infty}e^{-x^{2}}dx"),
        ("lim_(h->0)(f(x+h)-f(x))/h", r"\lim_{h\to0}\frac{f(x+h)-f(x)}{h}"),
        ("abs(x/y)+norm(v)", r"\left|\frac{x}{y}\right|+\left\|v\right\|"),
        ("root(3)(x) hat(ab) vec v", r"\sqrt[3]{x}\hat{ab}\vec{v}"),
        ('text(50% of it) x "if" y', r"\text{50\% of it}x\text{if}y"),
        ("sin(x)/cos x", r"\frac{\sin(x)}{\cos x}"),
        ("sin^2 x+log_2(x)/3", r"\sin^{2}x+\frac{\log_{2}(x)}{3}"),
        ("AA x in RR, EE y", r"\forall x\in\mathbb{R},\exists y"),
        ("stackrel(def)(=) a//b", r"\overset{def}{=}a/b"),
        ("bb(A) cc B bbb(R)", r"\mathbf{A}\mathcal{B}\mathbb{R}"),
        ("f'(x) x^2_1", r"f'(x)x_{1}^{2}"),
        ("(a,b] [0,1)", r"(a,b][0,1)"),
        ("{x | x>0}", r"\{x|x>0\}"),
        (r"\alpha\beta", r"\alpha\beta"),
        ("1/2/3", r"\frac{1}{2}/3"),
        # of what is not finished all that is there stays
        ("((a+b)/c", r"\left(\frac{a+b}{c}\right."),
        ("a_b^ ))", r"a_{b}^{}))"),
        ("_ ^ /", "_^{/}"),
        ("", ""),
    ],
)
def test_formulas(source: str, expected: str) -> None:
    """As LaTeX is written by hand."""
    assert to_latex(source) == expected


WORDS = [*SYMBOLS, *UNARY, *BINARY, *OPENING, *CLOSING, "_", "^", "/", '"', "text", ",", " ", "x", "12", "é", "%"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_every_text_has_a_latex(words: list[str]) -> None:
    """Nothing is raised, fences come in pairs, and braces too where none is a brace to be seen."""
    latex = to_latex(" ".join(words))
    assert latex.count("\\left") - latex.count("\\leftarrow") - latex.count("\\leftrightarrow") == latex.count(
        "\\right"
    ) - latex.count("\\rightarrow")
    unescaped = latex.replace("\\{", "").replace("\\}", "")
    assert unescaped.count("{") == unescaped.count("}")


@pytest.mark.parametrize("source", ["(" * 5000, "sqrt" * 5000, "x^" * 5000, "[[" * 2000, "a/" * 5000, "(a,b)," * 3000])
def test_long_and_deep_texts_end(source: str) -> None:
    """Without an error."""
    assert to_latex(source)
