"""Tokenizers and token shards: text in, memory-mapped token ids out.

Shards have Megatron's indexed format (data.md 11.2), byte for byte: `.bin` holds the ids back to back, little endian;
`.idx` holds the header, int32 sequence lengths, int64 byte pointers and int64 document indices (first 0, last = number of
sequences). A folder of shards is complete when its `manifest.json` is there: it is written last, and every file is
written under a temporary name and renamed, so a killed run leaves nothing that could be taken for a corpus.

A document is stored as `bos text eos`, as far as the tokenizer has these tokens. Special tokens written out in a text stay
text: they are encoded letter by letter, so that no document can speak in the chat template's voice.

Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import contextlib
import hashlib
import heapq
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alloy.core import tokenizer as tokenizer_folder
from alloy.core.runs import atomic_path, atomic_write
from alloy.data.io import Document
from alloy.errors import DataError, RecipeError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# words with one leading mark or space, digits singly, runs of marks, line ends, spaces
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Nemotron 3's layout (hybrid-models.md 13): always a system turn; reasoning before the last user turn is cut
CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("this tokenizer's chat template has no layout for tools") }}{% endif %}
{%- set thinking = enable_thinking if enable_thinking is defined else true %}
{%- set truncate = truncate_history_thinking if truncate_history_thinking is defined else true %}
{%- set turns = messages %}
{%- set system = "" %}
{%- if messages and messages[0].role == "system" %}
{%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for turn in turns %}{% if turn.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{{- "<|im_start|>system\\n" + system + "<|im_end|>\\n" }}
{%- for turn in turns %}
{%- if turn.role not in ["user", "assistant"] %}
{{- raise_exception("unknown role " + turn.role + " in turn " + loop.index|string + "; use system (first), user or assistant") }}
{%- endif %}
{{- "<|im_start|>" + turn.role + "\\n" }}
{%- if turn.role == "assistant" %}
{%- if turn.reasoning_content and (not truncate or loop.index0 > last.user) %}
{{- "<think>\\n" + turn.reasoning_content + "\\n</think>\\n" }}
{%- else %}
{{- "<think></think>" }}
{%- endif %}
{%- endif %}
{{- turn.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" + ("<think>\\n" if thinking else "<think></think>") }}
{%- endif %}"""

IDX_MAGIC = b"MMIDIDX\0\0"
IDX_HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
UINT16_VOCAB = 65_500
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 28
BATCH_CHARS = 1 << 20

Ids = NDArray[np.integer]
# called with (documents, tokens, bytes) written so far
Progress = Callable[[int, int, int], None]


