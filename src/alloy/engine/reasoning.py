"""Thoughts in a stream of tokens: where they open and close, how long they are, and when a budget ends one.

Markers that are single tokens are told by their ids, others by the text of the tokens, since tokens join the ends of a marker
with what stands beside it (">" and a newline, a full stop and "</") and a model may spell it in several ways.

The limit is hard: exactly `budget` thought tokens at most, those in the prompt included. Inside the last `grace` of them
the first newline closes the thought softly. The closing text belongs to the answer's overhead, not to the thought.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ThinkingMarkers:
    """What opens and closes a thought.

    Attributes:
        start: its text
        end: its text
        ids: both as single tokens; empty if they are several
        turns: ids that end a turn, and so a thought in what came before
        piece: text of a token; where the markers are single tokens, all others have none
        encode: ids of a text
    """

    start: str
    end: str
    ids: tuple[int, ...]
    turns: frozenset[int]
    piece: Callable[[int], str]
    encode: Callable[[str], Sequence[int]]

    def opening(self, prompt: Sequence[int]) -> int:
        """Index of the token in which the marker of a prompt's open thought begins; the length if none is open."""
        longest, text = max(len(self.start), len(self.end)), ""
        for i in reversed(range(len(prompt))):
            if prompt[i] in self.turns:
                break
            text = self.piece(prompt[i]) + text[:longest]
            if self.start in text or self.end in text:
                return i if text.rfind(self.start) > text.rfind(self.end) else len(prompt)
        return len(prompt)

    def rest(self, held: str) -> tuple[int, ...]:
        """Ids that complete the end marker after `held`; none if nothing is held, or no ids have just this text."""
        text = self.end[len(held) :]
        ids = tuple(self.encode(text)) if held else ()
        return ids if "".join(map(self.piece, ids)) == text else ()

    def spills(self, vocab: int) -> dict[str, list[int]]:
        """By what is held of the end marker: tokens that would complete it and begin the answer in one."""
        pieces = [] if self.ids else [self.piece(token) for token in range(vocab)]
        return {
            held: [i for i, piece in enumerate(pieces) if (held + piece).partition(self.end)[2].strip("\n")]
            for held in (self.end[:size] for size in range(len(self.end)))
        }


class Thought:
    """Whether a sequence is inside a thought, and the length of its thoughts: a function of its tokens.

    A token that holds thought and a part of the end marker is thought. Tokens of what may become the end marker are thought
    until it is complete. Markers of several tokens are mere text once the answer has begun.

    Args:
        markers: what opens and closes a thought.
        prompt: what the sequence begins with.
        inside: without a prompt, whether a thought is open at the beginning.

    Attributes:
        inside: a thought is open
        used: tokens of thought
        held: end of the text that begins the next marker
    """

    def __init__(self, markers: ThinkingMarkers, prompt: Sequence[int] = (), inside: bool = False) -> None:
        self._markers = markers
        self.inside, self.used, self.held = inside, 0, ""
        # in a prompt, and as single tokens, markers count wherever they stand
        self._is_answer, self._anywhere = False, True
        # where the tokens that are counted, and hold `held` alone, begin in it
        self._begins: list[int] = []
        for token in prompt[markers.opening(prompt) :]:
            self.push(token)
        self._anywhere = bool(markers.ids)

    def push(self, token: int, counts: bool = True) -> None:
        """Take the next token; `counts`: inside a thought it is a part of it."""
        if self._is_answer:
            return
        text, begins = self.held + self._markers.piece(token), self._begins
        if not text:
            self.used += self.inside and counts
            return
        if self.inside and counts:
            self.used += 1
            begins = [*begins, len(self.held)]
        was_inside = self.inside
        while (at := text.find(mark := self._markers.end if self.inside else self._markers.start)) >= 0:
            if not (self.inside or self._anywhere) and text[:at].strip():
                break
            self.used -= sum(begin >= at for begin in begins)
            text, begins = text[at + len(mark) :], []
            self.inside = not self.inside
        size = held_back(text, mark)
        self.held = text[len(text) - size :]
        self._begins = [b + size - len(text) for b in begins if b >= len(text) - size] if size else []
        is_text = was_inside or len(text.lstrip()) > size
        self._is_answer = is_text and not (self.inside or self._anywhere)


class ThinkingBudget:
    """Counter of one sequence.

    Args:
        budget: thought tokens allowed.
        grace: width of the soft landing before the budget.
        text: ids to force before the end marker when the budget closes the thought.
        markers: what opens and closes a thought.
        has_newline: whether a token's text contains a newline.

    Attributes:
        thought: the sequence's, with the tokens it has used
    """

    def __init__(
        self,
        budget: int,
        grace: int,
        text: Sequence[int],
        markers: ThinkingMarkers,
        has_newline: Callable[[int], bool],
    ) -> None:
        self._budget = budget
        self._soft = budget - grace
        self._close = (*text, *(markers.ids[1:] or markers.encode(markers.end)))
        self._markers = markers
        self._has_newline = has_newline
        self.thought = Thought(markers)

    def start(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Read a prompt whose last thought may be open still; ids to force at once."""
        self.thought = Thought(self._markers, prompt)
        return self._force() if self.thought.inside and self.thought.used >= self._budget else ()

    def observe(self, token: int, is_forced: bool) -> tuple[int, ...]:
        """Take the next token; ids to force from the next position on."""
        thought, before = self.thought, self.thought.used
        thought.push(token, counts=not is_forced)
        if is_forced or not thought.inside:
            return ()
        lands = thought.used > max(before, self._soft) and self._has_newline(token)
        return self._force() if lands or thought.used >= self._budget else ()

    def _force(self) -> tuple[int, ...]:
        """The end marker: what is missing of it, or after the closing text all of it."""
        return self._markers.rest(self.thought.held) or self._close


def held_back(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0
