"""Tensor names: one table per architecture, from the names in memory to those on the hub.

Reading inverts the same table: `reading_plan` lists for every name a file may hold which part of which tensor it fills,
including the spellings that other writers use (stacked experts, fused gate and up, other prefixes). No torch here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from alloy.models.configs import DecoderConfig, HybridConfig

Shape = tuple[int, ...]

# (pattern of the name in memory, its spelling on the hub), applied one after another; {expert} is the expert's number
HYBRID_NAMES = (
    (r"^embed\.", "backbone.embeddings."),
    (r"^norm\.", "backbone.norm_f."),
    (r"^head\.", "lm_head."),
    (r"^layers\.", "backbone.layers."),
    (r"final_norm\.", "final_layernorm."),
    (r"mixer\.conv\.", "mixer.conv1d."),
    (r"gate\.bias$", "gate.e_score_correction_bias"),
    (r"mixer\.shared\.", "mixer.shared_experts."),
    (r"mixer\.latent_in\.", "mixer.fc1_latent_proj."),
    (r"mixer\.latent_out\.", "mixer.fc2_latent_proj."),
    (r"experts\.(up|down|gate)$", r"experts.{expert}.\1_proj.weight"),
)
DECODER_NAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.linear\.", ".self_attn.linear_attn."),
    (r"\.mlp\.linear\.", ".mlp.linear_mlp."),
    (r"\.attention\.", ".self_attn."),
    (r"experts\.(up|down|gate)$", r"experts.{expert}.\1_proj.weight"),
)
# what stands before the names in files of different writers
PREFIX = re.compile(r"^(?:(?:model|backbone|language_model|module)\.)+")
# buffers that old files hold and no model needs
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
SYNONYMS = {"embedding.weight": "embeddings.weight"}


class Entry(NamedTuple):
    """One tensor as it is written: its name on the hub, and the tensor in memory (or one expert's slot) it comes from."""

    name: str
    key: str
    expert: int | None
    shape: Shape


class Piece(NamedTuple):
    """What one stored tensor fills: a tensor in memory, one expert's slot of it, from some of its rows."""

    key: str
    # slot along the first dimension; None: the whole
    expert: int | None
    # (start, stop) along the stored tensor's second dimension; None: all of it
    rows: tuple[int, int] | None
    # of the stored tensor
    shape: Shape


def entries(
    shapes: Mapping[str, Shape], config: HybridConfig | DecoderConfig, layers: Sequence[int] | None = None
) -> Iterator[Entry]:
    """Every tensor of a model as the hub names it, in the order of `shapes`.

    Args:
        shapes: name in memory -> shape
        config: the model's configuration
        layers: where each block lies in the file when only some were taken (None: all, in order)
    """
    for key, shape in shapes.items():
        name = hub_name(key, config, layers)
        if "{expert}" in name:
            for expert in range(shape[0]):
                yield Entry(name.replace("{expert}", str(expert)), key, expert, shape[1:])
        else:
            # a convolution's weight (channels, kernel) is (channels, 1, kernel) on the hub
            yield Entry(name, key, None, (shape[0], 1, shape[1]) if name.endswith("conv1d.weight") else shape)


def hub_name(key: str, config: HybridConfig | DecoderConfig, layers: Sequence[int] | None = None) -> str:
    """The hub's spelling of a name in memory."""
    if layers is not None:
        key = re.sub(r"^layers\.(\d+)\.", lambda match: f"layers.{layers[int(match[1])]}.", key)
    if isinstance(config, HybridConfig):
        key = _flat_mtp(key, len(config.mtp_pattern))
    for pattern, spelling in HYBRID_NAMES if isinstance(config, HybridConfig) else DECODER_NAMES:
        key = re.sub(pattern, spelling, key)
    return key


def _flat_mtp(key: str, blocks: int) -> str:
    """The hub numbers MTP blocks through all depths; a depth's own parts stand at its first or last block."""
    match = re.match(r"mtp\.(\d+)\.(?:layers\.(\d+)\.)?(.*)", key)
    if not match:
        return key
    first = int(match[1]) * blocks
    inner = int(match[2]) if match[2] else (blocks - 1 if match[3].startswith("final_norm") else 0)
    return f"mtp.layers.{first + inner}.{match[3]}"


def bare_name(name: str) -> str:
    """A stored name without what writers put before it."""
    bare = PREFIX.sub("", name)
    return SYNONYMS.get(bare, bare)


def reading_plan(
    shapes: Mapping[str, Shape], config: HybridConfig | DecoderConfig, layers: Sequence[int] | None = None
) -> dict[str, list[Piece]]:
    """For every bare name a file may hold: what it fills."""
    plan: dict[str, list[Piece]] = {}
    for entry in entries(shapes, config, layers):
        plan[bare_name(entry.name)] = [Piece(entry.key, entry.expert, None, entry.shape)]
    for key, shape in shapes.items():
        if re.search(r"experts\.(up|down)$", key):
            stacked = bare_name(hub_name(key, config, layers)).replace("{expert}.", "").removesuffix(".weight")
            plan[stacked] = [Piece(key, None, None, shape)]
        if key.endswith("experts.gate"):
            # transformers 5 keeps gate and up of all experts in one tensor, gate first
            fused = bare_name(hub_name(key, config, layers)).replace("{expert}.gate_proj.weight", "gate_up_proj")
            experts, ffn, width = shape
            both = (experts, 2 * ffn, width)
            up = key.removesuffix("gate") + "up"
            plan[fused] = [Piece(key, None, (0, ffn), both), Piece(up, None, (ffn, 2 * ffn), both)]
    return plan
