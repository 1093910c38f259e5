"""Cleaned rows: by rules, or by a model whose every chunk must pass the guards, with the rules to fall back on.

A chunk that loses formulas, loops, adds what is not there and so on is asked for again at temperature 0; one whose answer was
cut off is asked for in halves. What still fails takes the text that the rules make of it. A row is complete or says that it
is not: `clean_status` is

    rules     cleaned by rules, because that is the mode
    skipped   cleaned by rules, because `prefilter` found little to remove
    llm       every chunk is the model's
    partial   some chunks are those of the rules
    failed    all of them are; what the row holds then is decided by `on_fail`
    nothing   the model found nothing of use; no text is left
    empty     there was no text
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pydantic import Field, field_validator

from alloy.core.generator import Generated
from alloy.data.chunks import merge
from alloy.data.clean import Cleaned, clean_text, clean_texts
from alloy.data.document import set_columns
from alloy.data.executors import Report
from alloy.data.guards import Verdict, judge, math_kept, strip_fence
from alloy.data.llm import LlmConfig, LlmStage, check_prompt, log
from alloy.data.pipeline import Job, Place
from alloy.data.prompts import load_prompt

NOTHING = "NO USEFUL CONTENT"
# chunks that may fail the guard of formulas before it is worth a warning
MATH_WARNING = 0.1
Label = Literal["label-topic", "label-code2", "label-code5", "label-math5"]


class CleanConfig(LlmConfig):
    """Settings of `alloy data clean`. Sampling: the reference pipeline of Nemotron-CC-Math (arXiv 2508.15096)."""

    stage: Literal["clean"] = "clean"
    mode: Annotated[Literal["rules", "llm"], Field(description="Who cleans.")] = "rules"
    prompt: Annotated[str, Field(description="math, code, or a TOML file with a prompt.")] = "math"
    on_fail: Annotated[
        Literal["rules", "raw", "drop"],
        Field(description="What a page holds after the model failed: that, or no text."),
    ] = "rules"
    prefilter: Annotated[
        float | None,
        Field(ge=0, le=1, description="Do not ask where the rules remove less than this share of a page."),
    ] = None
    labels: Annotated[
        tuple[Label, ...],
        Field(description="Ask about the cleaned text, too: label-topic, label-code2, label-code5, label-math5."),
    ] = ()

    @property
    def asks(self) -> bool:
        """Whether a model is needed at all."""
        return self.mode == "llm" or bool(self.labels)

    @field_validator("prompt")
    @classmethod
    def check_prompt(cls, name: str) -> str:
        return check_prompt(name)


@dataclass
class Piece:
    """A chunk of a row on its way through the model: `text` is what was taken, None where nothing was."""

    source: str
    tokens: int
    text: str | None = None
    verdict: str = ""
    # what it is asked for in after its answer was cut off
    halves: "list[Piece]" = field(default_factory=list)

    @property
    def leaves(self) -> "list[Piece]":
        """The pieces that have texts."""
        return self.halves or [self]


class Clean(LlmStage[CleanConfig]):
    """Clean texts: boilerplate out, mathematics as LaTeX in dollars, code kept."""

    Config = CleanConfig
    columns = ("text",)
    statuses = ("clean_status",)

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The rows with cleaned_text, clean_status and what led to them."""
        texts = self.texts(table)
        cleaned = clean_texts(texts, _hosts(table))
        rows = [_by_rules(text, by_rules) for text, by_rules in zip(texts, cleaned, strict=True)]
        if self.config.mode == "llm":
            asked = [i for i in range(len(rows)) if self._is_asked(rows[i], texts[i], cleaned[i])]
            for i, row in zip(
                asked, self._by_model([texts[i] for i in asked], [cleaned[i] for i in asked]), strict=True
            ):
                rows[i] = row
        columns = {name: [row[name] for row in rows] for name in _by_rules("", Cleaned("", 0))}
        for label in self.config.labels:
            columns[label.replace("-", "_")] = self._labels(label, columns["cleaned_text"])
        return set_columns(table, **columns)

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """Cost, and a warning where the model keeps losing formulas."""
        counts = Counter[str]()
        for report in reports:
            counts.update(report.get("counts", {}))
        if counts["guard=math"] > MATH_WARNING * max(1, counts["chunks"]):
            log.warning(
                "clean: %d of %d chunks lost formulas and were refused; try another model, or smaller chunk_tokens",
                counts["guard=math"], counts["chunks"],
            )  # fmt: skip
        return super().finish(job, reports)

    def _is_asked(self, row: dict[str, Any], text: str, by_rules: Cleaned) -> bool:
        """Whether the model is to see a row; what is saved is counted."""
        if row["clean_status"] == "empty":
            return False
        if self.config.prefilter is None or by_rules.removed >= self.config.prefilter * len(text):
            return True
        row["clean_status"] = "skipped"
        self.counts["saved_tokens"] += self.count(text)
        return False

    def _by_model(self, texts: Sequence[str], cleaned: Sequence[Cleaned]) -> list[dict[str, Any]]:
        pieces = [
            [Piece(c.text, c.tokens, verdict="" if c.fits else "too-long") for c in self.split(text)] for text in texts
        ]
        todo = [piece for row in pieces for piece in row if not piece.verdict]
        self.counts["chunks"] += sum(map(len, pieces))
        again, smaller = self._round(todo, is_last=False)
        for piece in smaller:
            half = max(1, piece.tokens // 2)
            piece.halves = [
                Piece(c.text, c.tokens, verdict="" if c.fits else "too-long") for c in self.split(piece.source, half)
            ]
        self._round([*again, *(half for piece in smaller for half in piece.halves if not half.verdict)], is_last=True)
        return [
            self._row(text, by_rules, [leaf for piece in row for leaf in piece.leaves])
            for text, by_rules, row in zip(texts, cleaned, pieces, strict=True)
        ]

    def _round(self, pieces: list[Piece], is_last: bool) -> tuple[list[Piece], list[Piece]]:
        """Ask for pieces; (those to be asked for again, those that need smaller chunks)."""
        prompt = load_prompt(self.config.prompt)
        prompts = []
        for piece in pieces:
            sampling = self.config.sampling(2 * piece.tokens + 64)
            # a second try takes no chances
            prompts.append(prompt.fill(piece.source, replace(sampling, temperature=0.0) if piece.verdict else sampling))
        again, smaller = [], []
        for piece, answer in zip(pieces, self.ask(prompts), strict=True):
            verdict = self._take(piece, answer)
            if verdict and not is_last and piece.text is None:
                (smaller if "truncated" in verdict.failed else again).append(piece)
        self.counts["chunks_again"] += len(again) + len(smaller)
        return again, smaller

    def _take(self, piece: Piece, answer: Generated) -> Verdict | None:
        """Put an answer into its piece if the guards let it; None where there is no answer to judge."""
        if answer.failure is not None:
            piece.verdict = f"no answer: {answer.failure.kind}"
            return None
        text = strip_fence(answer.text)
        is_nothing = text.strip().strip('.*`"') == NOTHING
        verdict = judge(piece.source, "" if is_nothing else text, answer.finish_reason)
        if is_nothing:
            # nothing is short, and may be right; formulas and code are something
            verdict = Verdict({name: value for name, value in verdict.failed.items() if name != "length"})
        for name in verdict.failed:
            self.counts[f"guard={name}"] += 1
        piece.verdict = str(verdict)
        if verdict.is_good:
            piece.text = "" if is_nothing else text
        return verdict

    def _row(self, text: str, by_rules: Cleaned, pieces: list[Piece]) -> dict[str, Any]:
        failed = [piece for piece in pieces if piece.text is None]
        if len(failed) == len(pieces):
            status = "failed"
            cleaned = {"rules": by_rules.text, "raw": text, "drop": ""}[self.config.on_fail]
        else:
            cleaned = merge([clean_text(p.source).text if p.text is None else p.text for p in pieces])
            status = "partial" if failed else "llm" if cleaned else "nothing"
        verdicts = Counter(piece.verdict for piece in pieces)
        return {
            "cleaned_text": cleaned,
            "clean_status": status,
            "clean_model": self.model,
            "clean_prompt_sha": load_prompt(self.config.prompt).sha,
            "clean_math_kept": math_kept(text, cleaned),
            "clean_guard": "; ".join(f"{n}x {verdict}" if n > 1 else verdict for verdict, n in verdicts.items()),
        }

    def _labels(self, name: str, texts: Sequence[str]) -> list[str | None]:
        """What the model says of the first chunk of each text."""
        prompt, sampling = load_prompt(name), replace(self.config.sampling(512), temperature=0.0, max_tokens=512)
        first = [(i, chunks[0].text) for i, text in enumerate(texts) if (chunks := self.split(text))]
        labels: list[str | None] = [None] * len(texts)
        for (i, _), answer in zip(first, self.ask([prompt.fill(text, sampling) for _, text in first]), strict=True):
            labels[i] = prompt.label(answer.text)
        self.counts[f"unlabelled={name}"] += labels.count(None)
        return labels


def _by_rules(text: str, cleaned: Cleaned) -> dict[str, Any]:
    return {
        "cleaned_text": cleaned.text,
        "clean_status": "rules" if text.strip() else "empty",
        "clean_model": None,
        "clean_prompt_sha": None,
        "clean_math_kept": math_kept(text, cleaned.text),
        "clean_guard": None,
    }


def _hosts(table: pa.Table) -> list[str] | None:
    """Of the rows' URLs, where there are such."""
    if "url" not in table.column_names:
        return None
    return [_host(url or "") for url in table["url"].to_pylist()]


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""
