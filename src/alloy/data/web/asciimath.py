"""AsciiMath to LaTeX.

Source: the grammar and the table of symbols at asciimath.org (version 2.2). Grammar, with E an expression, I a simple expression
with scripts, S a simple expression:
    E = I E | I / I        I = S | S _ S | S ^ S | S _ S ^ S        S = v | l E r | u S | b S S
"""

import re
from collections.abc import Iterator

from alloy.data.web.symbols import FUNCTIONS

# names of one argument: what stands before and behind it
UNARY = {
    "sqrt": ("\\sqrt{", "}"), "hat": ("\\hat{", "}"), "bar": ("\\overline{", "}"), "overline": ("\\overline{", "}"),
    "vec": ("\\vec{", "}"), "dot": ("\\dot{", "}"), "ddot": ("\\ddot{", "}"), "tilde": ("\\tilde{", "}"),
    "overarc": ("\\overparen{", "}"), "overparen": ("\\overparen{", "}"), "ul": ("\\underline{", "}"),
    "underline": ("\\underline{", "}"), "ubrace": ("\\underbrace{", "}"), "underbrace": ("\\underbrace{", "}"),
    "obrace": ("\\overbrace{", "}"), "overbrace": ("\\overbrace{", "}"), "cancel": ("\\cancel{", "}"),
    "abs": ("\\left|", "\\right|"), "Abs": ("\\left|", "\\right|"), "norm": ("\\left\\|", "\\right\\|"),
    "floor": ("\\left\\lfloor ", "\\right\\rfloor "), "ceil": ("\\left\\lceil ", "\\right\\rceil "),
    "bb": ("\\mathbf{", "}"), "mathbf": ("\\mathbf{", "}"), "bbb": ("\\mathbb{", "}"), "mathbb": ("\\mathbb{", "}"),
    "cc": ("\\mathcal{", "}"), "mathcal": ("\\mathcal{", "}"), "tt": ("\\mathtt{", "}"), "mathtt": ("\\mathtt{", "}"),
    "fr": ("\\mathfrak{", "}"), "mathfrak": ("\\mathfrak{", "}"), "sf": ("\\mathsf{", "}"),
    "mathsf": ("\\mathsf{", "}"), "rm": ("\\mathrm{", "}"), "mathrm": ("\\mathrm{", "}"),
}  # fmt: skip
# names of two arguments
BINARY = {
    "frac": "\\frac{{{0}}}{{{1}}}", "root": "\\sqrt[{0}]{{{1}}}", "stackrel": "\\overset{{{0}}}{{{1}}}",
    "overset": "\\overset{{{0}}}{{{1}}}", "underset": "\\underset{{{0}}}{{{1}}}", "color": "{{\\color{{{0}}}{1}}}",
    "id": "{1}", "class": "{1}",
}  # fmt: skip
TEXT = ("text", "mbox")
OPENING = {"(": "(", "[": "[", "{": "\\{", "(:": "\\langle ", "<<": "\\langle ", "langle": "\\langle ", "{:": ".",
           "|:": "|", "lfloor": "\\lfloor ", "lceil": "\\lceil ", "left(": "(", "left[": "["}  # fmt: skip
CLOSING = {")": ")", "]": "]", "}": "\\}", ":)": "\\rangle ", ">>": "\\rangle ", "rangle": "\\rangle ", ":}": ".",
           ":|": "|", "rfloor": "\\rfloor ", "rceil": "\\rceil ", "right)": ")", "right]": "]"}  # fmt: skip
