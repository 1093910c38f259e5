"""Content MathML as presentation MathML.

Source: MathML 3, W3C Recommendation of 2014, chapter 4: its elements, and the renderings that it suggests. Strict content (`csymbol`,
`bind`) is read by the names that the standard dictionaries share with the elements.
"""

from collections.abc import Sequence

from alloy.data.web.element import Element, fenced, operator, row

# with the depth of presentation markup around it, well within the stack
DEEPEST = 60
# how tightly an expression holds together
LOGIC, RELATION, SUM, PRODUCT, CALL, POWER, ATOM = 10, 20, 40, 50, 60, 70, 100
# operators between arguments: the sign, and how tight it is
INFIX: dict[str, tuple[str, int]] = {
    "implies": ("⇒", 5), "equivalent": ("≡", 6), "or": ("∨", LOGIC), "xor": ("⊻", LOGIC), "and": ("∧", 12),
    "eq": ("=", RELATION), "neq": ("≠", RELATION), "gt": (">", RELATION), "lt": ("<", RELATION), "geq": ("≥", RELATION),
    "leq": ("≤", RELATION), "approx": ("≈", RELATION), "factorof": ("∣", RELATION), "in": ("∈", RELATION),
    "notin": ("∉", RELATION), "subset": ("⊆", RELATION), "prsubset": ("⊂", RELATION), "notsubset": ("⊈", RELATION),
    "notprsubset": ("⊄", RELATION), "tendsto": ("→", RELATION), "union": ("∪", 30), "intersect": ("∩", 32),
    "setdiff": ("∖", 34), "cartesianproduct": ("×", 36), "plus": ("+", SUM), "minus": ("−", SUM), "rem": ("mod", PRODUCT),
    "times": ("", PRODUCT), "vectorproduct": ("×", PRODUCT), "scalarproduct": ("⋅", PRODUCT), "outerproduct": ("⊗", PRODUCT),
    "compose": ("∘", PRODUCT + 2), "left_compose": ("∘", PRODUCT + 2),
}  # fmt: skip
# a minus or a difference takes its right side more tightly
UNEQUAL = frozenset(["minus", "setdiff", "rem", "implies"])
_CALLED = (
    "sin cos tan sec csc cot sinh cosh tanh coth arcsin arccos arctan ln log exp gcd lcm max min arg sech csch arcsec arccsc arccot "
    "arcsinh arccosh arctanh arccoth arcsech arccsch median mode domain codomain image"
)
NAMES = {name: name for name in _CALLED.split()} | {
    "determinant": "det", "real": "ℜ", "imaginary": "ℑ", "sdev": "σ", "ident": "id", "divergence": "∇⋅", "grad": "∇", "curl": "∇×",
    "laplacian": "∇²",
}  # fmt: skip
BETWEEN = {"abs": ("|", "|"), "card": ("|", "|"), "floor": ("⌊", "⌋"), "ceiling": ("⌈", "⌉"), "mean": ("⟨", "⟩")}
BEHIND = {
    "factorial": operator("!"),
    "transpose": Element("mi", text="T"),
    "inverse": row(operator("−"), Element("mn", text="1")),
}
CONSTANTS = {"pi": "π", "exponentiale": "e", "imaginaryi": "i", "infinity": "∞", "eulergamma": "γ", "true": "true", "false": "false",
             "notanumber": "NaN", "emptyset": "∅", "integers": "ℤ", "reals": "ℝ", "rationals": "ℚ", "naturalnumbers": "ℕ",
             "complexes": "ℂ", "primes": "ℙ"}  # fmt: skip
LARGE = {"sum": "∑", "product": "∏", "int": "∫", "union": "⋃", "intersect": "⋂", "forall": "∀", "exists": "∃", "limit": "lim",
         "max": "max", "min": "min"}  # fmt: skip
