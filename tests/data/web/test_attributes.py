"""Formulas in attributes and marked elements, and those written with sub and sup."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.web.attributes import formula_of_attributes, formula_of_text, may_hold_formula
from alloy.data.web.subsup import Piece, formula_of_texhtml, text_of_pieces


@pytest.mark.parametrize(
    ("tag", "attributes", "expected"),
    [
        ("span", {"data-tex": "x^2"}, "$x^2$"),
        ("div", {"data-latex": "\\frac{a}{b}"}, "$$\\frac{a}{b}$$"),
        ("span", {"data-math": "true"}, None),
        ("span", {"data-formula": "formula-12"}, None),
        ("span", {"data-formula": "a + b"}, "$a + b$"),
        ("span", {"data-tex": "x", "data-display": "true"}, "$$x$$"),
        ("span", {"class": "ql-formula", "data-value": "e=mc^2"}, "$e=mc^2$"),
        ("span", {"data-value": "e=mc^2"}, None),
        ("equation-editor", {"tex": "\\sum x"}, "$\\sum x$"),
        ("span", {"mathjax": "a_1"}, "$a_1$"),
        ("span", {"class": "tex", "title": "\\alpha"}, "$\\alpha$"),
        ("span", {"class": "tex", "title": "show source"}, None),
        ("span", {"data-math": "<math><mi>x</mi></math>"}, None),
        ("p", {}, None),
    ],
)
def test_formula_in_attributes(tag: str, attributes: dict[str, str], expected: str | None) -> None:
    what = formula_of_attributes(tag, attributes)
    assert (what and what.text) == expected


@pytest.mark.parametrize(
    ("tag", "classes", "text", "has_elements", "expected"),
    [
        ("span", "math inline", "\\(x_i\\)", False, "$x_i$"),
        ("span", "math display", "\\frac12", False, "$$\\frac12$$"),
        ("span", "math", "n + 1", False, "$n + 1$"),
        ("span", "math", "xi", True, None),
        ("span", "math", "see the theorem", False, None),
        ("div", "math", "\\(a\\) and \\(b\\)", False, None),
        ("tex", "", "x", False, "$x$"),
        ("equation", "", "\\alpha", False, "$$\\alpha$$"),
        ("span", "asciimath", "`sqrt(2)`", False, "$\\sqrt{2}$"),
        ("span", "texhtml", "n", False, None),
    ],
)
def test_formula_in_the_text_of_a_marked_element(
    tag: str, classes: str, text: str, has_elements: bool, expected: str | None
) -> None:
    assert may_hold_formula(tag, classes)
    what = formula_of_text(tag, {"class": classes}, text, has_elements)
    assert (what and what.text) == expected


def test_other_elements_are_not_asked() -> None:
    assert not may_hold_formula("p", "")
    assert not may_hold_formula("p", "mathematics")


def pieces(markup: str) -> list[Piece]:
    """`a_b_` is a sub, `a^b^` a sup, `/a/` italic, `~a~` a linked sup."""
    kinds = {
        "_": {"kind": "sub"},
        "^": {"kind": "sup"},
        "/": {"is_italic": True},
        "~": {"kind": "sup", "is_link": True},
    }
    out: list[Piece] = []
    mark, text = "", ""
    for c in markup:
        if c in kinds and mark in ("", c):
            if text:
                out.append(Piece(text, **kinds.get(mark, {})))  # type: ignore[arg-type]
            mark, text = ("", "") if mark else (c, "")
        else:
            text += c
    return [*out, Piece(text)] if text else out


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("x^2^ and a_ij_", "x^{2} and a_{ij}"),
        ("the 4^th^ of", "the 4th of"),
        ("as shown^12^ by", "as shown12 by"),
        ("said.^3^", "said.3"),
        ("10 cm^2^ of H_2_O", "10 cm^{2} of H_{2}O"),
        ("see~1~", "see1"),
        ("O(n)^2^", "O(n)^{2}"),
        ("Brand^TM^", "BrandTM"),
        ("2^a much longer text^", "2a much longer text"),
        ("/A/^T^", "A^{T}"),
    ],
)
def test_scripts_in_text(markup: str, expected: str) -> None:
    assert text_of_pieces(pieces(markup)) == expected


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("let /x/_1_ + /y/^2^ = 5 be", "let $x_{1}+y^{2}$ = 5 be"),
        ("the /word/ is", "the word is"),
        ("so /x/ ≤ /y/.", r"so $x\leq y$."),
        ("as shown^12^ by", "as shown12 by"),
    ],
)
def test_runs_are_promoted_to_formulas(markup: str, expected: str) -> None:
    assert (
        text_of_pieces(pieces(markup), promote=True)
        .replace(" + ", "+")
        .replace(" ≤ ", "≤")
        .replace(r" \leq ", r"\leq ")
        == expected
    )


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("/x/_i_^2^", "x_{i}^{2}"),
        ("/x/^2^_i_", "x_{i}^{2}"),
        ("sin /α/", r"\sin \alpha"),
        ("/e/^−^/x/", "e^{-}x"),
        ("rank(/A/)", r"\mathrm{rank}(A)"),
    ],
)
def test_texhtml_is_one_formula(markup: str, expected: str) -> None:
    what = formula_of_texhtml(pieces(markup))
    assert what is not None
    assert what.tex.strip() == expected


@given(
    st.lists(
        st.builds(Piece, st.text(max_size=20), st.sampled_from(["text", "sub", "sup"]), st.booleans(), st.booleans()),
        max_size=12,
    )
)
def test_any_pieces_have_text(some: list[Piece]) -> None:
    assert isinstance(text_of_pieces(some, promote=True), str)
    assert text_of_pieces(some).count("{") >= sum(piece.text.count("{") for piece in some)
    formula_of_texhtml(some)
