"""Thought and answer apart, while the text still grows (serving.md 6.1, 6.4).

Whether an answer begins inside a thought is decided by what the prompt ends with, never by the request's settings.
"""

from collections.abc import Sequence
from typing import Literal

from alloy.engine.reasoning import held_back

Part = tuple[Literal["thought", "answer"], str]


def ends_inside(text: str, markers: tuple[str, str]) -> bool:
    """Whether `text` opens a thought and leaves it open."""
    return text.rfind(markers[0]) > text.rfind(markers[1])


class Split:
    """The two parts of one answer.

    A thought can only open an answer; a marker later on is text. Newlines around the thought belong to the layout.

    Args:
        markers: text that opens and closes a thought; None: everything is answer
        is_inside: the prompt ends inside a thought
        ends: other texts that end a thought and belong to the answer, such as the start of a tool call
    """

    def __init__(self, markers: tuple[str, str] | None, is_inside: bool, ends: Sequence[str] = ()) -> None:
        self._markers = markers
        self._state: Literal["start", "thought", "gap", "answer"] = "start"
        if markers is None:
            self._state = "answer"
        elif is_inside:
            self._state = "thought"
        self._ends = tuple(ends)
        self._held = ""
        self._has_thought = False

    @property
    def is_answer(self) -> bool:
        """Whether the answer has begun."""
        return self._state == "answer"

    def push(self, text: str) -> list[Part]:
        """The parts of `text`; what may be the beginning of a marker waits."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back."""
        held, self._held = self._held, ""
        parts: list[Part] = []
        if self._state == "thought":
            self._say(parts, held.rstrip("\n"))
        elif held and self._state != "gap":
            parts.append(("answer", held))
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """One transition; False when more text is needed."""
        if self._state == "answer":
            if self._held:
                parts.append(("answer", self._held))
                self._held = ""
            return False
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "answer"
            return bool(self._held)
        assert self._markers is not None, "without markers all is answer"
        start, end = self._markers
        if self._state == "start":
            seen = self._held.lstrip()
            if seen.startswith(start):
                self._held = seen[len(start) :]
                self._state = "thought"
                return True
            if start.startswith(seen):
                return False
            self._state = "answer"
            return True
        found = [(at, mark) for mark in (end, *self._ends) if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            self._say(parts, self._held[:at].rstrip("\n"))
            self._held = self._held[at + len(mark) if mark == end else at :]
            self._state = "gap" if mark == end else "answer"
            return True
        keep = max(held_back(self._held, mark) for mark in (end, *self._ends))
        free = self._held[: len(self._held) - keep].rstrip("\n")
        self._say(parts, free)
        self._held = self._held[len(free) :]
        return False

    def _say(self, parts: list[Part], text: str) -> None:
        text = text if self._has_thought else text.lstrip("\n")
        if text:
            self._has_thought = True
            parts.append(("thought", text))