QUALIFIERS = frozenset(
    ["bvar", "lowlimit", "uplimit", "interval", "condition", "domainofapplication", "degree", "logbase", "momentabout"]
)
INTERVALS = {"open": "()", "closed": "[]", "open-closed": "(]", "closed-open": "[)"}
_BUILT = ("apply", "bind", "ci", "cn", "csymbol", "cs", "cbytes", "cerror", "share", "reln", "fn", "lambda", "set", "list", "vector",
          "matrix", "matrixrow", "piecewise", "declare", "interval")  # fmt: skip
CONTENT = frozenset((*_BUILT, *CONSTANTS))


def presentation(element: Element) -> Element:
    """Presentation markup of a content element; what is not content is given back."""
    return _term(element, 0)[0]


Term = tuple[Element, int]


def _term(element: Element, depth: int) -> Term:
    """Presentation of an element and how tightly it holds together."""
    tag = element.tag
    if depth > DEEPEST:
        return Element("mtext", text=element.word()), ATOM
    if tag in ("apply", "bind", "reln"):
        return _apply(element, depth + 1)
    if tag == "cn":
        return _number(element, depth + 1)
    if tag in ("ci", "csymbol", "fn", "cs"):
        if element.children:
            return row(*(_term(child, depth + 1)[0] for child in element.children)), ATOM
        return _identifier(element), ATOM
    if tag in CONSTANTS:
        return Element("mi", text=CONSTANTS[tag]), ATOM
    if tag in NAMES or tag in INFIX:
        return Element("mo", text=NAMES.get(tag) or INFIX[tag][0]), ATOM
    build = _CONTAINERS.get(tag)
    return (build(element, depth + 1), ATOM if tag != "lambda" else 1) if build is not None else (element, ATOM)


def _inner(element: Element, depth: int) -> Element:
    return _term(element, depth)[0]


def _identifier(element: Element) -> Element:
    word = element.word()
    if element.tag == "csymbol" and word in CONSTANTS:
        word = CONSTANTS[word]
    kind = {"vector": "bold", "matrix": "bold"}.get(element.get("type"))
    return Element("mi", {"mathvariant": kind} if kind else {}, text=word)


def _number(element: Element, depth: int) -> Term:
    parts = [element.text.strip()]
    for child in element.children:
        if child.tag == "sep":
            parts.append("")
        else:
            parts[-1] += child.word()
    first, second = (Element("mn", text=part) for part in (*parts, "")[:2])
    kind, base = element.get("type"), element.get("base")
    if element.children and any(child.tag != "sep" and child.tag != "#text" for child in element.children):
        return row(*(_inner(child, depth) for child in element.children)), ATOM
    if len(parts) > 1:
        ten = Element("mn", text="10")
        if kind == "rational":
            return Element("mfrac", children=[first, second]), PRODUCT
        if kind == "e-notation":
            return row(first, operator("×"), _script("msup", ten, second)), PRODUCT
        if kind == "complex-polar":
            power = row(Element("mi", text="i"), second)
            return row(first, _script("msup", Element("mi", text="e"), power)), PRODUCT
        sign = operator("−" if second.text.startswith(("-", "−")) else "+")
        second.text = second.text.lstrip("-−")
        return row(first, sign, second, Element("mi", text="i")), SUM
    if kind == "constant" or not any(c.isdigit() for c in first.text):
        return Element("mi", text=first.text), ATOM
    is_negative = first.text.startswith(("-", "−"))
    if base and base != "10":
        return _script("msub", first, Element("mn", text=base)), ATOM
    return first, SUM if is_negative else ATOM


def _script(tag: str, base: Element, *scripts: Element) -> Element:
    return Element(tag, children=[base, *scripts])


def _held(term: Term, tightness: int) -> Element:
    """An expression, in parentheses where it is looser than its place."""
    return term[0] if term[1] >= tightness else fenced("(", term[0], ")")


def _commas(elements: Sequence[Element]) -> Element:
    parts: list[Element] = []
    for element in elements:
        parts.extend([operator(","), element] if parts else [element])
    return row(*parts)


