"""Tables that are displays, as HeVeA nests them."""

import pytest

from alloy.data.web.math_table import Table, formula_of_table
from alloy.data.web.subsup import Piece


def it(text: str) -> Piece:
    return Piece(text, is_italic=True)


def sub(text: str) -> Piece:
    return Piece(text, "sub")


TALL = [it("e"), Piece("−x", "sup")]
SUM = [it("c"), sub("0"), Piece(" "), it("x"), Piece("+"), it("c"), sub("1")]
FRACTION = Table([[[it("a")]], [[]], [[it("b"), Piece("+1")]]])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[TALL, [Piece("⎛\n⎝")], SUM, [Piece("⎞\n⎠")]]], r"e^{-x}\left(c_{0} x+c_{1}\right)"),
        ([[[Table([[TALL, [Piece("⎛\n⎝")], SUM, [Piece("⎞\n⎠")]]])], [Piece("\u00a0")], []]], r"e^{-x}\left(c_{0} x+c_{1}\right)"),
        ([[[it("y"), Piece("=")], [FRACTION]]], r"y=\frac{a}{b+1}"),
        ([[[Table([[[it("n")]], [[Piece("∑")]], [[it("i"), Piece("=1")]]])], [it("i")]]], r"\sum_{i=1}^{n}i"),
        ([[[Piece("⎡\n⎣")], [Table([[[it("a")], [it("b")]], [[it("c")], [it("d")]]])], [Piece("⎤\n⎦")]]],
         r"\left[\begin{matrix}a & b \\ c & d\end{matrix}\right]"),
        ([[[Piece("⎛\n⎝")], [it("x"), Piece("=1")]]], "(x=1"),
        ([[[Piece("diff("), it("f"), Piece("("), it("x"), Piece("),"), it("x"), Piece(")")]]], r"\mathrm{diff}(f(x),x)"),
        ([[[Piece("Name")], [Piece("Value")]]], None),
        ([[[Piece("This is a table that lays out a page of text with a = b in it")]]], None),
        ([], None),
    ],
)  # fmt: skip
def test_table_becomes_a_display(rows: list[list[list[Piece | Table]]], expected: str | None) -> None:
    what = formula_of_table(Table(rows))
    assert (what and (what.tex, what.display)) == (expected and (expected, True))
