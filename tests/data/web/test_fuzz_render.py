"""Long trials: pages changed at random are rendered within their limits of time and memory, or have a status that says why not."""

import os
import random
import re
from pathlib import Path

import pytest

from alloy.core.guard import CallError, Guard
from alloy.data.stages.render import RenderConfig, render_page

TRIALS = 100
TAG = re.compile(rb"<[^>]*>")
SPICE = (
    b"\0", b"<", b">", b"</div>", b"<table><tr><td>", b"<pre>", b"<math><mfrac>", b"$", b"$$", rb"\(", rb"\[", rb"\begin{align}",
    b"<script type='math/tex'>", b"<!--", b"<![CDATA[", b"<plaintext>", b"<svg><style>", b"&#x110000;", b"&amp;amp;", b"\xff\xfe",
    b"<span class='katex'>", b"<annotation encoding='application/x-tex'>", b"<mjx-container>", b"\x1b$B", b"<template>", b"</body>",
)  # fmt: skip


def mutated(page: bytes, others: list[bytes], r: random.Random) -> bytes:
    """A page with up to eight changes: bytes, tags, pieces of other pages, repetitions."""
    for _ in range(r.randint(1, 8)):
        at = r.randrange(len(page) + 1)
        kind = r.choice(["flip", "cut", "drop", "double", "spice", "many", "other", "tags"])
        if kind == "flip" and at < len(page):
            page = page[:at] + bytes([r.randrange(256)]) + page[at + 1 :]
        elif kind == "cut":
            page = page[: max(at, 50)]
        elif kind == "drop":
            page = page[:at] + page[at + r.randint(1, 500) :]
        elif kind == "double":
            page = page[: at + r.randint(1, 3000)] + page[at:]
        elif kind == "spice":
            page = page[:at] + r.choice(SPICE) + page[at:]
        elif kind == "many":
            page = page[:at] + r.choice(SPICE) * r.choice([10, 1000, 20_000]) + page[at:]
        elif kind == "other":
            other = r.choice(others)
            start = r.randrange(len(other))
            page = page[:at] + other[start : start + r.randint(1, 5000)] + page[at:]
        else:
            tags = [match.span() for match in TAG.finditer(page)]
            if tags:
                start, stop = r.choice(tags)
                page = page[:start] + r.choice([b"", page[start:stop] * 3, r.choice(SPICE)]) + page[stop:]
    return page


@pytest.mark.soak
def test_changed_pages_are_bounded(soak_count: int, soak_seed: int) -> None:
    """100 trials for each one asked for: 20,000 of 200. No process dies, and none comes near its limits."""
    root = os.environ.get("ALLOY_TEST_DATA")
    if not root:
        pytest.skip("ALLOY_TEST_DATA is not set: no real pages to change")
    pages = [file.read_bytes() for file in sorted((Path(root) / "math-pages" / "pages").glob("*.html"))]
    config = RenderConfig()
    failed: list[str] = []
    with Guard(
        "alloy.data.stages.render:render_page",
        config.timeout_s,
        config.memory_mib << 20,
        first=(b"<p>x", "", "", config),
    ) as guard:
        for seed in range(soak_seed * TRIALS, (soak_seed + soak_count) * TRIALS):
            r = random.Random(seed)
            page = mutated(r.choice(pages), pages, r)
            kind = r.choice(
                ["text/html", "text/html; charset=shift_jis", "application/xhtml+xml", "text/xml", "text/plain", ""]
            )
            try:
                row = guard(page, kind, "https://fuzz.example/", config)
            except CallError as error:
                failed.append(f"seed {seed} ({len(page)} bytes, {kind}): {error.kind} {error}")
                continue
            assert "\0" not in row["text"], seed
            row["text"].encode()
            assert row["n_math"] >= 0, seed
    assert failed == []


def test_mutations_change_pages() -> None:
    """The trials above try something: most changed pages differ, and the renderer gives a row for each."""
    page = b"<html><body><p>Some words \\(x^2\\) and more of them.</p><table><tr><td>1</td></tr></table></body></html>"
    changed = [mutated(page, [page], random.Random(seed)) for seed in range(50)]
    assert len(set(changed)) > 40
    assert all(set(render_page(one, "text/html", "", RenderConfig())) >= {"text", "type", "n_math"} for one in changed)
