"""Bits per byte and perplexity of a text: every byte counted exactly once.

A document is measured as `bos text eos`: bos is context only (eos where the tokenizer has no bos), every token of the text
and the eos that ends it are charged, and bytes are the UTF-8 bytes of the text. How long documents are cut into windows is
said in losses/likelihood.py, which validation in training shares.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerFast

from alloy.data.io import Document
from alloy.data.tokens import TextEncoder
from alloy.errors import DataError
from alloy.losses.likelihood import document_nats
from alloy.models.base import CausalLM
from alloy.models.quant import quantize_weights
from alloy.ops.quant import Weights

# windows longer than this cost memory and change little
LONGEST_WINDOW = 4096


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


def with_weights(
    model: CausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document | str], seq: int, weights: Weights
) -> tuple[Score, Score]:
    """Scores of the same text before and after the matrices of `model` are turned, in place, into `weights`."""
    encoder = TextEncoder(tokenizer)
    before = bits_per_byte(model, tokenizer, documents, seq, encoder)
    quantize_weights(model, weights)
    return before, bits_per_byte(model, tokenizer, documents, seq, encoder)


def bits_per_byte(
    model: CausalLM,
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