def _apply(element: Element, depth: int) -> Term:
    """An operator with its arguments and qualifiers."""
    if not element.children:
        return Element("mrow"), ATOM
    head, *rest = element.children
    name = head.word() if head.tag in ("csymbol", "fn") and not head.children else head.tag
    qualifiers: dict[str, list[Element]] = {}
    arguments: list[Element] = []
    for child in rest:
        # an interval is a qualifier where something is bound, else an argument
        is_bound = child.tag in QUALIFIERS and (child.tag != "interval" or "bvar" in qualifiers)
        if is_bound:
            qualifiers.setdefault(child.tag, []).append(child)
        else:
            arguments.append(child)
    if name in LARGE and (qualifiers or name in ("sum", "product", "int", "limit", "forall", "exists")):
        return _large(name, qualifiers, arguments, depth)
    terms = [_term(argument, depth) for argument in arguments]
    special = _special(name, terms, qualifiers, depth)
    if special is not None:
        return special
    if name in INFIX:
        return _infix(name, terms)
    if name in BETWEEN:
        opening, closing = BETWEEN[name]
        return fenced(opening, _commas([term[0] for term in terms]), closing), ATOM
    if name in BEHIND and terms:
        base = _held(terms[0], ATOM)
        return (row(base, BEHIND[name]) if name == "factorial" else _script("msup", base, BEHIND[name])), POWER
    return _call(name, head, terms, qualifiers, depth)


def _special(name: str, terms: list[Term], qualifiers: dict[str, list[Element]], depth: int) -> Term | None:
    """Operators with a form of their own; None: it has none."""
    if not terms:
        return None
    first = terms[0]
    if name == "divide" and len(terms) > 1:
        return Element("mfrac", children=[first[0], terms[1][0]]), PRODUCT
    if name == "quotient" and len(terms) > 1:
        return fenced("⌊", Element("mfrac", children=[first[0], terms[1][0]]), "⌋"), ATOM
    if name == "power" and len(terms) > 1:
        return _script("msup", _held(first, POWER + 1), terms[1][0]), POWER
    if name == "root":
        degree = _qualifier(qualifiers, "degree", depth)
        if degree is None or degree.word() == "2":
            return Element("msqrt", children=[first[0]]), ATOM
        return Element("mroot", children=[first[0], degree]), ATOM
    if name == "minus" and len(terms) == 1:
        return row(operator("−"), _held(first, PRODUCT)), SUM
    if name == "plus" and len(terms) == 1:
        return row(operator("+"), _held(first, PRODUCT)), SUM
    if name == "not":
        return row(operator("¬"), _held(first, RELATION + 1)), 15
    if name == "conjugate":
        return Element("mover", children=[first[0], operator("¯")]), ATOM
    if name == "exp":
        return _script("msup", Element("mi", text="e"), first[0]), POWER
    if name == "selector" and len(terms) > 1:
        return _script("msub", _held(first, ATOM), _commas([term[0] for term in terms[1:]])), ATOM
    if name == "variance":
        return row(_script("msup", Element("mi", text="σ"), Element("mn", text="2")), fenced("(", first[0], ")")), CALL
    if name == "moment":
        degree = _qualifier(qualifiers, "degree", depth) or Element("mn", text="1")
        return fenced("⟨", _script("msup", _held(first, ATOM), degree), "⟩"), ATOM
    if name in ("diff", "partialdiff"):
        return _derivative(name, terms, qualifiers, depth)
    return None


def _infix(name: str, terms: list[Term]) -> Term:
    sign, tightness = INFIX[name]
    parts: list[Element] = []
    for i, term in enumerate(terms):
        # equal neighbours of one operator need parentheses only where the order matters
        least = tightness + 1 if name in UNEQUAL and i else tightness + 1 if tightness <= RELATION else tightness
        shown = _held(term, least)
        if i and name == "plus" and _is_negative(term[0]):
            # a sum with a negative summand is a difference
            parts.extend([operator("−"), *term[0].children[1:]])
            continue
        if i and sign:
            parts.append(operator(sign))
        elif i and (shown.tag == "mn" or (shown.tag == "msup" and shown.children[0].tag == "mn")):
            parts.append(operator("⋅"))
        parts.append(shown)
    return row(*parts), tightness


