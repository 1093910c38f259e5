"""Unicode characters of mathematics and their LaTeX commands.

Names are those of LaTeX and amssymb; where two commands mean one character, the one that MathJax and KaTeX both know.
"""

# accents of mover and munder, and what a stretched one is called
OVER = {
    "^": "hat", "\u02c6": "hat", "\u0302": "hat", "~": "tilde", "\u02dc": "tilde", "\u0303": "tilde", "\u00af": "bar",
    "\u0304": "bar", "\u02c9": "bar", "\u203e": "overline", "_": "overline", "\u0332": "overline", "\u2015": "overline", "\u2192": "vec",
    "\u20d7": "vec", "\u2190": "overleftarrow", "\u2194": "overleftrightarrow", "\u02d9": "dot", "\u0307": "dot",
    ".": "dot", "\u00a8": "ddot", "\u0308": "ddot", "..": "ddot", "...": "dddot", "\u20db": "dddot", "\u20dc": "ddddot",
    "\u02d8": "breve", "\u0306": "breve", "\u02c7": "check", "\u030c": "check", "\u00b4": "acute", "\u0301": "acute",
    "`": "grave", "\u0300": "grave", "\u02da": "mathring", "\u030a": "mathring", "\u23de": "overbrace",
    "\u23b4": "overbracket", "-": "bar", "\u2013": "bar", "\u2212": "bar",
}  # fmt: skip
WIDE = {"hat": "widehat", "tilde": "widetilde", "bar": "overline", "vec": "overrightarrow", "check": "widecheck"}
UNDER = {
    "_": "underline", "\u0332": "underline", "\u00af": "underline", "\u203e": "underline", "\u2015": "underline",
    "\u23df": "underbrace", "\u23b5": "underbracket", "\u2192": "underrightarrow", "\u2190": "underleftarrow",
    "-": "underline", "\u2013": "underline", "\u2212": "underline",
}  # fmt: skip

# functions that LaTeX writes upright
FUNCTIONS = frozenset(
    [
        "arccos",
        "arcsin",
        "arctan",
        "arg",
        "cos",
        "cosh",
        "cot",
        "coth",
        "csc",
        "deg",
        "det",
        "dim",
        "exp",
        "gcd",
        "hom",
        "inf",
        "ker",
        "lg",
        "lim",
        "liminf",
        "limsup",
        "ln",
        "log",
        "max",
        "min",
        "Pr",
        "sec",
        "sin",
        "sinh",
        "sup",
        "tan",
        "tanh",
    ]
)
# and those with limits below them in displays
LIMITS = frozenset(["det", "gcd", "inf", "lim", "liminf", "limsup", "max", "min", "Pr", "sup"])

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "ϵ": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta", "ϑ": "vartheta", "ι": "iota", "κ": "kappa", "ϰ": "varkappa", "λ": "lambda", "μ": "mu", "µ": "mu",
    "ν": "nu", "ξ": "xi", "ο": "omicron", "π": "pi", "ϖ": "varpi", "ρ": "rho", "ϱ": "varrho", "σ": "sigma",
    "ς": "varsigma", "τ": "tau", "υ": "upsilon", "φ": "varphi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
    "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Υ": "Upsilon",
    "ϒ": "Upsilon", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega", "\u2126": "Omega", "\u2206": "Delta", "ϝ": "digamma",
}  # fmt: skip

