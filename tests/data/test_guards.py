"""What a rewritten chunk must keep, and what it must not add."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.guards import (
    code_kept,
    has_framing,
    is_refusal,
    judge,
    loops,
    math_kept,
    novel,
    strip_fence,
    strip_framing,
)

PAGE = """# Roots

The roots of a quadratic polynomial are found by completing the square, which every student learns in school.

$$x = \\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}$$

Let $a$ be positive. Then $f(x) = a x^2 + b x + c$ has a minimum, and it is attained where $x = -b/2a$ holds.

```python
def root(a, b, c):
    return (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)
```

The method is due to Babylonian scribes, who solved such problems on clay tablets some four thousand years ago."""


def test_a_faithful_rewriting_passes() -> None:
    """Another notation of the same formulas, and a comma mended, count as nothing."""
    output = (
        PAGE.replace("\\frac", "\\dfrac")
        .replace("a x^2 + b x + c", "ax^{2}+bx+c")
        .replace("scribes, who", "scribes who")
    )
    assert judge(PAGE, PAGE).is_good
    assert str(judge(PAGE, output)) == "ok"


@pytest.mark.parametrize(
    ("output", "finish_reason", "guards"),
    [
        (PAGE.replace("$$x = \\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}$$", ""), "stop", {"math": 2 / 3}),
        (PAGE.replace("\n    return", "\n  # gone\n"), "stop", {"code": 0.5}),
        (PAGE, "length", {"truncated": 1.0}),
        ("Here is the cleaned text:\n\n" + PAGE, "stop", {"framing": 1.0}),
        ("Sure! " + PAGE, "stop", {"framing": 1.0}),
        ("", "stop", {"math": 0.0, "code": 0.0, "length": 0.0}),
    ],
)
def test_each_guard_names_its_figure(output: str, finish_reason: str, guards: dict[str, float]) -> None:
    assert judge(PAGE, output, finish_reason).failed == pytest.approx(guards)


def test_a_refusal_a_loop_and_an_invention_are_seen() -> None:
    assert "refusal" in judge(PAGE, "I'm sorry, but I can't help with that.").failed
    again = (
        "the same words come again and again until the limit of the answer is reached and nobody knows why that is so "
    )
    assert {"loop", "novel"} <= set(judge(PAGE, PAGE + again * 3).failed)
    story = PAGE + "\n\n" + " ".join(f"invented{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(40))
    assert judge(PAGE, story).failed["novel"] > 0.4


def test_what_the_page_says_itself_is_no_fault() -> None:
    """A page may begin like an answer, and repeat itself."""
    page = (
        "Sure, here is the text of the oath. "
        + "It is read aloud in the square every year on the first day of spring by all. " * 9
    )
    assert judge(page, page).is_good


def test_retention_by_hand() -> None:
    source = "$a$ $b=1$ $c+1=2$ and $$d^2 = e$$ and \\(f \\le g_1\\)"
    # a and b=1 are too short to count
    assert math_kept(source, "c + 1 = 2 and d^{2}=e, $f\\leq g_{1}$") == 1.0
    assert math_kept(source, "$c+1=2$") == pytest.approx(1 / 3)
    assert math_kept("prose", "") == 1.0
    code = "```\na = 1\n\n  b = 2\nc = 3\n```"
    assert code_kept(code, "```\n  a = 1\nb = 2\n```") == pytest.approx(2 / 3)
    assert code_kept("no code", "") == 1.0


def test_loops_and_shingles_by_hand() -> None:
    words = [f"w{i}" for i in range(20)]
    assert loops(" ".join(words * 3)) == 3
    assert loops(" ".join(words[:-1])) == 0
    letters = "ab cd ef gh ij kl mn op qr st uv wx yz"
    assert novel(letters, letters) == 0.0
    assert novel(letters, letters.replace("ab", "zz")) == 0.5
    assert novel(letters, "ef gh") == 0.0
    assert novel(letters, "ef ij") == 1.0
    assert novel(letters, "ab cd\n\nuv wx yz") == 0.0
    assert novel(letters, "$ef = zz$ and 12".replace("and", "")) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "Here is the cleaned text:",
        "Here's a cleaned-up version of the page:",
        "Certainly! Below you find it.",
        "Below is the main content of the page.",
        "**Here is the conversation:**",
        "I have removed the menus.",
        "Cleaned text:",
    ],
)
def test_framing_is_known(text: str) -> None:
    assert has_framing(text)
    assert strip_framing(text + "\n\nThe text.") == "The text."
    assert strip_framing(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "Here we prove the theorem.",
        "This is a proof of the theorem of Gauss.",
        "Following Gauss, we write $x$.",
        "Surely there is one.",
        "Below is the graph of $f$.",
        "I can see that the sum is 3.",
    ],
)
def test_texts_that_only_sound_like_it_are_not(text: str) -> None:
    assert not has_framing(text)
    assert not is_refusal(text)


def test_a_fence_around_the_whole_goes() -> None:
    assert strip_fence("```markdown\n# A\n\ntext\n```\n") == "# A\n\ntext"
    two = "```\na\n```\n\ntext\n\n```\nb\n```"
    assert strip_fence(two) == two


@given(st.text(max_size=300), st.text(max_size=300))
def test_no_text_breaks_the_guards(source: str, output: str) -> None:
    verdict = judge(source, output)
    assert all(0 <= verdict.failed.get(name, 0) <= 1 for name in ("math", "code", "novel"))
