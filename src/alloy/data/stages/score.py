"""Language, mathematics and quality of each row."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from alloy.core.logging import get_logger
from alloy.data.classifier import Classifier
from alloy.data.document import require_columns, set_columns
from alloy.data.language import THRESHOLD, LanguageIdentifier
from alloy.data.pipeline import Place, Stage, StageConfig
from alloy.data.score import band, int_score, is_math, math_score
from alloy.data.train_scorer import Scorer, load_scorer
from alloy.errors import CheckpointError

log = get_logger(__name__)


class ScoreConfig(StageConfig):
    """Settings of `alloy data score`."""

    stage: Literal["score"] = "score"
    on: Annotated[
        Literal["auto", "raw", "cleaned"],
        Field(description="Text that is scored: cleaned where there is one, always text, or always cleaned_text."),
    ] = "auto"
    lang: Annotated[
        list[str],
        Field(default_factory=lambda: ["en"], description='Languages whose rows get a quality score, or "any".'),
    ]
    lang_threshold: Annotated[float, Field(ge=0, le=1, description="Least probability of the language.")] = THRESHOLD
    lang_model: Annotated[Path | None, Field(description="A fastText model file; default: py3langid's own.")] = None
    math_only: Annotated[
        bool, Field(description="Quality scores only for rows whose math score passes OpenWebMath's thresholds.")
    ] = False
    finemath: Annotated[
        str | None, Field(description="Folder or hub id of the classifier, such as HuggingFaceTB/finemath-classifier.")
    ] = None
    fallback: Annotated[
        Path | None, Field(description="Folder of a trained scorer, for when there is no classifier.")
    ] = None
    windows: Annotated[int, Field(ge=1, description="Places of a document that the classifier is shown.")] = 1
    join: Annotated[Literal["max", "mean"], Field(description="How the scores of several windows become one.")] = "mean"
    device: Annotated[str, Field(description="Of the classifier: auto, cpu, cuda, ...")] = "auto"
    dtype: Annotated[str, Field(description="Of the classifier's weights.")] = "float32"


class Score(Stage[ScoreConfig]):
    """Rows with language, math score and, with a classifier or a trained scorer, quality score and band.

    Rows in other languages than those asked for are kept; they get no quality score and the band "<3".
    """

    Config = ScoreConfig
    needs = ("text",)
    statuses = ("band", "lang", "score_on")

    def start(self, out: Path) -> None:
        """Load the models."""
        self.language = LanguageIdentifier(self.config.lang_model)
        self.scorer, self.scorer_name = self._load()

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The rows with their scores; without a scorer the columns of quality are empty."""
        texts, places = self._texts(table)
        languages = [self.language.identify(text) for text in texts]
        maths = [math_score(text) for text in texts]
        chosen = [row for row in range(len(texts)) if self._is_wanted(*languages[row]) and self._is_math(*maths[row])]
        self.counts["not scored"] += len(texts) - len(chosen)
        scores: list[float | None] = [None] * len(texts)
        if self.scorer is not None:
            for row, score in zip(chosen, self.scorer.score([texts[row] for row in chosen]), strict=True):
                scores[row] = score
        wholes = [None if score is None else int_score(score) for score in scores]
        return set_columns(
            table,
            lang=[code for code, _ in languages],
            lang_score=[score for _, score in languages],
            math_score=[score for score, _ in maths],
            finemath_score=scores,
            finemath_int_score=wholes,
            band=[None if self.scorer is None else band(whole or 0) for whole in wholes],
            score_on=places,
            score_model=pa.array([None if score is None else self.scorer_name for score in scores], pa.string()),
        )

    def _texts(self, table: pa.Table) -> tuple[list[str], list[str]]:
        """The text of each row that is scored, and which one that is."""
        if self.config.on == "cleaned":
            require_columns(table.column_names, ("cleaned_text",), "score with on = cleaned", "the input")
        raw = [text or "" for text in table["text"].to_pylist()]
        if self.config.on == "raw" or "cleaned_text" not in table.column_names:
            return raw, ["raw"] * len(raw)
        cleaned: list[str | None] = table["cleaned_text"].to_pylist()
        if self.config.on == "cleaned":
            return [text or "" for text in cleaned], ["cleaned"] * len(raw)
        texts = [other if text is None else text for text, other in zip(cleaned, raw, strict=True)]
        return texts, ["raw" if text is None else "cleaned" for text in cleaned]

    def _is_wanted(self, code: str, score: float) -> bool:
        return "any" in self.config.lang or (code in self.config.lang and score >= self.config.lang_threshold)

    def _is_math(self, score: float, num_formulas: int) -> bool:
        return not self.config.math_only or is_math(score, num_formulas)

    def _load(self) -> tuple[Scorer | None, str]:
        """The classifier, or the fallback where it cannot be had; and its name."""
        config: Any = self.config
        if config.finemath is not None:
            options = {name: getattr(config, name) for name in ("device", "dtype", "windows", "join")}
            try:
                return Classifier(config.finemath, **options), config.finemath
            except CheckpointError as error:
                if config.fallback is None:
                    raise
                log.warning("%s Going on with the fallback, %s.", error, config.fallback)
        if config.fallback is not None:
            return load_scorer(config.fallback, config.device), str(config.fallback)
        return None, ""
