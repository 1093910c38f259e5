"""HTML reports."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from alloy.core.metrics import MetricLog
from alloy.core.recipe import Config, Recipe, RunOptions, load_recipe
from alloy.core.report import Bars, Curves, Table, Text, cell, draw, smoothed, thinned, write_report
from alloy.core.run_report import compare_runs, report_run
from alloy.core.runs import RunDir
from alloy.errors import DataError


class Train(Config):
    steps: int = 10
    lr: float = 1e-3


class ToyRecipe(Recipe):
    train: Train = Train()


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, addresses and text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset"):
                self.addresses.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)
        else:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th", "dt", "dd") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_valid(tmp_path: Path) -> None:
    """No address leads outside, ids are unique, text is escaped, both colour schemes are there."""
    xs = list(range(1, 90))
    curves = Curves(
        "Loss <b>", {"a & b": (xs, [1 / x for x in xs]), "val": ([30, 60], [0.4, 0.3])}, references={"paper": 0.2}
    )
    write_report(
        tmp_path / "r.html",
        "Run <1>",
        [
            curves,
            Curves("Rate", {"r": (xs, [5.0] * len(xs))}),
            Bars("Importance", {"layer 0": 3.0, "layer 1": 1.5}, unit="%", references={"layer 0": 2.0}),
            Table("Scores", ["name", "value"], [["x<y", 0.5], ["z", None]]),
            Table("More", ["name"], [["folded"]], folded=True),
            Text("Sample", "line 1\n<script>alert(1)</script>", caption="step 5"),
        ],
        {"tokens": "1.2M"},
    )
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(html)
    assert all(address.startswith("#") for address in page.addresses)
    assert len(set(page.ids)) == len(page.ids)
    assert "<script" not in html
    assert "<script>alert(1)</script>" in page.text
    assert "Loss <b>" in page.text
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert html.count("<svg") == 2
    assert "width: 50.0%" in html
    assert not re.search(r"url\((?!#)", html)
    assert re.sub(r"http://www\.w3\.org/\S+", "", html).count("http") == 0


def test_drawing_takes_its_colours_from_the_page() -> None:
    """The SVG is well-formed, scales, and has no colour of its own but black defaults."""
    svg = draw(Curves("x", {"a": ([1, 2, 3], [1.0, math.nan, 3.0])}, references={"r": 2.0}), "f7")
    root = ET.fromstring(svg)
    assert root.get("width") is None
    assert root.get("viewBox")
    assert "#00f0" not in svg
    assert {"var(--c1)", "var(--c2)", "var(--ink)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert all(element.get("id", "f7-").startswith("f7-") for element in root.iter())
    assert draw(Curves("x", {"a": ([1, 2, 3], [1.0, 2.0, 3.0])}), "f1") == draw(
        Curves("x", {"a": ([1, 2, 3], [1.0, 2.0, 3.0])}), "f1"
    )


def test_empty_and_broken_series_draw() -> None:
    """Nothing to show is no error."""
    for points in (([], []), ([1], [2.0]), ([1, 2], [math.nan, math.inf])):
        ET.fromstring(draw(Curves("x", {"a": points}), "f"))
    long = list(range(5000))
    ET.fromstring(draw(Curves("x", {"a": (long, [math.nan] * 5000)}), "f"))
    assert len(draw(Curves("x", {"a": (long, [float(x % 17) for x in long])}), "f")) < 150_000


def test_smoothed_keeps_lines_and_means() -> None:
    """A straight line stays straight inside; noise shrinks; gaps are bridged."""
    line = [2.0 * x for x in range(50)]
    assert smoothed(line, reach=5)[5:-5] == pytest.approx(line[5:-5])
    assert smoothed([1.0, 3.0, 1.0, 3.0, 1.0], reach=1)[1:4] == pytest.approx([5 / 3, 7 / 3, 5 / 3])
    assert smoothed([1.0, math.nan, 3.0], reach=1)[1] == 2.0
    assert math.isnan(smoothed([math.nan], reach=1)[0])
    assert smoothed([], reach=3) == []


def test_thinned_keeps_spikes() -> None:
    """The extreme values of each stretch survive, in order."""
    ys = [0.0] * 1001
    ys[333], ys[777] = 9.0, -9.0
    xs, thin = thinned([float(x) for x in range(1001)], ys, most=100)
    assert len(xs) <= 102
    assert (333.0, 9.0) in list(zip(xs, thin, strict=True))
    assert (777.0, -9.0) in list(zip(xs, thin, strict=True))
    assert xs == sorted(xs)


def test_cells() -> None:
    """Four digits, separators, words for booleans."""
    values = [None, True, 12345, 0.123456, 1234.5678, 2.5e-5, 3e7, math.inf, "x", 0.0]
    assert [cell(value) for value in values] == [
        "-",
        "yes",
        "12,345",
        "0.1235",
        "1,235",
        "2.5e-5",
        "3.0e7",
        "inf",
        "x",
        "0",
    ]


def test_bars_refuse_what_they_cannot_show() -> None:
    """Negative or missing lengths."""
    with pytest.raises(ValueError, match="finite values >= 0"):
        Bars("x", {"a": -1.0})


def make_run(root: Path, name: str, *overrides: str) -> Path:
    """A finished run with 40 steps of metrics."""
    (root / "toy.toml").write_text('command = "toy"\n[train]\nsteps = 40\n')
    loaded = load_recipe(root / "toy.toml", overrides, ToyRecipe)
    with (
        RunDir.create(loaded, RunOptions(run_dir=root / name), "toy") as run,
        MetricLog(run.path / "metrics.jsonl") as log,
    ):
        for step in range(1, 41):
            rate = 10.0 if step <= 5 else 2000.0
            log.log(step, loss=3 / step, lr=1e-3, tokens=step * 64, tokens_per_s=rate, custom=step % 3)
        log.log(40, val_loss=0.5, val_bits_per_byte=1.25)
    return run.path


def test_report_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves, throughput without warm-up, settings with origin, samples, evaluation, environment."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, "one", "train.lr=0.5")
    (run / "eval").mkdir()
    (run / "eval" / "samples.jsonl").write_text(json.dumps({"step": 40, "prompt": "The ", "text": "end <eos>"}) + "\n")
    scores = {"topics": {"bits": {"value": 1.5, "reference": 2.25}}, "lzma": 2.75}
    (run / "eval" / "scores.json").write_text(json.dumps(scores))
    page = Page(report_run(run).read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    for expected in (
        "tokens/s 2k",
        "best bits per byte 1.250",
        "status done",
        "Learning rate",
        "Custom",
        "topics.bits 1.5 2.25",
        "Sample at step 40",
        "The end <eos>",
        'train.lr 0.5 override "train.lr=0.5"',
        "train.steps 40 toy.toml:3",
        "Settings left at their defaults (1)",
        "seed 0 default",
        "python 3.",
    ):
        assert expected in words, expected


def test_comparison(tmp_path: Path) -> None:
    """One line per run, last values side by side, only the settings that differ."""
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", "train.lr=0.5")]
    page = Page(compare_runs(runs, tmp_path / "c.html").read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "one, training" in words
    assert "loss 0.075 0.075" in words
    assert "Settings that differ key one two train.lr 0.001 0.5" in words
    assert "train.steps" not in words


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    """File and reason."""
    run = make_run(tmp_path, "one")
    (run / "eval").mkdir()
    (run / "eval" / "scores.json").write_text("{")
    with pytest.raises(DataError, match=r"scores\.json: not valid JSON"):
        report_run(run)