SYMBOLS = {
    **GREEK,
    # binary operators
    "±": "pm", "∓": "mp", "×": "times", "÷": "div", "⋅": "cdot", "·": "cdot", "∗": "ast", "⋆": "star", "∘": "circ",
    "•": "bullet", "∙": "bullet", "∩": "cap", "∪": "cup", "⊎": "uplus", "⊓": "sqcap", "⊔": "sqcup", "∨": "vee",
    "∧": "wedge", "∖": "setminus", "≀": "wr", "⋄": "diamond", "△": "triangle", "▵": "triangle", "▽": "triangledown",
    "◃": "triangleleft", "▹": "triangleright", "⊕": "oplus", "⊖": "ominus", "⊗": "otimes", "⊘": "oslash", "⊙": "odot",
    "◯": "bigcirc", "†": "dagger", "‡": "ddagger", "⨿": "amalg", "⋉": "ltimes", "⋊": "rtimes", "⋈": "bowtie",
    "⊞": "boxplus", "⊟": "boxminus", "⊠": "boxtimes", "⊡": "boxdot", "⋇": "divideontimes", "∔": "dotplus",
    "⊼": "barwedge", "⊻": "veebar", "⋏": "curlywedge", "⋎": "curlyvee",
    # relations
    "≤": "leq", "≥": "geq", "≠": "neq", "≪": "ll", "≫": "gg", "≺": "prec", "≻": "succ", "⪯": "preceq", "⪰": "succeq",
    "≼": "preccurlyeq", "≽": "succcurlyeq", "∼": "sim", "≃": "simeq", "≈": "approx", "≅": "cong", "≡": "equiv",
    "≢": "not\\equiv", "≐": "doteq", "∝": "propto", "⊂": "subset", "⊃": "supset", "⊆": "subseteq", "⊇": "supseteq",
    "⊄": "not\\subset", "⊅": "not\\supset", "⊈": "nsubseteq", "⊉": "nsupseteq", "⊊": "subsetneq", "⊋": "supsetneq",
    "⊏": "sqsubset", "⊐": "sqsupset", "⊑": "sqsubseteq", "⊒": "sqsupseteq", "∈": "in", "∉": "notin", "∋": "ni",
    "∌": "not\\ni", "⊢": "vdash", "⊣": "dashv", "⊨": "models", "⊩": "Vdash", "⊬": "nvdash", "⊭": "nvDash",
    "⟂": "perp", "⊥": "bot", "⊤": "top", "∣": "mid", "∤": "nmid", "∥": "parallel", "∦": "nparallel", "≍": "asymp",
    "≲": "lesssim", "≳": "gtrsim", "⩽": "leqslant", "⩾": "geqslant", "≦": "leqq", "≧": "geqq", "≨": "lneqq",
    "≩": "gneqq", "≮": "nless", "≯": "ngtr", "≰": "nleq", "≱": "ngeq", "≁": "nsim", "≇": "ncong", "≉": "not\\approx",
    "≜": "triangleq", "≔": "coloneqq", "≕": "eqqcolon", "≗": "circeq", "≖": "eqcirc", "≑": "doteqdot", "⊴": "trianglelefteq",
    "⊵": "trianglerighteq", "⊲": "vartriangleleft", "⊳": "vartriangleright", "⌣": "smile", "⌢": "frown", "∽": "backsim",
    "≊": "approxeq", "≶": "lessgtr", "≷": "gtrless", "⋚": "lesseqgtr", "⋛": "gtreqless", "≾": "precsim", "≿": "succsim",
    # arrows
    "←": "leftarrow", "→": "to", "↔": "leftrightarrow", "⇐": "Leftarrow", "⇒": "Rightarrow", "⇔": "Leftrightarrow",
    "↑": "uparrow", "↓": "downarrow", "↕": "updownarrow", "⇑": "Uparrow", "⇓": "Downarrow", "⇕": "Updownarrow",
    "⟵": "longleftarrow", "⟶": "longrightarrow", "⟷": "longleftrightarrow", "⟸": "Longleftarrow",
    "⟹": "Longrightarrow", "⟺": "Longleftrightarrow", "↦": "mapsto", "⟼": "longmapsto", "↩": "hookleftarrow",
    "↪": "hookrightarrow", "↼": "leftharpoonup", "↽": "leftharpoondown", "⇀": "rightharpoonup",
    "⇁": "rightharpoondown", "⇌": "rightleftharpoons", "⇋": "leftrightharpoons", "↗": "nearrow", "↘": "searrow",
    "↙": "swarrow", "↖": "nwarrow", "↝": "rightsquigarrow", "⇝": "rightsquigarrow", "↠": "twoheadrightarrow",
    "↣": "rightarrowtail", "⇉": "rightrightarrows", "⇄": "rightleftarrows", "⇆": "leftrightarrows", "↛": "nrightarrow",
    "↚": "nleftarrow", "⇏": "nRightarrow", "⇎": "nLeftrightarrow", "↺": "circlearrowleft", "↻": "circlearrowright",
    # large operators
    "∑": "sum", "∏": "prod", "∐": "coprod", "∫": "int", "∬": "iint", "∭": "iiint", "⨌": "iiiint", "∮": "oint",
    "∯": "oiint", "∰": "oiiint", "⋂": "bigcap", "⋃": "bigcup", "⋁": "bigvee", "⋀": "bigwedge", "⨁": "bigoplus",
    "⨂": "bigotimes", "⨀": "bigodot", "⨄": "biguplus", "⨆": "bigsqcup",
    # letters and signs
    "∞": "infty", "∂": "partial", "∇": "nabla", "∀": "forall", "∃": "exists", "∄": "nexists", "∅": "emptyset",
    "⌀": "varnothing", "ℵ": "aleph", "ℶ": "beth", "ℷ": "gimel", "ℸ": "daleth", "ℏ": "hbar", "ℓ": "ell", "℘": "wp",
    "ℜ": "Re", "ℑ": "Im", "∠": "angle", "∡": "measuredangle", "∢": "sphericalangle", "¬": "neg", "√": "surd",
    "□": "square", "◻": "square", "■": "blacksquare", "▪": "blacksquare", "∎": "blacksquare", "◊": "lozenge",
    "⧫": "blacklozenge", "▴": "blacktriangle", "▾": "blacktriangledown", "♠": "spadesuit", "♡": "heartsuit",
    "♢": "diamondsuit", "♣": "clubsuit", "♭": "flat", "♮": "natural", "♯": "sharp", "ℂ": "mathbb{C}", "ℍ": "mathbb{H}",
    "ℕ": "mathbb{N}", "ℙ": "mathbb{P}", "ℚ": "mathbb{Q}", "ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℬ": "mathcal{B}",
    "ℰ": "mathcal{E}", "ℱ": "mathcal{F}", "ℋ": "mathcal{H}", "ℐ": "mathcal{I}", "ℒ": "mathcal{L}", "ℳ": "mathcal{M}",
    "ℛ": "mathcal{R}", "ℯ": "mathcal{e}", "ℊ": "mathcal{g}", "ℴ": "mathcal{o}", "ℭ": "mathfrak{C}", "ℌ": "mathfrak{H}",
    "ℨ": "mathfrak{Z}", "ⅆ": "mathrm{d}", "ⅇ": "mathrm{e}", "ⅈ": "mathrm{i}", "ⅉ": "mathrm{j}", "ⅅ": "mathrm{D}",
    "ı": "imath", "ȷ": "jmath", "§": "S", "¶": "P", "©": "copyright", "£": "pounds", "ð": "eth", "ħ": "hbar",
    # dots, primes, bars
    "…": "ldots", "⋯": "cdots", "⋮": "vdots", "⋱": "ddots", "∴": "therefore", "∵": "because", "‖": "|", "¦": "vert",
    "°": "circ", "∶": ":",
    # fences
    "⟨": "langle", "⟩": "rangle", "〈": "langle", "〉": "rangle", "⌈": "lceil", "⌉": "rceil", "⌊": "lfloor",
    "⌋": "rfloor", "⟦": "llbracket", "⟧": "rrbracket", "⌜": "ulcorner", "⌝": "urcorner", "⌞": "llcorner",
    "⌟": "lrcorner", "⟪": "langle\\!\\langle", "⟫": "rangle\\!\\rangle", "⎰": "lmoustache", "⎱": "rmoustache",
    "⟮": "lgroup", "⟯": "rgroup",
}  # fmt: skip

