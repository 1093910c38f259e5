"""The trained scorer beside scipy's optimum, its training, and the labels of whole sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import optimize, stats
from typer.testing import CliRunner

from alloy.cli.data import app
from alloy.data.quality import LABELS, Sketch, bins, exact_edges, quality_labels
from alloy.data.scorer import LinearScorer, Matrix, features, fit_linear
from alloy.data.train_scorer import (
    ScorerConfig,
    calibration,
    grades_of_urls,
    host_of,
    load_scorer,
    measure,
    spearman,
    split_groups,
    train_scorer,
)
from alloy.errors import AlloyError, CheckpointError, DataError, RecipeError

GOOD = ["proof", "lemma", "integer", "matrix", "vector", "theorem", "sum", "prime"]
BAD = ["football", "weather", "recipe", "holiday", "film", "music", "dress", "garden"]
BOTH = ["the", "of", "and", "a", "it", "was", "in", "for", "with", "that"]


def documents(count: int, seed: int) -> tuple[list[str], list[float], list[str]]:
    """Texts whose grade is about the share of good words; 23 hosts."""
    rng = np.random.default_rng(seed)
    texts, grades = [], []
    for _ in range(count):
        grade = int(rng.integers(0, 6))
        words = [*rng.choice(GOOD, 2 * grade), *rng.choice(BAD, 10 - 2 * grade), *rng.choice(BOTH, 15)]
        rng.shuffle(words)
        texts.append(" ".join(words))
        grades.append(float(grade))
    return texts, grades, [f"host{index % 23}.org" for index in range(count)]


def test_features_count_words_and_pairs() -> None:
    """Four places for three words of which two are equal, and the two pairs; 1 + log of the counts."""
    places, values = features("ab cd ab")
    assert len(set(places.tolist())) == 4
    assert sorted(values.tolist()) == pytest.approx([1, 1, 1, 1 + np.log(2)])
    assert set(features("CD")[0].tolist()) < set(places.tolist())
    assert len(features("")[0]) == 0


@pytest.mark.parametrize("fractions", [False, True])
def test_weights_are_the_optimum(fractions: bool) -> None:
    """The same loss written densely and minimised by scipy has its least value at the same scores."""
    texts, grades, _ = documents(41, seed=1)
    wanted = np.array(grades) * (0.9 if fractions else 1.0)
    rows = [features(text, 9) for text in texts]
    scorer = fit_linear(rows, wanted.tolist(), bits=9, decay=0.7, iterations=200)
    matrix = Matrix.of(rows).scaled(scorer.frequency)
    dense = np.zeros((41, 512))
    for row in range(41):
        inside = slice(matrix.starts[row], matrix.starts[row + 1])
        dense[row, matrix.places[inside]] = matrix.values[inside]
    assert np.linalg.norm(dense, axis=1) == pytest.approx(np.ones(41), abs=1e-5)
    steps = np.clip(wanted[:, None] - np.arange(5), 0, 1)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = (dense @ x[:512])[:, None] + x[512:]
        slope = 1 / (1 + np.exp(-logits)) - steps
        value = (np.logaddexp(0, logits) - steps * logits).sum() + 0.35 * (x[:512] ** 2).sum()
        return value, np.concatenate([dense.T @ slope.sum(1) + 0.7 * x[:512], slope.sum(0)])

    best = optimize.minimize(loss, np.zeros(517), jac=True, method="L-BFGS-B", options={"maxiter": 3000, "ftol": 1e-14})
    ours = loss(np.concatenate([scorer.weights, scorer.steps]).astype(np.float64))[0]
    assert ours == pytest.approx(best.fun, rel=1e-5)
    logits = (dense @ best.x[:512])[:, None] + best.x[512:]
    assert scorer.score(texts) == pytest.approx((1 / (1 + np.exp(-logits))).sum(1), abs=0.02)


def test_it_learns_and_comes_back_from_disk(tmp_path: Path) -> None:
    """Good words make good grades on other hosts; twice the same bytes; loaded, the same scores; a blank text has 0."""
    texts, grades, hosts = documents(600, seed=2)
    facts = train_scorer(texts, grades, hosts, ScorerConfig(bits=14, test_share=0.2), tmp_path / "a")
    train_scorer(texts, grades, hosts, ScorerConfig(bits=14, test_share=0.2), tmp_path / "b")
    for name in ("scorer.safetensors", "scorer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert facts["train"]["rows"] + facts["test"]["rows"] == 600
    assert facts["train"]["hosts"] + facts["test"]["hosts"] == 23
    assert facts["test"]["spearman"] > 0.9
    assert facts["test"]["f1"] > 0.9
    assert json.loads((tmp_path / "a/scorer.json").read_text()) == facts
    assert "calibration" in (tmp_path / "a/report.html").read_text()
    scorer = load_scorer(tmp_path / "a")
    high, low, blank = scorer.score([" ".join(GOOD), " ".join(BAD), " \n"])
    assert 5 >= high > 4 > 1 > low >= 0 == blank
    assert LinearScorer.load(tmp_path / "a").score(texts) == scorer.score(texts)


def test_damaged_scorers_are_refused(tmp_path: Path) -> None:
    """No folder, no weights, another kind."""
    with pytest.raises(CheckpointError, match=r"holds no scorer\.json"):
        load_scorer(tmp_path)
    (tmp_path / "scorer.json").write_text('{"kind": "linear"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_scorer(tmp_path)
    (tmp_path / "scorer.json").write_text('{"kind": "forest"}')
    with pytest.raises(CheckpointError, match='kind = "forest"'):
        load_scorer(tmp_path)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda g: len(set(g)) > 1), st.integers(0, 9))
def test_hosts_are_never_on_both_sides(members: list[int], seed: int) -> None:
    """Whole groups; both sides have rows; no more than the share unless one group alone is more."""
    groups = [f"h{member}" for member in members]
    is_test = split_groups(groups, 0.3, seed)
    sides = {
        group: {bool(side) for other, side in zip(groups, is_test, strict=True) if other == group} for group in groups
    }
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < is_test.sum() < len(groups)
    tested = {group for group, side in sides.items() if side == {True}}
    assert is_test.sum() <= max(1.0, 0.3 * len(groups)) or len(tested) == 1


def test_one_host_is_refused() -> None:
    """It could only be tested on what it was trained on."""
    with pytest.raises(DataError, match="at least two hosts"):
        split_groups(["a.org"] * 9, 0.1, 0)
    with pytest.raises(DataError, match="names no host"):
        host_of("not an address")
    assert host_of("https://www.Example.org:80/x") == "example.org"


@pytest.mark.parametrize(
    ("grades", "config", "error", "message"),
    [
        ([0, 6, 1], ScorerConfig(), DataError, "grade 6 of row 1"),
        ([2, 2, 2], ScorerConfig(), DataError, "nothing can be learned"),
        ([0, 1, 2], ScorerConfig(backend="encoder"), RecipeError, "needs a model"),
    ],
)
def test_what_cannot_be_trained_on(
    grades: list[float], config: ScorerConfig, error: type[AlloyError], message: str, tmp_path: Path
) -> None:
    """One sentence each."""
    with pytest.raises(error, match=message):
        train_scorer(["a", "b", "c"], grades, ["x", "y", "z"], config, tmp_path)


def test_figures_by_hand() -> None:
    """Three found, two of them rightly, of four."""
    grades, scores = np.array([5.0, 4, 3, 3, 0, 1]), np.array([4.6, 3.1, 2.4, 1.0, 2.9, 0.2])
    figures = measure(grades, scores)
    assert figures["precision"] == pytest.approx(2 / 3)
    assert figures["recall"] == pytest.approx(2 / 4)
    assert figures["f1"] == pytest.approx(4 / 7)
    assert figures["mae"] == pytest.approx((0.4 + 0.9 + 0.6 + 2 + 2.9 + 0.8) / 6)
    assert calibration(grades, scores)[0] == (0.2, 1.0, 1)
    assert sum(count for _, _, count in calibration(grades, scores)) == 6


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 5)), min_size=3, max_size=40))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, float]]) -> None:
    """Ties included."""
    left, right = zip(*pairs, strict=True)
    value = spearman(left, right)
    if value is None:
        assert len(set(left)) == 1 or len(set(right)) == 1
    else:
        assert value == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-9)


def test_grades_of_addresses(tmp_path: Path) -> None:
    """Hosts stand for subdomains; unlisted addresses are 0, or nothing where a bad list is given."""
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("math.org\nnews.org/science/*\n")
    bad.write_text("news.org/sport/*\n")
    urls = ["https://a.math.org/x", "http://news.org/science/1", "http://news.org/sport/1", "http://else.org"]
    assert grades_of_urls(urls, good) == [5, 5, 0, 0]
    assert grades_of_urls(urls, good, bad) == [5, 5, 0, None]
    with pytest.raises(DataError, match="good list"):
        grades_of_urls(urls, good, good)


def test_command(tmp_path: Path) -> None:
    """Rows in, a scorer and its figures out; refusals."""
    texts, grades, hosts = documents(200, seed=3)
    rows = [
        {"text": text, "grade": grade, "url": f"http://{host}/"}
        for text, grade, host in zip(texts, grades, hosts, strict=True)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "x", "grade": None, "url": "http://a.b"}])
    )
    result = CliRunner().invoke(app, ["train-scorer", str(file), "--label", "grade", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "1 without a grade" in result.output
    assert load_scorer(tmp_path / "out").score([" ".join(GOOD)])[0] > 3
    result = CliRunner().invoke(app, ["train-scorer", str(file), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, RecipeError)


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-100, 100, width=32, allow_nan=False)))
def test_sketches_are_near_the_exact_edges(scores: np.ndarray) -> None:
    """Within 1/2048 of each edge, whatever the order and the pieces."""
    whole, pieces = Sketch(), Sketch()
    whole.add(scores)
    for piece in np.array_split(scores[::-1], 3):
        other = Sketch()
        other.add(piece)
        pieces.join(other)
    assert (whole.counts == pieces.counts).all()
    edges = exact_edges(scores)
    assert (np.abs(whole.edges() - edges) <= np.abs(edges) / 2048 + 1e-36).all()


def test_quality_labels_by_hand() -> None:
    """A hundred documents: a twentieth a bin, four bins a label; the better of two classifiers counts."""
    scores = np.random.default_rng(0).permutation(100)
    assert np.bincount(bins(scores, exact_edges(scores))).tolist() == [5] * 20
    labels = quality_labels([scores])
    assert [labels[int(np.flatnonzero(scores == value)[0])] for value in (0, 19, 20, 59, 60, 99)] == [
        "low", "low", "medium-low", "medium", "medium-high", "high",
    ]  # fmt: skip
    assert {labels.count(label) for label in LABELS} == {20}
    both = quality_labels([scores, -scores])
    assert both.count("low") == both.count("medium-low") == 0
    assert both.count("high") == 40
