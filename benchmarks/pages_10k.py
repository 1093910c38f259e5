"""A WARC file of many pages out of a few: words of the prose and numbers changed, markup and formulas in their form.

    python benchmarks/pages_10k.py OUT.warc.gz FOLDER... [--count 10000] [--seed 0]

FOLDER holds .html files, or `expected.jsonl` and `pages/`. Each copy of a page has another choice of words from the vocabulary of all
pages in the place of a third of its words, and other numbers of as many digits; what stands in tags, scripts, `pre`, MathML, and TeX
between delimiters keeps all but its numbers, so that removal of near-duplicates keeps the copies and a renderer has the same work.
"""

import argparse
import gzip
import json
import random
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHANGED_WORDS = 0.35

# markup, whole elements whose text is no prose, and TeX: what is not matched is prose
_FIXED = re.compile(
    r"(?P<keep><!--.*?-->|<(?P<raw>script|style|title|textarea)\b.*?</(?P=raw)\s*>|<[^>]*>|&[#\w]+;)"
    r"|(?P<numbers>\\\(.*?\\\)|\\\[.*?\\\]|\$\$.*?\$\$|\\begin\{(?P<name>\w+\*?)\}.*?\\end\{(?P=name)\})",
    re.DOTALL | re.IGNORECASE,
)
# elements inside which words stay, because they are code or the glyphs of a formula
_CODE = re.compile(r"<(?P<close>/?)(?P<name>pre|code|tt|math|annotation|mjx-container|svg|samp|kbd)\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\w\\$&])[a-z]{4,}(?![\w\\$])")
_NUMBER = re.compile(r"(?<![\w#&.])\d+(?![\w;])")


class Page(NamedTuple):
    """One of the pages that copies are made of."""

    name: str
    body: bytes
    encoding: str
    content_type: str


def read_pages(folder: Path) -> Iterator[Page]:
    """All pages of a folder, with the encodings that its expected.jsonl tells."""
    truth = folder / "expected.jsonl"
    if truth.exists():
        for row in map(json.loads, truth.read_text("utf-8").splitlines()):
            body = (folder / "pages" / row["page"]).read_bytes()
            yield Page(row["page"], body, row.get("encoding", "utf-8"), row.get("content_type", "text/html"))
    else:
        for file in sorted(folder.rglob("*.html")):
            yield Page(file.name, file.read_bytes(), "utf-8", "text/html")


def vocabulary(pages: list[Page]) -> list[str]:
    """Words of the prose of all pages, once each."""
    words: set[str] = set()
    for page in pages:
        text = _FIXED.sub(" ", page.body.decode(page.encoding, "replace"))
        words.update(word for word in _WORD.findall(text) if word.isascii())
    return sorted(words)


def varied(html: str, words: list[str], rng: random.Random) -> str:
    """The page with other words and numbers."""
    # digits of one number change alike in the whole page, so that references still fit
    digits = "".join(rng.sample("123456789", 9))
    table = str.maketrans("123456789", digits)

    def number(found: re.Match[str]) -> str:
        return found[0].translate(table)

    def word(found: re.Match[str]) -> str:
        return rng.choice(words) if rng.random() < CHANGED_WORDS else found[0]

    parts: list[str] = []
    at = depth = 0
    for fixed in _FIXED.finditer(html):
        prose = html[at : fixed.start()]
        parts.append(_NUMBER.sub(number, prose if depth else _WORD.sub(word, prose)))
        parts.append(_NUMBER.sub(number, fixed[0]) if fixed["numbers"] else fixed[0])
        at = fixed.end()
        code = _CODE.match(fixed[0])
        if code and not fixed[0].endswith("/>"):
            depth = max(0, depth - 1) if code["close"] else depth + 1
    return "".join(parts) + html[at:]


def record(url: str, body: bytes, content_type: str) -> bytes:
    """A response of a WARC file as one gzip member."""
    http = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + http + b"\r\n\r\n", 5, mtime=0)


def write_pages(out: Path, pages: list[Page], count: int, seed: int) -> int:
    """`count` records, the pages in turn; the bytes of their bodies."""
    words = vocabulary(pages)
    size = 0
    with out.open("wb") as file:
        for i in range(count):
            page = pages[i % len(pages)]
            text = varied(page.body.decode(page.encoding, "replace"), words, random.Random(f"{seed}:{i}"))
            body = text.encode(page.encoding, "xmlcharrefreplace")
            size += len(body)
            file.write(record(f"https://host{i % 97}.example.net/{i}/{page.name}", body, page.content_type))
    return size


def main() -> None:
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pages = [page for folder in options.folders for page in read_pages(folder)]
    if not pages:
        parser.error(f"no pages in {', '.join(map(str, options.folders))}")
    size = write_pages(options.out, pages, options.count, options.seed)
    print(f"{options.out}: {options.count:,} pages of {len(pages)}, {size:,} bytes")


if __name__ == "__main__":
    main()
