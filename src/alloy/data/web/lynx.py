"""Pages to text by the browser lynx, as the reference pipeline does it.

One process a page with the flags of NeMo Curator (nemo_curator/stages/math/download/html_extractors/lynx.py), which made
Nemotron-CC-Math. Paper: Nemotron-CC-Math (Karimi Mahabadi et al., 2025), section 2. arXiv:2508.15096

Differs:
- A NUL becomes U+FFFD, as in browsers; lynx stops reading at one.
- Pages are decoded before (`decode`), and a byte order mark says so; lynx believes a `<meta charset>` above its flags.
"""

import re
import shutil
import subprocess

from alloy.data.web.decode import decode
from alloy.data.web.delimiters import read_configuration
from alloy.data.web.formula import Formula
from alloy.data.web.layout import Layout, Tag
from alloy.data.web.markup import split
from alloy.data.web.page import DEFAULTS
from alloy.errors import DataError, ResourceError

FLAGS = (
    *("-dump", "-stdin", "-nolist", "-width=10000", "-assume_charset=utf-8", "-display_charset=utf-8"),
    *("-localhost", "-force_html"),
)
TIMEOUT_S = 20.0
_MARK = re.compile("\ue000(\\d+)\ue001")
_NO_MARKS = str.maketrans("", "", "\ue000\ue001")


def render_lynx(body: bytes, content_type: str = "", url: str = "") -> str:
    """A page's text as the reference pipeline has it; `url` changes nothing."""
    return lay_out(decode(body, content_type).text)


def lay_out(markup: str, timeout_s: float = TIMEOUT_S) -> str:
    """What lynx shows of a page."""
    program = shutil.which("lynx")
    if program is None:
        raise ResourceError(
            "the renderers lynx and dom+lynx run the program lynx, which is not installed: install it (apt-get install lynx, "
            "brew install lynx), or use --renderer dom."
        )
    page = markup.replace("\0", "\ufffd").encode("utf-8-sig", "replace")
    try:
        done = subprocess.run([program, *FLAGS], input=page, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"lynx did not finish a page of {len(page):,} bytes in {timeout_s:g} s; leave it out."
        ) from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[:200]
        raise DataError(f"lynx failed with code {done.returncode} on a page of {len(page):,} bytes: {said}")
    return done.stdout.decode("utf-8", "replace")


class _Places(Layout):
    """Which tags and texts of a page each formula stood in; those between delimiters in the text stay where they are."""

    def __init__(self, parts: list[str]) -> None:
        has_scripts = any(part.startswith("script") and "math/" in part for part in parts[1::2])
        super().__init__(parts, read_configuration([], []), has_scripts=has_scripts)
        self.places: list[tuple[int, int, Formula]] = []
        self._found: Formula | None = None

    def _put(self, what: Formula | None) -> bool:
        self._found = what
        return super()._put(what)

    def _noted(self, i: int, j: int) -> int:
        if self._found is not None:
            self.places.append((i - 1, j, self._found))
            self._found = None
        return j

    def image(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().image(tag, i))

    def script(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().script(tag, i))

    def katex(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().katex(tag, i))

    def mathjax(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().mathjax(tag, i))

    def math(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().math(tag, i))

    def attribute(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().attribute(tag, i))

    def display_table(self, tag: Tag, i: int) -> int:
        return self._noted(i, super().display_table(tag, i))


def render_dom_lynx(body: bytes, content_type: str = "", url: str = "") -> str:
    """A page's text by lynx, with the formulas that our renderer finds in its elements.

    Each stands in the page as a mark of private-use characters, so that lynx neither breaks nor changes it. Macros stay.
    """
    parts = split(decode(body, content_type).text.translate(_NO_MARKS), DEFAULTS.max_depth, DEFAULTS.max_nodes)
    layout = _Places(parts)
    layout.read()
    marked: list[str] = []
    at = 0
    for number, (start, end, formula) in enumerate(layout.places):
        mark = f"\ue000{number}\ue001"
        marked += (_markup(parts, at, start), f"<br>{mark}<br>" if formula.display else mark)
        at = end
    marked.append(_markup(parts, at, len(parts)))
    return _MARK.sub(lambda found: layout.places[int(found[1])][2].text, lay_out("".join(marked)))


def _markup(parts: list[str], start: int, end: int) -> str:
    return "".join(f"<{parts[i]}>" if i % 2 else parts[i] for i in range(start, end))
