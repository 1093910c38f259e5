"""Tiny random models of every kind that the engine must treat alike, and a tokenizer of single bytes."""

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
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
MTP = {"mtp_depths": 1, "mtp_pattern": "*-", "tie_embeddings": True}
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
    "mtp": lambda: HybridConfig.model_validate({**HYBRID, **MTP, "pattern": "M*-ME"}),
}
# the same kinds of layers beside a block that drafts
DRAFTING = {
    "attention": lambda: HybridConfig.model_validate({**HYBRID, **MTP, "pattern": "*-*-"}),
    "hybrid": lambda: HybridConfig.model_validate({**HYBRID, **MTP, "pattern": "M-M*-"}),
    "moe": lambda: HybridConfig.model_validate({**HYBRID, **MTP, "pattern": "ME*E", "mtp_pattern": "*E"}),
    "mtp": MODELS["mtp"],
}


def build(name: str, seed: int = 0, drafting: bool = False) -> CausalLM:
    """A random model in evaluation mode, of `MODELS` or, with multi-token prediction, of `DRAFTING`."""
    config = (DRAFTING if drafting else MODELS)[name]()
    model = HybridLM(config) if isinstance(config, HybridConfig) else DecoderLM(config)
    model.init_weights(seed)
    return model.eval()


def teach(model: CausalLM, period: Sequence[int]) -> CausalLM:
    """Train a model to repeat a pattern, so that it drafts well; returns it in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor([*period] * 8)
    for step in range(60):
        rows = torch.stack([text[(step + 3 * i) % len(period) :][:29] for i in range(4)])
        out = model(rows, return_mtp=2)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        for k, logits in enumerate(out.mtp_logits, 1):
            loss = loss + F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, k + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


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


def _byte_order() -> list[str]:
    """The characters that stand for bytes 0 .. 255 in a byte-level vocabulary."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    other = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(other)) for b in range(256)]
