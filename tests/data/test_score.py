"""Cheap math scores, bands, and scores by an encoder beside transformers' own pipeline."""

import gzip
import json
import os
from pathlib import Path

import pytest
from transformers import pipeline

from alloy.data.classifier import CENTRE_CHARS, Classifier, batches
from alloy.data.score import band, html_marks, int_score, is_math, math_score
from alloy.errors import CheckpointError
from tests.data.encoder import save_bert


def data() -> Path:
    """The folder of real data."""
    folder = os.environ.get("ALLOY_TEST_DATA")
    if not folder:
        pytest.skip("ALLOY_TEST_DATA is not set")
    return Path(folder)


@pytest.mark.parametrize(
    "html",
    [
        b"<script src='/MathJax.js'></script>",
        b"<p><Math><mi>x</mi></math>",
        b'<span class="katex-html">x</span>',
        b'<img src="https://latex.codecogs.com/gif.latex?x">',
        b'<div class="note math notranslate">',
        rb"<p>\frac{a}{b} \le \sqrt{2}</p>",
        "<p class='tex'>\\(a\\)".encode("utf-16"),
    ],
)
def test_marks_of_mathematics_are_seen(html: bytes) -> None:
    """Each carrier leaves a mark."""
    assert html_marks(html)


@pytest.mark.parametrize("html", [b"", b"<p>news</p>", rb"C:\new\text \u003c \frac", b"<p class=mathew>aftermath</p>"])
def test_other_pages_have_no_marks(html: bytes) -> None:
    """Names, backslashes and words that contain math."""
    assert html_marks(html) == []


def test_prefilter_keeps_pages_with_formulas() -> None:
    """All pages of the test set but those whose mathematics is plain text, sub- and superscripts or HTML tables."""
    folder = data() / "math-pages"
    unmarked = {"plain-text", "html-table-math", "unicode"}
    for line in (folder / "expected.jsonl").read_text().splitlines():
        page = json.loads(line)
        if not unmarked & set(page["carriers"]):
            assert html_marks((folder / "pages" / page["page"]).read_bytes()), page["page"]


def test_math_score_by_hand() -> None:
    """The formula of the docstring: 2 of 4 characters in formulas; then 1 of 4 words."""
    assert math_score("ab $cd$") == (pytest.approx(1 - 2.718281828459045**-2), 1)
    assert math_score("we met her theorem") == (pytest.approx(1 - 2.718281828459045**-1.25), 0)
    assert math_score("```\n$x$\n```") == (0.0, 0)
    assert math_score("") == (0.0, 0)
    greek = "Το τρένο άργησε σήμερα το πρωί"
    assert math_score(greek) == (0.0, 0)


def test_math_score_of_news_is_low() -> None:
    """No article and no review is as mathematical as OpenWebMath's lower threshold asks."""
    for name in ("bbc", "imdb"):
        with gzip.open(data() / f"text/{name}-test.jsonl.gz") as file:
            texts = [json.loads(line)["text"] for line in file]
        assert max(math_score(text)[0] for text in texts) < 0.17
        assert not any(is_math(*math_score(text)) for text in texts)


def test_bands_and_whole_scores() -> None:
    """Halves to even, as Python rounds; 3 alone is "3"."""
    assert [int_score(score) for score in (-3.0, 0.49, 2.5, 2.51, 3.5, 4.5, 9.0)] == [0, 0, 2, 3, 4, 4, 5]
    assert [band(score) for score in range(6)] == ["<3", "<3", "<3", "3", "4plus", "4plus"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with one output; its scores lie around 2.5."""
    return save_bert(tmp_path_factory.mktemp("bert"))


TEXTS = ["a bc d", "h" * 9, "ab cd " * 40, "", "g", "zz a e f", "d e f g h a b c " * 3000, "\n"]


def test_scores_are_those_of_the_pipeline(checkpoint: Path) -> None:
    """Batched by length or one by one in transformers' pipeline: the same, for the middle of long texts."""
    judge = pipeline("text-classification", model=str(checkpoint), device="cpu", function_to_apply="none")
    scores = Classifier(checkpoint, device="cpu", batch_tokens=64).score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        half = max(0, len(text) - CENTRE_CHARS) // 2
        (answer,) = judge([text[half : half + CENTRE_CHARS]], truncation=True, max_length=31)
        assert score == pytest.approx(min(max(answer["score"], 0), 5) if text.strip() else 0.0, abs=1e-4)
    assert len({round(score, 3) for score in scores}) >= 5


def test_several_windows_are_joined(checkpoint: Path) -> None:
    """Three windows of a long text: the scores of the three pieces, as texts of their own."""
    text = "".join("abcdefgh"[i * i % 8] + " " for i in range(12_345))
    pieces = [text[int(24_690 / 3 * i + (24_690 / 3 - 6_666) / 2) :][:6_666] for i in range(3)]
    single = Classifier(checkpoint, device="cpu").score(pieces)
    for join, wanted in (("max", max(single)), ("mean", sum(single) / 3)):
        (score,) = Classifier(checkpoint, device="cpu", windows=3, join=join).score([text])
        assert score == pytest.approx(wanted, abs=1e-4)


def test_batches_hold_what_they_may() -> None:
    """Every row once, at most so many padded tokens unless one row has more."""
    lengths = [3, 50, 7, 7, 1, 20, 19]
    groups = batches(lengths, 40)
    assert sorted(row for group in groups for row in group) == list(range(7))
    assert all(len(group) * max(lengths[row] for row in group) <= 40 or len(group) == 1 for group in groups)
    assert groups[0] == [1]
    assert groups[1] == [5, 6]


def test_messages_say_what_to_do(tmp_path: Path) -> None:
    """No model: the fallback is named. Two outputs: no score."""
    with pytest.raises(CheckpointError, match="train-scorer"):
        Classifier(tmp_path / "none")
    save_bert(tmp_path, num_labels=2)
    with pytest.raises(CheckpointError, match="has 2 outputs"):
        Classifier(tmp_path)
