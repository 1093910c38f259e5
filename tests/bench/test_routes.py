"""Passes through a model that are made to choose the experts of another pass."""

import pytest
import torch

from alloy.bench.cases.model import Routes
from alloy.models.presets import preset
from alloy.models.registry import build


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-mtp", "tiny-qwen3-moe", "tiny-dense"])
@torch.no_grad()
def test_the_same_experts_whatever_the_router_says(name: str) -> None:
    """Recorded in pieces of 5 tokens and replayed in one of 17 by routers that would choose otherwise; MTP stays out of it."""
    model = build(preset(name))
    # routers tell what they chose in training
    model.train()
    model.init_weights(3)
    tokens = torch.randint(0, model.config.vocab, (1, 17), generator=torch.Generator().manual_seed(1))
    routes, cache = Routes(model), model.new_cache(batch=1)
    with routes.recorded():
        pieces = [model(piece, cache=cache, logits=None).routers for piece in tokens.split(5, 1)]
    chosen = [torch.stack([router.counts for router in layer]).sum(0) for layer in zip(*pieces, strict=True)]
    for gate in model.gates():
        for weight in gate.parameters():
            weight.neg_()
    free = [router.counts for router in model(tokens, cache=model.new_cache(batch=1), logits=None).routers]
    with routes.replayed():
        again = [router.counts for router in model(tokens, cache=model.new_cache(batch=1), logits=None).routers]
    assert len(again) == len(chosen) == len(free)
    for want, got, other in zip(chosen, again, free, strict=True):
        assert torch.equal(got, want)
        assert not torch.equal(other, want)
