"""Named model sizes: every published one, and tiny ones for tests and laptops.

Configurations only: no torch, no weights. `preset(name)` builds one; `PRESETS` lists the names in order.

Papers: Nemotron-H (2025), arXiv:2504.03624; Nemotron Nano 2 (2025), arXiv:2508.14444; Nemotron 3 (2025), model cards;
Nemotron-4 340B (2024), arXiv:2406.11704; Llama-Nemotron (2025), arXiv:2505.00949; Qwen3 (2025), arXiv:2505.09388.
"""

import difflib
import re
from collections.abc import Callable

from alloy.errors import RecipeError
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

PATTERN_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PATTERN_H_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_H_56B = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
PATTERN_NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
PATTERN_NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
PATTERN_NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
PATTERN_NANO_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
PATTERN_SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
PATTERN_ULTRA = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
)

# special tokens of every Nemotron hybrid
_HYBRID_IDS = {"pad_id": 0, "bos_id": 1, "eos_ids": (2,)}

# Llama-Nemotron: A attention, . none; then the MLP as a multiple (section 2/3 of it times hidden is its width), 0 none
BLOCKS_SUPER_49B = (
    "A2.625 5xA5.25 2x.2.625 3xA5.25 .3.28125 30xA5.25 .1.3125 2x.2.625 .1.3125 .5.25 .1.3125 .2.625 3x.1.3125 A5.25 "
    ".1.3125 2x.1 .1.3125 3x.1 2x.1.3125 2x.0.5 2x.1 2x.0.5 .1 2x.0.5 9xA5.25"
)
BLOCKS_ULTRA_253B = (
    "A0.4875 A0.975 6xA1.4625 A1.95 4x.0 3xA1.95 2xA4.875 6x.0 3xA4.875 5x.0 3xA4.875 A2.4375 3x.0 "
    "3xA1.95 .1.95 A4.875 .4.875 5x.0 4xA4.875 5x.0 4xA4.875 5x.0 4xA4.875 5x.0 4xA4.875 5x.0 A4.875 3xA3.4125 2x.0 "
    "A2.925 3xA2.4375 2x.2.4375 A2.4375 .0 7x.2.4375 A2.4375 5x.0 A2.925 A4.875 .4.875 A4.875 8x.0 .36.5625 8x.0 .39 "
    "8x.0 .31.40625 5x.0 .27.5625 .1.95 A1.95 A2.4375 .0 2xA2.4375 A3.4125 4xA4.875 A2.4375"
)


