"""The size calculator against published numbers, transformers' own models, built modules and allocated caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from alloy.errors import RecipeError, ResourceError
from alloy.models import sizes
from alloy.models.configs import HybridConfig
from alloy.models.hf.config import write_config
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import build
from alloy.models.sizes import GIB, Setting

# hybrid-models.md section 9: parameters, MTP, active with and without input embedding (1e9), KV bytes per token
TABLE = {
    "nemotron-h-4b": (4.489, 0, 4.489, 4.087, 16_384),
    "nemotron-h-8b": (8.101, 0, 8.101, 7.564, 16_384),
    "nemotron-h-47b": (46.792, 0, 46.792, 45.718, 20_480),
    "nemotron-h-56b": (56.324, 0, 56.324, 55.251, 40_960),
    "nemotron-nano-9b-v2": (8.888, 0, 8.888, 8.301, 16_384),
    "nemotron-nano-12b-v2": (12.310, 0, 12.310, 11.639, 24_576),
    "nemotron-3-nano-4b": (3.974, 0, 3.974, 3.563, 16_384),
    "nemotron-3-nano-30b-a3b": (31.578, 0, 3.580, 3.228, 6144),
    "nemotron-3.5-lightning-30b-a3b": (31.578, 1.335, 3.580, 3.228, 6144),
    "nemotron-3-super-120b-a12b": (120.669, 2.942, 12.770, 12.233, 8192),
    "nemotron-3-ultra-550b-a55b": (549.309, 11.216, 56.059, 54.985, 12_288),
    "nemotron-4-340b": (341.029, 0, 341.029, 336.311, 589_824),
    "llama-nemotron-nano-8b": (8.030, 0, 8.030, 7.505, 131_072),
    "llama-nemotron-super-49b": (49.867, 0, 49.867, 48.816, 200_704),
    "llama-nemotron-ultra-253b": (253.401, 0, 253.401, 251.300, 262_144),
    "qwen3-8b": (8.191, 0, 8.191, 7.568, 147_456),
    "qwen3-30b-a3b": (30.532, 0, 3.353, 3.042, 98_304),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_sizes(name: str) -> None:
    """Totals, MTP apart, active parameters and KV bytes of the published table."""
    config = preset(name)
    total, mtp, active, without, kv = TABLE[name]
    found = (
        sizes.parameters(config),
        sizes.mtp_parameters(config),
        sizes.parameters(config, active=True),
        sizes.parameters(config, active=True, input_embedding=False),
    )
    assert [round(number / 1e9, 3) for number in found] == [total, mtp, active, without]
    assert sizes.kv_bytes(config, 1, 1) == kv


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nemotron-nano-12b-v2", 12_310_001_152),
        ("nemotron-nano-9b-v2", 8_888_227_328),
        ("nemotron-h-8b", 8_100_852_736),
        ("nemotron-h-4b", 4_489_223_040),
    ],
)
def test_exact_published_totals(name: str, count: int) -> None:
    """Golden totals of the compression tutorials, to the unit."""
    assert sizes.parameters(preset(name)) == count


@pytest.mark.parametrize("name", [name for name in TABLE if preset(name).kind not in ("nemotron-nas",)])
def test_totals_equal_transformers_models(name: str) -> None:
    """The same sum over transformers' model of the config.json we write, on the meta device (it knows no MTP)."""
    data = write_config(preset(name))
    config = transformers.CONFIG_MAPPING[data.pop("model_type")](**data)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config)
    assert sizes.parameters(preset(name)) == sum(tensor.numel() for tensor in peer.state_dict().values())


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_built_modules(name: str) -> None:
    """Parameters, MTP parameters and bytes of the tensors of the module itself; per-layer overrides count."""
    config = preset(name)
    state = build(config, "meta", torch.bfloat16).state_dict(keep_vars=True)
    # tied tensors once
    tensors = {id(tensor): (key, tensor) for key, tensor in state.items()}.values()
    assert sizes.parameters(config) == sum(t.numel() for key, t in tensors if not key.startswith("mtp."))
    assert sizes.mtp_parameters(config) == sum(t.numel() for key, t in tensors if key.startswith("mtp."))
    assert sizes.weight_bytes(config, "bfloat16") == sum(t.nbytes for _, t in tensors)


