"""Tiny models of every kind that the engine must treat alike (`alloy.bench.tiny`), and what plain passes of them say."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alloy.bench.tiny import EOS, HYBRID, MODELS, SPECIAL, TEMPLATE, VOCAB, build, byte_tokenizer
from alloy.models.base import CausalLM

__all__ = ["EOS", "HYBRID", "MODELS", "SPECIAL", "TEMPLATE", "VOCAB", "build", "byte_tokenizer"]


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> CausalLM:
    """One model of each kind."""
    return build(request.param)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., CausalLM]:
    """`build`, for fixtures of a test file."""
    return build


@pytest.fixture(scope="session")
def mtp_model() -> CausalLM:
    """A hybrid with multi-token prediction."""
    return build("mtp", seed=1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """`byte_tokenizer`, made once."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def reference() -> Callable[[CausalLM, list[int], int], tuple[list[int], list[float]]]:
    """Greedy continuation by whole forward passes, without any cache, and the gap between the two best logits."""

    def continue_greedily(model: CausalLM, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        tokens, gaps = list(prompt), []
        with torch.no_grad():
            for _ in range(count):
                out = model(torch.tensor([tokens]), logits="last")
                best = _last(out.logits).topk(2)
                gaps.append(float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :], gaps

    return continue_greedily


def _last(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits[0, -1]
