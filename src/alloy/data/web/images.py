"""Formulas that are images: LaTeX from the address that a service drew them by, or from the text beside them."""

import re
from collections.abc import Mapping
from urllib.parse import unquote

from alloy.data.web.formula import Formula
from alloy.data.web.tex import clean_tex, formula, looks_like_tex

SOURCES = ("src", "data-src", "data-lazy-src", "data-original", "data-lazy", "srcset", "data-srcset")
_CLASS_NAMES = (
    "latex tex math mathtex formulainl formuladsp mwe-math-fallback-image-inline mwe-math-fallback-image-display texrender ee_img "
    "wp-katex mathimage math-image latex-image inlineequation displayequation equation mimetex mathjax-image ql-img-inline-formula "
    "ql-img-displayed-equation tex-image"
)
CLASSES = frozenset(_CLASS_NAMES.split())
DISPLAYS = frozenset(
    [
        "formuladsp",
        "mwe-math-fallback-image-display",
        "displayequation",
        "ql-img-displayed-equation",
        "equation",
        "displaymath",
    ]
)
# an address above this is an image itself
LONGEST = 20_000
# services whose query is LaTeX: the whole of it, where `+` is a plus
_WHOLE = re.compile(
    r"(?:latex\.codecogs\.com|codecogs\.com(?:/eq)?|latex\.numberempire\.com|tex\.s2cms\.ru)/(?:[\w.]*latex|(?:gif|png|svg|swf|emf|pdf|eq)[\w.]*)"
    r"(?:\?|/)(?P<codecogs>.*)|(?:mimetex|mathtex)(?:\.cgi|\.php|\.exe)?\?(?P<mimetex>.*)|/(?:math|teq|tex)\.cgi\?(?P<cgi>.*)"
    r"|zhihu\.com/equation\?tex=(?P<zhihu>.*)|latex\.csdn\.net/eq\?(?P<csdn>.*)|math\.vercel\.app/?\?(?:from|inline)=(?P<vercel>.*)"
    r"|render\.githubusercontent\.com/render/math\?(?:.*&)?math=(?P<github>.*)",
    re.DOTALL,
)
# services with a form: the field that holds LaTeX, where `+` is a space
_FORM = re.compile(
    r"(?:latex\.php|latexrender[^?]*|s\d\.wp\.com/latex\.php|quicklatex[^?]*)\?(?:.*?&)?(?:latex|tex|formula)=(?P<latex>[^&]*)"
    r"|chart\.(?:googleapis|apis\.google)\.com/chart\?(?P<chart>.*)",
    re.DOTALL,
)
_SIZES = re.compile(r"&(?:bg|fg|s|c|zoom|mode|color|from)=[^&]*(?=&|$)")
_WIDE = re.compile(r"\s+\d+(?:\.\d+)?[wx]\s*(?:,|$)")
_NAME = re.compile(r"[\w .,:;!?%()/-]*\.(?:png|gif|jpe?g|svg|webp|bmp)", re.IGNORECASE)


def formula_of_image(attributes: Mapping[str, str]) -> Formula | None:
    """The formula that an `img` shows; None: it shows none, or one that nothing in it tells."""
    texts = [attributes.get(name) or "" for name in ("alt", "title")]
    names = set((attributes.get("class") or "").lower().split())
    display = bool(names & DISPLAYS)
    for name in SOURCES:
        address = attributes.get(name) or ""
        if ("?" in address or "latex" in address) and len(address) <= LONGEST:
            found = _of_address(_WIDE.split(address, 1)[0] if name.endswith("srcset") else address, texts)
            if found is not None:
                return formula(found, display or _is_display(found), "image")
    is_math = is_math_image(attributes)
    for text in texts:
        if _is_formula(text, is_math):
            return formula(text, display or _is_display(text), "image")
    return None


def is_math_image(attributes: Mapping[str, str]) -> bool:
    """Whether an `img` says that it shows mathematics; without a formula in it, that is mathematics lost."""
    if not CLASSES.isdisjoint((attributes.get("class") or "").lower().split()):
        return True
    address = next((attributes[name] for name in SOURCES if attributes.get(name)), "")[:500]
    return any(
        part in address
        for part in ("/math/render/", "codecogs.com", "mimetex", "mathtex", "latex.php", "/_images/math/", "form_")
    )


def _is_formula(text: str, is_math: bool) -> bool:
    bare = clean_tex(text) if is_math else text.strip()
    if not bare or _NAME.fullmatch(bare):
        return False
    # an image of a formula has it as its text, unless that is a sentence about it
    return looks_like_tex(text) or (is_math and len(re.findall(r"[A-Za-z]{3,}", bare)) < 3)


def _of_address(address: str, texts: list[str]) -> str | None:
    """LaTeX in the address of a service that draws formulas."""
    found = _WHOLE.search(address)
    if found is not None and found.lastgroup is not None:
        return _decoded(_SIZES.sub("", found[found.lastgroup]))
    found = _FORM.search(address)
    if found is None:
        return None
    if found["chart"] is not None:
        parts = (part.partition("=") for part in found["chart"].split("&"))
        fields: dict[str, str] = {name: value for name, _, value in parts}
        return _decoded(fields.get("chl", "").replace("+", " ")) if fields.get("cht", "").startswith("tx") else None
    # the author's own text beside it was not encoded
    for text in texts:
        if text.strip() and not _NAME.fullmatch(text.strip()):
            return text
    return _decoded(found["latex"].replace("+", " "))


def _decoded(query: str) -> str:
    tex = unquote(query, errors="replace")
    # sites encode what was encoded
    if "%5C" in tex or "%5c" in tex or "%7B" in tex:
        tex = unquote(tex, errors="replace")
    return tex.replace("&space;", " ").replace("\ufffd", "")


def _is_display(tex: str) -> bool:
    tex = tex.lstrip()
    return tex.startswith(
        ("$$", "\\[", "\\begin{displaymath}", "\\begin{equation", "\\begin{align", "\\begin{gather", "\\begin{eqnarray")
    )
