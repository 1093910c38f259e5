"""Tokenizers: byte-level BPE that loses nothing, trained, loaded, extended; and texts as shards of ids (data/shards.py).

A document is stored as `bos text eos`, as far as the tokenizer has these tokens. Special tokens written out in a text stay
text: they are encoded letter by letter, so that no document can speak in the chat template's voice.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alloy.core import tokenizer as tokenizer_folder
from alloy.data.chat import CHAT_TEMPLATE
from alloy.data.io import Document
from alloy.data.shards import SHARD_TOKENS, Chunk, clear_for_shards, shard_dtype, write_manifest, write_shards
from alloy.errors import DataError, RecipeError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# what merges stay within, but for the digits; a mark or space may lead a word.
# "words": letters together; "gpt4": English contractions apart (cl100k); "nemotron": words end where lower case does, and
# hold combining marks (o200k without contractions, as Mistral's and Nemotron's tokenizers have it)
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PIECES = {
    "words": (r"[^\r\n\p{L}\p{N}]?\p{L}+", _MARKS % ""),
    "gpt4": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+", _MARKS % ""),
    "nemotron": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
        _MARKS % "/",
    ),
}
Pieces = Literal["words", "gpt4", "nemotron"]
BATCH_CHARS = 1 << 20

# called with (documents, tokens, bytes) written so far
Progress = Callable[[int, int, int], None]


def train_tokenizer(
    texts: Iterable[str],
    vocab: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    max_bytes: int | None = None,
    seed: int = 0,
    pieces: Pieces = "words",
    digits: int = 1,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: lossless for every text, the same for the same texts and seed.

    Args:
        texts: training texts
        vocab: size including the 256 bytes and the special tokens
        special_tokens: take the first ids; `<s>`, `</s>` and `<pad>` become bos, eos and padding where present
        max_bytes: train on a random choice of whole texts of at most this many bytes in all (None = all)
        seed: of that choice
        pieces: what a text is cut into before merging (see PIECES)
        digits: most digits of a number that stay together, from its left
    """
    if digits < 1 or len(set(special_tokens)) < len(special_tokens):
        raise RecipeError(f"digits = {digits} must be at least 1, and special_tokens must differ from each other.")
    least = 256 + len(special_tokens)
    if vocab < least:
        raise RecipeError(
            f"vocab = {vocab} is too small: 256 bytes and {len(special_tokens)} special tokens need {least}."
        )
    if max_bytes is not None:
        texts = sample_texts(texts, max_bytes, seed)
        if not texts:
            raise DataError(f"max_bytes = {max_bytes} leaves no whole text to train on; raise it.")
    words, marks = PIECES[pieces]
    numbers = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{words}|{numbers}|{marks}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if "<s>" in special_tokens:
        # a prompt begins as a document does; chat templates and `TextEncoder` say themselves what comes first
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    roles = {role: token for role, token in roles.items() if token in special_tokens}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[token for token in special_tokens if token not in roles.values()],
        clean_up_tokenization_spaces=False,
        **roles,
    )
    if set(SPECIAL_TOKENS) <= set(special_tokens):
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> Path:
    """Write a transformers fast tokenizer folder, which counts as one only when it is whole."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        raise RecipeError(f"{folder} holds a tokenizer already; choose another folder or remove it.")
    tokenizer_folder.save_tokenizer(tokenizer, folder)
    return folder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a local folder (a tokenizer's or a checkpoint's)."""
    found = tokenizer_folder.load_tokenizer(Path(folder))
    if found is None:
        raise DataError(
            f"{folder} has no tokenizer.json; make one with `alloy data tokenizer`, or name a checkpoint folder."
        )
    return found


class TextEncoder:
    """Encodes documents for training and measurement: no truncation, no padding, special tokens in texts stay text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.hash = tokenizer_hash(tokenizer)
        self.vocab = len(tokenizer)
        self.bos = _token_id(tokenizer, tokenizer.bos_token)
        self.eos = _token_id(tokenizer, tokenizer.eos_token)
        self._backend.encode_special_tokens = True
        self.dtype = shard_dtype(self.vocab)
        self.facts = {"hash": self.hash, "vocab": self.vocab, "bos": self.bos, "eos": self.eos}

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, without bos and eos, in parallel."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text as a document: bos text eos."""
        before = [] if self.bos is None else [self.bos]
        after = [] if self.eos is None else [self.eos]
        return [np.concatenate([before, ids, after]).astype(np.int64) for ids in self.encode(texts)]

    def chunk(self, texts: Sequence[str]) -> Chunk:
        """The documents of non-empty texts, back to back."""
        documents = self.documents(texts)
        return Chunk(np.concatenate(documents), np.array([len(ids) for ids in documents]))

    def scored(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Documents as they are measured: the first id is context only, bos or, where there is none, eos."""
        if self.bos is not None:
            return self.documents(texts)
        if self.eos is None:
            raise DataError(
                "this tokenizer has neither a bos nor an eos token, so the first token of a text has no context to be scored in."
            )
        return [np.concatenate([[self.eos], ids]) for ids in self.documents(texts)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what decides the ids: model, normaliser, pre-tokeniser and added tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: parts[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def tokenize_corpus(
    documents: Iterable[Document | str],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize documents into shards of about `shard_tokens` tokens; the manifest, written last, is returned."""
    folder = Path(folder)
    clear_for_shards(folder, overwrite)
    encoder = TextEncoder(tokenizer)
    counts = Counter(documents=0, tokens=0, bytes=0)

    def chunks() -> Iterator[Chunk]:
        for batch in _batches(documents):
            chunk = encoder.chunk(batch)
            counts.update(documents=len(batch), tokens=len(chunk.ids), bytes=sum(len(text.encode()) for text in batch))
            yield chunk
            if progress:
                progress(counts["documents"], counts["tokens"], counts["bytes"])

    shards = write_shards(chunks(), folder, encoder.dtype, shard_tokens)
    if not shards:
        raise DataError(f"nothing to tokenize for {folder}: no document holds text.")
    return write_manifest(folder, encoder.facts, encoder.dtype, counts["bytes"], shards)


def _token_id(tokenizer: PreTrainedTokenizerFast, token: object) -> int | None:
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def _batches(documents: Iterable[Document | str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        text = document if isinstance(document, str) else document.text
        if not text:
            continue
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def sample_texts(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A choice of texts of at most `max_bytes`, uniform by (seed, index), in their order; holds no more than that."""
    chosen: list[tuple[int, int, str]] = []  # max-heap by key through the sign
    total = 0
    for index, text in enumerate(texts):
        key = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        heapq.heappush(chosen, (-int.from_bytes(key), index, text))
        total += len(text.encode())
        while total > max_bytes:
            total -= len(heapq.heappop(chosen)[2].encode())
    return [text for _, _, text in sorted(chosen, key=lambda item: item[1])]
