import pyarrow as pa
import pytest

from alloy.data.filter import Filter
from alloy.errors import DataError, RecipeError

ROWS = [
    {"n": 1, "band": "3", "keep": True, "score": 0.5, "text": "abc"},
    {"n": 2, "band": "4plus", "keep": False, "score": None, "text": "äöü∑"},
    {"n": 3, "band": None, "keep": None, "score": 2.5, "text": ""},
    {"n": 4, "band": "4plus", "keep": True, "score": -1.0, "text": None},
]


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ('band == "4plus"', [2, 4]),
        ('band != "4plus"', [1]),
        ("keep", [1, 4]),
        ("not keep", [2]),
        ("keep != False", [1, 4]),
        ("keep == None or not keep", [2, 3]),
        ("score != None and score > 0", [1, 3]),
        ("-2 < score <= 0.5", [1, 4]),
        ("n in [1, 3, 7]", [1, 3]),
        ('band not in ["3"]', [2, 3, 4]),
        ("n * 2 + 1 == 7", [3]),
        ("len(text) == 4", [2]),
        ('(band == "3" or n == 4) and keep', [1, 4]),
    ],
)
def test_conditions_keep_the_rows_that_meet_them(condition: str, kept: list[int]) -> None:
    """By hand; a condition over a missing value is not met."""
    assert Filter(condition)(pa.Table.from_pylist(ROWS))["n"].to_pylist() == kept


@pytest.mark.parametrize(
    "condition", ["", "band ==", "1 == 1", "__import__('os')", "n is 1", "n.x == 1", "[n]", "lambda: n"]
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    """And shown."""
    with pytest.raises(RecipeError, match="only = "):
        Filter(condition)


def test_unknown_columns_and_wrong_types_are_named() -> None:
    """With the columns that are there."""
    with pytest.raises(DataError, match='no column "brand"; columns: n, band'):
        Filter('brand == "3"')(pa.Table.from_pylist(ROWS))
    with pytest.raises(RecipeError, match="does not fit"):
        Filter('n == "x"')(pa.Table.from_pylist(ROWS))
