"""Long trials: random models against the derivation and transformers, random calls of them, random damage of their files."""

import json
import math
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import alloy
from alloy.errors import CheckpointError
from alloy.models import sizes
from alloy.models.base import CausalLM
from alloy.models.configs import (
    AttentionConfig,
    DecoderConfig,
    DecoderLayerConfig,
    HybridConfig,
    LayerOverride,
    LinearConfig,
    MLPConfig,
    RopeConfig,
)
from alloy.models.hf.folder import INDEX
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import build
from tests.models import oracle
from tests.models.test_parity import decode, peer_decode, randomise, set_limits
from tests.models.zoo import decoder, disturb, hybrid

pytestmark = pytest.mark.soak

MODELS_A_TRIAL = 8


def random_hybrid(r: random.Random) -> HybridConfig:
    """Any pattern, groups, windows, latent widths, MTP blocks and per-layer overrides."""
    kv_heads, ssm_groups = r.randint(1, 4), r.randint(1, 4)
    groups, size = r.choice([1, 1, 2, 3]), r.randint(2, 4)
    kept = r.randint(1, groups)
    top_k, heterogeneous = r.randint(1, kept * size), r.random() < 0.5
    pattern = "".join(r.choice("M*-EMM") for _ in range(r.randint(1, 6)))
    mtp_pattern = "".join(r.choice("M*-E") for _ in range(r.randint(1, 3)))

    def override(symbol: str) -> LayerOverride:
        choices = {
            "M": {"ssm_state": r.randint(1, 9), "ssm_heads": ssm_groups * r.randint(1, 3), "ssm_head_dim": r.randint(1, 5)},
            "*": {"window": r.randint(1, 6), "num_heads": kv_heads * r.randint(1, 3), "head_dim": r.randint(1, 5)},
            "-": {"ffn": r.randint(1, 20)},
            "E": {"expert_ffn": r.randint(1, 9), "top_k": r.randint(1, top_k), "latent": r.randint(1, 9), "shared_ffn": r.choice([0, 4])},
        }[symbol]  # fmt: skip
        return LayerOverride(**{name: value for name, value in choices.items() if r.random() < 0.5})

    depths = r.choice([0, 1, 1, 2])
    return hybrid(
        pattern,
        kind="nemotron_h_puzzle" if heterogeneous else "nemotron_h",
        hidden=r.choice([7, 13, 20, 24]),
        num_heads=kv_heads * r.randint(1, 3),
        num_kv_heads=kv_heads,
        head_dim=r.randint(1, 9),
        window=r.choice([None, None, 1, 2, 5]),
        ffn=r.randint(1, 33),
        ssm_heads=ssm_groups * r.randint(1, 3),
        ssm_head_dim=r.randint(1, 9),
        ssm_state=r.randint(1, 17),
        ssm_groups=ssm_groups,
        conv_kernel=r.randint(1, 5),
        conv_bias=r.random() < 0.7,
        num_experts=groups * size,
        top_k=top_k,
        expert_ffn=r.randint(1, 13),
        shared_ffn=r.choice([0, 5, 13]),
        latent=r.choice([None, None, 3, 10]),
        num_router_groups=groups,
        top_router_groups=kept,
        normalize_weights=r.random() < 0.6,
        mtp_depths=depths,
        mtp_pattern=mtp_pattern,
        mtp_repeated=r.random() < 0.6,
        residual_fp32=r.random() < 0.2,
        tie_embeddings=r.random() < 0.3,
        time_step_limit=r.choice([(0.0, math.inf), (0.02, 0.3)]),
        layers=tuple(map(override, pattern)) if heterogeneous else None,
        mtp_layers=tuple(map(override, mtp_pattern)) if heterogeneous and depths else None,
    )