# what is written without a command
PLAIN = {
    "−": "-", "‐": "-", "‑": "-", "–": "-", "—": "-", "⁄": "/", "∕": "/", "＋": "+", "′": "'", "″": "''", "‴": "'''",
    "⁗": "''''", "‵": "\\backprime ", "\u2019": "'", "\u2018": "`", "∣": "\\mid ", "\u00a0": " ", "{": "\\{", "}": "\\}",
    "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$", "_": "\\_", "\\": "\\backslash ", "~": "\\sim ", "^": "\\wedge ",
    "：": ":", "，": ",", "（": "(", "）": ")", "＝": "=", "．": ".", "；": ";", "≠": "\\neq ",
}  # fmt: skip

# characters that are there for no reader
INVISIBLE = "\u2061\u2062\u2063\u2064\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe00\ufe0e\ufe0f"

# mathvariant of letters: the command that gives it
VARIANTS = {
    "bold": "mathbf", "bold-italic": "boldsymbol", "double-struck": "mathbb", "script": "mathcal",
    "bold-script": "boldsymbol\\mathcal", "fraktur": "mathfrak", "bold-fraktur": "mathfrak", "sans-serif": "mathsf",
    "bold-sans-serif": "mathsf", "sans-serif-italic": "mathsf", "sans-serif-bold-italic": "mathsf",
    "monospace": "mathtt",
}  # fmt: skip
# where the mathematical alphabets of Unicode begin: capital and small letters, 52 each
ALPHABETS = {
    0x1D400: "bold", 0x1D434: "italic", 0x1D468: "bold-italic", 0x1D49C: "script", 0x1D4D0: "bold-script",
    0x1D504: "fraktur", 0x1D538: "double-struck", 0x1D56C: "bold-fraktur", 0x1D5A0: "sans-serif",
    0x1D5D4: "bold-sans-serif", 0x1D608: "sans-serif-italic", 0x1D63C: "sans-serif-bold-italic", 0x1D670: "monospace",
}  # fmt: skip
DIGITS = {
    0x1D7CE: "bold", 0x1D7D8: "double-struck", 0x1D7E2: "sans-serif", 0x1D7EC: "bold-sans-serif", 0x1D7F6: "monospace"
}  # fmt: skip
GREEK_STARTS = {0x1D6A8: "bold", 0x1D6E2: "italic", 0x1D71C: "bold-italic"}
GREEK_ORDER = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡϴΣΤΥΦΧΨΩ∇αβγδεζηθικλμνξοπρςστυφχψω∂ϵϑϰϕϱϖ"