GREEK = (
    "alpha beta chi delta Delta epsilon varepsilon eta gamma Gamma iota kappa lambda Lambda mu nu omega Omega phi Phi varphi "
    "pi Pi psi Psi rho sigma Sigma tau theta Theta vartheta upsilon xi Xi zeta"
)
SAME = (
    "sum prod int oint partial nabla pm emptyset infty aleph therefore because ldots cdots vdots ddots quad qquad angle "
    "frown triangle diamond square lfloor rfloor lceil rceil forall exists bot top vdash models uparrow downarrow "
    "rightarrow to leftarrow leftrightarrow Rightarrow Leftarrow Leftrightarrow mapsto times div cdot ast star circ "
    "oplus otimes odot wedge vee cap cup bigwedge bigvee bigcap bigcup ne neq le leq ge geq lt gt prec preceq succ succeq in "
    "notin subset supset subseteq supseteq equiv cong approx propto neg implies iff setminus backslash ltimes rtimes "
    "bowtie prime sim grad"
)
SYMBOLS = {
    **{word: f"\\{word}" for word in f"{GREEK} {SAME}".split()},
    **{word: f"\\{word}" for word in FUNCTIONS},
    "varepsilon": "\\varepsilon", "lt": "<", "gt": ">", "grad": "\\nabla", "sech": "\\operatorname{sech}",
    "csch": "\\operatorname{csch}", "lcm": "\\operatorname{lcm}", "mod": "\\bmod", "lub": "\\operatorname{lub}",
    "glb": "\\operatorname{glb}", "f": "f", "g": "g",
    "*": "\\cdot", "**": "\\ast", "***": "\\star", "//": "/", "\\\\": "\\backslash", "xx": "\\times", "-:": "\\div",
    "@": "\\circ", "o+": "\\oplus", "ox": "\\otimes", "o.": "\\odot", "^^": "\\wedge", "^^^": "\\bigwedge",
    "vv": "\\vee", "vvv": "\\bigvee", "nn": "\\cap", "nnn": "\\bigcap", "uu": "\\cup", "uuu": "\\bigcup",
    "!=": "\\ne", ":=": ":=", "<": "<", ">": ">", "<=": "\\le", ">=": "\\ge", "mlt": "\\ll", "mgt": "\\gg",
    "-<": "\\prec", "-<=": "\\preceq", ">-": "\\succ", ">-=": "\\succeq", "!in": "\\notin", "sub": "\\subset",
    "sup": "\\supset", "sube": "\\subseteq", "supe": "\\supseteq", "-=": "\\equiv", "~=": "\\cong", "~~": "\\approx",
    "~": "\\sim", "prop": "\\propto", "and": "\\text{ and }", "or": "\\text{ or }", "not": "\\neg", "=>": "\\Rightarrow",
    "if": "\\text{if }", "<=>": "\\Leftrightarrow", "AA": "\\forall", "EE": "\\exists", "_|_": "\\bot", "TT": "\\top",
    "|--": "\\vdash", "|==": "\\models", "del": "\\partial", "+-": "\\pm", "O/": "\\emptyset", "oo": "\\infty",
    ":.": "\\therefore", ":'": "\\because", "...": "\\ldots", "|...|": "|\\ldots|", "|cdots|": "|\\cdots|",
    "\\ ": "\\ ", "/_": "\\angle", "/_\\": "\\triangle", "|__": "\\lfloor", "__|": "\\rfloor", "|~": "\\lceil",
    "~|": "\\rceil", "CC": "\\mathbb{C}", "NN": "\\mathbb{N}", "QQ": "\\mathbb{Q}", "RR": "\\mathbb{R}",
    "ZZ": "\\mathbb{Z}", "uarr": "\\uparrow", "darr": "\\downarrow", "rarr": "\\rightarrow", "->": "\\to",
    ">->": "\\rightarrowtail", "->>": "\\twoheadrightarrow", "|->": "\\mapsto", "larr": "\\leftarrow",
    "harr": "\\leftrightarrow", "rArr": "\\Rightarrow", "lArr": "\\Leftarrow", "hArr": "\\Leftrightarrow",
    "dx": "dx", "dy": "dy", "dz": "dz", "dt": "dt", "hbar": "\\hbar", "ell": "\\ell",
}  # fmt: skip
_WORDS = sorted({*SYMBOLS, *UNARY, *BINARY, *TEXT, *OPENING, *CLOSING, "_", "^", "/"}, key=len, reverse=True)
# a name may be written with a backslash; text in quotes is text
_TOKEN = re.compile(
    r'\s*(?:(?P<quoted>"[^"]*"?)|(?P<number>\d+(?:\.\d+)?|\.\d+)|\\?(?P<word>'
    + "|".join(map(re.escape, _WORDS))
    + r")|(?P<other>\S))",
    re.DOTALL,
)
DEEPEST = 100
# functions that take what follows along into a fraction
APPLIED = frozenset(FUNCTIONS - {"lim", "max", "min", "sup", "inf", "Pr", "arg"} | {"sech", "csch", "lcm", "f", "g"})
SCRIPTS = (("word", "_"), ("word", "^"))
NO_ARGUMENT = (*SCRIPTS, ("word", "/"), ("other", "|"), ("other", ","))
_ESCAPES = str.maketrans({c: f"\\{c}" for c in "#%&_{}$"})
Token = tuple[str, str]


