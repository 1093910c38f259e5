"""A MathML element as any parser gives it."""

from dataclasses import dataclass, field

from alloy.data.web.symbols import INVISIBLE


@dataclass(slots=True)
class Element:
    """A MathML element: its name without prefix, attributes, children in order, and the text before the first child.

    Text behind a child is a child of its own with the name `#text`.
    """

    tag: str
    attributes: dict[str, str] = field(default_factory=dict[str, str])
    children: list["Element"] = field(default_factory=list["Element"])
    text: str = ""

    def get(self, name: str) -> str:
        """An attribute, empty where it is missing."""
        return self.attributes.get(name, "").strip()

    def word(self) -> str:
        """All text below, without what no reader sees and with single spaces."""
        if not self.children:
            parts = [self.text]
        else:
            parts, waiting = list[str](), list["Element"]([self])
            while waiting:
                element = waiting.pop()
                parts.append(element.text)
                waiting.extend(reversed(element.children))
        return " ".join("".join(c for c in "".join(parts) if c not in INVISIBLE).split())


def row(*children: Element) -> Element:
    """Elements side by side."""
    return children[0] if len(children) == 1 else Element("mrow", children=list(children))


def operator(text: str, fence: bool = False) -> Element:
    """An `mo`."""
    return Element("mo", {"fence": "true"} if fence else {}, text=text)


def fenced(opening: str, inner: Element, closing: str) -> Element:
    """An element between two fences."""
    return Element("mrow", children=[operator(opening, True), inner, operator(closing, True)])
