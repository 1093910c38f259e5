"""Mathematics that is written with `sub`, `sup` and italics."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from alloy.data.web.formula import Formula
from alloy.data.web.symbols import FUNCTIONS, command, of_character
from alloy.data.web.tex import formula

# longer ones are text
LONGEST = 12
_ORDINAL = re.compile(r"(?:st|nd|rd|th|er|re|ère|e|ème|eme|o|a|º|ª)", re.IGNORECASE)
_MARK = re.compile(r"\[.*\]|[*†‡§¶]+|\(?[a-z]\)|TM|SM|®|©|™|℠|\d{1,3}(?:\s*[,–-]\s*\d{1,3})*")
_UNIT = re.compile(
    r"(?:^|[^A-Za-z])(?:[mcdkµμn]?m|in|ft|yd|mi|[mµμ]?s|sec|kg|cm|log|sin|cos|tan|sinh|cosh|tanh|sec|csc|cot|ln|exp|lim|det)$"
)
_COMMAND_END = re.compile(r"\\[A-Za-z]+$")
_TOKEN = re.compile(r"[A-Za-z]+|\d+(?:[.,]\d+)*|\s+|.", re.DOTALL)
# what may stand between the parts of a formula in text
_BETWEEN = re.compile(r"[\d\s.+\-−–=<>≤≥≠≈≡±×·⋅∙*/|(){}\[\],^!′'∈∉⊂⊆∪∩∧∨→⇒↦∞∑∏∫√∂∇∀∃α-ωΑ-Ω]+")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of inline text: where it stands, and whether it is italic or a link."""

    text: str
    kind: Literal["text", "sub", "sup"] = "text"
    is_italic: bool = False
    is_link: bool = False


def text_of_pieces(pieces: Sequence[Piece], promote: bool = False) -> str:
    """Text with `_{}` and `^{}` where pieces are scripts of mathematics; with `promote`, runs of them as `$...$`."""
    parts: list[str] = []
    run: list[Piece] = []
    before = ""
    for piece in pieces:
        is_script = piece.kind != "text" and is_script_of(before, piece)
        if promote and (is_script or _belongs(piece, bool(run))):
            run.append(piece)
        else:
            parts.extend((_promoted(run), _written(piece, is_script)))
            run = []
        before = piece.text if piece.kind == "text" or not is_script else before
    return "".join((*parts, _promoted(run)))


def is_script_of(before: str, piece: Piece) -> bool:
    """Whether a sub or sup behind the text `before` is mathematics and no ordinal, footnote mark or link."""
    content = piece.text.strip()
    base = before[-1:]
    if piece.is_link or not content or len(content) > LONGEST or not (base.isalnum() or base in ")]}|′'∑∏∫⋃⋂∇"):
        return False
    if piece.kind == "sub":
        return True
    if base.isdigit() and _ORDINAL.fullmatch(content):
        return False
    if not _MARK.fullmatch(content):
        return True
    if not content[0].isdigit():
        return content == "*"
    # a number above a word is a note, above a letter, a number or a unit a power
    word = before[len(before.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")) :]
    return base in ")]}|" or len(word) < 2 or piece.is_italic or _UNIT.search(before[-8:]) is not None


def formula_of_texhtml(pieces: Sequence[Piece], display: bool = False) -> Formula | None:
    """The formula that HTML with sub, sup and italics shows, all of it being mathematics (`.texhtml`, `.math` without TeX)."""
    return formula(latex_of_pieces(pieces), display, "subsup")


def _written(piece: Piece, is_script: bool) -> str:
    if not is_script:
        return piece.text
    return f"{'_' if piece.kind == 'sub' else '^'}{{{piece.text.strip()}}}"


def _belongs(piece: Piece, is_inside: bool) -> bool:
    """Whether a piece of text may be part of a formula: an italic letter, or signs and numbers between parts."""
    text = piece.text.strip()
    if piece.kind != "text" or piece.is_link:
        return False
    if piece.is_italic:
        return 0 < len(text) <= 2 and text.isalpha()
    return is_inside and _BETWEEN.fullmatch(piece.text) is not None


def _promoted(run: Sequence[Piece]) -> str:
    """A run of pieces as one formula; as text where there is nothing mathematical in it."""
    if not run:
        return ""
    # what only follows stays outside
    last = max((i for i, piece in enumerate(run) if piece.is_italic or piece.kind != "text"), default=-1) + 1
    tail = "".join(piece.text for piece in run[last:])
    latex = latex_of_pieces(run[:last])
    return f"${latex}${tail}" if latex else tail


def latex_of_pieces(pieces: Sequence[Piece]) -> str:
    """LaTeX of text with scripts and italics that is mathematics throughout."""
    parts: list[str] = []
    scripts: dict[str, str] = {}

    def close() -> None:
        # an index before a power, and each once
        parts.extend(f"{mark}{{{scripts[mark]}}}" for mark in ("_", "^") if mark in scripts)
        scripts.clear()

    for piece in pieces:
        latex = _symbols(piece)
        if piece.kind == "text":
            close()
            parts.append(latex)
            continue
        mark = "_" if piece.kind == "sub" else "^"
        scripts[mark] = joined((scripts.get(mark, ""), latex))
    close()
    return joined(parts).strip()


def joined(parts: Iterable[str]) -> str:
    """Parts side by side, with a space where a letter would run into a command."""
    latex = list[str]()
    for part in parts:
        is_run_into = latex and part[:1].isalpha() and _COMMAND_END.search(latex[-1][-20:])
        if part:
            latex.append(f" {part}" if is_run_into else part)
    return "".join(latex)


def _symbols(piece: Piece) -> str:
    if piece.text.isascii() and piece.text.isalnum() and (len(piece.text) == 1 or piece.text.isdigit()):
        return piece.text
    parts: list[str] = []
    for token in _TOKEN.findall(piece.text):
        if token.isspace() or token in "\u2004\u2009\u200a\xa0":
            parts.append(" ")
        elif len(token) == 1 or not token.isalpha():
            parts.append("".join(map(of_character, token)))
        elif token in FUNCTIONS:
            parts.append(command(token))
        else:
            parts.append(token if piece.is_italic and len(token) < 4 else f"\\mathrm{{{token}}}")
    return re.sub(r" (?=[ ^_{}])", "", "".join(parts)) if piece.kind == "text" else "".join(parts).strip()
