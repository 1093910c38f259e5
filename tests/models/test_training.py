"""Training mode: router statistics, activation checkpointing, precision islands, initialisation, meta device."""

import copy
import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.hybrid import HybridLM
from alloy.models.llama import DecoderLM
from alloy.ops import use_backend
from tests.models.zoo import CONFIGS, build, hybrid, random_tokens

DOCUMENTS = torch.tensor([[0] * 6 + [1] * 4 + [-1] * 3, [-1] * 2 + [0] * 11])


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_nothing(name: str) -> None:
    """Loss, gradients and router statistics are those of the plain pass, and blocks really are recomputed."""
    model, tokens = build(name).train(), random_tokens(2, 13)
    has_mtp = isinstance(model.config, HybridConfig) and model.config.mtp_depths > 0
    results = []
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.layers[0].register_forward_pre_hook(count)
    for mode in ("none", "selective", "full"):
        model.checkpointing = mode
        model.zero_grad()
        out = model(tokens, documents=DOCUMENTS, return_mtp=has_mtp)
        value = out.logits[DOCUMENTS >= 0].square().mean() + sum(r.balance for r in out.routers)
        value = value + sum(h.square().mean() for h in out.mtp_hidden or [])
        value.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        results.append((value.detach(), grads, [(r.counts, r.balance, r.entropy) for r in out.routers]))
    assert calls == 5
    (loss, grads, routers), *others = results
    for loss2, grads2, routers2 in others:
        assert torch.equal(loss, loss2)
        for a, b in zip(grads, grads2, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=0, rtol=1e-6)
        for mine, theirs in zip(routers, routers2, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_selective_checkpointing_multiplies_once() -> None:
    """No matmul of a block is computed again, which "full" does to all of them."""
    model, tokens = build("dense").train(), random_tokens(2, 64)
    flops: dict[str, int] = {}
    for mode in ("none", "selective", "full"):
        model.checkpointing = mode
        with use_backend("torch"), FlopCounterMode(display=False) as counter:
            model(tokens, logits=None).last_hidden.square().mean().backward()
        flops[mode] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert flops["none"] == flops["selective"] < flops["full"]


def test_router_stats_count_real_tokens_only() -> None:
    """Counts, balance (mean over documents) and entropy, from scores computed by hand; MTP counts tokens it predicts."""
    model, tokens = build("latent_mtp").train(), random_tokens(2, 13)
    seen: dict[int, torch.Tensor] = {}
    gates = model.gates()
    for i, gate in enumerate(gates):
        gate.register_forward_hook(lambda _, __, out, i=i: seen.setdefault(i, out.detach()))
    out = model(tokens, documents=DOCUMENTS, return_mtp=1)
    assert len(out.routers) == len(gates) == 3
    for i, stats in enumerate(out.routers):
        spans = [(0, 0, 6), (0, 6, 10), (1, 0, 11)]
        width = 13
        if i == 2:
            # depth 1: the last token of a document has no next one
            spans, width = [(row, a, b - 1) for row, a, b in spans], 12
        scores = torch.sigmoid(seen[i]).view(2, width, 6)
        counts, balance, entropy, total = torch.zeros(6), 0.0, 0.0, 0
        for row, a, b in spans:
            s = scores[row, a:b]
            chosen = (s + gates[i].bias).topk(2).indices
            hits = torch.zeros(6)
            for e in chosen.flatten().tolist():
                hits[e] += 1
            p = s / s.sum(-1, keepdim=True)
            counts += hits
            balance += float(6 / (2 * (b - a) ** 2) * (p.sum(0) * hits).sum()) / len(spans)
            entropy -= float((p * p.log()).sum())
            total += b - a
        assert stats.counts.tolist() == counts.tolist()
        assert float(stats.balance) == pytest.approx(balance, rel=1e-5)
        assert float(stats.entropy) == pytest.approx(entropy / total, rel=1e-5)
    assert model.eval()(tokens).routers == []


def test_repeated_depth_is_one_entry() -> None:
    """Two uses of the MTP's MoE layer in a step come as one: counts add up."""
    model, tokens = build("latent_mtp").train(), random_tokens(2, 13)
    out = model(tokens, return_mtp=True)
    assert [int(r.counts.sum()) for r in out.routers] == [52, 52, 2 * 2 * (12 + 11)]


@pytest.mark.parametrize("name", ["latent_mtp", "qwen3_moe", "nemotron"])
def test_islands_stay_fp32(name: str) -> None:
    """bf16 models keep A_log, D, dt_bias and the correction bias in fp32, unrounded, and run with fp32 logits."""
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    low = copy.deepcopy(model).to(torch.bfloat16)
    islands = ("A_log", ".D", "dt_bias", "gate.bias")
    for key, tensor in low.state_dict().items():
        if key.endswith(islands):
            assert torch.equal(tensor, before[key])
        else:
            assert tensor.dtype == torch.bfloat16
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        out = low(tokens)
        assert out.logits.dtype == torch.float32
        assert out.last_hidden.dtype == torch.bfloat16
        cache = low.new_cache(2)
        steps = [low(tokens[:, i : i + 1], cache=cache).logits for i in range(3)]
    assert torch.isfinite(torch.cat(steps, 1)).all()
    kind = type(model)
    made = kind(model.config, dtype=torch.bfloat16)
    assert {k: v.dtype for k, v in made.state_dict().items()} == {k: v.dtype for k, v in low.state_dict().items()}


def test_router_is_fp32_under_autocast() -> None:
    """Autocast does not reach the router."""
    model, tokens = build("moe").train(), random_tokens(2, 9)
    dtypes = []
    model.gates()[0].register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        out.logits.square().mean().backward()
    assert dtypes == [torch.float32]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_fp32_residual() -> None:
    """residual_fp32 keeps the stream in fp32 in a bf16 model."""
    model = HybridLM(hybrid("M*-E", residual_fp32=True), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        out = model(random_tokens(1, 5), return_hidden=True)
    assert {h.dtype for h in out.hidden} == {torch.float32}
    assert out.last_hidden.dtype == torch.bfloat16


def test_megatron_init() -> None:
    """Normal matrices of the config's std, residual outputs smaller by sqrt(blocks), Mamba-2's own ranges."""
    model = HybridLM(
        HybridConfig(
            vocab=512, hidden=256, pattern="M*-E", num_heads=8, num_kv_heads=2, head_dim=32, ffn=512, ssm_heads=64,
            ssm_head_dim=8, ssm_state=16, ssm_groups=2, num_experts=4, expert_ffn=128, shared_ffn=128, latent=64,
        )
    )  # fmt: skip
    model.init_weights(3)
    std = math.sqrt(0.8 / 256)
    state = model.state_dict()
    for key, tensor in state.items():
        if key.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down")):
            assert float(tensor.std()) == pytest.approx(std / 2, rel=0.05), key
        elif (
            key.endswith(("proj.weight", "gate.weight", "experts.up", "embed.weight", "head.weight")) or "latent" in key
        ):
            assert float(tensor.std()) == pytest.approx(std, rel=0.1), key
        elif key.endswith("norm.weight") or key.endswith(".D"):
            assert (tensor == 1).all()
    decay, dt = state["layers.0.mixer.A_log"].exp(), torch.nn.functional.softplus(state["layers.0.mixer.dt_bias"])
    assert decay.min() >= 1
    assert decay.max() <= 16
    assert decay.std() > 2
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert 0.45 < state["layers.0.mixer.conv.weight"].abs().max() <= 0.5
    assert 0.45 < state["layers.0.mixer.conv.bias"].abs().max() <= 0.5
    other = HybridLM(model.config)
    other.init_weights(torch.Generator().manual_seed(3), dt_range=(0.2, 0.3))
    assert torch.equal(other.embed.weight, model.embed.weight)
    dt = torch.nn.functional.softplus(other.state_dict()["layers.0.mixer.dt_bias"])
    assert dt.min() >= 0.2 * 0.999
    assert dt.max() <= 0.3 * 1.001


def test_transformers_init() -> None:
    """That library's scheme: A = 1..heads, zero conv bias, out_proj uniform over sqrt(blocks)."""
    model = HybridLM(hybrid("M*-E", ssm_heads=12, hidden=40))
    model.init_weights(0, init="transformers")
    mixer = model.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 13.0))
    assert (mixer.conv.bias == 0).all()
    bound = 1 / math.sqrt(12 * 7 * 4)
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert float(model.layers[1].mixer.o_proj.weight.detach().std()) == pytest.approx(0.25, rel=0.1)