def _is_negative(element: Element) -> bool:
    return (
        element.tag == "mrow"
        and bool(element.children)
        and element.children[0].text == "−"
        and len(element.children) == 2
    )


def _qualifier(qualifiers: dict[str, list[Element]], name: str, depth: int) -> Element | None:
    """The content of the first qualifier of a name."""
    found = qualifiers.get(name)
    return row(*(_inner(child, depth) for child in found[0].children)) if found else None


def _bound(qualifiers: dict[str, list[Element]], depth: int) -> list[tuple[Element, Element | None]]:
    """Bound variables, each with its degree."""
    bound: list[tuple[Element, Element | None]] = []
    for variable in qualifiers.get("bvar", []):
        degree = next((child for child in variable.children if child.tag == "degree"), None)
        name = row(*(_inner(child, depth) for child in variable.children if child.tag != "degree"))
        bound.append((name, None if degree is None else row(*(_inner(child, depth) for child in degree.children))))
    return bound


def _large(name: str, qualifiers: dict[str, list[Element]], arguments: list[Element], depth: int) -> Term:
    """Sums, integrals, limits and quantifiers: what binds a variable, its range below and above, and the body."""
    bound = [variable for variable, _ in _bound(qualifiers, depth)]
    variables = _commas(bound)
    low, high = (_qualifier(qualifiers, side, depth) for side in ("lowlimit", "uplimit"))
    if (interval := qualifiers.get("interval")) and len(interval[0].children) == 2:
        low, high = (_inner(child, depth) for child in interval[0].children)
    condition, domain = (_qualifier(qualifiers, kind, depth) for kind in ("condition", "domainofapplication"))
    below = condition
    if below is None and domain is not None:
        below = row(variables, operator("∈"), domain) if bound and name != "int" else domain
    if below is None and low is not None and name != "int":
        below = row(variables, operator("→" if name == "limit" else "="), low) if bound else low
    below = low if below is None else below
    sign = operator(LARGE[name])
    body = [_held(_term(argument, depth), SUM + 1 if name != "limit" else SUM) for argument in arguments]
    if name in ("forall", "exists"):
        body = [_inner(argument, depth) for argument in arguments]
        given = (
            [operator(","), condition]
            if condition is not None
            else [operator("∈"), domain]
            if domain is not None
            else []
        )
        return row(sign, variables, *given, operator(":"), *body), 3
    if name in ("max", "min"):
        body = [fenced("{", row(*body), "}")]
    if name == "int":
        differentials = [part for variable in bound for part in (Element("mi", text="d"), variable)]
        tag = "msubsup" if below is not None and high is not None else "msub"
        scripts = [script for script in (below, high) if script is not None]
        return row(_script(tag, sign, *scripts) if scripts else sign, *body, *differentials), PRODUCT - 5
    if below is None and bound:
        below = variables
    if below is not None:
        sign = _script("munderover", sign, below, high) if high is not None else _script("munder", sign, below)
    return row(sign, *body), PRODUCT - 5


def _derivative(name: str, terms: list[Term], qualifiers: dict[str, list[Element]], depth: int) -> Term:
    bound = _bound(qualifiers, depth)
    if not bound:
        # a function of one variable, or of those that a list names
        if name == "diff":
            return _script("msup", _held(terms[0], ATOM), operator("′")), POWER
        indices, function = terms[0][0], terms[-1]
        return row(_script("msub", Element("mi", text="D"), indices), _held(function, ATOM)), CALL
    sign = Element("mi", text="d" if name == "diff" else "∂")
    degrees = [degree for _, degree in bound]
    total = _qualifier(qualifiers, "degree", depth)
    if total is None and (len(bound) > 1 or degrees[0] is not None):
        one = Element("mn", text="1")
        counts = [(degree or one).word() for degree in degrees]
        if all(count.isdecimal() and len(count) < 6 for count in counts):
            total = Element("mn", text=str(sum(map(int, counts))))
        else:
            parts = [part for degree in degrees for part in (operator("+"), degree or one)]
            total = row(*parts[1:])
    top = sign if total is None else _script("msup", sign, total)
    below = [
        part
        for variable, degree in bound
        for part in (sign, variable if degree is None else _script("msup", variable, degree))
    ]
    function = terms[0]
    if function[1] >= CALL:
        return Element("mfrac", children=[row(top, function[0]), row(*below)]), PRODUCT
    return row(Element("mfrac", children=[top, row(*below)]), fenced("(", function[0], ")")), PRODUCT


