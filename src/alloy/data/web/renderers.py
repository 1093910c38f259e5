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
    raise RecipeError(f'renderer = "{name}" is unknown; use {", ".join(get_args(Renderer))}.')
