"""Token ids to text, one token at a time: no half characters, no part of a stop string.

Two hold-backs: bytes that do not yet make a character, and text that may turn out to begin a stop string. What is
released is final, so streamed pieces concatenate to the whole text whatever the token boundaries were.
"""

from codecs import getincrementaldecoder
from collections.abc import Callable, Collection, Sequence

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one growing sequence.

    Args:
        decode: ids to text, incomplete UTF-8 as U+FFFD (a tokenizer's plain decode).
        skip: ids without text (special tokens).
        stop: strings that end the text; the first to be complete counts, however tokens cut it.
        include_stop: keep the stop string in the text.
        spell: UTF-8 of an id, where a text is that of its ids one after another; None: `decode` alone knows.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        skip: Collection[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        spell: Callable[[int], bytes] | None = None,
    ) -> None:
        self._decode = decode
        self._spell = spell
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        self._skip = skip
        self._stop = tuple(stop)
        self._include_stop = include_stop
        # ids that are decoded together; their first `_known` ids and the text `_context` are out already
        self._window: list[int] = []
        self._known = 0
        self._context = ""
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """Text that became final with `token`; `stopped_by` is set once a stop string is complete."""
        if token in self._skip:
            return ""
        new = self._joined(token) if self._spell is None else self._utf8.decode(self._spell(token))
        return self._release(new, may_stop) if self._stop else new

    def _joined(self, token: int) -> str:
        """Text that became whole with `token`, for decoders that look at neighbours."""
        self._window.append(token)
        text = self._decode(self._window)
        # up to three bytes at the end may still become one character; all before them is final
        final = len(text)
        while final > len(text) - 3 and text[final - 1 : final] == REPLACEMENT:
            final -= 1
        start = len(self._context)
        if final <= start:
            return ""
        self._context = text[:final]
        if final == len(text):
            # the last piece stays in the window: some decoders treat the first token of a text differently
            del self._window[: self._known]
            self._known = len(self._window)
            self._context = self._decode(self._window)
        return text[start:final]

    def finish(self) -> str:
        """The rest: held text, and U+FFFD for a character that never became whole. Nothing after a stop string."""
        if self.stopped_by is not None:
            return ""
        new = self._decode(self._window)[len(self._context) :] if self._window else self._utf8.decode(b"", True)
        self._window, self._known, self._context = [], 0, ""
        text = self._release(new, may_stop=True)
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str, may_stop: bool) -> str:
        """Add `new` to the held text; what can no longer be part of a stop string comes out."""
        old, text = len(self._held), self._held + new
        if may_stop:
            # only ends inside `new` count; of several the earliest end, then the earliest start
            found = [
                (start + len(stop), start, stop)
                for stop in self._stop
                if (start := text.find(stop, max(0, old - len(stop) + 1))) >= 0
            ]
            if found:
                end, start, self.stopped_by = min(found)
                self._held = ""
                return text[: end if self._include_stop else start]
        keep = self._prefix_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _prefix_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        beginnings = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        return max((len(part) for part in beginnings if text.endswith(part)), default=0)
