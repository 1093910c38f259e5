"""Bits per byte: every byte once, whatever the window, the batching and the model."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from alloy.data.io import Document
from alloy.data.tokens import TextEncoder, train_tokenizer
from alloy.errors import DataError, RecipeError
from alloy.eval import ppl
from alloy.eval.ppl import bits_per_byte, cut_windows, document_nats
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM

TEXTS = ["naïve text number 17, again and again and again", "b", "ééé\n\n  two lines of it, the second longer than the first"]


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
        nats -= sum(log_probs[a, b].item() for a, b in zip(ids, ids[1:], strict=False))
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


@pytest.mark.parametrize(("positions", "seq"), [(1, 5), (5, 5), (6, 5), (23, 5), (23, 4), (100, 2), (3, 64)])
def test_windows_charge_each_position_once(positions, seq) -> None:
    """Charged parts tile the document; windows fit; later windows keep at least half a window of context."""
    charged = []
    for window in cut_windows(0, positions, seq):
        assert 0 <= window.start <= window.charged < window.stop <= positions
        assert window.stop - window.start <= seq
        if window.start:
            assert window.charged - window.start >= seq // 2
        charged += range(window.charged, window.stop)
    assert charged == list(range(positions))


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    config = HybridConfig(
        vocab=len(tokenizer), hidden=24, pattern="M*-", num_heads=3, num_kv_heads=1, head_dim=8, ffn=40,
        ssm_heads=4, ssm_head_dim=6, ssm_state=5, ssm_groups=2, chunk=8, mtp_depths=0,
    )  # fmt: skip
    model = HybridLM(config)
    model.init_weights(3)
    # weights large enough for context to matter
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.train()


@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_packed_windows_equal_single_windows(tokenizer, hybrid, monkeypatch, batch_tokens) -> None:
    """With a real model, packing and batching change nothing: each window alone gives the same values."""
    monkeypatch.setattr(ppl, "BATCH_TOKENS", batch_tokens)
    documents = TextEncoder(tokenizer).scored(TEXTS)
    seq = 11
    packed = document_nats(hybrid, documents, seq)
    assert hybrid.training
    hybrid.eval()
    for number, ids in enumerate(documents):
        single = np.zeros(len(ids) - 1)
        for window in cut_windows(number, len(ids) - 1, seq):
            tokens = torch.from_numpy(ids[window.start : window.stop])[None]
            with torch.no_grad():
                log_probs = torch.log_softmax(hybrid(tokens).logits[0].double(), dim=-1)
            for position in range(window.charged, window.stop):
                single[position] = -log_probs[position - window.start, ids[position + 1]]
        np.testing.assert_allclose(packed[number], single, atol=2e-4, rtol=1e-4)
    hybrid.train()


def test_nothing_to_measure(tokenizer) -> None:
    with pytest.raises(DataError, match="every document is empty"):
        bits_per_byte(Known(len(tokenizer)), tokenizer, ["", ""], seq=8)
    with pytest.raises(RecipeError, match="seq = 1 leaves no token"):
        bits_per_byte(Known(len(tokenizer)), tokenizer, ["a"], seq=1)
