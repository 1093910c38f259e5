"""`longdoc`: the long documents among rows, repeated by length, laid among shorter ones, asked about by a model.

With `questions`, as many are written for every document, each from spans far apart, and checked in a second round; a document
is written once for each question that needs its spans, the question at its end or start by (seed, id).
"""

from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from alloy.core.generator import Generated, Prompt
from alloy.data.document import row_id
from alloy.data.io import Document
from alloy.data.llm import LlmConfig, LlmStage, row_ids
from alloy.data.longdoc import (
    chain_documents,
    keep_long,
    number_passages,
    question_text,
    read_question,
    refuse_question,
    repetitions,
    sample_spans,
)
from alloy.data.pipeline import Place
from alloy.data.prompts import load_prompt

ANSWER_TOKENS = 512
_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(), "source_id": pa.string(), "text": pa.large_string(), "n_tokens": pa.int32(),
    "question": pa.string(), "answer": pa.string(),
}  # fmt: skip


class LongdocConfig(LlmConfig):
    """Settings of `alloy data longdoc`."""

    stage: Literal["longdoc"] = "longdoc"
    min_tokens: Annotated[int, Field(ge=1, description="Leave shorter documents out.")] = 32_768
    repeat: Annotated[
        tuple[str, ...],
        Field(description="TOKENS=FACTOR: write documents of so many tokens so often, such as 65536=2.5."),
    ] = ()
    chain_tokens: Annotated[
        int, Field(ge=0, description="Lay shorter documents of the part around each, up to so many tokens; 0: none.")
    ] = 0
    questions: Annotated[int, Field(ge=0, description="For each document, by a model.")] = 0
    spans: Annotated[int, Field(ge=2, description="Places that a question is made of.")] = 3
    span_chars: Annotated[int, Field(ge=1, description="About how long each is.")] = 1500

    @property
    def asks(self) -> bool:
        """Only questions need a model."""
        return self.questions > 0

    @property
    def buckets(self) -> dict[int, float]:
        """Least tokens -> factor."""
        return {int(least): float(factor) for least, _, factor in (entry.partition("=") for entry in self.repeat)}

    @model_validator(mode="after")
    def check_buckets(self) -> Self:
        try:
            factors = self.buckets.values()
        except ValueError:
            raise ValueError(
                f"repeat = {list(self.repeat)} is not a list of TOKENS=FACTOR, such as 65536=2.5"
            ) from None
        if any(not 0 <= factor < 1000 for factor in factors):
            raise ValueError(f"repeat = {list(self.repeat)}: factors are from 0 to 1000")
        return self


class Longdoc(LlmStage[LongdocConfig]):
    """Keep the long documents, repeat them by length, chain them, and ask about several of their places at once."""

    Config = LongdocConfig

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """One row for each time that a long document is written."""
        config, ids = self.config, row_ids(table, place)
        documents = [Document(text, name) for text, name in zip(self.texts(table), ids, strict=True)]
        numbers = {name: row for row, name in enumerate(ids)}
        long = list(keep_long(documents, self.count, config.min_tokens))
        self.counts["too-short"] += len(documents) - len(long)
        names = {document.name for document, _ in long}
        short = [document for document in documents if document.text and document.name not in names]
        asked = self._questions([document for document, _ in long]) if config.questions else {}
        rows: list[dict[str, Any]] = []
        for document, length in long:
            found = asked.get(document.name, [("", "")] if not config.questions else [])
            for time in range(repetitions(length, config.buckets, config.seed, document.name) * len(found)):
                question, answer = found[time % len(found)]
                seed = config.seed + time
                text = document.text
                if config.chain_tokens:
                    text = chain_documents(document, short, config.chain_tokens, self.count, seed).text
                name = row_id(document.name, "longdoc", time)
                if question:
                    text = question_text(text, question, answer, at_start=int(name, 16) % 2 == 0)
                rows.append(
                    {
                        "row": numbers[document.name],
                        "id": name,
                        "source_id": document.name,
                        "text": text,
                        "n_tokens": self.count(text),
                        "question": question or None,
                        "answer": answer or None,
                    }
                )
        return self.made_of(table, rows, _TYPES)

    def _questions(self, documents: list[Document]) -> dict[str, list[tuple[str, str]]]:
        """Questions with their answers that need their spans, by document."""
        config = self.config
        asked: list[tuple[str, list[str]]] = []
        for document in documents:
            if len(document.text) < 2 * config.span_chars * config.spans:
                self.counts["no-room-for-spans"] += 1
                continue
            for number in range(config.questions):
                spans = sample_spans(document.text, config.spans, config.span_chars, config.seed + number)
                asked.append((document.name, [document.text[start:stop].strip() for start, stop in spans]))
        written = self._ask("longdoc-question", [number_passages(passages) for _, passages in asked])
        read = [
            (name, passages, read_question(answer.text))
            for (name, passages), answer in zip(asked, written, strict=True)
        ]
        kept = [(name, passages, *question) for name, passages, question in read if question]
        self.counts["question=unreadable"] += len(read) - len(kept)
        prompts = [
            f"{number_passages(shown)}\n\nQuestion: {question}"
            for _, passages, question, _ in kept
            for shown in (passages, [], *([passage] for passage in passages))
        ]
        answers = self._ask("longdoc-answer", prompts)
        found: dict[str, list[tuple[str, str]]] = {}
        each = config.spans + 2
        for index, (name, _, question, answer) in enumerate(kept):
            given = answers[index * each : (index + 1) * each]
            texts = [one.text for one in given]
            failed = any(one.failure is not None for one in given)
            reason = "failed" if failed else refuse_question(answer, texts[0], texts[1], texts[2:])
            self.counts[f"question={reason or 'kept'}"] += 1
            if reason is None:
                found.setdefault(name, []).append((question, answer))
        return found

    def _ask(self, name: str, texts: list[str]) -> list[Generated]:
        sampling = self.config.sampling(ANSWER_TOKENS)
        prompts: list[Prompt] = [load_prompt(name).fill(text, sampling) for text in texts]
        return self.ask(prompts)
