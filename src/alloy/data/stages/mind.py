"""Conversations about texts, in seven styles: a model is asked chunk by chunk, and what passes the filters becomes rows.

Paper: MIND (Akter et al., 2024). arXiv:2410.12881. Chunks of about 500 tokens, because longer ones lose detail.
A row is a document in one style: the conversations of its chunks in order. With the style `longest` each chunk has the longest
of its seven, the best single setting of the paper (table 6).
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from alloy.data.algebra import Equality
from alloy.data.document import row_id
from alloy.data.guards import strip_fence, strip_framing
from alloy.data.llm import LlmConfig, LlmStage, row_ids
from alloy.data.mind import (
    STYLES,
    Faithfulness,
    Turn,
    drop_reason,
    faithfulness,
    interleave,
    messages,
    speakers_of,
    turns,
)
from alloy.data.pipeline import Place
from alloy.data.prompts import load_prompt


class MindConfig(LlmConfig):
    """Settings of `alloy data mind`. Sampling and chunks: section 3 of the paper."""

    stage: Literal["mind"] = "mind"
    styles: Annotated[
        tuple[str, ...], Field(min_length=1, description=f"all, longest, or some of {', '.join(STYLES)}.")
    ] = ("longest",)
    chunk_tokens: Annotated[int, Field(ge=1, description="Longest piece of a text asked about at once.")] = 500
    temperature: Annotated[float, Field(ge=0, description="Of sampling.")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, description="Of sampling.")] = 0.9
    top_k: Annotated[int, Field(ge=0, description="Of sampling; 0: all tokens, and not sent.")] = 0
    min_faithful: Annotated[
        float, Field(ge=0, le=1, description="Drop conversations in which a smaller share of the claims is supported.")
    ] = 0.0
    mix: Annotated[
        str | None, Field(description="Mix the texts themselves in: 1:1 is one token of them for one of conversations.")
    ] = None
    messages: Annotated[bool, Field(description="Also as chat messages with alternating roles.")] = False
    dropped: Annotated[bool, Field(description="Also write what was dropped, with kept = false.")] = False

    @model_validator(mode="after")
    def check_styles(self) -> Self:
        for style in self.styles:
            if style not in (*STYLES, "all", "longest"):
                raise ValueError(f'styles: there is no "{style}"; use all, longest, or some of {", ".join(STYLES)}')
        if {"all", "longest"} & set(self.styles) and len(self.styles) > 1:
            raise ValueError(f"styles = {', '.join(self.styles)}: all and longest stand alone")
        if self.mix is not None:
            parse_mix(self.mix)
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """The styles that the model is asked for."""
        return STYLES if self.styles[0] in ("all", "longest") else self.styles


def parse_mix(mix: str) -> tuple[int, int]:
    """ "1:2" as numbers; ValueError for anything else."""
    raw, _, synthetic = mix.partition(":")
    if not (raw.isdigit() and synthetic.isdigit() and int(synthetic) > 0):
        raise ValueError(f'mix = "{mix}" is not a ratio; write raw:synthetic, such as 1:1')
    return int(raw), int(synthetic)


@dataclass(frozen=True)
class Talk:
    """An answer about one chunk, judged."""

    row: int
    chunk: int
    style: str
    text: str
    tokens: int
    turns: list[Turn]
    drop: str | None
    faith: Faithfulness


class Mind(LlmStage[MindConfig]):
    """Turn texts into conversations about them (MIND)."""

    Config = MindConfig

    def start(self, out: Path) -> None:
        """Meet the model, and what evaluates formulas."""
        super().start(out)
        self.equal = Equality()

    def close(self) -> None:
        """End the process that evaluates."""
        self.equal.close()

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """One row for each document and style that has a conversation."""
        texts = self.texts(table)
        ids = row_ids(table, place)
        rows: list[dict[str, Any]] = []
        by_document: dict[tuple[int, str], list[Talk]] = defaultdict(list)
        for talk in self._talks(texts):
            self.counts["conversations"] += 1
            if talk.drop is None:
                by_document[talk.row, "longest" if self.config.styles == ("longest",) else talk.style].append(talk)
            else:
                self.counts[f"dropped={talk.drop}"] += 1
                if self.config.dropped:
                    rows.append(self._row([talk], talk.style, ids))
        for (_, style), talks in by_document.items():
            rows.append(self._row(_longest(talks) if style == "longest" else talks, style, ids))
        rows.sort(key=lambda row: (row["row"], not row["kept"], row["style"], row["chunk_ids"]))
        if self.config.mix:
            rows = self._mixed(rows, texts, ids)
        self.counts["rows_kept"] += sum(row["kept"] for row in rows)
        hidden = () if self.config.messages else ("messages",)
        return self.made_of(table, rows, {name: kind for name, kind in _TYPES.items() if name not in hidden})

    def _talks(self, texts: list[str]) -> list[Talk]:
        """All answers, judged, in the order of rows, chunks and styles."""
        chunks, owners, numbers = self.chunks(texts)
        styles = [load_prompt(f"mind-{style}") for style in self.config.asked]
        asked = [(i, prompt) for i in range(len(chunks)) for prompt in styles]
        sampling = self.config.sampling(4 * self.config.chunk_tokens)
        answers = self.ask([prompt.fill(chunks[i].text, sampling) for i, prompt in asked])
        found: list[Talk] = []
        for (i, prompt), answer in zip(asked, answers, strict=True):
            text = strip_framing(strip_fence(answer.text)).strip()
            tokens = self.count(text)
            drop: str | None = "failed"
            conversation: list[Turn] = []
            faith = Faithfulness(0, 0)
            if answer.failure is None:
                drop = drop_reason(text, prompt, tokens, answer.finish_reason)
                conversation = turns(text, prompt.speakers)
                faith = faithfulness(chunks[i].text, conversation, prompt.answers, self.equal)
                if drop is None and faith.share < self.config.min_faithful:
                    drop = "unfaithful"
            style = prompt.name.removeprefix("mind-")
            found.append(Talk(owners[i], numbers[i], style, text, tokens, conversation, drop, faith))
        return found

    def _row(self, talks: list[Talk], style: str, ids: list[str]) -> dict[str, Any]:
        row, spoken = talks[0].row, [turn for talk in talks for turn in talk.turns]
        claims, supported = sum(t.faith.claims for t in talks), sum(t.faith.supported for t in talks)
        chunk_ids = [talk.chunk for talk in talks]
        shas = list(dict.fromkeys(load_prompt(f"mind-{talk.style}").sha for talk in talks))
        text = "\n\n".join(talk.text for talk in talks)
        return {
            "row": row,
            "id": row_id(ids[row], f"mind-{style}-{talks[0].style}", chunk_ids[0]),
            "source_id": ids[row],
            "chunk_ids": chunk_ids,
            "style": style,
            "generator": self.model,
            "prompt_sha": " ".join(shas),
            "text": text,
            "n_turns": len(spoken),
            "speakers": speakers_of(spoken),
            "n_tokens": self.count(text),
            "kept": talks[0].drop is None,
            "drop_reason": talks[0].drop,
            "faithfulness": Faithfulness(claims, supported).share,
            "messages": [m for talk in talks for m in messages(talk.turns, load_prompt(f"mind-{talk.style}").answers)],
        }

    def _mixed(self, rows: list[dict[str, Any]], texts: list[str], ids: list[str]) -> list[dict[str, Any]]:
        """The rows with texts among them, as many as the ratio of tokens asks for."""
        assert self.config.mix, "called where there is one"
        raw: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            if text.strip():
                empty = self._row([Talk(i, 0, self.config.asked[0], text, 0, [], None, Faithfulness(0, 0))], "raw", ids)
                raw.append(
                    {**empty, "id": ids[i], "chunk_ids": [], "generator": None, "prompt_sha": None, "messages": []}
                )
        tokens = [row["n_tokens"] for row in raw], [row["n_tokens"] * row["kept"] for row in rows]
        order = interleave(*tokens, parse_mix(self.config.mix))
        self.counts["raw_left_out"] += len(raw) - sum(kind == "raw" for kind, _ in order)
        return [(raw if kind == "raw" else rows)[i] for kind, i in order]


_STRINGS = pa.list_(pa.string())
_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(), "source_id": pa.string(), "chunk_ids": pa.list_(pa.int32()), "style": pa.string(),
    "generator": pa.string(), "prompt_sha": pa.string(), "text": pa.large_string(), "n_turns": pa.int32(),
    "speakers": _STRINGS, "n_tokens": pa.int32(), "kept": pa.bool_(), "drop_reason": pa.string(),
    "faithfulness": pa.float32(), "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}  # fmt: skip


def _longest(talks: list[Talk]) -> list[Talk]:
    """The longest conversation of each chunk, in the order of the chunks."""
    best: dict[int, Talk] = {}
    for talk in talks:
        if talk.chunk not in best or talk.tokens > best[talk.chunk].tokens:
            best[talk.chunk] = talk
    return [best[chunk] for chunk in sorted(best)]