@pytest.mark.parametrize("name", PRESETS)
def test_active_parameters_equal_built_modules(name: str) -> None:
    """To the unit: of the experts those that one token uses; without input embedding, unless it is also the head."""
    config = preset(name)
    mixers = dict(enumerate(config.mixers if isinstance(config, HybridConfig) else [r.mlp for r in config.resolved]))
    state = build(config, "meta").state_dict(keep_vars=True)
    active = 0
    for key, tensor in {id(tensor): (key, tensor) for key, tensor in state.items()}.values():
        if key.startswith("mtp."):
            continue
        mixer = mixers[int(key.split(".")[1])] if ".experts." in key else None
        active += tensor.numel() if mixer is None else tensor.numel() // mixer.num_experts * mixer.top_k
    assert sizes.parameters(config, active=True) == active
    embedding = 0 if config.tie_embeddings else config.vocab * config.hidden
    assert sizes.parameters(config, active=True, input_embedding=False) == active - embedding


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-mtp", "tiny-puzzle", "tiny-nas", "tiny-qwen3-moe", "tiny-llama"])
def test_cache_bytes_equal_an_allocated_cache(name: str) -> None:
    """KV, recurrent and convolution state of 3 rows of 64 tokens."""
    config = preset(name)
    if isinstance(config, HybridConfig) and config.layers:
        # an allocated cache keeps whole rows behind a window
        config = type(config).model_validate(
            {**config.model_dump(), "layers": [layer.model_copy(update={"window": None}) for layer in config.layers]}
        )
    cache = build(config, dtype=torch.bfloat16).new_cache(3, 64)
    counted = sizes.kv_bytes(config, 3, 64, mtp=True) + sizes.state_bytes(config, 3) + sizes.conv_bytes(config, 3)
    assert counted == cache.bytes()


def test_state_sizes_of_nano_9b() -> None:
    """135 MiB of recurrent and 1.90 MiB of convolution state (3 taps, not 4) for one sequence."""
    config = preset("nemotron-nano-9b-v2")
    assert sizes.state_bytes(config, 1) == 27 * 128 * 80 * 128 * 4
    assert round(sizes.state_bytes(config, 1) / 2**20) == 135
    assert round(sizes.conv_bytes(config, 1) / 2**20, 2) == 1.90


def test_window_caps_the_cache() -> None:
    """Layer 3 of the puzzle sees 5 tokens only: 3 KV heads of 8, keys and values."""
    config = preset("tiny-puzzle")
    assert sizes.kv_bytes(config, 1, 100, "int8") == 2 * 3 * 8 * 5
    assert sizes.kv_bytes(config, 1, 4, "int8") == 2 * 3 * 8 * 4


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-nas", "tiny-nemotron", "tiny-qwen3-moe", "tiny-puzzle"])
def test_flops_equal_a_count_over_the_modules(name: str) -> None:
    """Two per weight of every linear a token passes, four per head dimension and key it attends to."""
    config, seq = preset(name), 11
    model = build(config, "meta")
    linear = sum(
        2 * m.weight.numel() for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "mtp." not in key
    )
    attended = routed = recurrent = 0
    for mixer in sizes.backbone_mixers(config):
        kind = type(mixer).__name__
        if kind == "AttentionConfig":
            pairs = sum(1 for i in range(seq) for j in range(i + 1) if mixer.window is None or i - j < mixer.window)
            attended += 4 * mixer.num_heads * mixer.head_dim * pairs
        elif kind == "MoEConfig":
            width = mixer.latent or mixer.hidden
            routed += 2 * mixer.hidden * mixer.num_experts + mixer.top_k * 2 * width * mixer.ffn * (
                3 if mixer.gated else 2
            )
        elif kind == "MambaConfig":
            # decay, dt x B, add, C per state element; D x; convolution
            recurrent += mixer.heads * mixer.head_dim * (5 * mixer.state + 2) + 2 * mixer.channels * mixer.conv_kernel
    expected = linear + routed + recurrent + attended / seq
    assert sizes.flops_per_token(config, seq) == pytest.approx(expected, abs=len(sizes.backbone_mixers(config)))


def test_nano_9b_fits_128k_in_22_gib_and_12b_does_not() -> None:
    """The claim the 9B model was made for; Qwen3-8B's keys and values alone take 18 GiB."""
    nine = sizes.fits(preset("nemotron-nano-9b-v2"), 22 * GIB, 1, 131_072)
    assert nine.fits
    assert round(nine.memory.weights / GIB, 2) == 16.56
    assert round(nine.memory.kv / GIB, 2) == 2.00
    for name in ("nemotron-nano-12b-v2", "qwen3-8b"):
        assert not sizes.fits(preset(name), 22 * GIB, 1, 131_072).fits