def plain_letter(character: str) -> tuple[str, str | None]:
    """A letter or digit of a mathematical alphabet as an ordinary one, and the alphabet; others as they are."""
    code = ord(character)
    if not 0x1D400 <= code <= 0x1D7FF:
        return character, None
    for start, variant in ALPHABETS.items():
        if start <= code < start + 52:
            offset = code - start
            return chr(ord("A") + offset) if offset < 26 else chr(ord("a") + offset - 26), variant
    for start, variant in GREEK_STARTS.items():
        if start <= code < start + len(GREEK_ORDER):
            return GREEK_ORDER[code - start], variant
    for start, variant in DIGITS.items():
        if start <= code < start + 10:
            return chr(ord("0") + code - start), variant
    return {0x1D6A4: "ı", 0x1D6A5: "ȷ"}.get(code, character), None


def command(name: str) -> str:
    """A command as it is written before whatever follows: a space ends one that is all letters."""
    return f"\\{name} " if name[-1].isalpha() else f"\\{name}"


def of_character(character: str) -> str:
    """LaTeX of one character in math mode."""
    if character in INVISIBLE:
        return ""
    if character in PLAIN:
        return PLAIN[character]
    if character in SYMBOLS:
        return command(SYMBOLS[character])
    letter, variant = plain_letter(character)
    if variant is None and letter == character:
        return character
    inner = of_character(letter)
    return inner if variant in (None, "italic") else f"\\{VARIANTS[variant]}{{{inner.strip()}}}"