def random_decoder(r: random.Random) -> DecoderConfig:
    """Any decoder kind; nemotron-nas with layers that differ or are missing."""
    kind = r.choice(["llama", "qwen3", "qwen3_moe", "nemotron", "nemotron-nas"])
    kv_heads, head_dim, hidden = r.randint(1, 3), 4 * r.randint(1, 3), r.choice([11, 24])
    heads, layers = kv_heads * r.randint(1, 3), r.randint(1, 4)
    stretched = r.choice([{}, {"scaling": "linear", "factor": 3.0}])
    rope = RopeConfig.model_validate({"theta": r.choice([50.0, 1e4]), "partial": r.choice([0.5, 1.0]), **stretched})
    bias, changes = r.random() < 0.3, dict[str, Any]()
    if kind == "qwen3_moe":
        experts = r.randint(1, 6)
        changes = {"num_experts": experts, "top_k": r.randint(1, experts), "expert_ffn": r.randint(1, 9)}
        changes["dense_layers"] = tuple(i for i in range(layers) if r.random() < 0.3)
    if kind == "nemotron":
        changes = {"norm": "layer1p", "activation": "relu2", "gated": False}
    if kind == "nemotron-nas":
        linear, plain = LinearConfig(hidden=hidden, bias=bias), LinearConfig(hidden=hidden)
        own = [
            AttentionConfig(hidden=hidden, num_heads=heads, num_kv_heads=n, head_dim=head_dim, rope=rope, bias=bias)
            for n in {1, kv_heads, heads}
        ]
        wide = [MLPConfig(hidden=hidden, ffn=r.randint(1, 40), activation="silu", gated=True) for _ in range(3)]
        changes["layers"] = tuple(
            DecoderLayerConfig(attention=r.choice([None, linear, *own]), mlp=r.choice([None, plain, *wide]))
            for _ in range(layers)
        )
    return decoder(
        kind, hidden=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rope=rope,
        ffn=r.randint(1, 40), qk_norm=kind.startswith("qwen3"), attention_bias=bias,
        tie_embeddings=r.random() < 0.3, **changes,
    )  # fmt: skip


def random_documents(r: random.Random, rows: int, seq: int) -> Tensor:
    """Packing with padding at either end, documents of one token, numbers that come again, rows of padding only."""
    documents = torch.full((rows, seq), -1)
    for row in documents:
        start = r.choice([0, 0, r.randrange(seq)])
        end = r.choice([seq, seq, r.randint(start + 1, seq)])
        if r.random() < 0.1:
            continue
        number = 0
        while start < end:
            length = r.choice([1, r.randint(1, end - start), end - start])
            number = r.choice([n for n in range(4) if n != number])
            row[start : start + length] = number
            start += length
    return documents


def spans(documents: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    for row, numbers in enumerate(documents.tolist()):
        edges = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]), len(numbers)]
        yield from ((row, a, b) for a, b in pairwise(edges) if numbers[a] >= 0)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def check_calls(model: CausalLM, r: random.Random, generator: torch.Generator) -> None:
    """Chunks with padding anywhere, idle rows and drafts with random counts give the logits of one pass."""
    rows, seq, vocab = r.randint(1, 3), 30, model.config.vocab
    tokens = torch.randint(vocab, (rows, seq), generator=generator)
    whole = model(tokens).logits
    cache, held = model.new_cache(rows, r.choice([0, 3, 40])), [0] * rows
    assert whole is not None
    while max(held) < seq - 5:
        width = min(r.choice([1, 1, 2, 3, r.randint(1, 9)]), seq - max(held))
        counts = r.choice([[width] * rows, [r.randint(0, width) for _ in held]])
        draft = r.random() < 0.4
        starts = [0 if draft else r.randint(0, width - count) for count in counts]
        chunk, documents = torch.zeros(rows, width, dtype=torch.int64), torch.full((rows, width), -1)
        for row, (at, count) in enumerate(zip(starts, counts, strict=True)):
            chunk[row, at : at + count] = tokens[row, held[row] : held[row] + count]
            documents[row, at : at + count] = r.randrange(5)
        if draft:
            with cache.drafting():
                logits = model(chunk, cache=cache).logits
            cache.accept(torch.tensor(counts))
        else:
            plain = all(count == width for count in counts) and r.random() < 0.7
            logits = model(chunk, cache=cache, documents=None if plain else documents).logits
        assert logits is not None
        for row, (at, count) in enumerate(zip(starts, counts, strict=True)):
            close(logits[row, at : at + count], whole[row, held[row] : held[row] + count])
        held = [a + b for a, b in zip(held, counts, strict=True)]
        assert cache.lengths.tolist() == held


