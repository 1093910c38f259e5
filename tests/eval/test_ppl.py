"""Bits per byte: every byte once, whatever the window, the batching and the model."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alloy.data.io import Document
from alloy.data.tokens import train_tokenizer
from alloy.errors import DataError, RecipeError
from alloy.eval.ppl import bits_per_byte

TEXTS = [
    "naïve text number 17, again and again and again",
    "b",
    "ééé\n\n  two lines of it, the second longer than the first",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab=290)


class Known(nn.Module):
    """A model whose next-token distribution depends on the current token alone: row t of a table."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab=vocab)
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator))

    def forward(self, tokens, documents=None, logits="all"):
        return SimpleNamespace(logits=self.table[tokens].flatten(0, 1)[logits])


@pytest.mark.parametrize("seq", [2, 3, 7, 64])
def test_known_distribution_gives_its_own_bits(tokenizer, seq) -> None:
    """The bits equal a sum over bigrams done by hand, for windows shorter and longer than the documents."""
    model = Known(len(tokenizer))
    score = bits_per_byte(model, tokenizer, [Document(text, "x") for text in TEXTS], seq)
    log_probs = torch.log_softmax(model.table.double(), dim=-1)
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        nats -= sum(log_probs[a, b].item() for a, b in pairwise(ids))
        tokens += len(ids) - 1
    size = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert (score.tokens, score.bytes, score.documents) == (tokens, size, 3)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_uniform_model_pays_log_vocab(tokenizer) -> None:
    """A model that knows nothing costs log2(vocab) bits a token."""
    model = Known(len(tokenizer))
    nn.init.zeros_(model.table)
    score = bits_per_byte(model, tokenizer, TEXTS, seq=9)
    assert score.bits_per_byte == pytest.approx(math.log2(len(tokenizer)) * score.tokens / score.bytes, rel=1e-6)


def test_nothing_to_measure(tokenizer) -> None:
    with pytest.raises(DataError, match="every document is empty"):
        bits_per_byte(Known(len(tokenizer)), tokenizer, ["", ""], seq=8)
    with pytest.raises(RecipeError, match="seq = 1 leaves no token"):
        bits_per_byte(Known(len(tokenizer)), tokenizer, ["a"], seq=1)
