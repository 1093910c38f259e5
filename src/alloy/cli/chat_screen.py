"""An answer on the screen while it grows: Markdown on a terminal, thought dimmed; plain text elsewhere."""

import re
import time
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

_EVERY_S = 0.08
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")
# the start of an item of a list, or of what may become one
_ITEM = re.compile(r" {0,3}(?:(?:[-+*]|\d{1,9}[.)])(?=\s|$)|\d{1,9}$)")


class Screen:
    """One answer. What can no longer change is printed for good; only the last block of Markdown is drawn again and again.

    Args:
        console: where to
        thoughts: where thought goes if `console` is not a terminal; None: to `console` as well
    """

    def __init__(self, console: Console, thoughts: Console | None = None) -> None:
        self.console = console
        self.thoughts = thoughts or console
        self._is_thought = False
        self._has_settled = False
        self._open = ""
        self._drawn_at = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        if self._live:
            self._live.start()

    def add(self, text: str, is_thought: bool) -> None:
        """Show more of the answer."""
        if is_thought != self._is_thought:
            self._settle(len(self._open))
            if self._live is None and not is_thought:
                self.thoughts.print()
            self._is_thought = is_thought
        if self._live is None:
            self._target().print(self._plain(text), end="")
            return
        self._open += text
        self._settle(self._open.rfind("\n") + 1 if is_thought else whole_blocks(self._open))
        if time.monotonic() - self._drawn_at >= _EVERY_S:
            self._drawn_at = time.monotonic()
            self._live.update(_Tail(self._block(self._open)), refresh=True)

    def close(self, note: str = "") -> None:
        """Print what is still open, and after it `note`."""
        if self._live:
            self._settle(len(self._open))
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None
            if note:
                self.console.print(Text(note.strip(), style="dim"))
        else:
            self._target().print(Text(note, style="dim"))

    def _settle(self, length: int) -> None:
        """Print the first `length` letters of what is open for good."""
        block, self._open = self._open[:length], self._open[length:]
        if self._live and block.strip():
            self._live.update("", refresh=True)
            if self._has_settled and not self._is_thought:
                self.console.print()
            self._has_settled = True
            self.console.print(self._block(block.strip("\n")))

    def _block(self, text: str) -> RenderableType:
        return self._plain(text) if self._is_thought else Markdown(text)

    def _plain(self, text: str) -> Text:
        return Text(text, style="dim" if self._is_thought else "")

    def _target(self) -> Console:
        return self.thoughts if self._is_thought else self.console


class _Tail:
    """The last lines of something that may be higher than the screen."""

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        lines = console.render_lines(self.inner, options, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def whole_blocks(text: str) -> int:
    """Letters of Markdown at the start of `text` whose look no later letter can change.

    They end at an empty line outside of code after which text begins at the margin; the items of a list, which may
    have empty lines between them and are numbered together, stay together.
    """
    end = at = 0
    fence: str | None = None
    is_after_empty = in_list = False
    for line in text.splitlines(keepends=True):
        is_item = fence is None and _ITEM.match(line) is not None
        if is_after_empty and fence is None and line.strip() and not line[0].isspace() and not (in_list and is_item):
            end, in_list = at, False
        in_list |= is_item
        mark = _FENCE.match(line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and fence and mark[1].startswith(fence) and not mark[2].strip():
            fence = None
        is_after_empty = not line.strip()
        at += len(line)
    return end
