"""Log-likelihood of whole documents, each token once: what validation in training and `alloy eval` both report.

A document longer than `seq` is cut into windows of `seq` tokens that overlap by half: the model starts each window without
a state, and tokens of the overlap are context there, charged in the window before. So a token beyond the first window has
at least seq / 2 tokens before it. Windows are packed into rows with document ids, which the model keeps apart; hardly any
position is padding, and the head runs on charged positions alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from alloy.data.packing import PADDING, pack_best_fit
from alloy.errors import RecipeError
from alloy.models.base import CausalLM

# positions and logits in one forward pass, at most (one row at least)
BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26

Ids = NDArray[np.integer]


class Window(NamedTuple):
    """Positions start to stop of a document go in; those from `charged` on are scored by the token that follows them."""

    document: int
    start: int
    charged: int
    stop: int


@torch.no_grad()
def document_nats(model: CausalLM, documents: Sequence[Ids], seq: int) -> list[NDArray[np.float64]]:
    """Negative log-likelihood of every token but the first of each document.

    Args:
        model: runs on its own device and in its dtype, under the caller's autocast; in eval mode for the time
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
    charged = 0
    while charged < positions:
        stop = min(charged + (seq - seq // 2 if charged else seq), positions)
        yield Window(document, max(0, stop - seq), charged, stop)
        charged = stop


def _score_rows(
    model: CausalLM, documents: Sequence[Ids], rows: list[list[Window]], seq: int, nats: list[NDArray[np.float64]]
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
