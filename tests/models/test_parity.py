"""Agreement with transformers 5.23 on tiny checkpoints that transformers made, randomised in every tensor."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import alloy
from alloy.models.base import CausalLM
from alloy.models.presets import preset
from alloy.models.registry import build

VOCAB = 97
# fp32 on CPU (hybrid-models.md section 14)
CLOSE = 2e-4

HYBRID = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 84,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "ssm_state_size": 11,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "routed_scaling_factor": 2.5,
    # far above many of the step sizes, so that a floor in the wrong place shows
    "time_step_min": 0.02,
}
ODD = {
    "hidden_size": 39,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 7,
    "intermediate_size": 53,
    "mamba_num_heads": 5,
    "mamba_head_dim": 9,
    "ssm_state_size": 13,
    "n_groups": 1,
    "conv_kernel": 3,
    "chunk_size": 5,
}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
M, A, E, D = "linear_attention", "full_attention", "moe", "mlp"


@dataclass
class Case:
    """A checkpoint of transformers: its class, what differs from the base settings, and its blocks if a hybrid."""

    kind: str
    base: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_hybrid(self) -> bool:
        return self.kind == "NemotronH"


def hybrid(blocks: list[str], **changes: Any) -> Case:
    return Case("NemotronH", HYBRID, {"layers_block_type": blocks, **changes})


CASES = {
    "dense": hybrid([M, D, M, A, D, M, D]),
    "odd-widths": hybrid([M, D, A, D, M, M], **ODD),
    "one-kv-head": hybrid([M, A, D, A], num_key_value_heads=1),
    "group-limited": hybrid([M, E, M, A, E], n_group=4, topk_group=2),
    "latent": hybrid([M, E, A, E], moe_latent_size=22),
    "mixed": hybrid([M, E, A, D, M, E, D], use_bias=True, use_conv_bias=False, norm_topk_prob=False),
    "nemotron": Case("Nemotron", DECODER, {"partial_rotary_factor": 0.5, "hidden_act": "relu2"}),
    "llama": Case("Llama", DECODER, {"rope_parameters": LLAMA3, "attention_bias": True}),
    "qwen3": Case("Qwen3", DECODER, {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-moe": Case(
        "Qwen3Moe",
        DECODER,
        {
            "num_hidden_layers": 5,
            "head_dim": 10,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
        },
    ),
}
HYBRIDS = [name for name, case in CASES.items() if case.is_hybrid]


def randomise(model: nn.Module) -> None:
    """Draw every tensor so widely that no two can be exchanged, and no part has a negligible effect."""
    generator = torch.Generator().manual_seed(11)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.uniform_(low, high, generator=generator)

    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("A_log"):
            draw(tensor, math.log(0.3), math.log(12.0))
        elif name.endswith("dt_bias"):
            draw(tensor, -9.0, 1.5)
        elif "norm" in name:
            draw(tensor, 0.4, 1.6)
        elif tensor.dim() < 2:
            draw(tensor, -0.4, 0.4)
        elif "embed" in name:
            draw(tensor, -1.0, 1.0)
        else:
            bound = 1.6 / math.sqrt(tensor.shape[-1])
            draw(tensor, -bound, bound)


@dataclass
class Pair:
    """One checkpoint, its folder, and transformers' model of it."""

    name: str
    folder: Path
    peer: Any

    def load(self, compat: str | None = None) -> CausalLM:
        return alloy.load(self.folder, device="cpu", compat=compat)[0]


def make(name: str, folder: Path) -> Pair:
    case = CASES[name]
    config = getattr(transformers, f"{case.kind}Config")(**{**case.base, **case.changes})
    # the library's grouped product takes widths in multiples of 16 bytes only
    config._experts_implementation = "eager"
    peer = getattr(transformers, f"{case.kind}ForCausalLM")(config).eval()
    randomise(peer)
    peer.save_pretrained(folder)
    return Pair(name, folder, peer)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Every checkpoint in turn."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The hybrids alone."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


def set_limits(peer: nn.Module, limit: tuple[float, float]) -> None:
    for module in peer.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = limit


@pytest.fixture
def corrected(pair: Pair) -> Iterator[Pair]:
    """The peer with its mixers' time_step_limit set to the config's, as the released models were trained."""
    set_limits(pair.peer, (0.0, math.inf))
    yield pair
    set_limits(pair.peer, (HYBRID["time_step_min"], math.inf))


