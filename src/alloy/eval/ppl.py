"""Bits per byte and perplexity of a text: every byte counted exactly once.

A document is measured as `bos text eos`: bos is context only (eos where the tokenizer has no bos), every token of the text
and the eos that ends it are charged, and bytes are the UTF-8 bytes of the text. A document longer than `seq` is cut into
windows of `seq` tokens that overlap by half: the model starts each window without a state, and tokens of the overlap are
context there, charged in the window before. So a token beyond the first window has at least seq / 2 tokens before it.
Windows are packed into rows with document ids, which the model keeps apart; hardly any position is padding, and the head
runs on charged positions alone.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from alloy.data.io import Document
from alloy.data.packing import PADDING, pack_best_fit
from alloy.data.tokens import TextEncoder
from alloy.errors import DataError, RecipeError

# positions and logits in one forward pass, at most (one row at least)
BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 26

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Score:
    """A text under a model. `tokens` are the charged ones: those of the text and one eos a document."""

    bits_per_byte: float
    nats_per_token: float
    perplexity: float
    tokens: int
    bytes: int
    documents: int

    def as_dict(self) -> dict[str, float]:
        """Plain values, for metrics and JSON."""
        return asdict(self)


class Window(NamedTuple):
    """Positions start to stop of a document go in; those from `charged` on are scored by the token that follows them."""

    document: int
    start: int
    charged: int
    stop: int


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[Document | str],
    seq: int,
    encoder: TextEncoder | None = None,
) -> Score:
    """Bits that the model needs for each byte of the documents.

    Args:
        model: called as model(tokens, documents=..., logits=flat indices); runs in its own device and dtype, under the
            caller's autocast; put into eval mode for the time
        tokenizer: the model's
        documents: texts; empty ones are left out
        seq: tokens in a window
        encoder: of the tokenizer, if there is one already
    """
    texts = [text for document in documents if (text := document if isinstance(document, str) else document.text)]
    if not texts:
        raise DataError("there is no text to measure: every document is empty.")
    ids = (encoder or TextEncoder(tokenizer)).scored(texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    nats = sum(float(part.sum()) for part in document_nats(model, ids, seq))
    tokens = sum(len(document) - 1 for document in ids)
    return Score(
        bits_per_byte=nats / math.log(2) / num_bytes,
        nats_per_token=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        tokens=tokens,
        bytes=num_bytes,
        documents=len(texts),
    )


@torch.no_grad()
def document_nats(model: nn.Module, documents: Sequence[Ids], seq: int) -> list[NDArray[np.float64]]:
    """Negative log-likelihood of every token but the first of each document.

    Args:
        model: as in `bits_per_byte`
        documents: each (tokens,), the first token context only
        seq: tokens in a window

    Returns:
        for each document (tokens - 1,)
    """
    if seq < 2:
        raise RecipeError(f"seq = {seq} leaves no token to predict; use 2 or more.")
    windows = [window for number, ids in enumerate(documents) for window in cut_windows(number, len(ids) - 1, seq)]
    rows = pack_best_fit([window.stop - window.start for window in windows], seq)
    num_rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab) // seq)
    nats = [np.zeros(len(ids) - 1) for ids in documents]
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(rows), num_rows):
            batch = [[windows[piece.document] for piece in row] for row in rows[first : first + num_rows]]
            _score_rows(model, documents, batch, seq, nats)
    finally:
        model.train(was_training)
    return nats


def cut_windows(document: int, positions: int, seq: int) -> Iterator[Window]:
    """Windows that charge each of a document's positions once; all but the first have at least seq / 2 of context."""
    stop = min(seq, positions)
    yield Window(document, 0, 0, stop)
    while stop < positions:
        charged, stop = stop, min(stop + seq - seq // 2, positions)
        yield Window(document, stop - seq, charged, stop)


def _score_rows(
    model: nn.Module, documents: Sequence[Ids], rows: list[list[Window]], seq: int, nats: list[NDArray[np.float64]]
) -> None:
    """One forward pass; writes the charged positions' values into `nats`."""
    tokens = np.zeros((len(rows), seq), np.int64)
    numbers = np.full((len(rows), seq), PADDING, np.int32)
    indices: list[NDArray[np.int64]] = []
    targets: list[Ids] = []
    for row, row_windows in enumerate(rows):
        place = 0
        for number, (document, start, charged, stop) in enumerate(row_windows):
            end = place + stop - start
            tokens[row, place:end] = documents[document][start:stop]
            numbers[row, place:end] = number
            indices.append(np.arange(row * seq + place + charged - start, row * seq + end))
            targets.append(documents[document][charged + 1 : stop + 1])
            place = end
    device = next(model.parameters()).device
    logits = model(
        torch.from_numpy(tokens).to(device),
        documents=torch.from_numpy(numbers).to(device),
        logits=torch.from_numpy(np.concatenate(indices)).to(device),
    ).logits
    labels = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device)
    values = F.cross_entropy(logits.float(), labels, reduction="none").double().cpu().numpy()
    done = 0
    for document, _, charged, stop in (window for row_windows in rows for window in row_windows):
        nats[document][charged:stop] = values[done : done + stop - charged]
        done += stop - charged
