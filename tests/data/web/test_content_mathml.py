"""Content MathML to LaTeX, and what a `math` element carries."""

import xml.etree.ElementTree as ET

import pytest

from alloy.data.web.element import Element
from alloy.data.web.mathml import math_of, tex_of_glyph_lines, to_latex


def element(x: ET.Element) -> Element:
    children: list[Element] = []
    for child in x:
        children.append(element(child))
        if (child.tail or "").strip():
            children.append(Element("#text", text=child.tail or ""))
    return Element(x.tag.split("}")[-1], dict(x.attrib), children, x.text or "")


def latex(xml: str) -> str:
    return to_latex(element(ET.fromstring(f"<math>{xml}</math>")))


def ci(name: str) -> str:
    return f"<ci>{name}</ci>"


def cn(number: int | str) -> str:
    return f"<cn>{number}</cn>"


def call(name: str, *arguments: str) -> str:
    return f"<apply><{name}/>{''.join(arguments)}</apply>"


A, B, C, F, X, Y = map(ci, "abcfxy")
BVAR = f"<bvar>{X}</bvar>"


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        # parentheses by precedence
        (call("plus", A, call("times", B, C)), "a+bc"),
        (call("times", A, call("plus", B, C)), "a(b+c)"),
        (call("minus", A, call("minus", B, C)), "a-(b-c)"),
        (call("minus", call("minus", A, B), C), "a-b-c"),
        (call("plus", A, call("minus", B)), "a-b"),
        (call("power", call("plus", A, B), cn(2)), "(a+b)^{2}"),
        (call("power", call("power", A, B), C), "(a^{b})^{c}"),
        (call("times", cn(2), cn(3), A), r"2\cdot3a"),
        (call("divide", call("plus", A, cn(1)), B), r"\frac{a+1}{b}"),
        (call("minus", call("plus", A, B)), "-(a+b)"),
        (call("times", A, call("minus", B)), "a(-b)"),
        (call("and", call("or", A, B), call("not", C)), r"(a\vee b)\wedge\neg c"),
        (call("eq", A, B, C), "a=b=c"),
        (call("implies", call("lt", A, B), call("leq", A, B)), r"a<b\Rightarrow a\leq b"),
        # functions
        (call("sin", X), r"\sin x"),
        (call("sin", call("plus", X, Y)), r"\sin(x+y)"),
        (call("power", call("sin", X), cn(2)), r"(\sin x)^{2}"),
        (f"<apply>{F}{X}{Y}</apply>", "f(x,y)"),
        ("<apply><root/><degree>" + cn(3) + "</degree>" + X + "</apply>", r"\sqrt[3]{x}"),
        (call("root", X), r"\sqrt{x}"),
        ("<apply><log/><logbase>" + cn(2) + "</logbase>" + X + "</apply>", r"\log_{2}x"),
        (call("exp", X), "e^{x}"),
        (call("abs", call("minus", X)), "|-x|"),
        (call("factorial", call("plus", X, cn(1))), "(x+1)!"),
        (f"<apply><apply><inverse/>{F}</apply>{X}</apply>", "f^{-1}(x)"),
        # numbers and constants
        ("<cn type='rational'>1<sep/>2</cn>", r"\frac{1}{2}"),
        ("<cn type='e-notation'>6.02<sep/>23</cn>", r"6.02\times{10}^{23}"),
        ("<cn type='complex-cartesian'>1<sep/>-2</cn>", "1-2i"),
        ("<cn base='16'>7FE0</cn>", "{7FE0}_{16}"),
        (call("times", cn(2), "<pi/>", "<imaginaryi/>"), r"2\pi i"),
        (call("in", X, "<reals/>"), r"x\in\mathbb{R}"),
        # sums, integrals, limits, derivatives
        (f"<apply><sum/>{BVAR}<lowlimit>{cn(1)}</lowlimit><uplimit>{A}</uplimit>{X}</apply>", r"\sum_{x=1}^{a}x"),
        (f"<apply><int/>{BVAR}<interval>{cn(0)}{A}</interval>{X}</apply>", r"\int_{0}^{a}xdx"),
        (f"<apply><int/>{BVAR}{X}</apply>", r"\int xdx"),
        (f"<apply><limit/>{BVAR}<lowlimit>{cn(0)}</lowlimit>{call('sin', X)}</apply>", r"\lim_{x\to0}\sin x"),
        (f"<apply><diff/>{BVAR}<apply>{F}{X}</apply></apply>", r"\frac{df(x)}{dx}"),
        (f"<apply><diff/>{F}</apply>", "f'"),
        (f"<apply><partialdiff/>{BVAR}<bvar>{Y}<degree>{cn(2)}</degree></bvar>{F}</apply>", r"\frac{\partial^{3}f}{\partial x\partial y^{2}}"),
        (f"<apply><forall/>{BVAR}{call('geq', X, cn(0))}</apply>", r"\forall x:x\geq0"),
        # containers
        (f"<set>{BVAR}<condition>{call('lt', X, cn(5))}</condition></set>", r"\{x\mid x<5\}"),
        (f"<set>{A}{B}</set>", r"\{a,b\}"),
        (f"<interval closure='closed-open'>{A}{B}</interval>", "[a,b)"),
        (f"<matrix><matrixrow>{A}{B}</matrixrow><matrixrow>{cn(0)}{cn(1)}</matrixrow></matrix>", r"\begin{pmatrix}a & b \\ 0 & 1\end{pmatrix}"),
        (f"<piecewise><piece>{A}{call('lt', X, cn(0))}</piece><otherwise>{B}</otherwise></piecewise>",
         r"\begin{cases}a & \text{if }x<0 \\ b & \text{otherwise}\end{cases}"),
        (f"<lambda>{BVAR}{call('sin', X)}</lambda>", r"x\mapsto\sin x"),
        # strict content, presentation inside content
        (f"<apply><csymbol cd='arith1'>plus</csymbol>{A}{B}</apply>", "a+b"),
        (f"<bind><csymbol cd='quant1'>forall</csymbol>{BVAR}{X}</bind>", r"\forall x:x"),
        (call("plus", "<ci><msub><mi>v</mi><mn>1</mn></msub></ci>", B), "v_{1}+b"),
        ("<apply/>", ""),
        (call("plus"), ""),
    ],
)  # fmt: skip
def test_content_becomes_latex(xml: str, expected: str) -> None:
    assert latex(xml) == expected


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        ("<math display='block'><semantics><mi>x</mi><annotation encoding='application/x-tex'>{\\displaystyle y}</annotation></semantics></math>",
         ("$$y$$", "mathml-annotation")),
        ("<math alttext='\\alpha_{1}'><mi>x</mi></math>", ("$\\alpha_{1}$", "mathml-annotation")),
        ("<math alttext='x squared'><msup><mi>x</mi><mn>2</mn></msup></math>", ("$x^{2}$", "mathml")),
        ("<math alttext='x squared'/>", ("$x squared$", "mathml-annotation")),
        ("<math mode='display'><apply><sin/><ci>x</ci></apply></math>", ("$$\\sin x$$", "mathml-content")),
        ("<math><semantics><apply><sin/><ci>x</ci></apply><annotation-xml encoding='MathML-Presentation'><mi>y</mi></annotation-xml></semantics></math>",
         ("$y$", "mathml-content")),
        ("<math/>", None),
    ],
)  # fmt: skip
def test_math_element_gives_its_tex_or_its_markup(xml: str, expected: tuple[str, str] | None) -> None:
    what = math_of(element(ET.fromstring(xml)))
    assert (what and (what.text, what.carrier)) == expected


def test_deep_content_ends() -> None:
    nested = Element("ci", text="x")
    for _ in range(5000):
        nested = Element("apply", children=[Element("sin"), nested])
    assert to_latex(nested).startswith("\\sin")


def test_tex_is_the_last_block_of_glyph_lines() -> None:
    assert tex_of_glyph_lines("\n x \n 2 \n\n x^2 \n") == "x^2"
    assert tex_of_glyph_lines("a\n\n\n\\frac{a}\n{b}") == "\\frac{a}\n{b}"
    assert tex_of_glyph_lines("just words") is None
