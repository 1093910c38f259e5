"""What makes text of a page, by name."""

from collections.abc import Callable
from typing import Literal, get_args

from alloy.errors import RecipeError

# bytes of a page, its Content-Type, its address -> text
Render = Callable[[bytes, str, str], str]
Renderer = Literal["dom", "lynx", "dom+lynx"]


def find_renderer(name: str) -> Render:
    """`dom` is ours; `lynx` the reference pipeline's; `dom+lynx` puts formulas in as text and lets lynx lay out the rest."""
    if name == "lynx":
        from alloy.data.web.lynx import render_lynx

        return render_lynx
    if name == "dom":
        from alloy.data.web.decode import decode
        from alloy.data.web.page import render_text

        return lambda body, content_type, url: render_text(decode(body, content_type).text, content_type, url).text
    raise RecipeError(f'renderer = "{name}" is unknown; use {", ".join(get_args(Renderer))}.')
