"""Speed of the rules cleaner on one core, and what it leaves: pages as our renderer writes them, and as raw text.

    ALLOY_TEST_DATA=... python benchmarks/clean.py

Process time of a whole batch, the median of five; the pages of the set of at most 50,000 characters of text (the three longer
ones are 124,000). Raw text is resiliparse's, all of the page. Boilerplate, prose, code and formulas are the set's probes, compared
without white space.
"""

import os
import statistics
import time
from pathlib import Path

from resiliparse.extract.html2text import extract_plain_text

from alloy.data.clean import clean_texts, normalise, unify
from alloy.data.web.decode import decode
from alloy.data.web.extraction import Page, read_pages
from alloy.data.web.renderers import find_renderer

LONGEST, REPEATS, ROUNDS = 50_000, 8, 5


def held(pages: list[Page], texts: list[str]) -> dict[str, int]:
    """How many probes of each kind the texts hold."""
    found = dict.fromkeys(("boilerplate", "prose", "code", "equations"), 0)
    for page, text in zip(pages, texts, strict=True):
        squeezed = "".join(text.split())
        for kind in ("boilerplate", "prose", "code"):
            found[kind] += sum("".join(probe.split()) in squeezed for probe in getattr(page, kind))
        for equation in page.equations:
            found["equations"] += any("".join(form.split()) in squeezed for form in equation.forms)
    return found


def main() -> None:
    """Clean, time, compare."""
    read = list(read_pages(Path(os.environ["ALLOY_TEST_DATA"]) / "math-pages"))
    pages = [page for page, _ in read]
    dom = find_renderer("dom")
    raw = [
        extract_plain_text(decode(body, page.content_type).text, preserve_formatting=True, main_content=False)
        for page, body in read
    ]
    for name, texts in (("rendered", [dom(body, page.content_type, page.url) for page, body in read]), ("raw", raw)):
        short = [unify(normalise(text)) if name == "raw" else text for text in texts if len(text) <= LONGEST] * REPEATS
        rates = []
        for _ in range(ROUNDS):
            start = time.process_time()
            clean_texts(short)
            rates.append(len(short) / (time.process_time() - start))
        chars, lines = sum(map(len, short)) / len(short), sum(text.count("\n") for text in short) / len(short)
        rate = statistics.median(rates)
        print(
            f"{name}: {rate:,.0f} pages/s, {rate * chars / 1e6:.1f} MB/s ({chars:,.0f} characters, {lines:,.0f} lines a page)"
        )
        print(f"  before {held(pages, texts)}")
        print(f"  after  {held(pages, [found.text for found in clean_texts(texts)])}")


if __name__ == "__main__":
    main()