def test_largest_batch_and_context_are_tight() -> None:
    """The answers fit, one more does not."""
    config, device = preset("nemotron-nano-9b-v2"), 20 * GIB
    fit = sizes.fits(config, device, 2, 8192)

    def total(batch: int, context: int) -> int:
        return sizes.memory(config, batch, context, None, device).total

    assert total(fit.largest_batch, 8192) <= device < total(fit.largest_batch + 1, 8192)
    assert total(2, fit.largest_context) <= device < total(2, fit.largest_context + 1)


def test_what_does_not_fit_says_by_how_much() -> None:
    """The error names every part and what would fit."""
    fit = sizes.fits(preset("nemotron-nano-12b-v2"), 22 * GIB, 1, 131_072)
    with pytest.raises(
        ResourceError, match=r"needs 27.74 GiB \(weights 22.93, kv 3.00.* there are 22.00 GiB, 5.74 too few"
    ) as error:
        sizes.require_fit(fit)
    assert error.value.exit_code == 3


def test_dtypes_are_taken_one_by_one() -> None:
    """An fp8 cache halves the KV bytes and nothing else; fp32 islands keep their four bytes in int8 weights."""
    config = preset("nemotron-nano-9b-v2")
    plain = sizes.memory(config, 1, 8192)
    small = sizes.memory(config, 1, 8192, Setting(kv_dtype="fp8"))
    assert small.kv * 2 == plain.kv
    assert (small.weights, small.state, small.conv) == (plain.weights, plain.state, plain.conv)
    islands = 27 * 3 * 128
    assert sizes.weight_bytes(config, "int8") == sizes.parameters(config) + 3 * islands


@pytest.mark.parametrize(
    ("text", "count"),
    [("22GiB", 22 * 2**30), ("80GB", 80 * 10**9), ("512 MiB", 2**29), ("1.5g", 1_500_000_000), ("4096", 4096)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    """Binary and decimal units."""
    assert sizes.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "22 apples", "1.2.3GB", "-4GB"])
