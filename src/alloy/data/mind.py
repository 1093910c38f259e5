"""Conversations about texts: turns and speakers, what makes a generated one worth keeping, and whether it is true to its text.

Paper: MIND (Akter et al., 2024), sections 2 and 3. arXiv:2410.12881. Judging by a model was found too lenient there; the filters
are rules. Faithfulness is ours: numbers and formulas of the turns that answer must stand in the text, or follow from evaluation.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from alloy.data.blocks import FORMULA, formulas
from alloy.data.guards import FORMULA_TOKENS, is_refusal, latex_tokens
from alloy.data.prompts import PromptFile
from alloy.data.web.extraction import normalize

STYLES = (
    "two_professors", "teacher_student", "two_students", "debate", "problem_solving", "layman_knowall", "interview",
)  # fmt: skip
# a conversation of fewer tokens says nothing (section 3)
FEWEST_TOKENS = 50
Drop = Literal["failed", "refused", "truncated", "echo", "not-dialogue", "short", "unfaithful"]
Follows = Callable[[str, str], bool]

_TURN = re.compile(
    r"^[ \t]*(?:[-*>#]+[ \t]+)?(?:\*\*|__)?(?P<name>[^\W\d_][\w.'\u2019 -]{0,39}?)(?:[ \t]*\([^)\n]{0,40}\))?"
    r"(?:\*\*|__)?[ \t]*[:\uff1a][ \t]*(?:\*\*|__)?[ \t]*(?P<said>.*)$",
    re.MULTILINE,
)
# what stands before a colon in a text as often as a speaker does
_NO_SPEAKERS = frozenset(
    [
        "note",
        "notes",
        "remark",
        "example",
        "examples",
        "step",
        "proof",
        "theorem",
        "lemma",
        "definition",
        "corollary",
        "solution",
        "answer",
        "question",
        "hint",
        "given",
        "find",
        "result",
        "conclusion",
        "summary",
        "problem",
        "case",
        "formula",
        "equation",
        "where",
        "then",
        "so",
        "thus",
        "hence",
        "therefore",
        "first",
        "second",
        "next",
        "finally",
        "input",
        "output",
        "warning",
        "important",
    ]
)
_ENDS = re.compile(r"[.!?\u3002\uff01\uff1f\u2026:;$)\]}\"'\u201d\u2019*_`|]\s*\Z")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])")
_ARITHMETIC = re.compile(r"(?<![\w$])[\d(][\d\s.,+\-*/^()\u00d7\u00b7\u00f7]*=\s*-?[\d.,]*\d")


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody says."""

    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Numbers and formulas that the answers claim, and how many of them the text supports."""

    claims: int
    supported: int

    @property
    def share(self) -> float:
        """1 where nothing is claimed."""
        return self.supported / self.claims if self.claims else 1.0


def turns(text: str, speakers: Sequence[str] = ()) -> list[Turn]:
    """The turns of a conversation: lines that begin with a name and a colon, and what follows them.

    A name is one of `speakers`, or one that begins two lines or more; what stands before the first turn is left out.
    """
    matches = list(_TURN.finditer(text))
    known = {name.lower() for name in speakers}
    names = [match["name"].strip().lower() for match in matches]
    is_speaker = [
        name in known or (names.count(name) > 1 and name.split()[0] not in _NO_SPEAKERS and len(name.split()) <= 4)
        for name in names
    ]
    matches = [match for match, is_one in zip(matches, is_speaker, strict=True) if is_one]
    ends = [match.start() for match in matches[1:]] + [len(text)][: len(matches)]
    return [
        Turn(match["name"].strip(), text[match.start("said") : end].strip())
        for match, end in zip(matches, ends, strict=True)
    ]


def speakers_of(conversation: Sequence[Turn]) -> list[str]:
    """Names in order of their first turn."""
    return list(dict.fromkeys(turn.speaker for turn in conversation))


def drop_reason(text: str, prompt: PromptFile, tokens: int, finish_reason: str | None) -> Drop | None:
    """Why an answer is not worth keeping; None: it is."""
    if is_refusal(text):
        return "refused"
    if finish_reason == "length" or not _ENDS.search(text):
        return "truncated"
    if _echoes(text, prompt.user):
        return "echo"
    conversation = turns(text, prompt.speakers)
    if len(conversation) < 2 or len({turn.speaker.lower() for turn in conversation}) < 2:
        return "not-dialogue"
    return "short" if tokens < FEWEST_TOKENS else None


def faithfulness(text: str, conversation: Sequence[Turn], answers: Sequence[str], follows: Follows) -> Faithfulness:
    """How far the answers keep to their text.

    Args:
        text: what the conversation is about
        conversation: its turns
        answers: speakers whose turns count; none: all
        follows: whether two formulas, as LaTeX, are equal
    """
    counted = {name.lower() for name in answers}
    said = [turn.text for turn in conversation if not counted or turn.speaker.lower() in counted]
    source, known = normalize(text), set(_numbers(text))
    claims = supported = 0
    for answer in said:
        prose = FORMULA.sub(" ", answer)
        sums = _ARITHMETIC.findall(prose)
        for formula in [*formulas(answer), *sums]:
            if len(latex_tokens(formula)) < FORMULA_TOKENS:
                continue
            claims += 1
            if normalize(formula) in source or _follows(formula, follows):
                supported += 1
                # what was worked out may be used
                known.update(_numbers(formula))
        for number in _numbers(_ARITHMETIC.sub(" ", prose)):
            # steps and parts are counted in any text
            if number > 2:
                claims += 1
                supported += number in known
    return Faithfulness(claims, supported)


def messages(conversation: Sequence[Turn], answers: Sequence[str]) -> list[dict[str, str]]:
    """A conversation as chat messages of alternating roles, the user first; turns of one role in succession are one message."""
    if not conversation:
        return []
    assistants = {name.lower() for name in answers}
    first = conversation[0].speaker.lower()
    if not assistants or first in assistants:
        assistants = {turn.speaker.lower() for turn in conversation} - {first}
    found: list[dict[str, str]] = []
    for turn in conversation:
        role = "assistant" if turn.speaker.lower() in assistants else "user"
        if found and found[-1]["role"] == role:
            found[-1]["content"] += "\n\n" + turn.text
        else:
            found.append({"role": role, "content": turn.text})
    return found


def interleave(raw: Sequence[int], synthetic: Sequence[int], ratio: tuple[int, int]) -> list[tuple[str, int]]:
    """Raw and synthetic rows in an order whose every beginning has about the ratio of tokens asked for.

    Args:
        raw: tokens of each raw row
        synthetic: tokens of each synthetic row
        ratio: raw to synthetic; raw rows that are too many for it are left out, synthetic ones are not

    Returns:
        ("raw" or "synthetic", index) of each row
    """
    order: list[tuple[str, int]] = []
    done = {"raw": 0, "synthetic": 0}
    at = {"raw": 0, "synthetic": 0}
    rows = {"raw": raw, "synthetic": synthetic}
    while at["synthetic"] < len(synthetic) or (
        at["raw"] < len(raw) and done["raw"] * ratio[1] < done["synthetic"] * ratio[0]
    ):
        is_raw_due = done["raw"] * ratio[1] < done["synthetic"] * ratio[0] or at["synthetic"] == len(synthetic)
        kind = "raw" if is_raw_due and at["raw"] < len(raw) and ratio[0] else "synthetic"
        order.append((kind, at[kind]))
        done[kind] += rows[kind][at[kind]]
        at[kind] += 1
    return order


def _echoes(text: str, prompt: str) -> bool:
    """Whether an answer repeats a sentence of what was asked."""
    rules = [line.strip("- ") for line in prompt.partition("{text}")[0].split("\n")]
    return any(rule in text for rule in rules if len(rule.split()) >= 8)


def _numbers(text: str) -> list[Fraction]:
    return [Fraction(match.replace(",", "")) for match in _NUMBER.findall(text)]


def _follows(formula: str, follows: Follows) -> bool:
    """Whether every step of a chain of equations holds."""
    sides = re.split(r"(?<![<>!:\\])=|\\approx(?![A-Za-z])", formula.replace("&", ""))
    return len(sides) > 1 and all(side.strip() for side in sides) and all(map(follows, sides, sides[1:]))
