"""A formula found in a page."""

from dataclasses import dataclass
from typing import Literal

# how a page stored it
Carrier = Literal[
    "tex",
    "script",
    "katex",
    "katex-glyphs",
    "mathjax-glyphs",
    "mathml-annotation",
    "mathml",
    "mathml-content",
    "asciimath",
    "image",
    "attribute",
    "subsup",
    "table",
]


@dataclass(frozen=True, slots=True)
class Formula:
    """LaTeX without delimiters, whether it stands on a line of its own, and what carried it."""

    tex: str
    display: bool
    carrier: Carrier

    @property
    def text(self) -> str:
        """With delimiters, as it stands in the text of a row."""
        return f"$${self.tex}$$" if self.display else f"${self.tex}$"
