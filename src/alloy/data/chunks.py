"""Texts cut into pieces that a model can take, and put together again.

Cuts are at blank lines, never inside a fence, a table or a formula. A paragraph that is too long alone is cut at sentence ends,
then between words, then anywhere. Code, a table or a formula that is too long stays whole: its chunk does not fit.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alloy.data.blocks import block_spans, formula_spans

# characters of a token, where no tokenizer is given
TOKEN_CHARS = 4
Count = Callable[[str], int]
_SENTENCE = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=[^\W\d_a-z]|["'(\[$\\])|(?<=[\u3002\uff01\uff1f])""")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text, and whether it keeps the limit."""

    text: str
    tokens: int
    fits: bool = True


def counter(tokenizer: str | Path | None) -> Count:
    """Counts the tokens of a text, with the tokenizer of a folder, or one for every four characters."""
    if tokenizer is None:
        return lambda text: -(-len(text) // TOKEN_CHARS)
    from alloy.data.tokens import TextEncoder, load_tokenizer

    encoder = TextEncoder(load_tokenizer(tokenizer))
    return lambda text: len(encoder.encode([text])[0])


def split(text: str, max_tokens: int, count: Count) -> list[Chunk]:
    """The chunks of a text, in order; no chunk that fits has more than `max_tokens`."""
    chunks: list[Chunk] = []
    at = end = tokens = 0

    def close() -> None:
        nonlocal tokens
        if tokens:
            chunks.append(Chunk(text[at:end], tokens))
        tokens = 0

    for kind, start, stop in block_spans(text):
        # the blank line costs, too
        size = count(text[start:stop]) + 1
        if tokens + size <= max_tokens:
            at = at if tokens else start
            end, tokens = stop, tokens + size
            continue
        close()
        if size <= max_tokens:
            at, end, tokens = start, stop, size
        elif kind in ("prose", "heading"):
            chunks += list(_cut(text[start:stop], max_tokens, count))
        else:
            chunks.append(Chunk(text[start:stop], size, fits=False))
    close()
    return chunks


def merge(texts: Sequence[str]) -> str:
    """The text of cleaned chunks."""
    return "\n\n".join(stripped for text in texts if (stripped := text.strip("\n")))


def _cut(paragraph: str, max_tokens: int, count: Count) -> Iterator[Chunk]:
    """A paragraph that is too long, at sentence ends, or else between words."""
    formulas = formula_spans(paragraph)
    for sentences in _packed(paragraph, _places(_SENTENCE, paragraph, formulas), max_tokens, count):
        if count(sentences) <= max_tokens:
            yield Chunk(sentences.strip(), count(sentences))
            continue
        inside = formula_spans(sentences)
        for words in _packed(sentences, _places(_SPACE, sentences, inside), max_tokens, count):
            yield from _halves(words.strip(), max_tokens, count)


def _halves(words: str, max_tokens: int, count: Count) -> Iterator[Chunk]:
    """What is too long without any place to cut, in the middle; a formula stays whole."""
    tokens, middle = count(words), len(words) // 2
    if tokens <= max_tokens or middle == 0 or formula_spans(words):
        yield Chunk(words, tokens, tokens <= max_tokens)
    else:
        yield from _halves(words[:middle], max_tokens, count)
        yield from _halves(words[middle:], max_tokens, count)


def _places(pattern: re.Pattern[str], text: str, formulas: list[tuple[int, int]]) -> list[int]:
    """Where `text` may be cut: behind the matches of a pattern that are not in a formula."""
    ends = (match.end() for match in pattern.finditer(text))
    return [end for end in ends if not any(start < end < stop for start, stop in formulas)]


def _packed(text: str, places: list[int], max_tokens: int, count: Count) -> Iterator[str]:
    """Slices between places, each as long as the limit allows; one that no place divides may be longer."""
    at = last = tokens = 0
    for place in [*places, len(text)]:
        size = count(text[last:place])
        if tokens and tokens + size > max_tokens:
            yield text[at:last]
            at, tokens = last, 0
        last, tokens = place, tokens + size
    if at < len(text):
        yield text[at:]
