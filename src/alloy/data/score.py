"""Cheap scores of mathematics: a look at raw HTML, a density of rendered text, and the bands of a 0-5 score.

The idea of looking for marks in raw HTML before anything is parsed is OpenWebMath's (Paster et al., 2023,
arXiv:2310.06786, section 3.1); the marks here are those that the renderer can recover mathematics from, and the density of
`math_score` is our own.
"""

import math
import re
from typing import Literal

from alloy.data.prose import split_math, without_code

Band = Literal["<3", "3", "4plus"]
HIGHEST = 5

# in lower case; what MathJax, KaTeX, MathML, AsciiMath, forum engines, image services and documentation tools leave in a page
# fmt: off
HTML_MARKS = (
    b"mathjax", b"katex", b"<math", b"mml:math", b"math/tex", b"math/mml", b"math/ascii", b"asciimath", b"jsmath", b"mathquill",
    b"math-container", b"mwe-math", b"texhtml", b"codecogs.com", b"latex.php", b"mimetex", b"mathtex", b"tex.cgi", b"cht=tx",
    b"data-tex", b"data-latex", b"data-katex", b"ql-formula", b"equation-editor", b"[tex]", b"[itex]", b"[latex]", b"<tex>",
)
# fmt: on
_HTML_CLASS = re.compile(rb"""class=["']?(?:[\w -]* )?(?:math|tex|latex|formulainl|formuladsp|displaymath|eqno)\b""")
# commands that a page about something else does not hold; scripts and file names have backslashes, too
_TEX = (
    r"\\(?:frac|dfrac|tfrac|sqrt|sum|prod|int|iint|oint|lim|infty|partial|nabla|alpha|beta|gamma|delta|epsilon|varepsilon|"
    r"theta|lambda|mu|sigma|omega|phi|varphi|psi|pi|Delta|Omega|Sigma|leq?|geq?|neq?|approx|equiv|cdot|times|pm|subset|"
    r"subseteq|cup|cap|forall|exists|rightarrow|Rightarrow|mapsto|mathbb|mathbf|mathcal|mathrm|mathfrak|operatorname|"
    r"left|right|begin\{(?:equation|align|gather|cases|[pbv]?matrix|array|eqnarray|multline)|vec|overline|underline|"
    r"binom|sin|cos|tan|ln|quad|ldots|cdots|dots)(?![A-Za-z])"
)
_TEX_BYTES = re.compile(_TEX.encode())
_TEX_TEXT = re.compile(_TEX)
FEWEST_COMMANDS = 2

# operators and mathematical letters; Greek letters that stand alone
_SYMBOL = re.compile(
    "[\u2200-\u22ff\xd7\xf7\xb1\u27c0-\u27ef\u2980-\u2aff\U0001d400-\U0001d7ff]"
    "|(?<![\u0370-\u03ff])[\u03b1-\u03c9\u0393\u0394\u0398\u039b\u03a3\u03a6\u03a8\u03a9](?![\u0370-\u03ff])"
)
# fmt: off
MATH_WORDS = frozenset((
    "abelian", "algebra", "algebraic", "algorithm", "angle", "approximation", "arithmetic", "asymptotic", "axiom", "axis",
    "bijection", "bijective", "binomial", "calculus", "coefficient", "coefficients", "column", "commutative", "compute",
    "congruent", "conjecture", "continuous", "convergence", "converges", "convex", "coordinate", "coordinates", "corollary",
    "cosine", "cubic", "decimal", "denominator", "derivative", "derivatives", "determinant", "diameter", "differentiable",
    "differential", "dimension", "dimensional", "divisible", "divisor", "eigenvalue", "eigenvalues", "eigenvector",
    "ellipse", "equation", "equations", "equilateral", "euclidean", "exponent", "exponential", "factorial", "finite",
    "formula", "fraction", "fractions", "function", "functions", "gaussian", "geometric", "geometry", "gradient", "graph",
    "hence", "hyperbola", "hypotenuse", "identity", "inequality", "infinite", "infinity", "injective", "integer", "integers",
    "integral", "integrals", "integration", "interval", "inverse", "isomorphic", "isomorphism", "iteration", "kernel",
    "lemma", "limit", "linear", "logarithm", "manifold", "math", "mathematical", "mathematics", "maths", "matrices",
    "matrix", "maximum", "mean", "median", "minimum", "modulo", "multiplication", "multiplied", "multiply", "nonlinear",
    "norm", "numerator", "numerical", "optimal", "orthogonal", "parabola", "parallel", "parameter", "permutation",
    "perpendicular", "polygon", "polynomial", "polynomials", "prime", "primes", "probability", "product", "proof", "prove",
    "quadratic", "quotient", "radius", "random", "ratio", "rational", "recursive", "root", "roots", "scalar", "sequence",
    "sine", "slope", "solution", "solve", "square", "squared", "standard", "subset", "subtract", "sum", "summation",
    "symmetric", "tangent", "tensor", "theorem", "topology", "triangle", "trigonometric", "trigonometry", "variable",
    "variables", "variance", "vector", "vectors", "vertex", "vertices",
))
# fmt: on
_WORD = re.compile(r"[a-z]+")

