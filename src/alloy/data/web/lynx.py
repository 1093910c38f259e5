"""Pages to text by the browser lynx, as the reference pipeline does it.

One process a page with the flags of NeMo Curator (nemo_curator/stages/math/download/html_extractors/lynx.py), which made
Nemotron-CC-Math. Paper: Nemotron-CC-Math (Karimi Mahabadi et al., 2025), section 2. arXiv:2508.15096

Differs:
- A NUL becomes U+FFFD, as in browsers; lynx stops reading at one.
- Pages are decoded before (`decode`), and a byte order mark says so; lynx believes a `<meta charset>` above its flags.
"""

import shutil
import subprocess

from alloy.data.web.decode import decode
from alloy.errors import DataError, ResourceError

FLAGS = (
    *("-dump", "-stdin", "-nolist", "-width=10000", "-assume_charset=utf-8", "-display_charset=utf-8"),
    *("-localhost", "-force_html"),
)
TIMEOUT_S = 20.0


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