def check_gradients(model: CausalLM, tokens: Tensor, documents: Tensor, generator: torch.Generator) -> None:
    """Loss, router balance and gradients of packed rows are the sums over the documents alone."""
    weight = torch.randn(*tokens.shape, model.config.vocab, generator=generator)
    parameters = list(model.parameters())

    def loss(row: slice, span: slice) -> Tensor:
        out = model(tokens[row, span], documents=documents[row, span], return_mtp=model.has_mtp)
        assert out.logits is not None
        total = (out.logits * weight[row, span])[documents[row, span] >= 0].sum()
        for k, hidden in enumerate(out.mtp_hidden or [], start=1):
            for i, a, b in spans(documents[row, span]):
                total = total + hidden[i, a : max(a, b - k)].square().sum()
        return total + sum(stats.balance * stats.sequences for stats in out.routers)

    def gradients(value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))

    together = loss(slice(None), slice(None))
    alone = torch.stack([loss(slice(i, i + 1), slice(a, b)) for i, a, b in spans(documents)]).sum()
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)
    ours, theirs = gradients(together), gradients(alone)
    rounding = 1e-6 * torch.stack([g.norm() for g in theirs]).norm()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + rounding


def check_folder(model: CausalLM, folder: Path, r: random.Random) -> None:
    """Parameters and cache are those the calculator gives; save -> load in either style is bit-equal, logits too, and keeps its islands in bf16."""
    config, state = model.config, model.state_dict(keep_vars=True)
    tensors = {id(tensor): (key, tensor) for key, tensor in state.items()}.values()
    assert sizes.parameters(config) == sum(t.numel() for key, t in tensors if not key.startswith("mtp."))
    assert sizes.mtp_parameters(config) == sum(t.numel() for key, t in tensors if key.startswith("mtp."))
    assert sizes.weight_bytes(config, "float32") == sum(t.nbytes for _, t in tensors)
    shard = r.choice([5_000, 10**9])
    alloy.save(model, folder, config_style=r.choice(["hybrid", "transformers5"]), max_shard_bytes=shard)
    again, narrow = alloy.load(folder, device="cpu")[0], alloy.load(folder, device="cpu", dtype="bfloat16")[0]
    for key, tensor in state.items():
        assert torch.equal(again.state_dict()[key], tensor), key
        is_island = key.endswith(("A_log", ".D", "dt_bias", "gate.bias"))
        assert torch.equal(narrow.state_dict()[key], tensor if is_island else tensor.bfloat16()), key
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        ours, theirs = (m(tokens, return_mtp=m.has_mtp) for m in (model, again))
    for mine, other in zip(
        [ours.logits, *(ours.mtp_logits or [])], [theirs.logits, *(theirs.mtp_logits or [])], strict=True
    ):
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)


def random_model(config: HybridConfig | DecoderConfig, seed: int) -> tuple[CausalLM, torch.Generator]:
    model, generator = build(config), torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    disturb(model, generator)
    return model.eval(), generator


def trials(count: int, seed: int) -> Iterator[int]:
    return iter(range(seed * MODELS_A_TRIAL, (seed + count) * MODELS_A_TRIAL))


