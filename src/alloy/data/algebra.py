"""Whether two formulas are equal: a small part of LaTeX, read without evaluating text, and decided by sympy.

Read are numbers, letters, Greek letters, the four operations, powers, fractions, roots, and the usual functions of one
argument; juxtaposition is multiplication. Everything else is not understood, and what is not understood does not follow.
"""

import re
from itertools import pairwise
from typing import Any

from alloy.core.device import require
from alloy.core.guard import CallError, Guard

MOST_TOKENS, MOST_DIGITS, MOST_EXPONENT = 120, 15, 200
_TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+|[A-Za-z]|[-+*/^_(){}\[\]|!]")
_SAME = {
    "\\cdot": "*", "\\times": "*", "\\ast": "*", "\\div": "/", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "**": "^",
}  # fmt: skip
_DROPPED = re.compile(r"\\left|\\right|\\[,;:! ]|\\quad|\\qquad|\\displaystyle|[\s$~]")
_FUNCTIONS = ("sin", "cos", "tan", "exp", "ln", "log", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan")
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Delta Gamma Theta Lambda Sigma Phi Psi Omega"
)


class UnreadError(ValueError):
    """A formula that is beyond this reader."""


def is_equal(left: str, right: str) -> bool:
    """Whether two expressions are equal, numerically up to rounding or as expressions; False where that is not known."""
    sympy = require("sympy", extra="data", why="formulas are evaluated")
    try:
        difference = read(left) - read(right)
    except (UnreadError, ZeroDivisionError, RecursionError):
        return False
    if difference == 0:
        return True
    if difference.is_number:
        # a decimal stands for all that round to it
        places = [len(match[1]) for match in re.finditer(r"\.(\d+)", left + " " + right)]
        tolerance = 0.5 * 10.0 ** -max(places) * (1 + 1e-9) if places else 1e-12
        return abs(complex(sympy.N(difference))) <= tolerance
    return bool(sympy.simplify(difference) == 0)


class Equality:
    """`is_equal` in a process of its own, which has some seconds for each answer; answers are remembered."""

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 2 << 30) -> None:
        self._guard = Guard(f"{__name__}:is_equal", timeout_s, memory_bytes, first=("1 + 1", "2"))
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, left: str, right: str) -> bool:
        """Whether they are equal; False where the time does not suffice."""
        pair = (left.strip(), right.strip())
        if pair not in self._known:
            try:
                self._known[pair] = bool(self._guard(*pair))
            except CallError:
                self._known[pair] = False
        return self._known[pair]

    def close(self) -> None:
        """End the process."""
        self._guard.close()


def read(latex: str) -> Any:
    """The sympy expression of a formula; `UnreadError` where it is not one of those that are understood."""
    for old, new in _SAME.items():
        latex = re.sub(rf"{re.escape(old)}(?![A-Za-z])", lambda _, new=new: new, latex)
    text = _DROPPED.sub(" ", latex)
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or not 0 < len(tokens) <= MOST_TOKENS:
        raise UnreadError(latex)
    # two numbers side by side are no product
    if any(a[-1].isdigit() and b[0].isdigit() for a, b in pairwise(tokens)):
        raise UnreadError(latex)
    reader = _Reader(list(tokens))
    value = reader.sum()
    if reader.tokens:
        raise UnreadError(latex)
    return value


class _Reader:
    """Recursive descent; `tokens` holds what is left."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.sympy = require("sympy", extra="data", why="formulas are evaluated")

    def next(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def take(self, *wanted: str) -> str:
        if not self.tokens or (wanted and self.tokens[0] not in wanted):
            raise UnreadError(self.next())
        return self.tokens.pop(0)

    def sum(self) -> Any:
        value = self.product()
        while self.next() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Any:
        if self.next() in ("+", "-"):
            return self.product() if self.take() == "+" else -self.product()
        value = self.power()
        while self.next() and self.next() not in ("+", "-", ")", "}", "]", "|"):
            if self.next() == "/":
                self.take()
                divisor = self.power()
                if divisor == 0:
                    raise UnreadError("division by zero")
                value = value / divisor
            else:
                if self.next() == "*":
                    self.take()
                value = value * self.power()
        return value

    def power(self) -> Any:
        value = self.atom()
        if self.next() == "!":
            self.take()
            if not (value.is_Integer and 0 <= value <= MOST_EXPONENT):
                raise UnreadError("!")
            value = self.sympy.factorial(value)
        if self.next() == "^":
            self.take()
            exponent = self.argument()
            if exponent.is_number and abs(complex(exponent)) > MOST_EXPONENT:
                raise UnreadError("^")
            value = value**exponent
        return value

    def argument(self) -> Any:
        """What stands in braces, or one token."""
        if self.next() == "{":
            return self.group("{", "}")
        if self.next() == "-":
            self.take()
            return -self.atom()
        if len(self.next()) > 1 and self.next().isdigit():
            # of digits without braces only the first
            self.tokens[:1] = [self.tokens[0][0], self.tokens[0][1:]]
        return self.atom()

    def group(self, opening: str, closing: str) -> Any:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def atom(self) -> Any:
        sympy, token = self.sympy, self.next()
        for opening, closing in ("()", "{}", "[]"):
            if token == opening:
                return self.group(opening, closing)
        if token == "|":
            return sympy.Abs(self.group("|", "|"))
        self.take()
        if token[:1].isdigit() or token[:1] == ".":
            if len(token) > MOST_DIGITS:
                raise UnreadError(token)
            return sympy.Rational(token.replace(",", ""))
        name = token.removeprefix("\\")
        if token == "\\frac":
            numerator, denominator = self.argument(), self.argument()
            if denominator == 0:
                raise UnreadError("division by zero")
            return numerator / denominator
        if token == "\\sqrt":
            degree = self.group("[", "]") if self.next() == "[" else sympy.Integer(2)
            return self.argument() ** (1 / degree)
        if token == "\\pi":
            return sympy.pi
        if token.startswith("\\") and name in _FUNCTIONS:
            return self.function(name)
        if len(token) == 1 and token.isalpha():
            return sympy.Symbol(self.index(token))
        if name in _GREEK.split():
            return sympy.Symbol(self.index(name))
        raise UnreadError(token)

    def function(self, name: str) -> Any:
        power = None
        if self.next() == "^":
            self.take()
            power = self.argument()
        value = getattr(
            self.sympy, {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}.get(name, name)
        )(self.power())
        return value if power is None else value**power

    def index(self, name: str) -> str:
        """A symbol's name with its index."""
        if self.next() != "_":
            return name
        self.take()
        if self.next() != "{":
            return f"{name}_{self.take()}"
        end = self.tokens.index("}") if "}" in self.tokens else 0
        inside = self.tokens[1:end]
        del self.tokens[: end + 1]
        return f"{name}_{''.join(inside)}"
