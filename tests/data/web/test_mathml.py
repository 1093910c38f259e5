"""MathML to LaTeX: hand cases for every element, and LaTeX that another converter made MathML of."""

import xml.etree.ElementTree as ET

import pytest

from alloy.data.web.mathml import Element, to_latex


def element(x: ET.Element) -> Element:
    return Element(x.tag.split("}")[-1], dict(x.attrib), [element(child) for child in x], x.text or "")


def latex(xml: str) -> str:
    return to_latex(element(ET.fromstring(f"<math>{xml}</math>")))


A, B, C, ONE, TWO = "<mi>a</mi>", "<mi>b</mi>", "<mi>c</mi>", "<mn>1</mn>", "<mn>2</mn>"


def mo(text: str, more: str = "") -> str:
    return f"<mo {more}>{text}</mo>"


def row(*cells: str) -> str:
    return "<mtr>" + "".join(f"<mtd>{cell}</mtd>" for cell in cells) + "</mtr>"


TABLE = f"<mtable>{row(A, B)}{row(ONE, TWO)}</mtable>"
SUM = f"<mrow>{A}{mo('+')}{B}</mrow>"


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        # tokens
        ("<mi>α</mi><mi>x</mi>", r"\alpha x"),
        ("<mi>α</mi><mo>+</mo><mi>ℝ</mi>", r"\alpha+\mathbb{R}"),
        ("<mi>𝒜</mi><mi>𝐱</mi><mi>𝑛</mi><mn>𝟏</mn>", r"\mathcal{A}\mathbf{x}n\mathbf{1}"),
        ("<mi mathvariant='bold'>x</mi><mi mathvariant='bold'>β</mi>", r"\mathbf{x}\boldsymbol{\beta}"),
        ("<mi mathvariant='normal'>d</mi><mi>rank</mi><mi>sin</mi><mi>x</mi>", r"\mathrm{d}\mathrm{rank}\sin x"),
        ("<mi>sin</mi><mo>&#x2061;</mo><mi>x</mi>", r"\sin x"),
        ("<mn>3.14</mn><mo>&#x2062;</mo><mi>r</mi>", r"3.14r"),
        ("<mo>−</mo><mn>1</mn><mo>≤</mo><mi>x</mi><mo>&lt;=</mo><mi>y</mi>", r"-1\leq x\leq y"),
        ("<mo>{</mo><mi>x</mi><mo>}</mo><mo>%</mo><mo>&amp;</mo>", r"\{x\}\%\&"),
        ("<mtext>if x &gt; 0, 5% of </mtext><mi>y</mi>", r"\text{if x > 0, 5\% of }y"),
        ("<mtext>&#xa0;</mtext><mi>y</mi><ms>a_b</ms>", "\\ y\\text{\"a\\_b\"}"),
        ("<mi>x</mi><mspace width='1em'/><mi>y</mi><mspace width='2em'/><mi>z</mi>", r"x\quad y\qquad z"),
        # fractions, roots
        (f"<mfrac>{SUM}{C}</mfrac>", r"\frac{a+b}{c}"),
        (f"<mfrac bevelled='true'>{A}{B}</mfrac>", r"{a}/{b}"),
        (f"<mo>(</mo><mfrac linethickness='0'>{A}{B}</mfrac><mo>)</mo>", r"\binom{a}{b}"),
        (f"<mfrac linethickness='0px'>{A}{B}</mfrac>", r"\genfrac{}{}{0pt}{}{a}{b}"),
        (f"<msqrt>{A}{mo('+')}{B}</msqrt><mroot>{A}<mn>3</mn></mroot>", r"\sqrt{a+b}\sqrt[3]{a}"),
        # scripts
        (f"<msub>{A}{ONE}</msub><msup>{B}{TWO}</msup>", r"a_{1}b^{2}"),
        (f"<msubsup>{A}<mi>i</mi>{TWO}</msubsup>", r"a_{i}^{2}"),
        (f"<msup>{SUM}{TWO}</msup>", r"{a+b}^{2}"),
        (f"<msup><mrow><mo>(</mo>{SUM}<mo>)</mo></mrow>{TWO}</msup>", r"(a+b)^{2}"),
        ("<msup><mn>10</mn><mn>3</mn></msup>", r"{10}^{3}"),
        ("<msup><mi>f</mi><mo>′</mo></msup><msup><mi>g</mi><mo>″</mo></msup>", r"f'g''"),
        ("<msup><mi>f</mi><mrow><mo>′</mo><mn>2</mn></mrow></msup>", r"f^{\prime2}"),
        ("<msubsup><mi>f</mi><mn>1</mn><mo>′</mo></msubsup>", r"f_{1}^{\prime}"),
        (
            "<mmultiscripts><mi>C</mi><none/><none/><mprescripts/><mn>6</mn><mn>14</mn></mmultiscripts>",
            r"{}_{6}^{14}C",
        ),
        ("<mmultiscripts><mi>R</mi><mi>i</mi><none/><none/><mi>j</mi></mmultiscripts>", r"R_{i}{}^{j}"),
        # above and below
        (f"<munderover><mo>∑</mo><mi>i</mi><mi>n</mi></munderover>{A}", r"\sum_{i}^{n}a"),
        ("<munder><mi>lim</mi><mrow><mi>x</mi><mo>→</mo><mn>0</mn></mrow></munder><mi>x</mi>", r"\lim_{x\to0}x"),
        ("<munder><mo>max</mo><mi>x</mi></munder>", r"\max_{x}"),
        ("<mover><mi>x</mi><mo>^</mo></mover><mover><mi>AB</mi><mo>¯</mo></mover>", r"\hat{x}\overline{\mathrm{AB}}"),
        ("<mover><mi>v</mi><mo>→</mo></mover><mover><mrow><mi>A</mi><mi>B</mi></mrow><mo>→</mo></mover>",
         r"\vec{v}\overrightarrow{AB}"),
        (f"<munder><munder>{SUM}<mo>⏟</mo></munder><mi>n</mi></munder>", r"\underbrace{a+b}_{n}"),
        ("<mover><mo>=</mo><mtext>def</mtext></mover>", r"\overset{\text{def}}{=}"),
        ("<mover><mo>→</mo><mi>f</mi></mover>", r"\overset{f}{\to}"),
        # fences
        (f"<mrow><mo>(</mo><mfrac>{A}{B}</mfrac><mo>)</mo></mrow>", r"\left(\frac{a}{b}\right)"),
        (f"<mrow><mo>(</mo>{A}<mo>)</mo></mrow>", r"(a)"),
        (f"<mrow><mo>|</mo><mfrac>{A}{B}</mfrac><mo>|</mo></mrow>", r"\left|\frac{a}{b}\right|"),
        (f"<mfenced>{A}{B}</mfenced><mfenced open='[' close='[' separators=';'>{A}{B}{C}</mfenced>", r"(a,b)[a;b;c["),
        (f"<mfenced open='|' close='|'><mfrac>{A}{B}</mfrac></mfenced>", r"\left|\frac{a}{b}\right|"),
        # tables
        (f"<mrow><mo>(</mo>{TABLE}<mo>)</mo></mrow>", r"\begin{pmatrix}a & b \\ 1 & 2\end{pmatrix}"),
        (f"<mo>[</mo><mrow>{TABLE}</mrow><mo>]</mo>", r"\begin{bmatrix}a & b \\ 1 & 2\end{bmatrix}"),
        (f"<mfenced open='|' close='|'>{TABLE}</mfenced>", r"\begin{vmatrix}a & b \\ 1 & 2\end{vmatrix}"),
        (f"<mi>f</mi><mo>=</mo><mrow><mo>{{</mo>{TABLE}</mrow>", r"f=\begin{cases}a & b \\ 1 & 2\end{cases}"),
        (f"<mtable columnalign='right left'>{row(A, mo('=') + B)}</mtable>", r"\begin{aligned}a & =b\end{aligned}"),
        (f"<mtable columnalign='left center'>{row(A, B)}</mtable>", r"\begin{array}{lc}a & b\end{array}"),
        (f"<mtable columnlines='solid none'>{row(A, B, C)}</mtable>", r"\begin{array}{c|cc}a & b & c\end{array}"),
        (f"<mtable><mlabeledtr><mtd><mtext>(3)</mtext></mtd><mtd>{A}</mtd></mlabeledtr></mtable>",
         r"\begin{matrix}a\tag{3}\end{matrix}"),
        # the rest
        (f"<menclose notation='box'>{A}</menclose><menclose notation='updiagonalstrike'>{B}</menclose>",
         r"\boxed{a}\cancel{b}"),
        (f"<maction selection='2'>{A}{B}</maction><mphantom>{C}</mphantom><mpadded>{A}</mpadded>", r"ba"),
        (f"<semantics>{SUM}<annotation>a plus b</annotation></semantics>", r"a+b"),
        (f"<merror>{A}</merror><unknown>{B}</unknown>", r"ab"),
        ("<mi>x</mi><mi></mi><mrow/><mo></mo>", r"x"),
    ],
)  # fmt: skip
def test_each_element(xml: str, expected: str) -> None:
    """As LaTeX is written by hand."""
    assert latex(xml) == expected