def test_random_hybrids(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """Packed and padded rows against the derivation of every single document; then gradients and cached calls."""
    for seed in trials(soak_count, soak_seed):
        r = random.Random(seed)
        config = random_hybrid(r)
        model, generator = random_model(config, seed)
        documents = random_documents(r, r.randint(1, 3), r.randint(1, 14))
        tokens = torch.randint(config.vocab, documents.shape, generator=generator)
        depths = r.randint(1, 3) if config.mtp_repeated else config.mtp_depths
        with torch.no_grad():
            # what lies under padding is never looked at
            out = model(
                tokens.masked_fill(documents < 0, -7),
                documents=documents,
                return_hidden=True,
                return_mtp=depths if config.mtp_depths else False,
            )
            mtp = out.mtp_logits or []
            for i, a, b in spans(documents):
                truth = oracle.hybrid(config, model.state_dict(), tokens[i, a:b], min(len(mtp), b - a - 1))
                close(out.logits[i, a:b], truth["logits"][0])
                for ours, theirs in zip(out.hidden, truth["hidden"], strict=True):
                    close(ours[i, a:b], theirs)
                for k, theirs in enumerate(truth["mtp"], start=1):
                    close(mtp[k - 1][i, a : b - k], theirs)
            check_calls(model, r, generator)
        check_folder(model, tmp_path / str(seed), r)
        if (documents >= 0).any():
            check_gradients(model.train(), tokens, documents, generator)


def test_random_decoders(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """Packed and padded rows equal the documents alone, in values and gradients; cached calls equal one pass."""
    for seed in trials(soak_count, soak_seed):
        r = random.Random(seed)
        model, generator = random_model(random_decoder(r), seed)
        documents = random_documents(r, r.randint(1, 3), r.randint(1, 14))
        tokens = torch.randint(model.config.vocab, documents.shape, generator=generator)
        with torch.no_grad():
            packed = model(tokens.masked_fill(documents < 0, -7), documents=documents).logits
            for i, a, b in spans(documents):
                close(packed[i, a:b], model(tokens[i : i + 1, a:b]).logits[0])
            check_calls(model, r, generator)
        check_folder(model, tmp_path / str(seed), r)
        if (documents >= 0).any():
            check_gradients(model.train(), tokens, documents, generator)


def random_peer(r: random.Random) -> tuple[str, dict[str, Any]]:
    """A class of transformers and settings for it."""
    kind, kv_heads = r.choice(["NemotronH", "NemotronH", "NemotronH", "Nemotron", "Llama", "Qwen3", "Qwen3Moe"]), r.randint(1, 3)  # fmt: skip
    heads = kv_heads * r.randint(1, 3)
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": heads * r.randint(2, 9),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 4 * r.randint(1, 3),
        "intermediate_size": r.randint(3, 60),
    }
    if kind == "NemotronH":
        groups, routes, size = r.randint(1, 3), r.choice([1, 1, 2, 3]), r.randint(2, 4)
        kept = r.randint(1, routes)
        blocks = ["linear_attention", "linear_attention", "full_attention", "moe", "mlp"]
        return kind, settings | {
            "head_dim": r.randint(1, 9),
            "mamba_num_heads": groups * r.randint(1, 3),
            "mamba_head_dim": r.randint(1, 9),
            "ssm_state_size": r.randint(1, 15),
            "n_groups": groups,
            "conv_kernel": r.randint(2, 4),
            "chunk_size": r.choice([4, 8, 32]),
            "n_routed_experts": routes * size,
            "n_group": routes,
            "topk_group": kept,
            "num_experts_per_tok": r.randint(1, kept * size),
            "moe_intermediate_size": r.randint(2, 20),
            "moe_shared_expert_intermediate_size": r.randint(1, 20),
            "moe_latent_size": r.choice([None, None, r.randint(2, 20)]),
            "routed_scaling_factor": r.choice([1.0, 2.5]),
            "norm_topk_prob": r.random() < 0.6,
            "use_bias": r.random() < 0.3,
            "use_conv_bias": r.random() < 0.7,
            "mlp_bias": r.random() < 0.2,
            "time_step_min": 0.02,
            # that library's cache needs an attention layer
            "layers_block_type": ["full_attention", *(r.choice(blocks) for _ in range(r.randint(1, 5)))],
        }
    settings |= {"num_hidden_layers": r.randint(1, 4), "tie_word_embeddings": r.random() < 0.3}
    if kind == "Nemotron":
        return kind, settings | {"partial_rotary_factor": r.choice([0.5, 1.0]), "attention_bias": r.random() < 0.3}
    ropes = [
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0},
        {"rope_type": "default", "rope_theta": 777.0},
    ]  # fmt: skip
    settings |= {"rope_parameters": r.choice(ropes), "attention_bias": r.random() < 0.3}
    if kind == "Qwen3Moe":
        experts = r.randint(2, 6)
        settings |= {
            "num_experts": experts,
            "num_experts_per_tok": r.randint(1, experts),
            "moe_intermediate_size": r.randint(2, 20),
            "decoder_sparse_step": r.randint(1, 2),
            "mlp_only_layers": [i for i in range(4) if r.random() < 0.2],
            "norm_topk_prob": r.random() < 0.5,
        }
    return kind, settings