def _call(name: str, head: Element, terms: list[Term], qualifiers: dict[str, list[Element]], depth: int) -> Term:
    """A function and its arguments in parentheses; elementary ones go without before a single letter or number."""
    function = operator(NAMES[name]) if name in NAMES else _held(_term(head, depth), POWER)
    if name == "laplacian":
        function = _script("msup", operator("∇"), Element("mn", text="2"))
    if name == "log" and (base := _qualifier(qualifiers, "logbase", depth)) is not None:
        function = _script("msub", function, base)
    if not terms:
        return function, ATOM
    is_bare = name in NAMES and len(terms) == 1 and terms[0][0].tag in ("mi", "mn") and name not in ("gcd", "lcm")
    if is_bare or (name == "grad" and terms[0][1] == ATOM):
        return row(function, terms[0][0]), CALL
    return row(function, fenced("(", _commas([term[0] for term in terms]), ")")), CALL


def _list(element: Element, depth: int) -> Element:
    """Sets and lists, by their members or by a condition; intervals, vectors."""
    opening, closing = {"set": "{}", "list": "[]", "vector": "()"}.get(element.tag) or INTERVALS.get(
        element.get("closure"), "[]"
    )
    condition = next((child for child in element.children if child.tag in ("condition", "domainofapplication")), None)
    bound = [child for child in element.children if child.tag == "bvar"]
    members = [
        _inner(child, depth) for child in element.children if child.tag not in QUALIFIERS or child.tag == "interval"
    ]
    if condition is not None:
        shown = members or [row(*(_inner(child, depth) for child in variable.children)) for variable in bound]
        given = row(*(_inner(child, depth) for child in condition.children))
        return fenced(opening, row(_commas(shown), operator("∣"), given), closing)
    return fenced(opening, _commas(members), closing)


def _matrix(element: Element, depth: int) -> Element:
    rows = [
        Element("mtr", children=[Element("mtd", children=[_inner(cell, depth)]) for cell in line.children])
        for line in (element.children if element.tag == "matrix" else [element])
        if line.tag == "matrixrow"
    ]
    return fenced("(", Element("mtable", children=rows), ")")


def _piecewise(element: Element, depth: int) -> Element:
    rows: list[Element] = []
    for piece in element.children:
        cells = [Element("mtd", children=[_inner(child, depth)]) for child in piece.children[:2]]
        if piece.tag == "piece" and len(cells) == 2:
            cells[1].children.insert(0, Element("mtext", text="if "))
        elif piece.tag == "otherwise":
            cells.append(Element("mtd", children=[Element("mtext", text="otherwise")]))
        rows.append(Element("mtr", children=cells))
    return Element("mrow", children=[operator("{", True), Element("mtable", children=rows)])


def _lambda(element: Element, depth: int) -> Element:
    bound = [
        row(*(_inner(inner, depth) for inner in child.children)) for child in element.children if child.tag == "bvar"
    ]
    body = [_inner(child, depth) for child in element.children if child.tag not in QUALIFIERS]
    names = bound[0] if len(bound) == 1 else fenced("(", _commas(bound), ")")
    return row(names, operator("↦"), *body)


def _nothing(element: Element, depth: int) -> Element:
    return Element("mrow")


_CONTAINERS = {
    "set": _list, "list": _list, "vector": _list, "interval": _list, "matrix": _matrix, "matrixrow": _matrix,
    "piecewise": _piecewise, "lambda": _lambda, "declare": _nothing, "share": _nothing, "cbytes": _nothing,
}  # fmt: skip