def test_bad_sizes_are_refused(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(RecipeError, match="Write it like 22GiB"):
        sizes.parse_bytes(text)


def test_unknown_dtype_is_refused() -> None:
    """The message lists the known ones."""
    with pytest.raises(RecipeError, match='unknown dtype "bf17"'):
        sizes.dtype_bytes("bf17")


def test_no_torch_is_needed() -> None:
    """Sizes, presets and config.json work without importing torch."""
    code = (
        "import sys, alloy.models.sizes, alloy.models.hf.config as c, alloy.models.presets as p;"
        "c.read_config(c.write_config(p.preset('tiny-mtp'))); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sizes.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


@pytest.mark.parametrize(
    ("name", "context", "parts", "total"),
    [
        ("nemotron-nano-9b-v2", 131_072, (16.56, 2.00, 0.13, 0.002), 18.69),
        ("nemotron-3-nano-30b-a3b", 1_048_576, (58.82, 6.00, 0.045, 0.001), 64.87),
    ],
)
def test_what_one_long_sequence_holds(name: str, context: int, parts: tuple[float, ...], total: float) -> None:
    """Weights, KV, state and conv of the published shapes, in GiB; the rest of an 80 GB card is enough for the 30B model."""
    memory = sizes.memory(preset(name), 1, context)
    held = (memory.weights, memory.kv, memory.state, memory.conv)
    assert [size / GIB for size in held] == [pytest.approx(part, abs=0.005) for part in parts]
    assert sum(held) / GIB == pytest.approx(total, abs=0.01)
    assert sizes.fits(preset("nemotron-3-nano-30b-a3b"), 80 * 10**9, 1, 1_048_576).fits


def test_many_long_sequences_share_one_h200() -> None:
    """About twelve of a million tokens beside the 30B model in 143,771 MiB."""
    fit = sizes.fits(preset("nemotron-3-nano-30b-a3b"), 143_771 * 2**20, 1, 1_048_576)
    assert fit.largest_batch in (11, 12)


def test_activations_of_a_chunk_grow_with_it() -> None:
    """One Mamba layer of 2048 tokens: projection (88.5 MiB), convolution, two of inner width, three of hidden width."""
    config = preset("nemotron-nano-9b-v2")
    whole, half = (sizes.prefill_bytes(config, 2048, chunk) for chunk in (2048, 1024))
    logits = 10 * config.vocab
    rows = 2 * 10_240 + 2 * 8 * 128 + 128
    assert 2048 * rows * 2 == 88.5 * 2**20
    # without the keys of the first half, which an attention layer gathers, half the tokens take half
    assert whole - logits == 2048 * 2 * (rows + (10_240 + 2048) + 2 * 10_240 + 3 * 4480)
    assert (half - logits) * 2 == whole - logits
    behind = sizes.prefill_bytes(config, 131_072, 2048)
    assert behind > 2 * 8 * 128 * 2 * 131_072


def test_captured_steps_and_reserve_count_on_a_device_only() -> None:
    """A second pool takes what the first one does."""
    config = preset("nemotron-nano-9b-v2")
    none, one, two = (sizes.memory(config, 64, 8192, Setting(graphs=n), 80 * GIB).graphs for n in range(3))
    assert (none, two) == (0, 2 * one)
    assert one > 10 * 64 * config.vocab
    bare = sizes.memory(config, 64, 8192)
    assert (bare.graphs, bare.reserved) == (0, 0)
    assert sizes.memory(config, 64, 8192, Setting(graphs=0), 80 * GIB).activations >= sizes.decode_bytes(config, 64)


@pytest.mark.parametrize("name", ["nemotron-nano-9b-v2", "qwen3-8b", "nemotron-nano-12b-v2"])
def test_tensor_parallel_ranks_share_everything_but_norms(name: str) -> None:
    """Two ranks hold the model once, and norms twice; caches are halved."""
    config = preset(name)
    whole, part = (sizes.memory(config, 3, 8192, Setting(tp=tp)) for tp in (1, 2))
    norms = sum(sizes.norm_parameters(config) for _ in sizes.backbone_mixers(config)) + config.hidden
    if name == "qwen3-8b":
        norms += sum(2 * m.head_dim for m in sizes.backbone_mixers(config) if hasattr(m, "head_dim"))
    assert 2 * part.weights == whole.weights + 2 * norms
    assert (2 * part.kv, 2 * part.state, 2 * part.conv) == (whole.kv, whole.state, whole.conv)
    assert part.activations < whole.activations


def test_expert_parallel_ranks_share_routed_experts() -> None:
    """Four ranks: a quarter of the experts each, everything else whole."""
    config = preset("nemotron-3-nano-30b-a3b")
    experts = 23 * 128 * 2 * 2688 * 1856
    whole, part = sizes.weight_bytes(config), sizes.weight_bytes(config, ep=4)
    assert whole - part == 2 * experts * 3 // 4


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        (
            "nemotron-3-nano-30b-a3b",
            Setting(tp=3),
            r"tp = 3 does not divide heads = 64 of mamba layers; use one of 1, 2, 4, 8",
        ),
        (
            "nemotron-3-nano-30b-a3b",
            Setting(tp=4),
            r"tp = 4 does not divide num_kv_heads = 2 of attention layers; use one of 1, 2",
        ),
        (
            "nemotron-3-nano-30b-a3b",
            Setting(ep=3),
            r"ep = 3 does not divide num_experts = 128; use one of 1, 2, 4, 8, 16, 32, 64, 128",
        ),
        ("nemotron-h-8b", Setting(tp=16), r"tp = 16 does not divide groups = 8 of mamba layers; use one of 1, 2, 4, 8"),
        ("qwen3-8b", Setting(tp=16), r"tp = 16 does not divide num_kv_heads = 8"),
        ("qwen3-8b", Setting(prefill_chunk=0), r"prefill_chunk = 0 must be at least 1"),
        ("qwen3-8b", Setting(tp=0), r"tp = 0 must be at least 1"),
        ("qwen3-30b-a3b", Setting(ep=-1), r"ep = -1 must be at least 1"),
        ("qwen3-8b", Setting(graphs=-1), r"graphs = -1 must be at least 0"),
        ("qwen3-8b", Setting(ep=2), r"ep = 2, but the model has no routed experts to share; use 1"),
        ("nemotron-nano-9b-v2", Setting(state_dtype="int8"), r'a recurrent state cannot be "int8". Use one of float32'),
    ],
)
def test_settings_that_cannot_be(name: str, setting: Setting, message: str) -> None:
    """The message names the value and what would work."""
    with pytest.raises(RecipeError, match=message):
        sizes.fits(preset(name), 80 * GIB, 1, 4096, setting)


def test_half_states_take_half() -> None:
    """fp16, with or without stochastic rounding."""
    config = preset("nemotron-nano-9b-v2")
    assert (
        2 * sizes.state_bytes(config, 4, "float16-sr")
        == 2 * sizes.state_bytes(config, 4, "fp16")
        == sizes.state_bytes(config, 4)
    )
