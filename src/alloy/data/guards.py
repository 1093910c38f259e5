"""What a model's rewriting of a text must keep, and what it must not add: one verdict for each chunk.

Formulas are compared after `web.extraction.normalize`, so that another way of writing them does not count as a loss.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from alloy.data.blocks import FORMULA, code_lines, fences, formulas
from alloy.data.web.extraction import normalize

Guard = Literal["math", "code", "length", "framing", "refusal", "loop", "truncated", "novel"]

# a formula of fewer tokens is met by chance
FORMULA_TOKENS = 4
MATH_KEPT, CODE_KEPT = 0.8, 0.95
SHORTEST, LONGEST = 0.05, 1.5
# words of a passage that must not come again and again, and how often it may
LOOP_WORDS, LOOP_TIMES = 20, 2
SHINGLE_WORDS, MOST_NOVEL = 12, 0.2

_TOKEN = re.compile(r"\\[A-Za-z]+|\d+|[^\s{}\\]|\\.")
_WORD = re.compile(r"[^\W\d_]{2,}")
# a remark of the model to whoever asked
_FRAMING = re.compile(
    r"\s*(?:\*\*|#+ )?(?:(?:sure|certainly|of course|okay|ok|absolutely|understood|great)\b[,.!:]"
    r"|(?:here|below|following|this)\b(?: is|'s| are|\u2019s) (?:the|a|an|your|my)\b[^\n]{0,80}?"
    r"\b(?:text|document|content|version|page|output|result|conversation|dialogue|discussion|summary|rewrite|list|passage|questions?)\b"
    r"|i(?:'ve| have|\u2019ve) (?:cleaned|extracted|rewritten|removed|kept|restored|formatted)\b"
    r"|(?:cleaned|extracted|rewritten|main|restored) (?:text|content|document)\s*:)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\s*(?:i(?:'m| am|\u2019m) (?:sorry|afraid|unable|not able)|(?:sorry|apologies|unfortunately),? (?:but )?i\b"
    r"|i (?:can(?:no|')t|cannot|can\u2019t|will not|won't|must decline)\b|as an ai\b|as a (?:large )?language model\b)",
    re.IGNORECASE,
)
_WHOLE_FENCE = re.compile(r"\A\s*(```+|~~~+)(?:markdown|md|text|latex|tex)?[ \t]*\n(.*)\n\1\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """The guards that an output does not pass, each with its figure; none: it is taken."""

    failed: dict[Guard, float]

    @property
    def is_good(self) -> bool:
        """Whether all guards pass."""
        return not self.failed

    def __str__(self) -> str:
        return " ".join(f"{name}={value:.2f}" for name, value in self.failed.items()) or "ok"


def judge(source: str, output: str, finish_reason: str | None = "stop") -> Verdict:
    """All guards on one chunk.

    Args:
        source: what the model was given
        output: what it made of it
        finish_reason: why it ended; "length" means that the end is missing
    """
    failed: dict[Guard, float] = {}
    if finish_reason == "length":
        failed["truncated"] = 1.0
    if (kept := math_kept(source, output)) < MATH_KEPT:
        failed["math"] = kept
    if (kept := code_kept(source, output)) < CODE_KEPT:
        failed["code"] = kept
    ratio = len(output.strip()) / max(1, len(source.strip()))
    if not SHORTEST <= ratio <= LONGEST:
        failed["length"] = ratio
    if has_framing(output) and not has_framing(source):
        failed["framing"] = 1.0
    if is_refusal(output) and not is_refusal(source):
        failed["refusal"] = 1.0
    if (times := loops(output)) > max(LOOP_TIMES, loops(source)):
        failed["loop"] = times
    if (share := novel(source, output)) > MOST_NOVEL:
        failed["novel"] = share
    return Verdict(failed)


def math_kept(source: str, output: str) -> float:
    """Share of the different formulas of `source` that stand in `output`; 1 where it has none."""
    found = set(formulas(source))
    # most often nothing has changed, and comparing is slow
    if source == output or found <= set(formulas(output)):
        return 1.0
    wanted = {normalize(formula) for formula in found if len(latex_tokens(formula)) >= FORMULA_TOKENS} - {""}
    if not wanted:
        return 1.0
    have = normalize(output)
    return sum(formula in have for formula in wanted) / len(wanted)


def latex_tokens(formula: str) -> list[str]:
    """Commands, numbers, letters and signs of a formula; braces and spaces are none."""
    return _TOKEN.findall(formula)


def code_kept(source: str, output: str) -> float:
    """Share of the different lines of fenced code in `source` that are lines of `output`; 1 where it has none."""
    wanted = {line.strip() for line in code_lines(source)}
    have = {line.strip() for line in output.split("\n")}
    return len(wanted & have) / len(wanted) if wanted else 1.0


def has_framing(text: str) -> bool:
    """Whether a text begins with a remark to whoever asked for it."""
    return _FRAMING.match(text) is not None


def is_refusal(text: str) -> bool:
    """Whether a text says that the model will not answer."""
    return _REFUSAL.match(text) is not None


def loops(text: str) -> int:
    """How often the most frequent passage of 20 words stands in a text."""
    words = text.split()
    passages = Counter(tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1))
    return max(passages.values(), default=0)


def novel(source: str, output: str) -> float:
    """Share of the passages of 12 words in `output` that `source` does not have; formulas and code do not count.

    A passage does not go beyond its line, so that what was left out between two lines makes none; a shorter line is one.
    """
    known = _WORD.findall(_prose(source))
    there: dict[int, set[tuple[str, ...]]] = {}
    total = unknown = 0
    for line in _prose(output).split("\n"):
        words = _WORD.findall(line)
        size = min(SHINGLE_WORDS, len(words))
        if size == 0:
            continue
        if size not in there:
            there[size] = {tuple(known[i : i + size]) for i in range(len(known) - size + 1)}
        passages = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        total += len(passages)
        unknown += sum(passage not in there[size] for passage in passages)
    return unknown / total if total else 0.0


def strip_fence(text: str) -> str:
    """A model's answer without a fence around the whole of it."""
    fenced = _WHOLE_FENCE.match(text)
    return (fenced[2] if fenced and "\n" + fenced[1] not in fenced[2] else text).strip("\n")


def strip_framing(text: str) -> str:
    """A text without a first line that is a remark of the model."""
    first, _, rest = text.lstrip().partition("\n")
    return rest.strip("\n") if has_framing(first) and rest.strip() else text


def _prose(text: str) -> str:
    """What is neither formula nor code, in lower case."""
    pieces, at = [], 0
    for start, end in [*fences(text), (len(text), len(text))]:
        pieces.append(FORMULA.sub(" ", text[at:start]))
        at = end
    return "\n".join(pieces).lower()