def tokens(batch: int, seq: int, seed: int = 3) -> Tensor:
    return torch.randint(VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= CLOSE
    # the comparison means something only where the numbers are of order one
    assert theirs.std() > 0.1


def peer_blocks(peer: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the residual stream after each block."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in peer.model.layers
    ]
    with torch.no_grad():
        logits = peer(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def loss_and_gradient_norm(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    norms = torch.stack([g.float().norm() for g in gradients if g is not None])
    return loss.detach(), norms.norm()


def agree_everywhere(model: CausalLM, peer: Any) -> None:
    ids = tokens(2, 21)
    with torch.no_grad():
        output = model(ids, return_hidden=True)
    logits, hidden = peer_blocks(peer, ids)
    agree(output.logits, logits)
    assert output.hidden is not None
    assert len(output.hidden) == len(hidden)
    for ours, theirs in zip(output.hidden, hidden, strict=True):
        assert (ours - theirs).abs().max() <= CLOSE


def agree_in_gradient(model: CausalLM, peer: Any) -> None:
    ids = tokens(2, 19, seed=5)
    ours = loss_and_gradient_norm(model, model(ids).logits, ids)
    theirs = loss_and_gradient_norm(peer, peer(ids).logits, ids)
    assert abs(ours[0] - theirs[0]) <= CLOSE
    assert abs(ours[1] - theirs[1]) <= 1e-4 * theirs[1]


def test_logits_and_every_block_agree(corrected: Pair) -> None:
    """Logits and the residual stream after each block, with dt clamped by the config."""
    agree_everywhere(corrected.load(), corrected.peer)


def test_loss_and_gradient_norm_agree(corrected: Pair) -> None:
    """Cross entropy to 2e-4, the norm of all gradients to 1e-4 of itself."""
    agree_in_gradient(corrected.load(), corrected.peer)


def test_cached_decoding_agrees(corrected: Pair) -> None:
    """Prefill of 9 tokens, then one by one."""
    ids = tokens(2, 15, seed=7)
    agree(decode(corrected.load(), ids, 9), peer_decode(corrected.peer, ids, 9))


def decode(model: CausalLM, ids: Tensor, prefill: int) -> Tensor:
    cache = model.new_cache(len(ids))
    with torch.no_grad():
        parts = [model(ids[:, :prefill], cache=cache).logits]
        parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(prefill, ids.shape[1])]
    return torch.cat(parts, dim=1)


def peer_decode(peer: Any, ids: Tensor, prefill: int) -> Tensor:
    with torch.no_grad():
        output = peer(ids[:, :prefill], use_cache=True)
        parts = [output.logits]
        for i in range(prefill, ids.shape[1]):
            output = peer(ids[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def test_finite_limits_clamp_from_both_sides(hybrid_pair: Pair, tmp_path: Path) -> None:
    """time_step_limit [0.05, 0.4] of config.json, against the library with its mixers' limit set to that."""
    for file in hybrid_pair.folder.iterdir():
        shutil.copy(file, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"time_step_limit": [0.05, 0.4]}))
    ids = tokens(2, 21)
    set_limits(hybrid_pair.peer, (0.05, 0.4))
    with torch.no_grad():
        limited = hybrid_pair.peer(ids).logits
        set_limits(hybrid_pair.peer, (HYBRID["time_step_min"], math.inf))
        agree(alloy.load(tmp_path, device="cpu")[0](ids).logits, limited)
        assert (hybrid_pair.peer(ids).logits - limited).abs().max() > 10 * CLOSE


def test_compat_reproduces_the_stock_library(hybrid_pair: Pair) -> None:
    """compat="transformers-5.23": dt floored in prefill, not clamped in decode; our default differs there.

    Logits, every block, loss and gradient norm of the library as it is, and its cached decoding.
    """
    ids = tokens(2, 15, seed=9)
    model = hybrid_pair.load(compat="transformers-5.23")
    with torch.no_grad():
        whole, stock = model(ids).logits, hybrid_pair.peer(ids).logits
        default = hybrid_pair.load()(ids).logits
    agree(whole, stock)
    agree_everywhere(model, hybrid_pair.peer)
    agree_in_gradient(model, hybrid_pair.peer)
    agree(decode(model, ids, 8), peer_decode(hybrid_pair.peer, ids, 8))
    assert (default - stock).abs().max() > 10 * CLOSE


@pytest.mark.parametrize("config_style", ["hybrid", "transformers5"])
def test_transformers_loads_what_we_save(pair: Pair, config_style: Any, tmp_path: Path) -> None:
    """load -> save keeps every number for transformers, with no key missing or left over."""
    alloy.save(pair.load(), tmp_path, config_style=config_style)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto", experts_implementation="eager"
    )
    assert not any(info.values()), info
    ids = tokens(1, 13)
    with torch.no_grad():
        agree(again.eval()(ids).logits, pair.peer(ids).logits)


def test_left_padding_and_packing_equal_single_rows(pair: Pair) -> None:
    """Rows of 5, 12 and 9 tokens: alone, left-padded in one batch, and packed in one row."""
    model, rows = pair.load(), [tokens(1, n, seed=n)[0] for n in (5, 12, 9)]
    padded, documents = torch.zeros(3, 12, dtype=torch.int64), torch.full((3, 12), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        padded[i, 12 - len(row) :], documents[i, 12 - len(row) :] = row, i
    packed = torch.cat([torch.full((len(row),), i, dtype=torch.int32) for i, row in enumerate(rows)])
    with torch.no_grad():
        single = [model(row[None]).logits[0] for row in rows]
        left = model(padded, documents=documents).logits
        joined = model(torch.cat(rows)[None], documents=packed[None]).logits[0].split([5, 12, 9])
    for i, alone in enumerate(single):
        torch.testing.assert_close(left[i, 12 - len(alone) :], alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(joined[i], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-latent", "tiny-mtp"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_our_own_hybrids(name: str, tied: bool, tmp_path: Path) -> None:
    """A model of ours, tied or not, written with time_step_min 1e-9, gives transformers the same logits."""
    config = type(preset(name)).model_validate(
        {**preset(name).model_dump(), "tie_embeddings": tied, "time_step_min": 1e-9}
    )
    model = build(config).eval()
    model.init_weights(0, dt_range=(1e-4, 0.1))
    alloy.save(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    ids = tokens(1, 13)
    with torch.no_grad():
        assert (model(ids).logits - peer(ids).logits).abs().max() <= CLOSE


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-qwen3-moe", "tiny-nemotron"])
def test_transformers_loads_our_own_decoders(name: str, tmp_path: Path) -> None:
    """Every decoder kind the library knows, from our presets; tied ones are written without a head."""
    model = build(preset(name)).eval()
    randomise(model)
    alloy.save(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    ids = tokens(2, 30)
    with torch.no_grad():
        agree(model(ids).logits, peer(ids).logits)
