"""The corpus that any machine has: Python's own documentation, docstrings and source code; or the user's text.

Parts, in this order: `topics` (the language reference that `help()` shows, pydoc_data.topics), `docstrings` of the standard
library, one document a module, taken from the source files without importing them, and `source`, the modules' code, as much
as is wanted. A module or topic is on one side only, before anything is counted: held out where md5(name) % 12 == 0, with
the same name for a module's docstrings and its code. Held-out paragraphs that training has too are dropped.

Setup: performance.md 12.1.
"""

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from alloy.data.io import Document, read_documents
from alloy.errors import DataError

HOLD_OUT_EVERY = 12
# shorter ones (headings, "Return a copy.") are common to all Python text
SHARED_PARAGRAPH = 40
BLOCK_CHARS = 4096
# fmt: off
LEFT_OUT = frozenset((
    "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "distutils", "pydoc_data", "__pycache__",
    "site-packages", "dist-packages",
))
# fmt: on
# made by the build, with the paths of one machine
GENERATED = "_sysconfigdata"
PARAGRAPH = re.compile(r"(\n[^\S\n]*\n\s*)")


@dataclass(frozen=True)
class Corpus:
    """Training documents and, by part, the documents held out; `notes` say what this machine lacks."""

    train: dict[str, list[Document]]
    held_out: dict[str, list[Document]]
    notes: list[str] = field(default_factory=list)

    @property
    def train_documents(self) -> list[Document]:
        """All training documents, part after part."""
        return [document for documents in self.train.values() for document in documents]

    def held_out_documents(self, *parts: str) -> list[Document]:
        """Held-out documents of the named parts (all parts if none is named)."""
        return [document for part in parts or self.held_out for document in self.held_out.get(part, [])]

    def counts(self) -> dict[str, dict[str, int]]:
        """By part: documents and UTF-8 bytes on each side."""
        return {
            part: {
                "train_documents": len(self.train[part]),
                "train_bytes": num_bytes(self.train[part]),
                "held_out_documents": len(self.held_out[part]),
                "held_out_bytes": num_bytes(self.held_out[part]),
            }
            for part in self.train
        }


