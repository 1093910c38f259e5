"""Token shards: memory-mapped token ids in Megatron's indexed format (data.md 11.2), byte for byte.

`.bin` holds the ids back to back, little endian; `.idx` holds the header, int32 sequence lengths, int64 byte pointers, int64
document indices (first 0, last = number of sequences) and, in multimodal data, an int8 mode for every sequence. A folder of
shards is complete when its `manifest.json` is there: it is written last, and every file is written under a temporary name and
renamed, so a killed run leaves nothing that could be taken for a corpus.

Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import contextlib
import hashlib
import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from alloy.core.runs import atomic_path, atomic_write
from alloy.errors import DataError, RecipeError

IDX_MAGIC = b"MMIDIDX\0\0"
IDX_HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
UINT16_VOCAB = 65_500
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 28
# ids converted and hashed at a time
BLOCK = 1 << 22

Ids = NDArray[np.integer]


def shard_dtype(vocab: int) -> str:
    """uint16 below 65,500 ids, else int32 (Megatron's rule)."""
    return "<u2" if vocab < UINT16_VOCAB else "<i4"


@dataclass
class Chunk:
    """Documents back to back.

    Attributes:
        ids: (tokens,)
        lengths: (sequences,) tokens of each
        documents: (documents + 1,) where documents begin, in sequences; None: one sequence each
        modes: (sequences,) int8 of multimodal data, or None
    """

    ids: Ids
    lengths: NDArray[np.integer]
    documents: NDArray[np.integer] | None = None
    modes: NDArray[np.int8] | None = None

    def split(self, tokens: int) -> tuple["Chunk", "Chunk | None"]:
        """The first documents, until there are `tokens` tokens, and what is left."""
        documents = np.arange(len(self.lengths) + 1) if self.documents is None else self.documents
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[documents]
        taken = int(np.searchsorted(ends[1:], tokens)) + 1
        if taken >= len(ends) - 1:
            return self, None
        cut = int(documents[taken])
        return (
            Chunk(self.ids[: ends[taken]], self.lengths[:cut], documents[: taken + 1], _slice(self.modes, None, cut)),
            Chunk(self.ids[ends[taken] :], self.lengths[cut:], documents[taken:] - cut, _slice(self.modes, cut, None)),
        )


class ShardWriter:
    """Appends documents to an open `.bin` file and keeps what the `.idx` file and the manifest need."""

    def __init__(self, prefix: Path, dtype: str | np.dtype, file: BinaryIO) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self._lengths: list[NDArray[np.integer]] = []
        self._documents: list[NDArray[np.integer]] = [np.zeros(1, np.int64)]
        self._modes: list[NDArray[np.int8]] = []
        self._sequences = self._number = 0
        self._file = file
        self._digest = hashlib.sha256()

    def add(self, ids: Ids) -> None:
        """Append one document; ids: (tokens,)."""
        if len(ids) == 0:
            raise DataError(f"{self.prefix}: document {self._number} has no tokens; leave empty documents out.")
        self.extend(Chunk(ids, np.array([len(ids)])))

    def extend(self, chunk: Chunk) -> None:
        """Append documents."""
        highest = np.iinfo(self.dtype).max
        for start in range(0, len(chunk.ids), BLOCK):
            block = chunk.ids[start : start + BLOCK]
            for value in (int(block.min()), int(block.max())):
                if not 0 <= value <= highest:
                    raise DataError(f"{self.prefix}: token id {value} does not fit {self.dtype.name} (0 to {highest}).")
            data = block.astype(self.dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
        sequences = len(chunk.lengths)
        documents = np.arange(sequences + 1) if chunk.documents is None else chunk.documents
        self._documents.append(documents[1:] + self._sequences)
        self._lengths.append(chunk.lengths)
        if chunk.modes is not None or self._modes:
            missing = np.zeros(self._sequences if not self._modes else 0, np.int8)
            self._modes += [missing, np.zeros(sequences, np.int8) if chunk.modes is None else chunk.modes]
        self._sequences += sequences
        self._number += len(documents) - 1
        self.tokens += len(chunk.ids)

    def __len__(self) -> int:
        return self._number

    def index(self) -> bytes:
        """Content of the `.idx` file."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        return idx_bytes(
            lengths, self.dtype, np.concatenate(self._documents), np.concatenate(self._modes) if self._modes else None
        )

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this shard."""
        return {
            "name": self.prefix.name,
            "documents": self._number,
            "tokens": self.tokens,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": hashlib.sha256(self.index()).hexdigest(),
        }


@contextlib.contextmanager
def open_shard(prefix: str | Path, dtype: str | np.dtype) -> Iterator[ShardWriter]:
    """A writer of one `.bin/.idx` pair; the files get their names only when the block ends well."""
    with atomic_path(Path(f"{prefix}.idx")) as index, atomic_path(Path(f"{prefix}.bin")) as data:
        with data.open("wb") as file:
            writer = ShardWriter(Path(prefix), dtype, file)
            yield writer
        index.write_bytes(writer.index())


def idx_bytes(
    lengths: Sequence[int] | NDArray[np.integer],
    dtype: np.dtype | str,
    documents: NDArray[np.integer] | None = None,
    modes: NDArray[np.int8] | None = None,
) -> bytes:
    """Content of an `.idx` file.

    Args:
        lengths: (sequences,)
        dtype: of the ids
        documents: (documents + 1,) where documents begin, in sequences; None: one sequence each
        modes: (sequences,) of multimodal data
    """
    dtype = np.dtype(dtype)
    codes = {np.dtype(name): code for code, name in DTYPES.items()}
    sizes = np.array(lengths, dtype="<i4")
    documents = np.arange(len(sizes) + 1) if documents is None else documents
    ends = np.cumsum(sizes, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(min(1, len(sizes)), "<i8"), ends[:-1]])
    parts = [sizes, pointers.astype("<i8"), documents.astype("<i8")]
    if modes is not None:
        parts.append(modes.astype("<i1"))
    header = IDX_HEADER.pack(IDX_MAGIC, 1, codes[dtype], len(sizes), len(documents))
    return header + b"".join(part.tobytes() for part in parts)


def write_shard(prefix: str | Path, documents: Iterable[Ids], dtype: str = "<u2") -> dict[str, Any]:
    """Write token ids, one array a document, as `prefix.bin` and `prefix.idx`; returns the manifest entry."""
    with open_shard(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return writer.entry()


def write_shards(
    chunks: Iterator[Chunk], folder: Path, dtype: str | np.dtype, shard_tokens: int = SHARD_TOKENS
) -> list[dict[str, Any]]:
    """Write chunks as shards, each full with the document that brings it to `shard_tokens`; their manifest entries."""
    entries: list[dict[str, Any]] = []
    chunk = next(chunks, None)
    while chunk is not None:
        with open_shard(folder / f"shard-{len(entries):05d}", dtype) as writer:
            while chunk is not None and writer.tokens < shard_tokens:
                head, rest = chunk.split(shard_tokens - writer.tokens)
                writer.extend(head)
                chunk = rest or next(chunks, None)
        entries.append(writer.entry())
    return entries


class TokenShard:
    """One `.bin/.idx` pair, memory-mapped.

    Attributes:
        tokens: (tokens,) all ids, a view of the file
        lengths: (sequences,) int32
        documents: (documents + 1,) int64, where documents begin, in sequences
        offsets: (documents + 1,) int64, where documents begin, in tokens
        modes: (sequences,) int8 of multimodal data, or None
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for file in (index, data):
            if not file.is_file():
                raise DataError(
                    f"{file} is missing; a shard is a .bin and an .idx file. Run `alloy data tokenize` again."
                )
        self.dtype, self.lengths, self.documents, self.modes = _read_idx(index)
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.offsets: NDArray[np.int64] = starts[self.documents]
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


def _read_idx(file: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int8] | None]:
    """dtype, lengths (sequences,), document indices (documents + 1,) and modes (sequences,) of an `.idx` file, checked."""
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
    modes = np.frombuffer(data, "<i1", sequences, size) if len(data) > size else None
    return dtype, lengths, indices, modes


def _slice(array: NDArray[np.int8] | None, start: int | None, stop: int | None) -> NDArray[np.int8] | None:
    return None if array is None else array[start:stop]


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

    def chunks(self) -> Iterator[Chunk]:
        """All documents, shard by shard."""
        for shard in self.shards:
            yield Chunk(shard.tokens, shard.lengths, shard.documents, shard.modes)

    def check(self) -> None:
        """Compare the files with the checksums of the manifest; DataError for a damaged one."""
        for entry, suffix in itertools.product(self.manifest["shards"] if self.manifest else [], ("bin", "idx")):
            file = self.path / f"{entry['name']}.{suffix}"
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != entry[f"{suffix}_sha256"]:
                    raise DataError(f"{file} is damaged: its checksum is not the one in {MANIFEST}; make it again.")

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


def clear_for_shards(folder: Path, overwrite: bool) -> None:
    """Make the folder ready for new shards; refuses one that holds a corpus unless it may be overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        if not overwrite:
            raise RecipeError(
                f"{folder} holds a tokenized corpus already; choose another folder, or overwrite it (--overwrite)."
            )
        (folder / MANIFEST).unlink()
    for leftover in folder.glob(".shard-*.tmp"):
        leftover.unlink()


def write_manifest(
    folder: Path,
    tokenizer: dict[str, Any],
    dtype: str | np.dtype,
    num_bytes: int | None,
    shards: list[dict[str, Any]],
    **more: str,
) -> dict[str, Any]:
    """Write what makes the folder a corpus; `num_bytes` of text, where that is known."""
    manifest = {
        "version": 1,
        "tokenizer": tokenizer,
        "dtype": np.dtype(dtype).name,
        **{key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")},
        "bytes": num_bytes,
        "shards": shards,
        **more,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def join_corpora(
    paths: Sequence[str | Path], folder: str | Path, shard_tokens: int = SHARD_TOKENS, overwrite: bool = False
) -> dict[str, Any]:
    """Documents of several corpora, one after another, in new shards; the manifest is returned.

    A Megatron pair keeps its sequences and modes. All must have one type of ids and, as far as they say, one tokenizer.
    """
    folder = Path(folder)
    corpora = [TokenCorpus(path) for path in paths]
    if any(folder.resolve() == corpus.path.resolve() for corpus in corpora):
        raise RecipeError(f"{folder} is both read and written; choose another folder.")
    dtype = corpora[0].shards[0].dtype
    for corpus in corpora:
        for shard in corpus.shards:
            if shard.dtype != dtype:
                raise DataError(f"{shard.prefix} holds {shard.dtype.name} ids but {corpora[0].path} {dtype.name} ones.")
    known = [corpus for corpus in corpora if corpus.tokenizer_hash]
    for corpus in known[1:]:
        if corpus.tokenizer_hash != known[0].tokenizer_hash:
            raise DataError(
                f"{corpus.path} was tokenized with another tokenizer than {known[0].path}; tokenize it again with the same."
            )
    clear_for_shards(folder, overwrite)
    shards = write_shards(
        itertools.chain.from_iterable(corpus.chunks() for corpus in corpora), folder, dtype, shard_tokens
    )
    sizes = [corpus.manifest["bytes"] for corpus in corpora if corpus.manifest and corpus.manifest["bytes"] is not None]
    unknown: dict[str, Any] = {"hash": None, "vocab": None, "bos": None, "eos": None}
    manifest = known[0].manifest if known else None
    total = sum(sizes) if len(sizes) == len(corpora) else None
    return write_manifest(folder, manifest["tokenizer"] if manifest else unknown, dtype, total, shards)
