"""Texts written anew by a model, in the five ways of Nemotron-CC: pieces by token budget, asked, checked, joined again.

Paper: Nemotron-CC (Su et al., 2024), section 2.3. arXiv:2412.02595. `wikipedia_style` is meant for text of low quality, the other
tasks for text of high quality; which rows a task gets is chosen by `only`.
"""

import re
from collections import defaultdict
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from alloy.core.generator import Generated
from alloy.data.chunks import merge
from alloy.data.document import row_id
from alloy.data.guards import is_refusal, strip_fence, strip_framing
from alloy.data.llm import LlmConfig, LlmStage, row_ids
from alloy.data.pipeline import Place
from alloy.data.prompts import load_prompt

Task = Literal["wikipedia_style", "diverse_qa", "distill", "extract_knowledge", "knowledge_list"]
# of a text
MOST_QUESTIONS = 8
_PAIR = re.compile(
    r"^[ \t]*(?:\d+[.)][ \t]*)?(?:\*\*)?Question(?:[ \t]*\d+)?(?:\*\*)?[ \t]*:(?:\*\*)?(?P<question>.+?)"
    r"^[ \t]*(?:\*\*)?Answer(?:[ \t]*\d+)?(?:\*\*)?[ \t]*:(?:\*\*)?(?P<answer>.+?)(?=^[ \t]*(?:\d+[.)][ \t]*)?(?:\*\*)?Question|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


class RephraseConfig(LlmConfig):
    """Settings of `alloy data rephrase`."""

    stage: Literal["rephrase"] = "rephrase"
    tasks: Annotated[
        tuple[Task, ...],
        Field(
            min_length=1,
            description="wikipedia_style, diverse_qa, distill, extract_knowledge, knowledge_list; a row comes of each.",
        ),
    ] = ("wikipedia_style",)
    chunk_tokens: Annotated[int, Field(ge=1, description="Longest piece of a text asked about at once.")] = 1000
    min_tokens: Annotated[int, Field(ge=0, description="Drop answers that are shorter.")] = 30
    dropped: Annotated[bool, Field(description="Also write texts of which nothing was kept, with kept = false.")] = (
        False
    )


class Rephrase(LlmStage[RephraseConfig]):
    """Write texts anew: as an encyclopedia, as questions, shorter, or as knowledge (Nemotron-CC)."""

    Config = RephraseConfig

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """One row for each text and task of which something was kept."""
        texts, ids = self.texts(table), row_ids(table, place)
        chunks, owners, numbers = self.chunks(texts)
        prompts = [load_prompt(f"rephrase-{task}") for task in self.config.tasks]
        asked = [(i, prompt) for i in range(len(chunks)) for prompt in prompts]
        sampling = self.config.sampling(2 * self.config.chunk_tokens)
        answers = self.ask([prompt.fill(chunks[i].text, sampling) for i, prompt in asked])
        pieces: dict[tuple[int, int], list[tuple[int, str, str | None]]] = defaultdict(list)
        for (i, prompt), answer in zip(asked, answers, strict=True):
            text, reason = self._piece(prompt.name, chunks[i].text, answer)
            self.counts["pieces"] += 1
            if reason:
                self.counts[f"dropped={reason}"] += 1
            pieces[owners[i], prompts.index(prompt)].append((numbers[i], text, reason))
        rows = [
            self._row(row, self.config.tasks[task], prompts[task].sha, found, ids)
            for (row, task), found in sorted(pieces.items())
        ]
        return self.made_of(table, [row for row in rows if row["kept"] or self.config.dropped], _TYPES)

    def _piece(self, prompt: str, source: str, answer: Generated) -> tuple[str, str | None]:
        """(what an answer is worth, why it is dropped)."""
        if answer.failure is not None:
            return "", "failed"
        text = strip_framing(strip_fence(answer.text)).strip()
        if is_refusal(text):
            return "", "refused"
        if prompt == "rephrase-diverse_qa":
            pairs = _pairs(text, answer.finish_reason == "length")
            if not pairs:
                return "", "no-questions"
            return f"{source}\n\n" + "\n\n".join(pairs[:MOST_QUESTIONS]), None
        if answer.finish_reason == "length":
            return "", "truncated"
        return (text, None) if self.count(text) >= self.config.min_tokens else ("", "short")

    def _row(
        self, row: int, task: str, sha: str, found: list[tuple[int, str, str | None]], ids: list[str]
    ) -> dict[str, Any]:
        kept = [(number, text) for number, text, reason in found if reason is None]
        text = merge([text for _, text in kept])
        return {
            "row": row,
            "id": row_id(ids[row], f"rephrase-{task}", 0),
            "source_id": ids[row],
            "chunk_ids": [number for number, _ in kept],
            "task": task,
            "generator": self.model,
            "prompt_sha": sha,
            "text": text,
            "n_tokens": self.count(text),
            "kept": bool(kept),
            "drop_reason": " ".join(sorted({reason for _, _, reason in found if reason})) or None,
        }


_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(), "source_id": pa.string(), "chunk_ids": pa.list_(pa.int32()), "task": pa.string(),
    "generator": pa.string(), "prompt_sha": pa.string(), "text": pa.large_string(), "n_tokens": pa.int32(),
    "kept": pa.bool_(), "drop_reason": pa.string(),
}  # fmt: skip


def _pairs(text: str, is_cut: bool) -> list[str]:
    """The questions with their answers; where the text was cut off, the answer that reaches to its end is not whole."""
    found = [m for m in _PAIR.finditer(text) if not (is_cut and m.end() == len(text))]
    pairs = [(match["question"].strip(" *\n"), match["answer"].strip()) for match in found]
    return [f"Question: {question}\nAnswer: {answer}" for question, answer in pairs if question and answer]