def num_bytes(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of the texts."""
    return sum(len(document.text.encode()) for document in documents)


def is_held_out(name: str) -> bool:
    """The split: one name in twelve, by its md5."""
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % HOLD_OUT_EVERY == 0


def python_corpus(source_bytes: int = 0) -> Corpus:
    """Topics and docstrings of this Python, and training source code up to about `source_bytes` (held out in proportion)."""
    notes: list[str] = []
    reference = list(topics())
    if not reference:
        notes.append(
            "this Python has no pydoc_data.topics (Debian: package libpython3-stdlib); going on without the topics"
        )
    modules = list(_modules())
    if not modules:
        notes.append("this Python's standard library has no source files; going on without docstrings and source")
    docstrings = [document for name, code in modules if (document := _docstrings(name, code))]
    train, held_out = _split({"topics": reference, "docstrings": docstrings})
    if source_bytes > 0:
        train["source"], held_out["source"] = _source(modules, source_bytes)
    if not any(train.values()):
        raise DataError("this Python has neither pydoc topics nor library source files; name a text with --text PATH.")
    return Corpus(train, _drop_shared(train, held_out), notes)


def text_corpus(path: str | Path) -> Corpus:
    """The user's text, split by document (file, JSONL line or Parquet row); a single document is cut into blocks."""
    documents = list(read_documents(path))
    if len(documents) == 1:
        documents = list(_blocks(documents[0]))
    if len(documents) < 2:
        raise DataError(
            f"{path} is too short to hold a part out: {num_bytes(documents)} bytes; give {4 * BLOCK_CHARS} or more."
        )
    root = Path(path).parent
    relative = [Document(document.text, os.path.relpath(document.name, root)) for document in documents]
    train, held_out = _split({"text": relative})
    if not held_out["text"] or not train["text"]:
        # few documents: the one with the least hash stands for the twelfth
        chosen = min(relative, key=lambda document: hashlib.md5(document.name.encode(), usedforsecurity=False).digest())
        train = {"text": [document for document in relative if document is not chosen]}
        held_out = {"text": [chosen]}
    kept = _drop_shared(train, held_out)
    if not kept["text"]:
        raise DataError(
            f"{path}: every held-out paragraph also occurs in the training part; remove duplicates from the text."
        )
    return Corpus(train, kept)


def _split(parts: dict[str, list[Document]]) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    train = {part: [d for d in documents if not is_held_out(d.name)] for part, documents in parts.items()}
    held_out = {part: [d for d in documents if is_held_out(d.name)] for part, documents in parts.items()}
    return train, held_out


def topics() -> Iterator[Document]:
    """The language reference of this Python, topic by topic; nothing where it is not installed."""
    try:
        texts = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(texts):
        yield Document(texts[name], name)


def _modules() -> Iterator[tuple[str, str]]:
    """(path relative to the library, code) of every module, sorted."""
    library = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted(files):
            if not name.endswith(".py") or name.startswith(GENERATED):
                continue
            path = Path(folder, name)
            try:
                code = importlib.util.decode_source(path.read_bytes())
            except (OSError, UnicodeDecodeError, SyntaxError):
                # a file that this Python itself cannot read is not text for us
                continue
            yield path.relative_to(library).as_posix(), code


def _docstrings(name: str, code: str) -> Document | None:
    """The docstrings of a module, its classes and functions, in the order of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return None
    found = [text for node in [tree, *_definitions(tree)] if (text := ast.get_docstring(node))]
    return Document("\n\n".join(found) + "\n", name) if found else None


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions below a statement, in the order of the file; expressions are not searched."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _definitions(child)


def _source(modules: list[tuple[str, str]], train_bytes: int) -> tuple[list[Document], list[Document]]:
    """Whole modules in the order of their md5, until training has `train_bytes`."""
    train: list[Document] = []
    held_out: list[Document] = []
    total = 0
    for name, code in sorted(
        modules, key=lambda module: hashlib.md5(module[0].encode(), usedforsecurity=False).digest()
    ):
        if total >= train_bytes:
            break
        if not code:
            continue
        if is_held_out(name):
            held_out.append(Document(code, name))
        else:
            train.append(Document(code, name))
            total += len(code.encode())
    return train, held_out


def _drop_shared(train: dict[str, list[Document]], held_out: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """The held-out documents without paragraphs that training has; documents left empty disappear."""
    known = {
        key
        for documents in train.values()
        for document in documents
        for paragraph in PARAGRAPH.split(document.text)[::2]
        if len(key := _squeeze(paragraph)) >= SHARED_PARAGRAPH
    }
    kept = {part: [_without(document, known) for document in documents] for part, documents in held_out.items()}
    return {part: [document for document in documents if document.text.strip()] for part, documents in kept.items()}


def _without(document: Document, known: set[str]) -> Document:
    pieces = PARAGRAPH.split(document.text)
    paragraphs, gaps = pieces[::2], [*pieces[1::2], ""]
    kept = [
        paragraph + gap for paragraph, gap in zip(paragraphs, gaps, strict=True) if _squeeze(paragraph) not in known
    ]
    return Document("".join(kept), document.name)


def _squeeze(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _blocks(document: Document) -> Iterator[Document]:
    """A text cut at blank lines into blocks of about `BLOCK_CHARS`, at any line or character after twice that."""
    block: list[str] = []
    size = number = 0
    for line in document.text.splitlines(keepends=True):
        for start in range(0, len(line), BLOCK_CHARS):
            part = line[start : start + BLOCK_CHARS]
            block.append(part)
            size += len(part)
            if size >= 2 * BLOCK_CHARS or (size >= BLOCK_CHARS and not line.strip()):
                yield Document("".join(block), f"{document.name}#{number}")
                block, size, number = [], 0, number + 1
    if block:
        yield Document("".join(block), f"{document.name}#{number}")
