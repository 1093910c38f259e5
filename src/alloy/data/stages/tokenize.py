"""`tokenize`: rows of text into token shards, rows of messages into packed chats.

Text becomes the same shards, byte for byte, as from `tokens.tokenize_corpus`, whoever worked on the parts: each part is a pair
of files first, and the pairs are laid one after another at the end. Chats (a `messages` column) are packed part by part into
Parquet with a loss mask; those that cannot be trained on are counted by reason in the manifest.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from alloy.core.hub import resolve
from alloy.data.chat import BadChat, ChatEncoder, Reasoning, Sample, pack_samples
from alloy.data.document import text_column
from alloy.data.executors import Report
from alloy.data.parts import RowWriter, columns_of, read_part
from alloy.data.pipeline import Job, Place, Stage, StageConfig
from alloy.data.shards import (
    MANIFEST,
    SHARD_TOKENS,
    Chunk,
    TokenShard,
    load_manifest,
    open_shard,
    write_manifest,
    write_shards,
)
from alloy.data.tokens import TextEncoder, load_tokenizer, save_tokenizer, train_tokenizer
from alloy.errors import DataError, RecipeError

# of a new tokenizer, in the folder of the shards, and the text it is trained on
TOKENIZER, TRAIN_BYTES = "tokenizer", 1 << 28


class TokenizeConfig(StageConfig):
    """Settings of `tokenize`."""

    stage: Literal["tokenize"] = "tokenize"
    tokenizer: Annotated[str | None, Field(description="Folder of the tokenizer, or of a checkpoint that has one.")] = (
        None
    )
    vocab: Annotated[int | None, Field(description="Train a tokenizer of this size on the rows instead.")] = None
    column: Annotated[str | None, Field(description="Text; default: cleaned_text where it is there, else text.")] = None
    eod: Annotated[bool, Field(description="End documents with the tokenizer's end token.")] = True
    shard_tokens: Annotated[int, Field(ge=1, description="Tokens in a shard, about.")] = SHARD_TOKENS
    shards: Annotated[int | None, Field(ge=1, description="Number of shards, instead of their size.")] = None
    seq: Annotated[int, Field(ge=2, description="Most tokens in a packed row of chats.")] = 4096
    reasoning: Annotated[Reasoning, Field(description="Thoughts of assistants: keep or strip.")] = "keep"
    too_long: Annotated[
        Literal["drop", "cut"], Field(description="Chats longer than seq: drop them, or cut their end off.")
    ] = "drop"

    @model_validator(mode="after")
    def check(self) -> Self:
        """One tokenizer."""
        if (self.tokenizer is None) == (self.vocab is None):
            raise ValueError("set tokenizer to a finished one, or vocab to the size of a new one, and not both")
        return self


class Tokenize(Stage[TokenizeConfig]):
    """Texts to token shards, chats to packed rows; rows marked as duplicates are left out."""

    Config = TokenizeConfig
    writes_rows = False

    def prepare(self, job: Job) -> None:
        """Refuse rows without text, and a folder that holds a corpus of another origin."""
        kinds = set[bool]()
        for part in job.parts:
            names = columns_of(part)
            kinds.add("messages" in names)
            if len(kinds) > 1:
                raise DataError(f"{part.files[0]} and the files before it are chats and texts; tokenize them apart.")
            column = self.config.column or text_column(names)
            if "messages" not in names and column not in names:
                raise DataError(
                    f'{part.files[0]} has neither the column "{column}" nor "messages" but {", ".join(names)}; '
                    "name the one that holds the text."
                )
        if (job.out / MANIFEST).exists():
            stage_key = load_manifest(job.out).get("key")
            if stage_key is None:
                raise RecipeError(f"{job.out} holds a tokenized corpus already; choose another folder.")
            if stage_key != job.key:
                (job.out / MANIFEST).unlink()
        if self.config.vocab is not None:
            texts = (
                text
                for part in job.parts
                for table in read_part(part, 256, self.config.only)
                for text in self._texts(table)
            )
            trained = train_tokenizer(texts, self.config.vocab, max_bytes=TRAIN_BYTES, seed=self.config.seed)
            save_tokenizer(trained, job.out / TOKENIZER)

    def start(self, out: Path) -> None:
        """Load the tokenizer."""
        named = self.config.tokenizer
        tokenizer = load_tokenizer(out / TOKENIZER if named is None else resolve(named))
        self.encoder = TextEncoder(tokenizer)
        if not self.config.eod:
            self.encoder.eos = None
        self.chats = ChatEncoder(tokenizer, self.config.reasoning) if tokenizer.chat_template else None

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """`ids` of each text, or `ids` and `mask` of each sample of chats."""
        if "dup_keep" in table.column_names:
            kept = table.filter(table["dup_keep"].fill_null(True))
            self.counts["duplicates left out"] += table.num_rows - kept.num_rows
            table = kept
        if "messages" in table.column_names:
            samples = self._samples(table)
            # offsets and values: no Python number for every token
            return pa.table({name: _lists([getattr(s, name) for s in samples]) for name in Sample._fields})
        texts = self._texts(table)
        self.counts["empty"] += table.num_rows - len(texts)
        self.counts["bytes"] += sum(len(text.encode()) for text in texts)
        return pa.table({"ids": _lists(self.encoder.documents(texts))})

    def _texts(self, table: pa.Table) -> list[str]:
        """The texts of a table that are not empty."""
        column = self.config.column or text_column(table.column_names)
        return [text for text in table[column].to_pylist() if text]

    def _samples(self, table: pa.Table) -> list[Sample]:
        if self.chats is None:
            raise DataError(f"{self.config.tokenizer} has no chat template, which rows of messages need.")
        samples: list[Sample] = []
        tools = table["tools"].to_pylist() if "tools" in table.column_names else [None] * table.num_rows
        for messages, extra in zip(table["messages"].to_pylist(), tools, strict=True):
            try:
                found = self.chats.encode(messages, extra)
            except BadChat as reason:
                self.counts[f"dropped: {reason}"] += 1
                continue
            for ids, mask in found:
                if len(ids) > self.config.seq:
                    self.counts[f"too long: {self.config.too_long}"] += 1
                    if self.config.too_long == "drop":
                        continue
                    ids, mask = ids[: self.config.seq], mask[: self.config.seq].copy()
                    mask[-1] = 0
                if not mask.any():
                    self.counts["dropped: nothing left to train on"] += 1
                    continue
                samples.append(Sample(ids, mask))
                self.counts.update(samples=1, tokens=len(ids), trained_tokens=int(mask.sum()))
        return samples

    def write(self, tables: Iterator[pa.Table], path: Path) -> Report:
        """A `.bin/.idx` pair of texts, or a Parquet file of packed rows."""
        chats: list[Sample] | None = None
        prefix = path.with_name(path.name.partition(".")[0])
        with open_shard(prefix, self.encoder.dtype) as writer:
            for table in tables:
                if "mask" in table.column_names:
                    chats = [*(chats or []), *map(Sample, _arrays(table["ids"]), _arrays(table["mask"]))]
                elif table.num_rows:
                    column = table["ids"].combine_chunks()
                    writer.extend(Chunk(column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())))
        if chats is None:
            return {"rows_out": len(writer), "file": f"{prefix.name}.bin", "tokens": writer.tokens}
        for suffix in (".bin", ".idx"):
            prefix.with_name(prefix.name + suffix).unlink()
        with RowWriter(prefix.with_name(prefix.name + ".parquet")) as rows:
            rows.add(pack_samples(chats, self.config.seq))
        return {"rows_out": rows.rows, "file": f"{prefix.name}.parquet", "tokens": sum(len(s.ids) for s in chats)}

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """Lay the pairs of all parts one after another."""
        total = sum(report["tokens"] for report in reports)
        full = [report["file"].removesuffix(".bin") for report in reports if report["rows_out"]]
        if not full:
            raise DataError(f"nothing to tokenize for {job.out}: no row holds text, or a chat to train on.")
        if any(report["file"].endswith(".parquet") for report in reports):
            return {"tokens": total}
        if not (job.out / MANIFEST).exists():
            self.start(job.out)
            pairs = (TokenShard(job.out / name) for name in full)
            chunks = (Chunk(pair.tokens, pair.lengths) for pair in pairs)
            size = math.ceil(total / self.config.shards) if self.config.shards else self.config.shard_tokens
            shards = write_shards(chunks, job.out, self.encoder.dtype, size)
            num_bytes = sum(report["counts"]["bytes"] for report in reports)
            write_manifest(job.out, self.encoder.facts, self.encoder.dtype, num_bytes, shards, key=job.key)
        for pair in job.out.glob("part-*"):
            pair.unlink()
        return {"tokens": total}


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of lists."""
    offsets = np.cumsum([0] + [len(array) for array in arrays], dtype=np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    return np.split(lists.flatten().to_numpy(), lists.offsets.to_numpy()[1:-1])
