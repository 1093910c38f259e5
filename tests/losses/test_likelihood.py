"""Likelihood of documents: each token once, whatever the window, the packing and the model."""

import numpy as np
import pytest
import torch

from alloy.losses import likelihood
from alloy.losses.likelihood import cut_windows, document_nats
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM

VOCAB = 37


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
def hybrid() -> HybridLM:
    config = HybridConfig(
        vocab=VOCAB, hidden=24, pattern="M*-", num_heads=3, num_kv_heads=1, head_dim=8, ffn=40,
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
def test_packed_windows_equal_single_windows(hybrid, monkeypatch, batch_tokens) -> None:
    """With a real model, packing and batching change nothing: each window alone gives the same values."""
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", batch_tokens)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, length) for length in (53, 2, 12, 31, 1, 13)]
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