def preset(name: str) -> HybridConfig | DecoderConfig:
    """The configuration called `name`; RecipeError with the nearest name if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else f" Known: {', '.join(PRESETS)}."
        raise RecipeError(f'unknown model size "{name}".{hint}')
    return PRESETS[name]()


def pattern_from_ratios(num_layers: int, attention: float = 0.08, mlp: float = 0.46) -> str:
    """A hybrid pattern with evenly spread layers (Nemotron-H, section 2.1).

    The first layer is Mamba, the last an MLP, and every attention layer stands directly before an MLP.

    Args:
        num_layers: number of blocks
        attention: share of attention blocks
        mlp: share of MLP blocks
    """
    num_attention, num_mlp = round(num_layers * attention), max(round(num_layers * mlp), 1)
    num_mamba = num_layers - num_attention - num_mlp
    if num_mamba < 1 or num_mlp < num_attention + (num_attention > 0):
        raise RecipeError(
            f"pattern of {num_layers} layers with attention = {attention} and mlp = {mlp}: needs at least one Mamba layer "
            f"and more MLP than attention layers, got {num_mamba} Mamba, {num_attention} attention, {num_mlp} MLP"
        )
    # MLP j follows the Mamba layers up to its even share; attention i precedes the MLP at the middle of its span
    before = {int((i + 0.5) * num_mlp / num_attention) for i in range(num_attention)}
    pattern, used = "", 0
    for j in range(num_mlp):
        upto = max(round((j + 1) * num_mamba / num_mlp), 1)
        pattern += "M" * (upto - used) + ("*" if j in before else "") + "-"
        used = upto
    return pattern


def ffn_width(multiple: float, hidden: int) -> int:
    """Width that `ffn_mult` of a nemotron-nas block means: 2/3 of multiple * hidden, up to a multiple of 256."""
    return -(-int(2 * multiple * hidden / 3) // 256) * 256


def nas_layers(blocks: str, hidden: int, heads: int, kv_heads: int, rope: RopeConfig) -> tuple[DecoderLayerConfig, ...]:
    """Layers from the short notation of the block tables, such as `5xA5.25 .0`."""
    attention = AttentionConfig(
        hidden=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads, rope=rope, norm_eps=1e-5
    )
    layers: list[DecoderLayerConfig] = []
    for block in blocks.split():
        match = re.fullmatch(r"(?:(\d+)x)?([A.])([\d.]+)", block)
        assert match, block
        multiple = float(match[3])
        mlp = (
            MLPConfig(hidden=hidden, ffn=ffn_width(multiple, hidden), activation="silu", gated=True)
            if multiple
            else None
        )
        layer = DecoderLayerConfig(attention=attention if match[2] == "A" else None, mlp=mlp)
        layers += [layer] * int(match[1] or 1)
    return tuple(layers)


def _dense(pattern: str, hidden: int, ffn: int, **fields: object) -> HybridConfig:
    return HybridConfig.model_validate({"pattern": pattern, "hidden": hidden, "ffn": ffn, **_HYBRID_IDS, **fields})


def _nemotron3(pattern: str, hidden: int, **fields: object) -> HybridConfig:
    shared = {"num_kv_heads": 2, "max_positions": 262_144, **_HYBRID_IDS, "eos_ids": (2, 11)}
    return HybridConfig.model_validate({"pattern": pattern, "hidden": hidden, **shared, **fields})


def _nano_30b(mtp_depths: int) -> HybridConfig:
    return _nemotron3(
        PATTERN_NANO_30B,
        2688,
        ssm_heads=64,
        num_experts=128,
        top_k=6,
        expert_ffn=1856,
        shared_ffn=3712,
        router_scale=2.5,
        init_std=0.0173,
        mtp_depths=mtp_depths,
    )


def _nas(blocks: str, hidden: int, heads: int, factor: float) -> DecoderConfig:
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=factor)
    layers = nas_layers(blocks, hidden, heads, 8, rope)
    return DecoderConfig(
        kind="nemotron-nas",
        vocab=128_256,
        hidden=hidden,
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=8,
        head_dim=hidden // heads,
        ffn=max(layer.mlp.ffn for layer in layers if isinstance(layer.mlp, MLPConfig)),
        rope=rope,
        max_positions=131_072,
        layers=layers,
        bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009),
    )


def _decoder(
    kind: str, hidden: int, num_layers: int, heads: tuple[int, int, int], ffn: int, **fields: object
) -> DecoderConfig:
    """A uniform decoder; heads: (query, key and value, width)."""
    base = {"kind": kind, "hidden": hidden, "num_layers": num_layers, "ffn": ffn}
    names = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    return DecoderConfig.model_validate({**base, **names, **fields})


def _qwen3(
    hidden: int, num_layers: int, heads: tuple[int, int, int], ffn: int, kind: str = "qwen3", **fields: object
) -> DecoderConfig:
    shared = {
        "vocab": 151_936,
        "qk_norm": True,
        "norm_eps": 1e-6,
        "rope": RopeConfig(theta=1e6),
        "max_positions": 40_960,
        "bos_id": 151_643,
        "eos_ids": (151_645,),
    }
    return _decoder(kind, hidden, num_layers, heads, ffn, **{**shared, **fields})


# sizes are odd and unequal on purpose: a swapped dimension must fail
_TINY_SSM = {"ssm_heads": 6, "ssm_head_dim": 12, "ssm_state": 10, "ssm_groups": 2, "chunk": 8}
_TINY = {
    "vocab": 259,
    "hidden": 56,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_positions": 512,
    **_TINY_SSM,
}
_TINY_ROUTED = {"num_experts": 8, "top_k": 3, "expert_ffn": 24, "shared_ffn": 40, "router_scale": 2.5}


def _tiny(pattern: str, **fields: object) -> HybridConfig:
    routed = _TINY_ROUTED if "E" in pattern else {}
    return HybridConfig.model_validate({"pattern": pattern, "ffn": 88, **_TINY, **routed, **_HYBRID_IDS, **fields})


def _tiny_puzzle() -> HybridConfig:
    overrides = (
        LayerOverride(ssm_state=6),
        LayerOverride(num_experts=6, top_k=2, expert_ffn=20, latent=12),
        LayerOverride(),
        LayerOverride(num_kv_heads=3, window=5),
        LayerOverride(ffn=40),
        LayerOverride(ssm_heads=4, ssm_head_dim=10),
        LayerOverride(top_k=1, shared_ffn=32),
    )
    return _tiny(
        "MEM*-ME",
        kind="nemotron_h_puzzle",
        layers=overrides,
        mtp_depths=1,
        mtp_layers=(LayerOverride(num_kv_heads=1), LayerOverride(top_k=2)),
    )


def _tiny_nas() -> DecoderConfig:
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=4.0, original_max_positions=16)
    full = AttentionConfig(hidden=48, num_heads=6, num_kv_heads=3, head_dim=8, rope=rope, norm_eps=1e-5)
    single = full.model_copy(update={"num_kv_heads": 1})
    mlp = MLPConfig(hidden=48, ffn=256, activation="silu", gated=True)
    wide = mlp.model_copy(update={"ffn": 512})
    linear = LinearConfig(hidden=48)
    table = ((full, mlp), (None, wide), (single, None), (None, None), (linear, mlp), (full, linear), (full, mlp))
    layers = tuple(DecoderLayerConfig(attention=attention, mlp=part) for attention, part in table)
    return _decoder(
        "nemotron-nas",
        48,
        7,
        (6, 3, 8),
        512,
        vocab=259,
        rope=rope,
        max_positions=512,
        layers=layers,
        bos_id=1,
        eos_ids=(2,),
    )


PRESETS: dict[str, Callable[[], HybridConfig | DecoderConfig]] = {
    "nemotron-h-4b": lambda: _dense(PATTERN_H_8B, 3072, 12_288, ssm_heads=112, max_positions=8192),
    "nemotron-h-8b": lambda: _dense(PATTERN_H_8B, 4096, 21_504, max_positions=8192),
    "nemotron-h-47b": lambda: _dense(
        PATTERN_H_47B, 8192, 30_720, num_heads=64, ssm_heads=256, ssm_state=256, max_positions=8192
    ),
    "nemotron-h-56b": lambda: _dense(
        PATTERN_H_56B, 8192, 32_768, num_heads=64, ssm_heads=256, ssm_state=256, max_positions=8192, init_std=0.0099
    ),
    "nemotron-nano-9b-v2": lambda: _dense(
        PATTERN_NANO_9B, 4480, 15_680, num_heads=40, ssm_head_dim=80, max_positions=131_072
    ),
    "nemotron-nano-12b-v2": lambda: _dense(
        PATTERN_NANO_12B, 5120, 20_480, num_heads=40, ssm_head_dim=80, max_positions=131_072, init_std=0.0125
    ),
    "nemotron-3-nano-4b": lambda: _dense(
        PATTERN_NANO_4B,
        3136,
        12_544,
        num_heads=40,
        ssm_heads=96,
        ssm_head_dim=80,
        chunk=256,
        max_positions=262_144,
        init_std=0.02,
    ),
    "nemotron-3-nano-30b-a3b": lambda: _nano_30b(mtp_depths=0),
    "nemotron-3.5-lightning-30b-a3b": lambda: _nano_30b(mtp_depths=1),
    "nemotron-3-super-120b-a12b": lambda: _nemotron3(
        PATTERN_SUPER,
        4096,
        num_experts=512,
        top_k=22,
        expert_ffn=2688,
        shared_ffn=5376,
        latent=1024,
        router_scale=5.0,
        init_std=0.014,
        mtp_depths=1,
    ),
    "nemotron-3-ultra-550b-a55b": lambda: _nemotron3(
        PATTERN_ULTRA,
        8192,
        num_heads=64,
        ssm_heads=256,
        num_experts=512,
        top_k=22,
        expert_ffn=5120,
        shared_ffn=10_240,
        latent=2048,
        router_scale=5.0,
        init_std=0.0099,
        mtp_depths=1,
        mtp_loss_scale=0.1,
    ),
    "nemotron-4-340b": lambda: _decoder(
        "nemotron",
        18_432,
        96,
        (96, 8, 192),
        73_728,
        vocab=256_000,
        activation="relu2",
        gated=False,
        norm="layer1p",
        rope=RopeConfig(partial=0.5),
        bos_id=2,
        eos_ids=(3,),
    ),
    "llama-nemotron-nano-8b": lambda: _decoder(
        "llama",
        4096,
        32,
        (32, 8, 128),
        14_336,
        vocab=128_256,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0),
        max_positions=131_072,
        bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009),
    ),
    "llama-nemotron-super-49b": lambda: _nas(BLOCKS_SUPER_49B, 8192, 64, 8.0),
    "llama-nemotron-ultra-253b": lambda: _nas(BLOCKS_ULTRA_253B, 16_384, 128, 16.0),
    "qwen3-8b": lambda: _qwen3(4096, 36, (32, 8, 128), 12_288),
    "qwen3-30b-a3b": lambda: _qwen3(
        2048, 48, (32, 4, 128), 6144, "qwen3_moe", num_experts=128, top_k=8, expert_ffn=768
    ),
    "tiny-dense": lambda: _tiny("M-M*-M-"),
    "tiny-moe": lambda: _tiny("MEM*EME", num_router_groups=4, top_router_groups=2),
    "tiny-latent": lambda: _tiny("MEM*E-", latent=20),
    "tiny-mtp": lambda: _tiny("MEM*E", mtp_depths=1),
    "tiny-puzzle": _tiny_puzzle,
    "tiny-llama": lambda: _decoder(
        "llama",
        48,
        3,
        (6, 2, 8),
        88,
        vocab=259,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=4.0, original_max_positions=16),
        max_positions=512,
        bos_id=1,
        eos_ids=(2,),
    ),
    "tiny-qwen3": lambda: _qwen3(
        40, 3, (6, 2, 8), 88, vocab=259, tie_embeddings=True, max_positions=512, bos_id=1, eos_ids=(2,)
    ),
    "tiny-qwen3-moe": lambda: _qwen3(
        40,
        4,
        (6, 2, 8),
        88,
        "qwen3_moe",
        vocab=259,
        num_experts=5,
        top_k=2,
        expert_ffn=24,
        dense_layers=(0, 2),
        max_positions=512,
        bos_id=1,
        eos_ids=(2,),
    ),
    "tiny-nemotron": lambda: _decoder(
        "nemotron",
        48,
        3,
        (6, 2, 8),
        88,
        vocab=259,
        activation="relu2",
        gated=False,
        norm="layer1p",
        rope=RopeConfig(partial=0.5),
        max_positions=512,
        bos_id=2,
        eos_ids=(3,),
    ),
    "tiny-nas": _tiny_nas,
}