def to_latex(source: str) -> str:
    """LaTeX of AsciiMath, without delimiters; every text has one, as the grammar refuses none."""
    return _Parser(source).expression()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source, self._at, self._depth = source, 0, 0

    def expression(self, closing: bool = False) -> str:
        """Up to the end, or with `closing` up to what closes a bracket."""
        parts: list[str] = []
        while (token := self._peek()) is not None:
            if closing and self._closes(token):
                break
            before = self._at
            parts.append(self._fraction())
            if self._at == before and self._peek() == token:
                self._take()
        return _joined(parts)

    def _fraction(self) -> str:
        top, is_group = self._scripted()
        if self._peek() != ("word", "/"):
            return top
        self._take()
        bottom, is_group_too = self._scripted()
        return f"\\frac{{{_bare(top, is_group)}}}{{{_bare(bottom, is_group_too)}}}"

    def _scripted(self) -> tuple[str, bool]:
        function = self._peek()
        base, is_group = self._simple()
        scripts: dict[str, str] = {}
        while (token := self._peek()) in SCRIPTS and token is not None and token[1] not in scripts:
            self._take()
            following = self._peek()
            # what closes a bracket is no script
            script = "" if following is not None and self._closes(following) else _bare(*self._simple())
            scripts[token[1]] = f"{token[1]}{{{script}}}"
        latex = base + scripts.get("_", "") + scripts.get("^", "")
        if scripts and function is not None and function[1] in APPLIED:
            latex = _joined([latex, self._argument()])
        return latex, is_group and not scripts

    def _argument(self) -> str:
        """What a function is applied to, its brackets kept; nothing where an operator follows."""
        token = self._peek()
        if token is None or token in NO_ARGUMENT or self._closes(token):
            return ""
        return self._simple()[0]

    def _simple(self) -> tuple[str, bool]:
        """A simple expression, and whether it stands in brackets that an argument does without."""
        token = self._take()
        if token is None:
            return "", False
        kind, word = token
        if kind == "quoted":
            return f"\\text{{{word.strip(chr(34)).translate(_ESCAPES)}}}", False
        if kind != "word":
            return (f"\\{word}" if word in "#%&$" else word), False
        if word in TEXT:
            return self._text(), False
        self._depth += 1
        try:
            if self._depth > DEEPEST:
                return SYMBOLS.get(word, OPENING.get(word, "")), False
            if word in UNARY:
                before, behind = UNARY[word]
                return f"{before}{_bare(*self._simple())}{behind}", False
            if word in BINARY:
                first, second = _bare(*self._simple()), _bare(*self._simple())
                return BINARY[word].format(first, second), False
            if word in OPENING:
                return self._bracket(word)
            if word in APPLIED and self._peek() not in SCRIPTS:
                return _joined([SYMBOLS[word], self._argument()]), False
        finally:
            self._depth -= 1
        return SYMBOLS.get(word, CLOSING.get(word, word)), False

    def _text(self) -> str:
        """What stands in the brackets behind `text`, as it is."""
        while self._source[self._at : self._at + 1].isspace():
            self._at += 1
        pairs = {"(": ")", "[": "]", "{": "}"}
        close = pairs.get(self._source[self._at : self._at + 1])
        if close is None:
            return ""
        end = self._source.find(close, self._at)
        end = len(self._source) if end < 0 else end
        text, self._at = self._source[self._at + 1 : end], end + 1
        return f"\\text{{{text.translate(_ESCAPES)}}}"

    def _bracket(self, word: str) -> tuple[str, bool]:
        start = self._at
        inner = self.expression(closing=True)
        token = self._take()
        closed = token[1] if token is not None else ":}"
        matrix = _matrix(word, closed, self._source[start : self._at - len(closed)] if token else "")
        if matrix is not None:
            return matrix, False
        left, right = OPENING[word], CLOSING.get(closed, ".")
        if "\\frac" in inner or "\\begin" in inner or "." in (left, right):
            return f"\\left{left}{inner}\\right{right}", True
        return f"{left}{inner}{right}", True

    def _closes(self, token: Token) -> bool:
        return token[0] == "word" and token[1] in CLOSING

    def _peek(self) -> Token | None:
        found = _TOKEN.match(self._source, self._at)
        if found is None or found.lastgroup is None:
            return None
        return found.lastgroup, found[found.lastgroup]

    def _take(self) -> Token | None:
        found = _TOKEN.match(self._source, self._at)
        if found is None or found.lastgroup is None:
            return None
        self._at = found.end()
        return found.lastgroup, found[found.lastgroup]


