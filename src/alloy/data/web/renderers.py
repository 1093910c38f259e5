"""What makes text of a page, by name."""

from collections.abc import Callable

from alloy.errors import RecipeError

# bytes of a page, its Content-Type, its address -> text
Render = Callable[[bytes, str, str], str]


def render_dom(body: bytes, content_type: str = "", url: str = "") -> str:
    """A page's text by our own renderer with its defaults."""
    from alloy.data.web.decode import decode
    from alloy.data.web.page import render_text

    return render_text(decode(body, content_type).text, content_type, url).text


def find_renderer(name: str) -> Render:
    """`dom` is ours; `lynx` the reference pipeline's; `dom+lynx` puts formulas in as text and lets lynx lay out the rest."""
    from alloy.data.web.lynx import render_dom_lynx, render_lynx

    renderers: dict[str, Render] = {"dom": render_dom, "lynx": render_lynx, "dom+lynx": render_dom_lynx}
    if name not in renderers:
        raise RecipeError(f'renderer = "{name}" is unknown; use {", ".join(renderers)}.')
    return renderers[name]
