"""`alloy data score` on files, and an encoder trained and used as its scorer."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alloy.data.executors import Executor
from alloy.data.pipeline import run_stage
from alloy.data.scorer import features, fit_linear
from alloy.data.stages.score import ScoreConfig
from alloy.data.train_scorer import ScorerConfig, load_scorer, train_scorer
from alloy.errors import CheckpointError, DataError
from tests.data.encoder import save_bert

ENGLISH = "We will prove that the sum of two odd integers is even; let $a$ and $b$ be odd and write them down."
FRENCH = "Nous allons démontrer que la somme de deux nombres impairs est un nombre pair, et ensuite nous partons."


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """English, French, nothing; the first has been cleaned. One column of the user's own."""
    table = pa.table(
        {
            "text": pa.array(["menu menu " + ENGLISH, FRENCH, None], pa.large_string()),
            "cleaned_text": pa.array([ENGLISH, None, None], pa.large_string()),
            "mine": [1, 2, 3],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def scored(rows: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """The rows that the stage gives."""
    run_stage(ScoreConfig(**settings), [str(rows)], out, Executor(kind="serial"))
    return pq.read_table(out / "part-00000.parquet").to_pylist()


def linear(folder: Path) -> Path:
    """A scorer that likes proofs."""
    texts = ["prove the sum is even", "we prove it", "a menu of the day", "nothing of the kind"] * 2
    fit_linear([features(text, 12) for text in texts], [5, 5, 0, 0] * 2, bits=12).save(folder)
    return folder


def test_columns_of_scored_rows(rows: Path, tmp_path: Path) -> None:
    """Cleaned text where there is one; other languages keep their row without a score; text and other columns untouched."""
    english, french, nothing = scored(rows, tmp_path / "out", fallback=linear(tmp_path / "scorer"))
    assert [english["lang"], french["lang"], nothing["lang"]] == ["en", "fr", "und"]
    assert [row["score_on"] for row in (english, french, nothing)] == ["cleaned", "raw", "raw"]
    assert english["text"] == "menu menu " + ENGLISH
    assert [row["mine"] for row in (english, french, nothing)] == [1, 2, 3]
    assert english["finemath_score"] == pytest.approx(load_scorer(tmp_path / "scorer").score([ENGLISH])[0])
    assert english["finemath_int_score"] == round(english["finemath_score"])
    assert english["score_model"] == str(tmp_path / "scorer")
    assert french["finemath_score"] is None
    assert french["band"] == nothing["band"] == "<3"
    assert english["math_score"] > french["math_score"]


def test_settings_of_the_stage(rows: Path, tmp_path: Path) -> None:
    """Raw text, every language, no scorer, mathematics alone."""
    scorer = linear(tmp_path / "scorer")
    english, french, _ = scored(rows, tmp_path / "a", fallback=scorer, on="raw", lang=["any"])
    assert english["score_on"] == "raw"
    assert french["finemath_score"] is not None
    english, *_ = scored(rows, tmp_path / "b")
    assert english["band"] is None
    assert english["lang"] == "en"
    english, french, _ = scored(rows, tmp_path / "c", fallback=scorer, lang=["any"], math_only=True)
    assert (english["finemath_score"] is None) == (english["math_score"] <= 0.17)
    assert french["finemath_score"] is None
    english, *_ = scored(rows, tmp_path / "d", fallback=scorer, lang_threshold=1.0)
    assert english["finemath_score"] is None


def test_without_the_classifier(rows: Path, tmp_path: Path) -> None:
    """It is named, and the fallback takes its place if there is one."""
    with pytest.raises(CheckpointError, match="train-scorer"):
        scored(rows, tmp_path / "a", finemath=str(tmp_path / "none"))
    english, *_ = scored(rows, tmp_path / "b", finemath=str(tmp_path / "none"), fallback=linear(tmp_path / "scorer"))
    assert english["score_model"] == str(tmp_path / "scorer")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "raw.parquet")
    with pytest.raises(DataError, match="cleaned_text"):
        scored(tmp_path / "raw.parquet", tmp_path / "c", on="cleaned")


def test_an_encoder_learns_letters(tmp_path: Path) -> None:
    """Texts of a, b, c are worth more than those of f, g, h, on hosts of their own; the saved one scores alike."""
    start = save_bert(tmp_path / "bert", num_labels=3, spread=0.05)
    rng = np.random.default_rng(0)
    grades = [float(grade) for grade in rng.integers(0, 2, 240) * 5]
    texts = [" ".join(rng.choice(list("abcde" if grade else "defgh"), 12)) for grade in grades]
    hosts = [f"h{index % 17}" for index in range(240)]
    config = ScorerConfig(backend="encoder", model=str(start), epochs=8, lr=3e-3, batch_tokens=256, device="cpu")
    facts = train_scorer(texts, grades, hosts, config, tmp_path / "out")
    assert facts["test"]["spearman"] > 0.7
    high, low = load_scorer(tmp_path / "out", device="cpu").score(["a b c a b c", "f g h f g h"])
    assert high > 3.5 > 1.5 > low
