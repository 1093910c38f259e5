"""The models against a derivation written apart from the package."""

import pytest
import torch

from alloy.models.configs import HybridConfig
from tests.models import oracle
from tests.models.zoo import CONFIGS, build, random_tokens

HYBRIDS = [name for name, config in CONFIGS.items() if isinstance(config, HybridConfig)]


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_matches_sequential_derivation(name: str) -> None:
    """Logits, the stream after each block, and MTP logits of every depth."""
    model, tokens = build(name), random_tokens(1, 19)
    config = model.config
    assert isinstance(config, HybridConfig)
    depths = 2 if config.mtp_depths else 0
    with torch.no_grad():
        ours = model(tokens, return_hidden=True, return_mtp=bool(depths))
        truth = oracle.hybrid(config, model.state_dict(), tokens[0], depths)
    torch.testing.assert_close(ours.logits[0], truth["logits"][0].float(), atol=1e-4, rtol=0)
    assert len(ours.hidden) == len(config.pattern)
    for mine, theirs in zip(ours.hidden, truth["hidden"], strict=True):
        torch.testing.assert_close(mine[0], theirs.float(), atol=1e-4, rtol=0)
    assert len(ours.mtp_logits or []) == depths
    for k, (mine, theirs) in enumerate(zip(ours.mtp_logits or [], truth["mtp"], strict=True), start=1):
        assert mine.shape == (1, 19 - k, config.vocab)
        torch.testing.assert_close(mine[0], theirs.float(), atol=1e-4, rtol=0)


def test_nas_matches_llama_parts() -> None:
    """nemotron-nas with no-op sub-blocks equals a stack of transformers' Llama sub-modules."""
    model, tokens = build("nas"), random_tokens(1, 40)
    with torch.no_grad():
        truth = oracle.nas(model.config, model.state_dict(), tokens[0])
        torch.testing.assert_close(model(tokens).logits[0], truth, atol=1e-4, rtol=0)


def test_limits_matter() -> None:
    """The finite-limit model really clamps: without the clamp its logits differ."""
    model, tokens = build("limits"), random_tokens(1, 19)
    loose = CONFIGS["limits"].model_copy(update={"time_step_limit": (0.0, float("inf"))})
    with torch.no_grad():
        truth = oracle.hybrid(loose, model.state_dict(), tokens[0])
        assert (model(tokens).logits[0] - truth["logits"][0]).abs().max() > 1e-2
