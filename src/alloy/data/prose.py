"""Which characters of a row's text are prose, which formulas, which code; and which stretches of it a model is shown.

Everything here takes time linear in the text, unclosed delimiters included.
"""

import re

# fenced code; a fence that is never closed holds the rest
FENCE = re.compile(r"^ {0,3}(`{3,}+|~{3,}+)[^\n]*+\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
# an escaped dollar is matched, without a group, so that it opens nothing; a dollar before a digit closes nothing (prices)
_MATH = re.compile(
    r"\\\$"
    r"|\$\$(.{1,20000}?)\$\$"
    r"|\$(?!\s)((?:\\.|[^\\$\n]){1,2000}?)(?<!\s)\$(?!\d)"
    r"|\\\(((?:[^\\]|\\[^(]){1,2000}?)\\\)"
    r"|\\\[((?:[^\\]|\\[^\[]){1,20000}?)\\\]"
    r"|\\begin\{(equation|align|gather|multline|eqnarray|alignat|flalign)(\*?)\}(.{1,3000}?)\\end\{\5\6\}",
    re.DOTALL,
)
_INLINE_CODE = re.compile(r"(?<!`)(`{1,2})(?!`)[^`\n]{1,500}\1(?!`)")
_ADDRESS = re.compile(r"(?:https?://|www\.|@)\S+")
_TABLE_LINE = re.compile(r"^[ \t]*\|.*$", re.MULTILINE)


def without_code(text: str) -> str:
    """The text without fenced code."""
    return FENCE.sub("\n", text) if "```" in text or "~~~" in text else text


def split_math(text: str) -> tuple[str, list[str]]:
    """The text with a blank for each formula, and the formulas without their delimiters.

    Formulas stand in `$ $`, `$$ $$`, `\\( \\)`, `\\[ \\]` or an environment such as align.
    """
    formulas: list[str] = []

    def take(match: re.Match[str]) -> str:
        if match.group() == "\\$":
            return "$"
        formulas.append(next(match.group(group) for group in (1, 2, 3, 4, 7) if match.group(group) is not None))
        return " "

    return _MATH.sub(take, text) if "$" in text or "\\" in text else text, formulas


def prose(text: str) -> str:
    """The text without code, formulas, addresses and tables."""
    rest, _ = split_math(without_code(text))
    for pattern in (_INLINE_CODE, _ADDRESS, _TABLE_LINE):
        rest = pattern.sub(" ", rest)
    return rest


def windows(text: str, count: int, chars: int) -> list[str]:
    """The centres, `chars` characters in all, of `count` equal stretches of the text; all of a shorter text, in one piece."""
    if len(text) <= chars:
        return [text]
    stretch, width = len(text) / count, chars // count
    starts = (int(stretch * index + (stretch - width) / 2) for index in range(count))
    return [text[start : start + width] for start in starts]