def test_decoder_init() -> None:
    """Two residual steps a layer: outputs start smaller by sqrt(2 layers); LayerNorm1P starts at gamma = 1."""
    model = build("nemotron")
    model.init_weights(0)
    assert float(model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.25 / math.sqrt(6), rel=0.1)
    assert (model.norm.weight == 0).all()
    assert (model.layers[0].attention.q_proj.bias == 0).all()


@pytest.mark.parametrize("name", ["latent_mtp", "qwen3", "nas"])
def test_meta_then_empty_then_init(name: str) -> None:
    """A model built on the meta device becomes an equal one by `to_empty` and `init_weights`."""
    config = CONFIGS[name]
    make = HybridLM if isinstance(config, HybridConfig) else DecoderLM
    with torch.device("meta"):
        model = make(config)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    model.init_weights(5)
    other = make(config, device="meta").to_empty(device="cpu")
    other.init_weights(5)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    assert torch.isfinite(model(random_tokens(1, 5)).logits).all()
    if config.tie_embeddings:
        assert model.head.weight is model.embed.weight


def test_published_size_builds_at_once() -> None:
    """The largest hybrid, 550 billion parameters, on the meta device in under two seconds."""
    start = time.perf_counter()
    config = HybridConfig(
        hidden=8192,
        pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        num_heads=64, num_kv_heads=2, ssm_heads=256, ssm_head_dim=64, num_experts=512, top_k=22, expert_ffn=5120,
        shared_ffn=10240, latent=2048,
    )  # fmt: skip
    model = HybridLM(config, device="meta", dtype=torch.bfloat16)
    assert time.perf_counter() - start < 2
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == 549.309


def test_same_seed_with_and_without_mtp() -> None:
    """MTP layers draw last: the backbone of a seed does not depend on them."""
    plain, more = HybridLM(hybrid("M*E")), HybridLM(hybrid("M*E", mtp_depths=1))
    plain.init_weights(1)
    more.init_weights(1)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, more.state_dict()[key]), key


def test_tied_qwen_has_no_second_matrix() -> None:
    """A tied head is the embedding, in the parameter list once."""
    config = CONFIGS["qwen3"]
    assert isinstance(config, DecoderConfig)
    model = DecoderLM(config)
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names
    assert "head.weight" not in names
