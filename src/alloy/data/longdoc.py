"""Long documents for long contexts (data.md 11.5): found, laid together, repeated by length, and asked about.

Documents of at least so many tokens are kept whole. A repository becomes one document, files after what they import, so that
what a file uses stands before it. A chain lays a document among distractors. Questions need several places of a document: a
model writes them for sampled spans, and a question counts only if a model finds its answer in all the spans and neither in one
alone nor without them. The stage is data/stages/longdoc.py.
"""

import ast
import hashlib
import posixpath
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from alloy.data.io import Document, list_files, read_documents
from alloy.errors import DataError, RecipeError

C_SUFFIXES = (".c", ".h", ".cc", ".cpp", ".hpp", ".cu")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def keep_long(
    documents: Iterable[Document], count: Callable[[str], int], tokens: int
) -> Iterator[tuple[Document, int]]:
    """Documents of at least `tokens` tokens, with their number of tokens; none is cut.

    Args:
        documents: to choose from
        count: tokens of a text
        tokens: least length
    """
    for document in documents:
        # a token is at least a byte
        if len(document.text.encode()) >= tokens and (length := count(document.text)) >= tokens:
            yield document, length


def repetitions(length: int, buckets: Mapping[int, float], seed: int, name: str) -> int:
    """How often a document of `length` tokens is written: the factor of the highest bucket it reaches.

    A factor of 2.5 means twice and, for every other document by (seed, name), once more.

    Args:
        length: tokens of the document
        buckets: least length -> factor
        seed: with the name decides about the fraction
        name: of the document
    """
    factor = max(((least, factor) for least, factor in buckets.items() if length >= least), default=(0, 1.0))[1]
    if factor < 0:
        raise RecipeError(f"bucket factor {factor} is negative; 0 leaves documents out.")
    return int(factor) + (_chance(seed, name) < factor % 1)


def join_repository(folder: Path) -> Document:
    """The readable files of a folder as one document, each headed by its path, after the files that it imports."""
    texts = {
        file.relative_to(folder).as_posix(): "".join(document.text for document in read_documents(file))
        for file in list_files(folder)
        if file.stat().st_size
    }
    if not texts:
        raise DataError(f"{folder} holds no text; name the folder of a repository.")
    parts = [f"# {name}\n{texts[name].rstrip()}\n" for name in order_files(texts)]
    return Document("\n".join(parts), folder.name)


def order_files(texts: Mapping[str, str]) -> list[str]:
    """Paths, each after those whose content it needs: imports of Python, quoted includes of C, else by path.

    Of files that need each other, the one whose path is first comes last.
    """
    needs = {name: _needs(name, text, texts) for name, text in texts.items()}
    ordered: dict[str, None] = {}
    open_files: set[str] = set()
    for root in sorted(texts):
        # (file, the needs still to be looked at): depth first without recursion
        stack = [(root, iter(needs[root]))] if root not in ordered else []
        open_files |= {root}
        while stack:
            name, rest = stack[-1]
            found = next((other for other in rest if other not in ordered and other not in open_files), None)
            if found is None:
                ordered[name] = None
                stack.pop()
            else:
                open_files.add(found)
                stack.append((found, iter(needs[found])))
    return list(ordered)


def chain_documents(
    document: Document, distractors: Sequence[Document], most_tokens: int, count: Callable[[str], int], seed: int
) -> Document:
    """A document among distractors, in an order by (seed, name), as many as fit into `most_tokens`; it is never cut."""
    rng = random.Random(f"{seed}:{document.name}")
    room = most_tokens - count(document.text)
    chosen: list[Document] = []
    for other in rng.sample(list(distractors), len(distractors)):
        size = count(other.text)
        if other.name != document.name and size <= room:
            chosen.append(other)
            room -= size
    chosen.insert(rng.randint(0, len(chosen)), document)
    return Document("\n\n".join(part.text for part in chosen), document.name)


