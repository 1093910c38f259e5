"""Pages by lynx: where the program is there, and what is said where it is not."""

import shutil

import pytest

from alloy.data.web.lynx import FLAGS, lay_out, render_lynx
from alloy.data.web.renderers import find_renderer
from alloy.errors import DataError, RecipeError, ResourceError

needs_lynx = pytest.mark.skipif(shutil.which("lynx") is None, reason="lynx is not installed")


def test_flags_are_those_of_the_reference_pipeline() -> None:
    """As the paper's pipeline passes them."""
    assert " ".join(FLAGS) == (
        "-dump -stdin -nolist -width=10000 -assume_charset=utf-8 -display_charset=utf-8 -localhost -force_html"
    )


@needs_lynx
@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1", "utf-16"])
def test_page_in_any_encoding(encoding: str) -> None:
    """A page that names its own encoding comes out as characters, TeX as it stands, scripts not at all."""
    page = f"<meta charset={encoding}><p>Énergie \\(E=mc^2\\)</p><script type='math/tex'>x</script><ul><li>a\0b</ul>"
    assert render_lynx(page.encode(encoding)).split("\n") == ["   Énergie \\(E=mc^2\\)", "     * a\ufffdb", ""]
    assert find_renderer("lynx") is render_lynx


@needs_lynx
def test_page_that_takes_too_long() -> None:
    """The limit is told."""
    with pytest.raises(DataError, match=r"did not finish a page of 800,\d+ bytes in 0.001 s"):
        lay_out("<p>a</p>" * 100_000, timeout_s=0.001)


def test_lynx_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError, match=r"lynx, which is not installed: install it \(apt-get install lynx"):
        lay_out("")


def test_unknown_renderer() -> None:
    """The names are told."""
    with pytest.raises(RecipeError, match=r'"links" is unknown; use dom, lynx, dom\+lynx'):
        find_renderer("links")


@needs_lynx
def test_formulas_are_recovered_before_lynx_lays_the_page_out() -> None:
    """Script, image, KaTeX and MathML become text that no line break or white space of lynx's touches."""
    long = "+".join(f"x_{{{i}}}" for i in range(400))
    page = (
        f"<p>a <script type='math/tex'>u &lt; v</script> b \ue000 0 \ue001 c <img alt='$y^2$' class=math src=x.png> d \\(w\\)"
        f"<script type='math/tex; mode=display'>{long}</script></p><ul><li>e <math><msup><mi>z</mi><mn>2</mn></msup></math>"
        "<li><span class=katex><span class=katex-mathml><math><semantics><mi>q</mi><annotation encoding='application/x-tex'>q</annotation>"
        "</semantics></math></span><span class=katex-html>q</span></span></ul>"
    )
    lines = [
        line.strip() for line in find_renderer("dom+lynx")(page.encode(), "text/html; charset=utf-8", "").split("\n")
    ]
    assert [line for line in lines if line] == [
        r"a $u < v$ b 0 c $y^2$ d \(w\)",
        f"$${long}$$",
        "* e $z^{2}$",
        "* $q$",
    ]
