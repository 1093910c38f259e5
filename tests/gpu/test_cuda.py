"""The same numbers on a CUDA device as on the CPU: models, cache, drafts, training."""

from pathlib import Path

import pytest
import torch

from alloy.core.metrics import read_metrics
from alloy.core.recipe import RunOptions, load_recipe
from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TINY = [name for name in PRESETS if name.startswith("tiny-")]


@pytest.fixture(autouse=True)
def full_precision() -> None:
    """Products in fp32 proper, so that differences are rounding only."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("name", TINY)
def test_forward_and_gradient_match_the_cpu(name: str) -> None:
    """Packed and padded rows: logits to 1e-3, the gradient's norm to 1e-3 relative."""
    results = []
    for device in ("cpu", "cuda"):
        model = build(preset(name)).train()
        model.init_weights(0)
        model.to(device)
        tokens = torch.randint(0, model.config.vocab, (3, 75), generator=torch.Generator().manual_seed(1)).to(device)
        documents = torch.zeros_like(tokens, dtype=torch.int32)
        documents[0, 31:], documents[1, :4], documents[2, 70:] = 1, -1, -1
        logits = model(tokens, documents=documents).logits
        assert logits is not None
        kept = logits[documents >= 0]
        kept.logsumexp(-1).sum().backward()
        norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
        results.append((kept.detach().cpu(), norm.item()))
    (a, norm_a), (b, norm_b) = results
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert norm_b == pytest.approx(norm_a, rel=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_decode_matches_one_pass(name: str) -> None:
    """Prefill in two pieces and token by token equals the whole pass."""
    model = build(preset(name)).eval()
    model.init_weights(0)
    model.to("cuda")
    tokens = torch.randint(0, model.config.vocab, (2, 21), device="cuda")
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model.new_cache(2)
        parts = [model(tokens[:, :7], cache=cache).logits, model(tokens[:, 7:16], cache=cache).logits]
        parts += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(16, 21)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-3, rtol=1e-3)


def test_drafts_give_the_same_tokens() -> None:
    """Greedy with and without drafts, four prompts at once."""
    model = build(preset("tiny-mtp")).eval()
    model.init_weights(0)
    model.to("cuda")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[3, 4, 5], [9] * 17, [7, 8], [11, 12, 13, 14]]
    plain = LLM(model, speculate=0).generate(prompts, params)
    drafted = LLM(model, speculate=3).generate(prompts, params)
    assert [a.completions[0].token_ids for a in plain] == [b.completions[0].token_ids for b in drafted]


def test_training_runs_and_learns(tmp_path: Path) -> None:
    """The tiny MoE recipe in bf16 on the device: the loss falls."""
    loaded = load_recipe("pretrain/tiny-moe", ["device=cuda", "train.precision=bf16", "train.steps=40"])
    result = loaded.recipe.run(RunOptions(run_dir=tmp_path / "run", quiet=True, loaded=loaded))
    assert result.checkpoint is not None
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
