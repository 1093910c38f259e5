"""LaTeX as pages store it: cleaned of what a site put around it, told from other text, made fit for dollars."""

import re
from html.entities import html5

from alloy.data.web.formula import Carrier, Formula
from alloy.data.web.symbols import FUNCTIONS, SYMBOLS

# &amp;lt; and worse: entities that outlived the parser; those without a semicolon would be columns of a table
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_STYLES = ("{\\displaystyle", "{\\textstyle", "{\\scriptstyle")
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\begin{displaymath}", "\\end{displaymath}"),
          ("\\begin{math}", "\\end{math}"))  # fmt: skip
_TAGS = re.compile(r"\[(tex|itex|math|latex|imath)\](.*)\[/\1\]", re.DOTALL | re.IGNORECASE)
# sizes, colours and resolutions that stand before the formula in the address of an image
_PREFIX = re.compile(
    r"(?:\\dpi\s*\{[^{}]*\}|\\(?:inline|opaque|reverse)(?![A-Za-z])|\\[bf]g(?:_\w+|\s*\{[^{}]*\})|\\fn_\w+"
    r"|\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])"
    r"|\\gammacorrection\s*\{[^{}]*\}|\\usepackage(?:\[[^\[\]]*\])?\{[^{}]*\}|\\(?:page)?color(?:\[\w+\])?\s*\{[^{}]*\})\s*"
)
# behind a digit it is a sign that lacks its backslash, else a comment
_PERCENT = re.compile(r"\\.|(?<=\d)(%)(?!\n)|%[^\n]*", re.DOTALL)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BRACE_OR_DOLLAR = re.compile(r"\\.|[{}$]", re.DOTALL)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
# a backslash command that takes an argument or a script, whatever its name
_APPLIED = re.compile(r"\\[A-Za-z]+\s?\{|\\[A-Za-z]+[_^]|[_^]\{")
_NAMES = (
    "frac dfrac tfrac cfrac sqrt binom dbinom tbinom over choose left right big Big bigg Bigg begin end text textbf textit "
    "mbox mathrm mathbf mathbb mathcal mathfrak mathscr mathsf mathit mathtt boldsymbol operatorname overline underline "
    "hat widehat tilde widetilde bar vec dot ddot overbrace underbrace overrightarrow stackrel overset underset substack "
    "limits nolimits displaystyle textstyle cdot cdots ldots dots quad qquad le ge ne leq geq neq rightarrow iff implies "
    "lbrace rbrace lvert rvert lVert rVert langle rangle pmod bmod mod prime not tag label mid Bbb rm bf it cal infty "
    "varnothing land lor lnot gets owns bigl bigr Bigl Bigr phantom boxed cancel middle mathop mathbin mathrel"
)
_KNOWN = frozenset(_NAMES.split()) | {name for name in (*SYMBOLS.values(), *FUNCTIONS) if name.isalpha()}


def formula(tex: str, display: bool, carrier: Carrier) -> Formula | None:
    """The formula that stored LaTeX is, fit to stand between dollars; None where nothing is left of it."""
    tex = close_groups(clean_tex(tex))
    # a dollar that has no partner, or stands outside braces, would end the formula
    tex = _without_loose_dollars(tex) if "$" in tex else tex
    if not display and "\n" in tex:
        tex = tex.replace("\n", " ")
    return Formula(tex, display, carrier) if tex else None


def clean_tex(tex: str) -> str:
    """LaTeX without entities, delimiters, comments, style wrappers and image prefixes around it; the mathematics stays as it is."""
    for _ in range(3):
        if "&" not in tex or (plain := _ENTITY.sub(_of_entity, tex)) == tex:
            break
        tex = plain
    if "\x00" in tex or "\r" in tex or "\xa0" in tex:
        tex = tex.replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ")
    if "%" in tex:
        tex = _PERCENT.sub(lambda m: "\\%" if m[1] else m[0] if m[0][0] == "\\" else "", tex)
    # a site may wrap what was wrapped already, but not often
    for _ in range(6):
        before, tex = tex, _stripped(tex)
        for opening, closing in _PAIRS:
            if tex.startswith(opening) and tex.endswith(closing) and _is_whole(tex, opening, closing):
                tex = tex[len(opening) : -len(closing)]
                break
        if tex[:1] == "[" and (tagged := _TAGS.fullmatch(tex)) is not None:
            tex = tagged[2]
        if tex.startswith(_STYLES) and not tex[tex.index("style") + 5 : tex.index("style") + 6].isalpha():
            tex = tex[tex.index("style") + 5 : -1] if end_of_group(tex, 0) == len(tex) else tex
        while (prefix := _PREFIX.match(tex)) is not None:
            tex = tex[prefix.end() :]
        if tex == before:
            break
    # no formula has a blank line
    return "\n".join(line.strip(" \t") for line in tex.split("\n") if line.strip()) if "\n" in tex else tex