def test_random_peers(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """Checkpoints of transformers: our logits, our compat mode with its decoding, and what that library reads of ours."""
    for seed in trials(soak_count, soak_seed):
        r = random.Random(seed)
        kind, settings = random_peer(r)
        config = getattr(transformers, f"{kind}Config")(**settings)
        config._experts_implementation = "eager"
        peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        randomise(peer)
        folder, again = tmp_path / f"{seed}-theirs", tmp_path / f"{seed}-ours"
        peer.save_pretrained(folder)
        model, ids = alloy.load(folder, device="cpu")[0], torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(seed))  # fmt: skip
        alloy.save(model, again, config_style=r.choice(["hybrid", "transformers5"]))
        reread, info = transformers.AutoModelForCausalLM.from_pretrained(
            again, output_loading_info=True, dtype="auto", experts_implementation="eager"
        )
        assert not any(info.values()), info
        with torch.no_grad():
            close(reread.eval()(ids).logits, peer(ids).logits)
            if kind == "NemotronH":
                compat = alloy.load(folder, device="cpu", compat="transformers-5.23")[0]
                close(compat(ids).logits, peer(ids).logits)
                close(decode(compat, ids, 8), peer_decode(peer, ids, 8))
                set_limits(peer, (0.0, math.inf))
            close(model(ids).logits, peer(ids).logits)


JUNK = [None, 0, -1, 2, 1.5, "x", "", [], {}, [1], ["a"], [None], [{}], True, False, math.nan, math.inf, 10**30, "M*"]


def spoil_json(data: Any, r: random.Random) -> None:
    """Delete or replace one value anywhere in a JSON document."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(data)
    node, key = r.choice(places)
    if r.random() < 0.2:
        del node[key]
    else:
        node[key] = r.choice(JUNK)


def spoil(folder: Path, r: random.Random) -> bool:
    """Damage one file; whether its numbers must be the old ones if it still loads."""
    weights = r.choice(sorted(folder.glob("*.safetensors")))
    raw = weights.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    kind = r.choice(["json", "json", "cut", "flip", "header"])
    if kind == "json":
        names = [
            "config.json",
            "config.json",
            "generation_config.json",
            *([INDEX] if (folder / INDEX).exists() else []),
        ]
        file = folder / r.choice(names)
        data = json.loads(file.read_text())
        spoil_json(data, r)
        text = json.dumps(data)
        file.write_text(text if r.random() < 0.9 else text[: r.randrange(len(text))])
        # a config may mean another model of the same shapes
        return file.name != "config.json"
    if kind == "cut":
        weights.write_bytes(raw[: r.randrange(len(raw))])
    elif kind == "flip":
        place = r.randrange(end)
        weights.write_bytes(raw[:place] + bytes([raw[place] ^ r.randrange(1, 256)]) + raw[place + 1 :])
    else:
        header = json.loads(raw[8:end])
        spoil_json(header, r)
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return True


def test_damaged_checkpoints(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """Any damage of any file gives CheckpointError, or leaves the weights as they were."""
    tiny = [name for name in PRESETS if name.startswith("tiny-")]
    for seed in range(soak_seed * 40, (soak_seed + soak_count) * 40):
        r = random.Random(seed)
        model, _ = random_model(preset(r.choice(tiny)), seed)
        folder = tmp_path / str(seed)
        alloy.save(model, folder, max_shard_bytes=r.choice([60_000, 10**9]))
        same = spoil(folder, r)
        try:
            state = alloy.load(folder, device="cpu")[0].state_dict()
        except CheckpointError:
            continue
        if same:
            assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()), seed