def _matrix(opening: str, closing: str, source: str) -> str | None:
    """Rows in brackets of one kind, separated by commas, with as many entries each: a matrix; else None."""
    rows = list(_split(source))
    marks = {(row[:1], row[-1:]) for row in rows}
    if not rows or marks not in ({("(", ")")}, {("[", "]")}) or (len(rows) < 2 and opening != "{:"):
        return None
    cells = [list(_split(row[1:-1])) for row in rows]
    if len({len(row) for row in cells}) != 1 or (len(cells[0]) < 2 and len(rows) < 2):
        return None
    if len(rows) > 1 and len(cells[0]) < 2 and opening not in "[{:(":
        return None
    body = " \\\\ ".join(" & ".join(to_latex(cell) for cell in row) for row in cells)
    known = {("(", ")"): "pmatrix", ("[", "]"): "bmatrix", ("{", ":}"): "cases", ("|", "|"): "vmatrix",
             ("{:", ":}"): "matrix"}  # fmt: skip
    name = known.get((opening, closing))
    if name is None:
        return f"\\left{OPENING[opening]}\\begin{{matrix}}{body}\\end{{matrix}}\\right{CLOSING.get(closing, '.')}"
    return f"\\begin{{{name}}}{body}\\end{{{name}}}"


def _split(source: str) -> Iterator[str]:
    """The parts between commas that stand in no bracket."""
    open_, start = 0, 0
    for i, c in enumerate(source):
        open_ += (c in "([{") - (c in ")]}")
        if c == "," and not open_:
            yield source[start:i].strip()
            start = i + 1
    if source.strip():
        yield source[start:].strip()


def _bare(latex: str, is_group: bool) -> str:
    """An argument without the brackets that only hold it together."""
    if not is_group:
        return latex
    for left, right in (("\\left(", "\\right)"), ("\\left[", "\\right]"), ("(", ")"), ("[", "]"), ("\\{", "\\}"),
                        ("\\left.", "\\right.")):  # fmt: skip
        if latex.startswith(left) and latex.endswith(right):
            return latex[len(left) : len(latex) - len(right)]
    return latex


def _joined(parts: list[str]) -> str:
    """Side by side, with a space where a command would run into a letter."""
    latex = ""
    for part in parts:
        ends_in_command = re.search(r"\\[A-Za-z]+$", latex) is not None
        latex += f" {part}" if ends_in_command and part[:1].isalpha() else part
    return latex
