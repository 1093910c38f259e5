"""Every command and Python block of README and docs runs.

A block runs in a folder that holds what the pages name: CHECKPOINT (a small model with its tokenizer), FILE (a text), texts/,
prompts.jsonl, chats.jsonl, page.html, my.toml. A block after `<!-- skip: reason -->` is left out, and so are blocks of another language.
"""

import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import alloy
from alloy.cli import main
from alloy.data.tokens import train_tokenizer
from alloy.models.configs import HybridConfig
from alloy.models.presets import preset
from alloy.models.registry import build

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- skip: [^>]+ -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
SENTENCES = [f"Return a new value {i}: the for statement iterates over item {i * 7 % 31}.\n" for i in range(400)]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the blocks of a page that run."""
    return [(language, text) for skip, language, text in BLOCK.findall(page.read_text()) if not skip]


def exit_code(words: list[str]) -> object:
    """How `alloy WORDS` ends."""
    try:
        main(words)
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("".join(SENTENCES[:20]))
    Path("texts").mkdir()
    for i in range(4):
        Path(f"texts/{i}.txt").write_text("".join(SENTENCES[100 * i : 100 * i + 100]))
    Path("prompts.jsonl").write_text('{"id": "a", "prompt": "Return a"}\n')
    Path("chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}\n'
    )
    Path("page.html").write_text(
        "<h1>Roots</h1><p>The root of two is $$\\sqrt{2} = 1.414\\ldots$$ and no fraction.</p>"
    )
    Path("my.toml").write_text('extends = ["pretrain/tiny.toml"]\n')
    tokenizer = train_tokenizer(SENTENCES, 280)
    model = build(HybridConfig.model_validate({**preset("tiny-mtp").model_dump(), "vocab": 280}))
    alloy.save(model, "CHECKPOINT", tokenizer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    yield tmp_path
    torch.set_grad_enabled(True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands end with 0; Python blocks raise nothing."""
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), {})  # the page is ours
        elif language == "":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["alloy"]:
                    assert exit_code(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"


def test_pages_have_blocks() -> None:
    """The test above has something to run."""
    assert sum(len(blocks(page)) for page in PAGES) > 10


def test_tables_are_those_of_the_results() -> None:
    """No figure of a table was typed: `benchmarks/table.py --update` would change nothing."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.count("<!-- table ") > 5
    assert script["update"](page) == page
