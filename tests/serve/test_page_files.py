"""The files of the chat page, read as text."""

import re

from tests.serve.stub import PAGE


def test_files_are_small_and_name_no_other_host() -> None:
    """Three files, 40 KB together, no absolute URL, no inline script or style, no HTML made from text."""
    texts = {file.name: file.read_text() for file in PAGE.iterdir()}
    assert sorted(texts) == ["chat.js", "index.html", "style.css"]
    assert sum(len(text.encode()) for text in texts.values()) <= 40_000
    whole = "\n".join(texts.values())
    assert re.findall(r"\b[a-z][a-z0-9+.-]*://|[\"'(=]\s*//\w", whole) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", whole) == []
    assert re.findall(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", texts["index.html"]) == []
