"""Which rows a stage takes: conditions over columns, such as `band == "4plus" and lang_score > 0.65`.

Python's notation for comparisons (== != < <= > >= in, not in), `and`, `or`, `not`, arithmetic, lists, None and len(column).
A condition that is null, because a value is missing, is not met; `x == None` and `x != None` ask for missing values.
"""

import ast
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alloy.errors import DataError, RecipeError

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a.is_null() if b is None else a == b,
    ast.NotEq: lambda a, b: a.is_valid() if b is None else a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a.isin(b),
    ast.NotIn: lambda a, b: ~a.isin(b),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


class Filter:
    """A condition that rows meet or not."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: set[str] = set()
        try:
            self._expression = self._read(ast.parse(text, mode="eval").body)
        except (SyntaxError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
            raise RecipeError(f'only = "{text}": {error}; write it as band == "4plus" and lang == "en".') from error
        if not isinstance(self._expression, pc.Expression):
            raise RecipeError(f'only = "{text}" names no column; write it as band == "4plus" and lang == "en".')

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows that meet the condition, in order."""
        missing = sorted(self.columns - set(table.column_names))
        if missing:
            raise DataError(
                f'only = "{self.text}": there is no column "{missing[0]}"; columns: {", ".join(table.column_names)}.'
            )
        try:
            return table.filter(self._expression)
        except pa.ArrowException as error:
            raise RecipeError(f'only = "{self.text}" does not fit the columns: {error}') from error

    def _read(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                self.columns.add(name)
                return pc.field(name)
            case ast.Constant(value=value):
                return value
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self._read(element) for element in elements]
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return ~self._read(inner)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.BoolOp(op=op, values=values):
                parts = [self._read(value) for value in values]
                result = parts[0]
                for part in parts[1:]:
                    result = result & part if isinstance(op, ast.And) else result | part
                return result
            case ast.Compare(left=left, ops=ops, comparators=rights):
                result = None
                here = self._read(left)
                for op, right in zip(ops, map(self._read, rights), strict=True):
                    if type(op) not in _COMPARE:
                        raise SyntaxError(f"{type(op).__name__} is not a comparison of values")
                    one = _COMPARE[type(op)](here, right)
                    result, here = one if result is None else result & one, right
                return result
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self._read(left), self._read(right))
            case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
                return _length(self._read(argument))
        raise SyntaxError(f"{ast.unparse(node)} is not understood")


def _length(column: Any) -> Any:
    return pc.utf8_length(column)  # type: ignore[attr-defined]