def looks_like_tex(text: str) -> bool:
    """Whether a text is LaTeX by itself: a command of mathematics, a braced script, or all of it between dollars."""
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        return True
    if "\\" not in text and "_{" not in text and "^{" not in text:
        return False
    if text.startswith(("\\(", "\\[")):
        return True
    return _is_balanced(text) and (
        _APPLIED.search(text) is not None or any(found[1] in _KNOWN for found in _COMMAND.finditer(text))
    )


def end_of_group(tex: str, at: int) -> int | None:
    """Where the group in braces that opens at `at` ends (behind its brace); None: it never does."""
    open_ = 0
    for found in _BRACE.finditer(tex, at):
        if found[0] == "{":
            open_ += 1
        elif found[0] == "}":
            open_ -= 1
            if open_ <= 0:
                return found.end()
    return None


def close_groups(tex: str) -> str:
    """With the braces that a cut end left open; those that close nothing are dropped."""
    if "{" not in tex and "}" not in tex:
        return tex
    open_, parts, start = 0, list[str](), 0
    for found in _BRACE.finditer(tex):
        if found[0] == "{":
            open_ += 1
        elif found[0] == "}" and open_:
            open_ -= 1
        elif found[0] == "}":
            parts.append(tex[start : found.start()])
            start = found.end()
    return "".join(parts) + tex[start:] + "}" * open_


def _of_entity(found: re.Match[str]) -> str:
    name = found[1]
    if name[0] != "#":
        return html5.get(f"{name};", found[0])
    code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
    return chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else ""


def _stripped(tex: str) -> str:
    """Without white space around it; a backslash that was before the last space says nothing and would escape a delimiter."""
    tex = tex.strip()
    if tex.endswith("\\"):
        bare = tex.rstrip("\\")
        tex = bare if (len(tex) - len(bare)) % 2 else tex
    return tex.rstrip()


def _is_whole(tex: str, opening: str, closing: str) -> bool:
    """Whether the delimiters at both ends belong to each other."""
    inner = tex[len(opening) : -len(closing)]
    if len(tex) < len(opening) + len(closing) or not inner.strip("$ \n"):
        return False
    if (len(inner) - len(inner.rstrip("\\"))) % 2:
        return False
    if closing in inner:
        level = 0
        for found in re.finditer(rf"{re.escape(closing)}|\\.|[{{}}]", inner, re.DOTALL):
            level += (found[0] == "{") - (found[0] == "}")
            if found[0] == closing and level <= 0:
                return False
    return True


def _is_balanced(tex: str) -> bool:
    open_ = 0
    for found in _BRACE.finditer(tex):
        open_ += (found[0] == "{") - (found[0] == "}")
        if open_ < 0:
            return False
    return open_ == 0


def _without_loose_dollars(tex: str) -> str:
    """Formulas between dollars with words between them become one formula; other dollars that would end it are escaped."""
    level, inner, at = 0, 0, 0
    parts: list[str] = []
    for found in _BRACE_OR_DOLLAR.finditer(tex):
        level += (found[0] == "{") - (found[0] == "}")
        if found[0] == "$" and level > 0:
            inner += 1
        elif found[0] == "$":
            parts.append(tex[at : found.start()])
            at = found.end()
    parts.append(tex[at:])
    if inner % 2 or len(parts) % 2 == 0:
        return _BRACE_OR_DOLLAR.sub(lambda m: "\\$" if m[0] == "$" else m[0], tex)
    if any(c in words for words in parts[::2] for c in "\\^_{"):
        return "".join(parts)
    return "".join(f"\\text{{{part}}}" if i % 2 == 0 and part.strip() else part for i, part in enumerate(parts))
