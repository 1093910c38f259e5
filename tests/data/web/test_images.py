"""Formulas that are images."""

import pytest

from alloy.data.web.images import formula_of_image, is_math_image


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"src": "https://latex.codecogs.com/gif.latex?%5Cdpi%7B150%7D%20x&space;+&space;y%2Bz"}, "$x + y+z$"),
        ({"src": "//latex.codecogs.com/svg.image?\\inline&space;\\large&space;a_1"}, "$a_1$"),
        ({"src": "http://www.codecogs.com/eq.latex?\\frac{a}{b"}, r"$\frac{a}{b}$"),
        ({"data-lazy-src": "https://latex.codecogs.com/png.latex?x^2", "src": "data:image/gif;base64,R0lGOD"}, "$x^2$"),
        ({"srcset": "https://latex.codecogs.com/png.latex?x^2 2x"}, "$x^2$"),
        ({"src": "/cgi-bin/mimetex.cgi?x+y"}, "$x+y$"),
        ({"src": "/cgi-bin/mathtex.cgi?\\alpha%2B1"}, r"$\alpha+1$"),
        ({"src": "https://s0.wp.com/latex.php?latex=x%2By+z&bg=ffffff&fg=000000&s=0"}, "$x+y z$"),
        ({"src": "https://s0.wp.com/latex.php?latex=cut", "alt": "x + y", "class": "latex"}, "$x + y$"),
        ({"src": "https://chart.googleapis.com/chart?cht=tx&chl=x%5E2+y"}, "$x^2 y$"),
        ({"src": "https://chart.googleapis.com/chart?cht=bvs&chl=a"}, None),
        ({"src": "https://www.zhihu.com/equation?tex=%5Calpha%2Bb"}, r"$\alpha+b$"),
        ({"src": "form_8.png", "class": "formulaInl", "alt": r"$Y \leftarrow \alpha$"}, r"$Y \leftarrow \alpha$"),
        ({"src": "form_8.png", "class": "formulaDsp", "alt": r"\[ a \]"}, "$$a$$"),
        ({"class": "mwe-math-fallback-image-inline", "alt": r"{\displaystyle N}"}, "$N$"),
        ({"class": "math", "alt": "f"}, "$f$"),
        ({"src": "_images/math/e3.png", "alt": r"f(x_1,\ldots) = b."}, r"$f(x_1,\ldots) = b.$"),
        ({"src": "a.png", "alt": "a.png"}, None),
        ({"src": "a_b.png", "alt": "The graph of a function", "class": "tex"}, None),
        ({"src": "logo.png", "alt": "Logo"}, None),
        ({}, None),
    ],
)
def test_formula_of_an_image(attributes: dict[str, str], expected: str | None) -> None:
    what = formula_of_image(attributes)
    assert (what and what.text) == expected


def test_image_of_a_formula_without_text_is_mathematics_lost() -> None:
    lost = {"src": "img12.png", "class": "math", "alt": ""}
    assert formula_of_image(lost) is None
    assert is_math_image(lost)
    assert not is_math_image({"src": "photo.jpg", "alt": "A cat"})


@pytest.mark.parametrize("piece", ["&bg=", "?latex=", "mimetex?", "%5C", "&", "x 2w,"])
def test_hostile_address_is_read(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    for name in ("src", "srcset", "alt"):
        formula_of_image({name: "https://latex.codecogs.com/gif.latex?" + text})
        formula_of_image({name: "/latex.php?" + text, "class": "math"})
