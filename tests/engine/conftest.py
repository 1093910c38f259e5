"""Tiny models of every kind that the engine must treat alike, and a tokenizer of single bytes."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alloy.models.base import CausalLM
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.hybrid import HybridLM
from alloy.models.llama import DecoderLM

SPECIAL = ("</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
VOCAB = 256 + len(SPECIAL)
EOS = 256
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}"
    "<think>\n{% endif %}{% endif %}"
)
HYBRID = {
    "vocab": VOCAB,
    "hidden": 24,
    "ffn": 40,
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 8,
    "ssm_heads": 4,
    "ssm_head_dim": 6,
    "ssm_state": 5,
    "ssm_groups": 2,
    "chunk": 8,
    "num_experts": 5,
    "top_k": 2,
    "expert_ffn": 16,
    "shared_ffn": 12,
    "max_positions": 160,
    "eos_ids": (),
    # larger than usual: the largest logits of a random model must be apart
    "init_std": 0.25,
}
MODELS = {
    "attention": lambda: DecoderConfig(
        kind="llama",
        vocab=VOCAB,
        hidden=24,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        head_dim=8,
        ffn=40,
        max_positions=160,
        init_std=0.25,
    ),
    "hybrid": lambda: HybridConfig.model_validate({**HYBRID, "pattern": "M-M*-"}),
    "moe": lambda: HybridConfig.model_validate({**HYBRID, "pattern": "ME*E"}),
    "mtp": lambda: HybridConfig.model_validate(
        {**HYBRID, "pattern": "M*-ME", "mtp_depths": 1, "mtp_pattern": "*-", "tie_embeddings": True}
    ),
}


def build(name: str, seed: int = 0) -> CausalLM:
    """A random model in evaluation mode."""
    config = MODELS[name]()
    model = HybridLM(config) if isinstance(config, HybridConfig) else DecoderLM(config)
    model.init_weights(seed)
    return model.eval()


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


def byte_tokenizer(special: Sequence[str] = SPECIAL, merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """Single bytes, pairs that are merged into one token (byte-level characters), and the special tokens of a chat."""
    pieces = [*_byte_order(), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pieces)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


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


def _byte_order() -> list[str]:
    """The characters that stand for bytes 0 .. 255 in a byte-level vocabulary."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    other = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(other)) for b in range(256)]