def test_depth_is_bounded() -> None:
    """Text of what is too deep stays, and nothing is raised."""
    xml = ET.fromstring("<mi>x</mi>")
    node = Element("mi", text="x")
    for _ in range(20_000):
        node = Element("mrow", children=[node])
    assert xml.text == "x"
    assert to_latex(node) == "x"


FORMULAS = [
    r"\frac{a+b}{c}", r"\sum_{i=0}^{n} x_i^2", r"\left(\frac{1}{2}\right)^{n}", r"\int_0^\infty e^{-x^2}\,dx",
    r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", r"\sqrt[3]{x+1}", r"\hat{x}+\vec{v}", r"f'(x)", r"\overline{AB}",
    r"\lim_{x\to 0}\frac{\sin x}{x}=1", r"\binom{n}{k}", r"\mathbb{R}^n", r"x\in\mathcal{A}", r"\text{if }x>0",
    r"\begin{cases}1&x>0\\0&x\leq 0\end{cases}", r"\{a,b\}", r"\underbrace{a+b}_{n}", r"\alpha_{i,j}\neq\beta",
    r"|x|\leq\|y\|", r"a\quad b", r"\operatorname{rank}A", r"x^{y^z}", r"a\equiv b", r"\nabla\cdot F=\rho",
    r"\prod_{k}\left[\frac{a_k}{b_k}\right]", r"A\subseteq B\cup C\setminus D", r"\forall x\exists y:x<y",
]  # fmt: skip


def leaves(e: Element) -> list[str]:
    """Tokens and structure, without groups that mean nothing."""
    if not e.children:
        return [f"{e.tag}:{e.word()}"] if e.word() else []
    inner = [leaf for child in e.children for leaf in leaves(child)]
    return inner if e.tag in ("mrow", "mstyle", "math", "mpadded") else [f"{e.tag}(", *inner, ")"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_there_and_back_through_another_converter(formula: str) -> None:
    """latex2mathml makes the same MathML of our LaTeX as of the formula that its MathML came from."""
    converter = pytest.importorskip("latex2mathml.converter")
    first = element(ET.fromstring(converter.convert(formula)))
    second = element(ET.fromstring(converter.convert(to_latex(first))))
    assert leaves(second) == leaves(first)