def train_tokenizer(
    texts: Iterable[str],
    vocab: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    max_bytes: int | None = None,
    seed: int = 0,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: lossless for every text, the same for the same texts and seed.

    Args:
        texts: training texts
        vocab: size including the 256 bytes and the special tokens
        special_tokens: take the first ids; `<s>`, `</s>` and `<pad>` become bos, eos and padding where present
        max_bytes: train on a random choice of whole texts of at most this many bytes in all (None = all)
        seed: of that choice
    """
    least = 256 + len(special_tokens)
    if vocab < least:
        raise RecipeError(
            f"vocab = {vocab} is too small: 256 bytes and {len(special_tokens)} special tokens need {least}."
        )
    if max_bytes is not None:
        texts = _sample(texts, max_bytes, seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
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

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, without bos and eos, in parallel."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text as a document: bos text eos."""
        before = [] if self.bos is None else [self.bos]
        after = [] if self.eos is None else [self.eos]
        return [np.concatenate([before, ids, after]).astype(np.int64) for ids in self.encode(texts)]

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


def shard_dtype(vocab: int) -> str:
    """uint16 below 65,500 ids, else int32 (Megatron's rule)."""
    return "<u2" if vocab < UINT16_VOCAB else "<i4"


class ShardWriter:
    """Appends documents to an open `.bin` file and keeps what the `.idx` file and the manifest need."""

    def __init__(self, prefix: Path, dtype: str, file: BinaryIO) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self.lengths: list[int] = []
        self._file = file
        self._digest = hashlib.sha256()

    def add(self, ids: Ids) -> None:
        """Append one document; ids: (tokens,)."""
        if len(ids) == 0:
            raise DataError(f"{self.prefix}: document {len(self.lengths)} has no tokens; leave empty documents out.")
        highest = np.iinfo(self.dtype).max
        for value in (int(ids.min()), int(ids.max())):
            if not 0 <= value <= highest:
                raise DataError(f"{self.prefix}: token id {value} does not fit {self.dtype.name} (0 to {highest}).")
        data = ids.astype(self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.lengths.append(len(ids))
        self.tokens += len(ids)

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this shard."""
        return {
            "name": self.prefix.name,
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": hashlib.sha256(idx_bytes(self.lengths, self.dtype)).hexdigest(),
        }


@contextlib.contextmanager
def open_shard(prefix: str | Path, dtype: str) -> Iterator[ShardWriter]:
    """A writer of one `.bin/.idx` pair; the files get their names only when the block ends well."""
    with atomic_path(Path(f"{prefix}.idx")) as index, atomic_path(Path(f"{prefix}.bin")) as data:
        with data.open("wb") as file:
            writer = ShardWriter(Path(prefix), dtype, file)
            yield writer
        index.write_bytes(idx_bytes(writer.lengths, writer.dtype))


def idx_bytes(lengths: Sequence[int], dtype: np.dtype | str) -> bytes:
    """Content of an `.idx` file whose sequences are one document each."""
    dtype = np.dtype(dtype)
    codes = {np.dtype(name): code for code, name in DTYPES.items()}
    sizes = np.array(lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(min(1, len(sizes)), "<i8"), ends[:-1]])
    header = IDX_HEADER.pack(IDX_MAGIC, 1, codes[dtype], len(sizes), len(sizes) + 1)
    return (
        header + sizes.tobytes() + pointers.astype("<i8").tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    )


def write_shard(prefix: str | Path, documents: Iterable[Ids], dtype: str = "<u2") -> dict[str, Any]:
    """Write token ids, one array a document, as `prefix.bin` and `prefix.idx`; returns the manifest entry."""
    with open_shard(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return writer.entry()


class TokenShard:
    """One `.bin/.idx` pair, memory-mapped. `offsets` (documents + 1,) int64 are document starts, in tokens."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for file in (index, data):
            if not file.is_file():
                raise DataError(
                    f"{file} is missing; a shard is a .bin and an .idx file. Run `alloy data tokenize` again."
                )
        self.dtype, lengths, documents = _read_idx(index)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.offsets: NDArray[np.int64] = starts[documents]
        if self.num_tokens == 0:
            raise DataError(f"{index} is empty: it holds no tokens. Remove the shard or tokenize its text again.")
        expected, size = self.num_tokens * self.dtype.itemsize, data.stat().st_size
        if size != expected:
            raise DataError(
                f"{data} has {size} bytes but its .idx describes {expected}; the copy is damaged, make it again."
            )
        self.tokens = np.memmap(data, dtype=self.dtype, mode="r")

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, document: int) -> Ids:
        """(tokens,) ids of one document, a view of the file."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]


def _read_idx(file: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64]]:
    """dtype, lengths (sequences,) and document indices (documents + 1,) of an `.idx` file, checked."""
    data = file.read_bytes()
    if len(data) < IDX_HEADER.size or not data.startswith(IDX_MAGIC):
        raise DataError(f"{file} is not an index of token shards: it does not begin with MMIDIDX.")
    _, version, code, sequences, documents = IDX_HEADER.unpack_from(data)
    if version != 1 or code not in DTYPES or DTYPES[code][1] == "f":
        raise DataError(f"{file} has version {version} and type code {code}; version 1 and an integer type are read.")
    size = IDX_HEADER.size + 12 * sequences + 8 * documents
    # multimodal files append one int8 a sequence
    if len(data) not in (size, size + sequences):
        raise DataError(
            f"{file} has {len(data)} bytes but its header describes {size}; it is cut short or damaged, make it again."
        )
    dtype = np.dtype(DTYPES[code])
    lengths = np.frombuffer(data, "<i4", sequences, IDX_HEADER.size)
    pointers = np.frombuffer(data, "<i8", sequences, IDX_HEADER.size + 4 * sequences)
    indices = np.frombuffer(data, "<i8", documents, IDX_HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    in_order = (lengths >= 0).all() and np.array_equal(pointers[1:], ends[:-1]) and (sequences == 0 or pointers[0] == 0)
    if not in_order or documents == 0 or indices[0] != 0 or indices[-1] != sequences or (np.diff(indices) < 0).any():
        raise DataError(f"{file} is inconsistent: lengths, pointers and document indices disagree; make it again.")
    return dtype, lengths, indices


class TokenCorpus:
    """The shards of a folder with a manifest, or one Megatron pair given by its prefix, as one list of documents."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        prefix = self.path.with_suffix("") if self.path.suffix in (".bin", ".idx") else self.path
        if not self.path.is_dir() and not Path(f"{prefix}.idx").exists():
            raise DataError(f"{path}: no token shards there. Run `alloy data tokenize` first, or name an .idx file.")
        self.manifest = load_manifest(self.path) if self.path.is_dir() else None
        entries = self.manifest["shards"] if self.manifest else []
        self.shards = [TokenShard(self.path / entry["name"]) for entry in entries] or [TokenShard(prefix)]
        for shard, entry in zip(self.shards, entries, strict=False):
            if (shard.num_documents, shard.num_tokens) != (entry["documents"], entry["tokens"]):
                raise DataError(
                    f"{shard.prefix} has {shard.num_tokens} tokens but {MANIFEST} says {entry['tokens']}; tokenize again."
                )
        self.lengths = np.concatenate([np.diff(shard.offsets) for shard in self.shards])
        self._firsts = np.cumsum([0] + [shard.num_documents for shard in self.shards])

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def tokenizer_hash(self) -> str | None:
        """None for a foreign shard, which does not say."""
        return self.manifest["tokenizer"]["hash"] if self.manifest else None

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, document: int) -> Ids:
        """(tokens,) ids of one document, a view of its file."""
        if len(self.shards) == 1:
            return self.shards[0][document]
        shard = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return self.shards[shard][document - int(self._firsts[shard])]


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete folder of shards; DataError where tokenization never finished."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(
            f"{folder} has no {MANIFEST}: nothing was tokenized there, or it was interrupted. Run `alloy data tokenize` again."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); tokenize again.") from error
    if not isinstance(manifest, dict) or not {"tokenizer", "shards"} <= manifest.keys():
        raise DataError(f"{file} is not a manifest of token shards: it lacks tokenizer or shards.")
    return manifest


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
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        if not overwrite:
            raise RecipeError(
                f"{folder} holds a tokenized corpus already; choose another folder, or overwrite it (--overwrite)."
            )
        (folder / MANIFEST).unlink()
    for leftover in folder.glob(".shard-*.tmp"):
        leftover.unlink()
    encoder = TextEncoder(tokenizer)
    dtype = shard_dtype(encoder.vocab)
    shards: list[dict[str, Any]] = []
    counts = Counter(documents=0, tokens=0, bytes=0)
    encoded = _encode(documents, encoder)
    pending = next(encoded, None)
    if pending is None:
        raise DataError(f"nothing to tokenize for {folder}: no document holds text.")
    while pending is not None:
        with open_shard(folder / f"shard-{len(shards):05d}", dtype) as writer:
            while pending is not None and writer.tokens < shard_tokens:
                ids, num_bytes = pending
                writer.add(ids)
                counts.update(documents=1, tokens=len(ids), bytes=num_bytes)
                if progress:
                    progress(counts["documents"], counts["tokens"], counts["bytes"])
                pending = next(encoded, None)
        shards.append(writer.entry())
    manifest = {
        "version": 1,
        "tokenizer": {"hash": encoder.hash, "vocab": encoder.vocab, "bos": encoder.bos, "eos": encoder.eos},
        "dtype": np.dtype(dtype).name,
        **counts,
        "shards": shards,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _token_id(tokenizer: PreTrainedTokenizerFast, token: object) -> int | None:
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def _encode(documents: Iterable[Document | str], encoder: TextEncoder) -> Iterator[tuple[Ids, int]]:
    """(ids, bytes of text) of each non-empty document, encoded in batches of about a million characters."""
    for batch in _batches(documents):
        for text, ids in zip(batch, encoder.documents(batch), strict=True):
            yield ids, len(text.encode())


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


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A choice of texts of at most `max_bytes`, uniform by (seed, index), in their order; holds no more than that."""
    chosen: list[tuple[int, int, str]] = []  # max-heap by key through the sign
    total = 0
    for index, text in enumerate(texts):
        key = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        heapq.heappush(chosen, (-int.from_bytes(key), index, text))
        total += len(text.encode())
        while total > max_bytes:
            total -= len(heapq.heappop(chosen)[2].encode())
    if not chosen:
        raise DataError(f"max_bytes = {max_bytes} leaves no whole text to train on; raise it.")
    return [text for _, _, text in sorted(chosen, key=lambda item: item[1])]
