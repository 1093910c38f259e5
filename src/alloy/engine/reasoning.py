"""Thinking budget: counts the tokens of a thought and says when its end marker must come.

The limit is hard: exactly `budget` thought tokens at most, those in the prompt included. Inside the last `grace` of them
the first newline closes the thought softly. The closing text belongs to the answer's overhead, not to the thought.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ThinkingMarkers:
    """Ids of the single tokens that open and close a thought."""

    start: int
    end: int


class ThinkingBudget:
    """Counter of one sequence.

    Args:
        budget: thought tokens allowed.
        grace: width of the soft landing before the budget.
        close: ids to force when the budget closes the thought; the last is the end marker.
        markers: what opens and closes a thought.
        has_newline: whether a token's text contains a newline.
    """

    def __init__(
        self,
        budget: int,
        grace: int,
        close: Sequence[int],
        markers: ThinkingMarkers,
        has_newline: Callable[[int], bool],
    ) -> None:
        self._budget = budget
        self._soft = budget - grace
        self._close = tuple(close)
        self._markers = markers
        self._has_newline = has_newline
        self._inside = False
        self.used = 0

    def start(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Read a prompt whose last thought may be open still; ids to force at once."""
        for token in prompt:
            if token == self._markers.start:
                self._inside, self.used = True, 0
            elif token == self._markers.end:
                self._inside, self.used = False, 0
            elif self._inside:
                self.used += 1
        if not self._inside:
            self.used = 0
        return self._force() if self._inside and self.used >= self._budget else ()

    def observe(self, token: int) -> tuple[int, ...]:
        """Count a token that the model chose; ids to force from the next position on."""
        if token == self._markers.end:
            self._inside = False
        elif self._inside:
            self.used += 1
            if self.used > self._soft and self._has_newline(token):
                return self._force()
        elif token == self._markers.start:
            self._inside = True
        return self._force() if self._inside and self.used >= self._budget else ()

    def _force(self) -> tuple[int, ...]:
        self._inside = False
        return self._close