def sample_spans(text: str, number: int, chars: int, seed: int) -> list[tuple[int, int]]:
    """Places of `number` passages of about `chars` characters, far apart: one in each of as many equal parts of the text.

    Passages begin and end at line or sentence ends where there are any. Fewer come back from a text that is too short.
    """
    part = len(text) // number
    if part < 2 * chars:
        raise DataError(f"a text of {len(text)} characters is too short for {number} spans of {chars} far apart.")
    rng = random.Random(f"{seed}:{len(text)}")
    spans: list[tuple[int, int]] = []
    for index in range(number):
        start = index * part + rng.randint(0, part - 2 * chars)
        begin = _edge(text, start, start + chars // 2)
        spans.append((begin, _edge(text, begin + chars, begin + chars + chars // 2)))
    return spans


def read_question(answer: str) -> tuple[str, str] | None:
    """(question, its answer) of what a model wrote; None where it wrote none."""
    found = re.search(r"Question:\s*(.+?)\s*\n\s*Answer:\s*(.+)", answer, re.DOTALL)
    return (found[1].strip(), found[2].strip()) if found else None


def refuse_question(answer: str, from_all: str, from_none: str, from_each: Sequence[str]) -> str | None:
    """Why a question does not need its spans; None: it does.

    Args:
        answer: what came with the question
        from_all: a model's answer from all spans
        from_none: without any text
        from_each: from each span alone
    """
    if not same_answer(from_all, answer):
        return "not-answered"
    if same_answer(from_none, answer):
        return "known-before"
    return "one-span" if any(same_answer(one, answer) for one in from_each) else None


def same_answer(first: str, second: str) -> bool:
    """Whether two short answers have the same words and numbers, or one holds all of the other."""
    one, other = (re.findall(r"\w+", text.lower()) for text in (first, second))
    if not one or not other:
        return False
    small, large = sorted((" ".join(one), " ".join(other)), key=len)
    return f" {small} " in f" {large} "


def question_text(text: str, question: str, answer: str, at_start: bool) -> str:
    """The document with a question before or after it, and the answer at the end."""
    asked = f"Question: {question}"
    body = f"{asked}\n\n{text.strip()}" if at_start else f"{text.strip()}\n\n{asked}"
    return f"{body}\n\nAnswer: {answer}\n"


def number_passages(passages: Sequence[str]) -> str:
    """Passages as a prompt shows them."""
    return "\n\n".join(f"[{number}]\n{passage}" for number, passage in enumerate(passages, start=1)) or "(no text)"


def _edge(text: str, position: int, limit: int) -> int:
    """The first place at or after `position` and before `limit` that follows a sentence's or line's end, else `position`."""
    found = re.compile(r"\n|[.!?]\s").search(text, position, limit)
    return found.end() if found else position


def _chance(seed: int, name: str) -> float:
    digest = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _needs(name: str, text: str, texts: Mapping[str, str]) -> list[str]:
    """The files among `texts` that this one imports or includes, sorted."""
    folder = posixpath.dirname(name)
    if name.endswith(C_SUFFIXES):
        wanted = [posixpath.normpath(posixpath.join(folder, path)) for path in INCLUDE.findall(text)]
        wanted += [other for path in INCLUDE.findall(text) for other in texts if other.endswith(f"/{path}")]
    elif name.endswith(".py"):
        wanted = [path for module in _imports(text, folder) for path in _module_files(module, texts)]
    else:
        wanted = []
    return sorted({path for path in wanted if path in texts and path != name})


def _imports(text: str, folder: str) -> list[str]:
    """Modules that Python code imports, as paths without suffix; what cannot be parsed imports nothing."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name.replace(".", "/") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").replace(".", "/")
            if node.level:
                above = posixpath.normpath(posixpath.join(folder, *[".."] * (node.level - 1))) if folder else ""
                base = posixpath.join(above, base).rstrip("/")
            modules += [base, *(posixpath.join(base, alias.name) for alias in node.names)]
    return [module for module in modules if module]


def _module_files(module: str, texts: Mapping[str, str]) -> list[str]:
    """The files that a module's path may mean, in the root or below a source folder."""
    ends = (f"{module}.py", f"{module}/__init__.py")
    return [path for path in texts for end in ends if path == end or path == f"src/{end}"]
