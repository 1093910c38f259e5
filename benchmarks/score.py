"""Speed and quality of scoring: language, math score, and a trained scorer beside scikit-learn's HashingVectorizer and Ridge.

    ALLOY_TEST_DATA=DIR OMP_NUM_THREADS=1 python benchmarks/score.py [--repeat N]

Ratings of film reviews (1 to 10, made 0 to 5) stand for grades, films for hosts: training and test films differ. Process
time of one process. scikit-learn is compared with where it is installed. `--repeat N` also trains on N times as many
documents, made by shuffling the sentences, to measure the time that 50,000 take.
"""

import argparse
import gzip
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alloy.core.report import cell
from alloy.data.language import LanguageIdentifier
from alloy.data.score import html_marks, math_score
from alloy.data.scorer import features, fit_linear
from alloy.data.train_scorer import measure


def reviews(folder: Path, part: str) -> tuple[list[str], np.ndarray]:
    """Rated reviews and their grades."""
    with gzip.open(folder / f"text/imdb-{part}.jsonl.gz") as file:
        rows = [row for row in map(json.loads, file) if row["rating"]]
    return [row["text"] for row in rows], np.array([(row["rating"] - 1) * 5 / 9 for row in rows])


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its process time."""
    start = time.process_time()
    return work(), time.process_time() - start


def rate(name: str, items: list[Any], work: Callable[[Any], object]) -> None:
    """Print the median of three rates."""
    seconds = sorted(timed(lambda: [work(item) for item in items])[1] for _ in range(3))[1]
    size = sum(len(item) for item in items)
    print(
        f"{name:<28} {len(items) / seconds:9,.0f}/s {size / seconds / 1e6:8.1f} MB/s  ({size / len(items):,.0f} each)"
    )


def show(name: str, grades: np.ndarray, scores: Any, seconds: float) -> None:
    """Print figures of scores and the time of training."""
    figures = measure(grades, np.clip(scores, 0, 5))
    names = ("precision", "recall", "f1", "spearman", "mae", "calibration_error")
    print(f"{name:<40} {seconds:6.1f} s  " + "  ".join(f"{key} {cell(figures[key])}" for key in names))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=0)
    repeat = parser.parse_args().repeat
    if "ALLOY_TEST_DATA" not in os.environ:
        sys.exit("ALLOY_TEST_DATA names no folder of test data")
    folder = Path(os.environ["ALLOY_TEST_DATA"])
    train, grades = reviews(folder, "train")
    test, wanted = reviews(folder, "test")
    rate("marks in raw HTML", [f.read_bytes() for f in sorted(folder.glob("math-pages/pages/*.html"))], html_marks)
    rate("language", test, LanguageIdentifier().identify)
    rate("math score", test, math_score)
    scorer, seconds = timed(lambda: fit_linear([features(text) for text in train], grades.tolist()))
    per_text = sorted(timed(lambda: scorer.score(test))[1] for _ in range(3))[1]
    print(f"{'linear scorer':<28} {len(test) / per_text:9,.0f}/s")
    show(f"linear, {len(train):,} documents", wanted, scorer.score(test), seconds)
    show("the mean grade", wanted, np.full(len(wanted), grades.mean()), 0.0)
    if importlib.util.find_spec("sklearn"):
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline

        hashing = {"n_features": 1 << 20, "ngram_range": (1, 2), "alternate_sign": False}
        for name, more in (("", []), (" + tf-idf", [TfidfTransformer(sublinear_tf=True)])):
            peer = make_pipeline(HashingVectorizer(**hashing), *more, Ridge())
            _, seconds = timed(lambda peer=peer: peer.fit(train, grades))
            show(f"scikit-learn hashing{name} + ridge", wanted, peer.predict(test), seconds)
    if repeat:
        rng = random.Random(0)
        many = [shuffled(text, rng) for _ in range(repeat) for text in train]
        more = np.tile(grades, repeat).tolist()
        start = time.perf_counter()
        _, seconds = timed(lambda: fit_linear([features(text) for text in many], more))
        print(f"{len(many):,} documents: {time.perf_counter() - start:.1f} s, {seconds:.1f} s of process time")


def shuffled(text: str, rng: random.Random) -> str:
    """The text with its sentences in another order."""
    sentences = text.split(". ")
    rng.shuffle(sentences)
    return ". ".join(sentences)


if __name__ == "__main__":
    main()
