"""What a tokenizer is trained on, how good it is, and how it grows.

Temperature: source i gives a share of the training bytes in proportion to size_i ** (1 / T), so that T = 1 keeps the sizes
and a large T makes small sources equal to large ones; no text is taken twice.

Measures (data.md 11.1): bytes per token; fertility, tokens per word between spaces; ids that a sample never needs; and
whether every text comes back byte for byte.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import AddedToken, PreTrainedTokenizerFast

from alloy.data.tokens import TextEncoder, sample_texts
from alloy.errors import RecipeError

# reads a source from its beginning
Texts = Callable[[], Iterable[str]]
SAMPLE_BYTES = 1 << 20
# a book is one text, and no choice of whole texts could do justice to a small share of it
PIECE_CHARS = 2048


def balanced_texts(
    sources: Mapping[str, Texts], max_bytes: int, temperature: float = 1.0, seed: int = 0
) -> Iterable[str]:
    """A choice of texts, long ones in pieces, of about `max_bytes` in all, small sources favoured by the temperature."""
    if temperature < 1:
        raise RecipeError(f"temperature = {temperature}; it is at least 1, where every source gives in proportion.")
    sizes = {name: sum(len(text.encode()) for text in texts()) for name, texts in sources.items()}
    budgets = share_bytes(sizes, max_bytes, temperature)
    return chain.from_iterable(
        sample_texts(chain.from_iterable(map(_pieces, texts())), budgets[name], seed) for name, texts in sources.items()
    )


def share_bytes(sizes: Mapping[str, int], max_bytes: int, temperature: float) -> dict[str, int]:
    """Bytes that each source gives; what a source lacks is shared among the others in the same proportions."""
    budgets: dict[str, int] = {}
    open_sources, room = dict(sizes), min(max_bytes, sum(sizes.values()))
    while open_sources:
        weights = {name: size ** (1 / temperature) for name, size in open_sources.items()}
        total = sum(weights.values()) or 1.0
        wanted = {name: int(room * weight / total) for name, weight in weights.items()}
        full = {name: open_sources[name] for name in wanted if wanted[name] >= open_sources[name]}
        if not full:
            return {**budgets, **wanted}
        budgets |= full
        room -= sum(full.values())
        open_sources = {name: size for name, size in open_sources.items() if name not in full}
    return budgets


def measure_tokenizer(
    tokenizer: PreTrainedTokenizerFast, sources: Mapping[str, Texts], sample_bytes: int = SAMPLE_BYTES
) -> dict[str, Any]:
    """Figures of a tokenizer on the first `sample_bytes` of every source.

    Returns:
        vocab, unused (ids, special ones left out), unused_tokens (some of them), lossless (share of the texts that came
        back), and `sources`: name -> documents, bytes, words, tokens, bytes_per_token, fertility, lossless
    """
    encoder = TextEncoder(tokenizer)
    used = np.zeros(encoder.vocab, bool)
    used[list(tokenizer.all_special_ids)] = True
    rows: dict[str, dict[str, Any]] = {}
    for name, texts in sources.items():
        row = dict.fromkeys(("documents", "bytes", "words", "tokens", "lossless"), 0)
        for text in texts():
            (ids,) = encoder.encode([text])
            used[ids] = True
            size = len(text.encode())
            back = tokenizer.decode(ids, skip_special_tokens=False) == text
            for key, value in zip(row, (1, size, len(text.split()), len(ids), back), strict=True):
                row[key] += value
            if row["bytes"] >= sample_bytes:
                break
        rows[name] = {
            **row,
            "bytes_per_token": row["bytes"] / max(row["tokens"], 1),
            "fertility": row["tokens"] / max(row["words"], 1),
            "lossless": row["lossless"] / max(row["documents"], 1),
        }
    documents = sum(row["documents"] for row in rows.values())
    unused = np.flatnonzero(~used)
    return {
        "vocab": encoder.vocab,
        "unused": len(unused),
        "unused_tokens": [tokenizer.convert_ids_to_tokens(int(i)) for i in unused[:100]],
        "lossless": sum(row["lossless"] * row["documents"] for row in rows.values()) / max(documents, 1),
        "sources": rows,
    }


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], special: bool = True
) -> dict[int, list[int]]:
    """Add tokens to a tokenizer; the new ids, and for each the ids that its text had before.

    Those are what `models.vocabulary.grow_vocabulary` makes the new rows of. Tokens that are known already are passed over.

    Args:
        tokenizer: changed in place
        tokens: texts
        special: leave them out of decoded text, and out of the encoding of documents
    """
    encoder = TextEncoder(tokenizer)
    known = tokenizer.get_vocab()
    wanted = [token for token in dict.fromkeys(tokens) if token not in known]
    if not all(wanted):
        raise RecipeError("an empty text cannot be a token; remove it from the list.")
    pieces = [ids.tolist() for ids in encoder.encode(wanted)]
    added = [AddedToken(token, special=special, normalized=False) for token in wanted]
    tokenizer.add_tokens(added, special_tokens=special)
    ids = tokenizer.get_vocab()
    return {ids[token]: parts for token, parts in zip(wanted, pieces, strict=True)}


def _pieces(text: str) -> Iterable[str]:
    """The text cut at line ends into pieces of `PIECE_CHARS` or a line."""
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= PIECE_CHARS:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