# least math score of a page with formulas, and of one without. OpenWebMath's values, for OpenWebMath's own fastText score:
# on the density below they are a convention, not the same filter
OWM_THRESHOLDS = (0.17, 0.8)


def html_marks(html: bytes) -> list[str]:
    """What in a raw page says that it holds mathematics; nothing is parsed. UTF-16 is looked at, too.

    Meant for leaving pages out before they are parsed: mathematics in plain text, italics or sub- and superscripts alone
    leaves no mark.
    """
    if b"\0" in html[:256]:
        html = html.replace(b"\0", b"")
    lower = html.lower()
    found = [mark.decode() for mark in HTML_MARKS if mark in lower]
    if _HTML_CLASS.search(lower):
        found.append("class")
    if len({match.group() for match in _TEX_BYTES.finditer(html)}) >= FEWEST_COMMANDS:
        found.append("tex")
    return found


def math_score(text: str) -> tuple[float, int]:
    """How mathematical a text is, from 0 to below 1, and how many formulas stand in it.

    1 - exp(-(4 f + 12 c + 5 w + 10 s)), with f the share of characters (blanks aside) that stand in formulas, and of the
    words outside formulas: w the share of mathematical English words, c of TeX commands, s of mathematical symbols. Fenced code is left
    out. The weights are our own: half a page of formulas, or a sixth of mathematical words, gives a half or more.
    """
    rest, formulas = split_math(without_code(text))
    outside = len(rest) - rest.count(" ")
    inside = sum(len(formula) - formula.count(" ") for formula in formulas)
    words = _WORD.findall(rest.lower())
    if not outside + inside:
        return 0.0, 0
    exponent = 4 * inside / (outside + inside)
    # scripts without blanks, or other than Latin, have few words of that kind
    total = max(len(words), outside // 6, 1)
    exponent += 5 * sum(word in MATH_WORDS for word in words) / total
    exponent += 12 * min(1.0, len(_TEX_TEXT.findall(rest)) / total)
    exponent += 10 * min(1.0, len(_SYMBOL.findall(rest)) / total)
    return 1 - math.exp(-exponent), len(formulas)


def is_math(score: float, num_formulas: int, thresholds: tuple[float, float] = OWM_THRESHOLDS) -> bool:
    """Whether a math score passes: one threshold for texts with formulas, a higher one for those without."""
    return score > thresholds[0 if num_formulas else 1]


def int_score(score: float) -> int:
    """A 0-5 score as a whole number; halves go to the even one, as `round` does in FineMath's model card."""
    return round(min(max(score, 0.0), float(HIGHEST)))


def band(score: int) -> Band:
    """The published configuration a whole score belongs to: "3" is 3 alone, "4plus" 4 and 5."""
    return "4plus" if score >= 4 else "3" if score == 3 else "<3"
