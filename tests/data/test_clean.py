"""Cleaning by rules: what sites say goes, and no formula or line of code does."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alloy.data.blocks import code_lines, formulas
from alloy.data.clean import clean_text, clean_texts, normalise, repair_table, unify
from alloy.data.guards import math_kept

PIECES = [
    "Home | About | Contact",
    "- Home\n- News\n- About us\n- Contact\n- $x^2+1=3$",
    "Skip to content",
    "© 2021 Example Corp. All rights reserved.",
    "Accept all cookies",
    "Share on Facebook $a+b=c$",
    "Log in to reply \\(y_1 + z = 0\\)",
    "# Next\n",
    "# A Theorem",
    "Let $f(x) = x^2$ be given. Then \\[ \\int f = \\frac{x^3}{3} \\] holds, and \\(a<b\\)5 is fine.",
    "\\begin{align}\na &= b \\\\[2pt]\nc &= d\n\\end{align}",
    "$$\n\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}\n\n+ 1\n$$",
    "```\nHome\n\nlog in   \n© 2020\n```",
    "~~~ python\ndef share(this):\n\treturn 'All rights reserved'\n~~~",
    "| a | $x|y$ |\n| 1 |\n| 2 | 3 | `p|q` |",
    "| Home | About |",
    "| next |\n|---|\n| $n + 1$ |",
    "    subscribe(newsletter);",
    "A long paragraph about numbers that says a lot about them and ends after more than sixty characters, with $p+q=r$.",
    "A long paragraph about numbers that says a lot about them and ends after more than sixty characters, with $p+q=r$.",
    "English | Deutsch | Français",
    "It costs \\$5 or $6 and $7.",
    "Inline `\\(code\\)` and `$HOME/$USER` stay. ",
    "Zero\u200bwidth\u00a0space\r\nand `\u200b`",
]
pages = st.lists(st.sampled_from(PIECES) | st.text("ab $\\`|\n#-()[]{}^_~=.", max_size=30), max_size=12).map(
    "\n\n".join
)


@given(pages)
@settings(max_examples=300)
@example("```\n$a$\n")
def test_no_formula_and_no_line_of_code_is_lost(page: str) -> None:
    """Formulas as a set: a repeated paragraph goes with its own; code line by line."""
    cleaned = clean_text(page).text
    lines = Counter(line.rstrip() for line in code_lines(normalise(page)))
    assert Counter(line.rstrip() for line in code_lines(cleaned)) == lines
    have = {"".join(formula.split()) for formula in formulas(cleaned)}
    for formula in {"".join(formula.split()) for formula in formulas(normalise(page))}:
        assert formula in have
    assert math_kept(page, cleaned) == 1.0


@given(pages)
def test_cleaning_is_deterministic_and_adds_no_word(page: str) -> None:
    first = clean_text(page)
    assert clean_text(page) == first
    assert set(re.findall(r"\w+", first.text)) <= set(re.findall(r"\w+", normalise(page)))
    assert 0 <= first.removed <= len(page) + 2


@pytest.mark.parametrize(
    "line",
    [
        "Home | About | Contact",
        "Skip to main content",
        "Copyright © 2008-2023, The Community.",
        "All Rights Reserved",
        "We use cookies to improve your experience. By continuing you accept our cookie policy.",
        "Subscribe to our newsletter",
        "Log in or sign up",
        "Share on Twitter",
        "« Previous | Next »",
        "Powered by WordPress",
        "Last updated on Nov 02, 2022.",
        "Back to top",
        "Leave a comment",
        "12 comments",
        "Posted in Mathematics, Physics",
        "English | Deutsch | Français",
        "[Home](/) [About](/about) [Contact us](/contact) [News](/news)",
    ],
)
def test_what_only_sites_say_goes(line: str) -> None:
    content = "A paragraph that says something about $x + 1 = 2$."
    found = clean_text(f"{content}\n\n{line}")
    assert found.text == content
    assert found.removed == len(line)


@pytest.mark.parametrize(
    "line",
    [
        "Next, we prove the theorem.",
        "Home economics is the study of the household.",
        "More generally, the sum converges.",
        "Share the cake among three people.",
        "The copyright of a work ends seventy years after the death of its author, and we discuss why that is so in detail here.",
        "Follow the steps below to find the root.",
        "Up to isomorphism there is one such group.",
        "search(tree, key)",
        "Top-down parsing begins with the start symbol.",
        "previous = next",
        "Print the result: $r$.",
    ],
)
def test_what_an_author_says_stays(line: str) -> None:
    content = "A paragraph that says something about $x + 1 = 2$."
    assert clean_text(f"{content}\n\n{line}\n\n{content[:-1]} again.").text.split("\n\n")[1] == line


def test_what_the_pages_of_a_host_share_goes() -> None:
    """Not so what pages of other hosts share, headings, and what holds a formula."""
    shared = "The Daily Number, a magazine for everybody\n\nWith $e = mc^2$\n\n## Summary\n\n"
    pages = [f"{shared}Page {i} says this about the number {i}." for i in range(5)]
    cleaned = clean_texts([*pages, pages[0]], ["a.org"] * 5 + ["b.org"])
    rest = "With $e = mc^2$\n\n## Summary\n\nPage 3 says this about the number 3."
    assert cleaned[3].text == rest
    assert cleaned[5].text == pages[0]
    assert clean_texts(pages[:3], ["a.org"] * 3)[0].text == pages[0]


def test_notation_and_space_by_hand() -> None:
    assert unify("\\(a\\), \\( b \\)2 and \\[c\n+ d\\]") == "$a$, $b$ 2 and $$c\n+ d$$"
    assert unify("\\begin{align}a\\end{align}.\nx") == "$$\\begin{align}a\\end{align}$$.\nx"
    kept = [
        "$\\begin{cases}a\\end{cases}$",
        "x \\begin{array}{l}a\\end{array} y",
        "`\\(a\\)`",
        "```\n\\(a\\)\n```",
        "\\\\(a\\\\)",
    ]
    for text in (*kept, "\\(a $ b\\)"):
        assert unify(text) == text
    assert normalise("a \r\nb\u00a0c\t\n```\nd  \n```\n\u200be") == "a\nb c\n```\nd  \n```\ne"
    # a joiner is a letter's part in Persian
    assert (
        normalise("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")
        == "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    )


def test_tables_are_repaired() -> None:
    assert repair_table("| a | b |\n|---|---|\n| 1 | 2 |") == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert repair_table("| a | b |\n| 1 |") == "| a | b |\n|---|---|\n| 1 | |"
    wide = "| a | b | | |\n|---|---|---|---|\n| $x|y$ | `p|q` |"
    assert repair_table(wide) == "| a | b |\n|---|---|\n| $x|y$ | `p|q` |"
    assert repair_table("| not\na table") == "| not\na table"


DATA = os.environ.get("ALLOY_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="ALLOY_TEST_DATA is not set")
def test_real_pages_lose_boilerplate_and_nothing_else() -> None:
    """Against another extractor's raw text, which keeps nearly all of it: at most 40 % of the known strings are left."""
    import json

    from resiliparse.extract.html2text import extract_plain_text

    folder = Path(str(DATA)) / "math-pages"
    before = after = 0
    for line in (folder / "expected.jsonl").read_text().splitlines():
        page = json.loads(line)
        html = (folder / "pages" / page["page"]).read_bytes().decode(page["encoding"], "replace")
        raw = extract_plain_text(html, preserve_formatting=True, main_content=False, list_bullets=True, alt_texts=True)
        cleaned = clean_text(raw).text
        squeezed, left = "".join(raw.split()), "".join(cleaned.split())
        kept = (
            [form for e in page["equations"] for form in [e["latex"], *e.get("alt", [])]] + page["code"] + page["prose"]
        )
        for string in ("".join(string.split()) for string in kept):
            assert (string in left) or string not in squeezed, (page["page"], string)
        for string in ("".join(string.split()) for string in page["boilerplate"]):
            before, after = before + (string in squeezed), after + (string in left)
    assert before >= 60
    assert after <= 0.4 * before
