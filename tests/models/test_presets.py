"""Named sizes: block tables, patterns, and every one built on the meta device."""

import time
from itertools import pairwise

import pytest
import torch

from alloy.errors import RecipeError
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.presets import PRESETS, ffn_width, pattern_from_ratios, preset
from alloy.models.registry import MODELS, build

PUBLISHED = [name for name in PRESETS if not name.startswith("tiny-")]


def test_every_published_name_is_there() -> None:
    """The names users type, as the issue lists them."""
    wanted = (
        "nemotron-h-8b nemotron-h-47b nemotron-h-56b nemotron-nano-9b-v2 nemotron-nano-12b-v2 nemotron-3-nano-30b-a3b "
        "nemotron-3-super-120b-a12b nemotron-3-ultra-550b-a55b nemotron-4-340b llama-nemotron-super-49b "
        "llama-nemotron-ultra-253b nemotron-h-4b nemotron-3-nano-4b llama-nemotron-nano-8b qwen3-8b qwen3-30b-a3b"
    )
    assert set(wanted.split()) <= set(PRESETS)


def test_tiny_presets_cover_every_kind() -> None:
    """One small model at least for each registered kind."""
    assert {preset(name).kind for name in PRESETS if name.startswith("tiny-")} == set(MODELS.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_building_on_the_meta_device_is_quick(name: str) -> None:
    """Under two seconds for every published size."""
    start = time.process_time()
    model = build(preset(name), "meta", torch.bfloat16)
    assert time.process_time() - start < 2
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [
        ("nemotron-h-8b", 52, {"M": 24, "*": 4, "-": 24}),
        ("nemotron-h-47b", 98, {"M": 45, "*": 5, "-": 48}),
        ("nemotron-h-56b", 118, {"M": 54, "*": 10, "-": 54}),
        ("nemotron-nano-9b-v2", 56, {"M": 27, "*": 4, "-": 25}),
        ("nemotron-nano-12b-v2", 62, {"M": 28, "*": 6, "-": 28}),
        ("nemotron-3-nano-4b", 42, {"M": 21, "*": 4, "-": 17}),
        ("nemotron-3-nano-30b-a3b", 52, {"M": 23, "*": 6, "E": 23}),
        ("nemotron-3-super-120b-a12b", 88, {"M": 40, "*": 8, "E": 40}),
        ("nemotron-3-ultra-550b-a55b", 108, {"M": 48, "*": 12, "E": 48}),
    ],
)
def test_patterns_have_the_published_layers(name: str, layers: int, counts: dict[str, int]) -> None:
    """Counts of each layer type, from the technical reports."""
    config = preset(name)
    assert isinstance(config, HybridConfig)
    assert config.num_layers == layers
    assert {symbol: config.pattern.count(symbol) for symbol in counts} == counts


@pytest.mark.parametrize(
    ("name", "layers", "attention", "mlp"),
    [("llama-nemotron-super-49b", 80, 49, 80), ("llama-nemotron-ultra-253b", 162, 64, 81)],
)
def test_block_tables_have_the_published_layers(name: str, layers: int, attention: int, mlp: int) -> None:
    """Layers in all, layers with attention, layers with an MLP."""
    config = preset(name)
    assert isinstance(config, DecoderConfig)
    assert config.num_layers == layers
    assert sum(layer.attention is not None for layer in config.resolved) == attention
    assert sum(layer.mlp is not None for layer in config.resolved) == mlp


@pytest.mark.parametrize(
    ("multiple", "hidden", "width"),
    [
        (5.25, 8192, 28_672),
        (3.28125, 8192, 17_920),
        (1.3125, 8192, 7168),
        (1.0, 8192, 5632),
        (0.5, 8192, 2816),
        (39.0, 16_384, 425_984),
    ],
)
def test_ffn_multiple_gives_the_published_width(multiple: float, hidden: int, width: int) -> None:
    """Two thirds of the multiple, rounded up to 256."""
    assert ffn_width(multiple, hidden) == width


@pytest.mark.parametrize("layers", [7, 13, 26, 52, 61, 118])
def test_pattern_from_ratios_follows_the_design_rule(layers: int) -> None:
    """Mamba first, MLP last, each attention layer directly before an MLP, spread evenly."""
    pattern = pattern_from_ratios(layers, attention=0.08, mlp=0.46)
    assert len(pattern) == layers
    assert pattern[0] == "M"
    assert pattern[-1] == "-"
    assert pattern.count("*") == round(layers * 0.08)
    places = [i for i, symbol in enumerate(pattern) if symbol == "*"]
    assert all(pattern[i + 1] == "-" for i in places)
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 3


def test_pattern_without_room_is_refused() -> None:
    """More attention than MLP layers cannot follow the rule."""
    with pytest.raises(RecipeError, match=r"attention = 0.5 and mlp = 0.4: needs at least one Mamba layer"):
        pattern_from_ratios(10, attention=0.5, mlp=0.4)


def test_unknown_name_suggests_the_nearest() -> None:
    """A slip of the keyboard is answered with the right name."""
    with pytest.raises(RecipeError, match=r'unknown model size "nemotron-nano-9b". Did you mean "nemotron-nano-9b-v2"'):
        preset("nemotron-nano-9b")
