"""Models whose matrices are kept in low precision: numbers, memory and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import alloy
from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from alloy.errors import RequestError
from alloy.models.base import CausalLM
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM
from alloy.models.quant import LowExperts, LowLinear, LowModule, check_place, full_bytes, quantize_weights, weight_bytes
from alloy.models.registry import build as new_model
from alloy.ops.quant import WEIGHTS, Weights, dequantize
from tests.engine.conftest import HYBRID, MODELS, VOCAB, build, byte_tokenizer

ANSWERS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def dequantized(model: CausalLM, source: CausalLM) -> CausalLM:
    """`source` with the matrices that `model`, its low-precision copy, stands for."""
    low = dict(model.named_modules())
    with torch.no_grad():
        for name, module in source.named_modules():
            found = low.get(name)
            if isinstance(found, LowLinear):
                # a tied head no longer shares the embedding
                module.weight = torch.nn.Parameter(dequantize(found.weight))
            elif isinstance(found, LowExperts):
                module.up.copy_(torch.stack([dequantize(w) for w in found.up]))
                module.down.copy_(torch.stack([dequantize(w) for w in found.down]))
    return source.eval()


def logits(model: CausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens).logits
    assert out is not None
    return out


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_only_the_weights_are_rounded(name: str, kind: Weights) -> None:
    """Logits are those of the dequantised matrices, up to what a kernel rounds of its inputs and results."""
    model, source = build(name), build(name)
    quantize_weights(model, kind)
    tokens = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
    want = logits(dequantized(model, source), tokens)
    error = (logits(model, tokens) - want).norm() / want.norm()
    assert error < (5e-3 if kind == "int8" else 8e-2)


def test_int8_moves_logits_less_than_a_bound() -> None:
    """Against full weights: a few hundredths of the logits' size at random weights, and bf16 less."""
    tokens = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    config = HybridConfig.model_validate({**HYBRID, "pattern": "M-M*-", "hidden": 64, "ffn": 128, "init_std": 0.02})
    errors: dict[str, float] = {}
    for kind in WEIGHTS:
        model = new_model(config)
        model.init_weights(0)
        want = logits(model.eval(), tokens)
        quantize_weights(model, kind)
        errors[kind] = float((logits(model, tokens) - want).norm() / want.norm())
    assert errors["bf16"] < errors["int8"] < 0.03, errors


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("pattern", ["M-M*-", "ME*E"])
def test_decode_equals_prefill(kind: Weights, pattern: str) -> None:
    """Token by token and at once, with widths that the kernels for few rows take."""
    config = HybridConfig.model_validate(
        {**HYBRID, "pattern": pattern, "hidden": 32, "ffn": 48, "expert_ffn": 32, "shared_ffn": 16, "ssm_head_dim": 8}
    )
    model = HybridLM(config)
    model.init_weights(0)
    quantize_weights(model, kind)
    tokens = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    want = logits(model, tokens)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(tokens[:, :5], cache=cache, logits=None)
        steps = [model(tokens[:, i : i + 1], cache=cache).logits for i in range(5, 20)]
    assert (torch.cat(steps, 1) - want[:, 5:]).norm() <= 0.1 * want[:, 5:].norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved hybrid with experts and MTP."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    alloy.save(build("mtp"), path, byte_tokenizer())
    return path


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_engine_answers_with_them(folder: Path, kind: Weights) -> None:
    """Greedy answers are those of the same model quantised by hand; drafts change nothing."""
    by_hand, tokenizer = alloy.load(folder, device="cpu")
    quantize_weights(by_hand, kind)
    want = LLM(by_hand, tokenizer, speculate=0).generate(["ab", "once"], ANSWERS)
    llm = LLM(folder, device="cpu", weights=kind, speculate=0)
    assert [o.text for o in llm.generate(["ab", "once"], ANSWERS)] == [o.text for o in want]
    assert llm.model.weights == kind
    if kind == "int8":
        # nearly all products of this model are of dequantised matrices, so that drafts do not flip a choice
        drafted = LLM(folder, device="cpu", weights=kind, speculate=2).generate(["ab", "once"], ANSWERS)
        assert [o.text for o in drafted] == [o.text for o in want]


def test_every_matrix_is_replaced_and_memory_falls(folder: Path) -> None:
    """Embedding, norms, convolution, recurrence and router keep their dtype; the rest has no parameters left."""
    full, _ = alloy.load(folder, device="cpu")
    before = weight_bytes(full)
    model = LLM(folder, device="cpu", weights="int8").model
    kept = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 2)[-1] for name, _ in model.named_parameters()}
    names = ("embed.weight", "norm.weight", "conv.weight", "conv.bias", "gate.weight", "mixer.A_log", "mixer.D")
    names += ("mixer.dt_bias", "enorm.weight", "hnorm.weight", "final_norm.weight")
    assert kept <= set(names)
    assert not any(p.requires_grad for p in model.parameters())
    assert weight_bytes(model) < before
    assert full_bytes(model) == before
    assert full_bytes(full) == before


def test_a_tied_head_gets_a_matrix_of_its_own() -> None:
    """The embedding stays as it is."""
    config = HybridConfig.model_validate({**HYBRID, "pattern": "M-", "tie_embeddings": True})
    model = HybridLM(config)
    model.init_weights(0)
    embedding, before = model.embed.weight.clone(), weight_bytes(model)
    quantize_weights(model, "int8")
    assert torch.equal(model.embed.weight, embedding)
    assert isinstance(model.head, LowModule)
    assert full_bytes(model) == before


def refuse(act: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        act()


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    """Each in one sentence that says what to do."""
    refuse(
        lambda: LLM(folder, device="cpu", weights="nvfp4"), 'weights = "nvfp4" is not known; use one of "bf16", "int8"'
    )
    refuse(lambda: LLM(build("hybrid"), weights="int8"), "would change the model that was given; give its folder")
    refuse(lambda: check_place("int8", torch.device("cuda")), 'are for CPUs and this is cuda; use device = "cpu"')
    model = LLM(folder, device="cpu", weights="int8").model
    refuse(lambda: quantize_weights(model, "bf16"), 'low precision already \\("int8"\\)')
    refuse(lambda: alloy.save(model, tmp_path / "out"), 'weights = "int8" cannot be saved')
    assert not (tmp_path / "out").exists()
    refuse(lambda: model.to(torch.bfloat16), "cannot be moved or cast")
