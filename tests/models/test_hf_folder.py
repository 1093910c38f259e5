"""Checkpoint folders: bit-equal round trips, streaming, other writers' names, and what is refused."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import alloy
from alloy.errors import CheckpointError, RecipeError, ResourceError
from alloy.models.base import CausalLM
from alloy.models.hf import files
from alloy.models.hf.files import read_header
from alloy.models.hf.folder import INDEX, SINGLE, bad_values, stored_tensors
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import build, take_layers

TINY = [name for name in PRESETS if name.startswith("tiny-")]


def make(name: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A tiny model whose every tensor is random, norms and biases too."""
    model = build(preset(name), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def load(path: Path, **options: Any) -> CausalLM:
    return alloy.load(path, device="cpu", **options)[0]


def assert_same(ours: CausalLM, theirs: CausalLM) -> None:
    before, after = ours.state_dict(), theirs.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


def rewrite(path: Path, change: Any) -> None:
    """Let `change` edit the tensors of a single-file checkpoint."""
    tensors = safetensors.torch.load_file(path / SINGLE)
    tensors = change(tensors) or tensors
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path / SINGLE, {"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    data = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_bit_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor of every kind, MTP and fp32 islands included, in both config styles and in shards."""
    model = make(name, dtype)
    model.foreign = {"auto_map": {"AutoConfig": "x.Y"}}
    alloy.save(model, tmp_path / "a")
    alloy.save(load(tmp_path / "a"), tmp_path / "b", config_style="transformers5", max_shard_bytes=60_000)
    again = load(tmp_path / "b")
    assert_same(model, again)
    assert again.config.model_dump(exclude={"init_std"}) == model.config.model_dump(exclude={"init_std"})
    assert again.foreign.items() >= model.foreign.items()
    assert (again.head.weight is again.embed.weight) == model.config.tie_embeddings


def test_files_are_what_the_safetensors_package_reads_and_writes(tmp_path: Path) -> None:
    """Names, dtypes and values agree in both directions."""
    alloy.save(make("tiny-mtp", torch.bfloat16), tmp_path)
    theirs = safetensors.torch.load_file(tmp_path / SINGLE)
    header = read_header(tmp_path / SINGLE)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in theirs.items()} == {
        k: (v.dtype, v.shape) for k, v in header.items()
    }
    assert theirs["backbone.layers.0.mixer.conv1d.weight"].shape == (112, 1, 4)
    assert theirs["backbone.layers.1.mixer.gate.e_score_correction_bias"].dtype == torch.float32
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.1.final_layernorm.weight"} <= set(theirs)
    safetensors.torch.save_file(theirs, tmp_path / SINGLE, {"format": "pt"})
    assert_same(make("tiny-mtp", torch.bfloat16), load(tmp_path))


def test_stored_depths_are_numbered_through(tmp_path: Path) -> None:
    """Two stored MTP depths of two blocks: index = depth * blocks + block; own parts at the first or last block."""
    config = type(preset("tiny-mtp")).model_validate({**preset("tiny-mtp").model_dump(), "mtp_depths": 2})
    model = build(config)
    alloy.save(model, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / SINGLE)
    ours = model.state_dict()
    for theirs, key in (
        ("mtp.layers.2.enorm.weight", "mtp.1.enorm.weight"),
        ("mtp.layers.2.eh_proj.weight", "mtp.1.eh_proj.weight"),
        ("mtp.layers.2.mixer.q_proj.weight", "mtp.1.layers.0.mixer.q_proj.weight"),
        ("mtp.layers.3.mixer.shared_experts.up_proj.weight", "mtp.1.layers.1.mixer.shared.up_proj.weight"),
        ("mtp.layers.3.final_layernorm.weight", "mtp.1.final_norm.weight"),
        ("mtp.layers.1.final_layernorm.weight", "mtp.0.final_norm.weight"),
    ):
        assert torch.equal(stored[theirs], ours[key])
    assert_same(model, load(tmp_path))


def test_shards_respect_their_size(tmp_path: Path) -> None:
    """No file above the limit but those of one tensor; the index names each tensor once."""
    alloy.save(make("tiny-moe"), tmp_path, max_shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    stored = stored_tensors(tmp_path)
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in stored.items()}
    assert index["metadata"]["total_size"] == sum(tensor.size for tensor in stored.values())
    for file in tmp_path.glob("*.safetensors"):
        sizes = [tensor.size for tensor in stored.values() if tensor.file == file]
        assert sum(sizes) <= 40_000 or len(sizes) == 1


def test_saving_again_leaves_no_old_shards(tmp_path: Path) -> None:
    """Shards, fewer shards, one file: the folder always holds one checkpoint."""
    model = make("tiny-moe")
    for limit in (40_000, 90_000, 10**9, 60_000):
        alloy.save(model, tmp_path, max_shard_bytes=limit)
        assert_same(model, load(tmp_path))
        assert len({tensor.file for tensor in stored_tensors(tmp_path).values()}) == len(
            list(tmp_path.glob("*.safetensors"))
        )


def test_a_load_reads_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors go straight into the model's memory: no buffer at all in the stored dtype, one tensor when converting."""
    alloy.save(make("tiny-moe"), tmp_path)
    buffers: list[int] = []
    opened: list[int] = []
    whole = files.TensorReader.read

    def watched(self: Any, stored: Any, into: Tensor | None = None) -> Tensor:
        opened.append(len([f for f in os.listdir("/proc/self/fd") if _is_weights(f)]))
        buffers.append(0 if into is not None else stored.size)
        return whole(self, stored, into)

    monkeypatch.setattr(files.TensorReader, "read", watched)
    load(tmp_path)
    assert set(buffers) == {0}
    assert set(opened) == {1}
    buffers.clear()
    load(tmp_path, dtype="bfloat16")
    assert max(buffers) == max(tensor.size for tensor in stored_tensors(tmp_path).values())


def _is_weights(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors")
    except OSError:
        return False


def test_dtype_on_load_keeps_fp32_islands(tmp_path: Path) -> None:
    """Matrices in bfloat16; A_log, D, dt_bias and the correction bias as stored."""
    model = make("tiny-moe")
    alloy.save(model, tmp_path)
    state, before = load(tmp_path, dtype="bfloat16").state_dict(), model.state_dict()
    islands = ("A_log", "D", "dt_bias", "gate.bias")
    for name, tensor in state.items():
        wanted = before[name] if name.endswith(islands) else before[name].bfloat16()
        assert torch.equal(tensor, wanted), name


def test_some_layers_only(tmp_path: Path) -> None:
    """Blocks 2, 3 and 6 of seven: their tensors, and the same stream as through these blocks of the whole model."""
    for name, chosen in (
        ("tiny-moe", [2, 3, 6]),
        ("tiny-puzzle", [1, 3, 5]),
        ("tiny-nas", [0, 4]),
        ("tiny-qwen3-moe", [1, 2]),
    ):
        whole = make(name)
        alloy.save(whole, tmp_path / name)
        part = load(tmp_path / name, layers=chosen)
        assert len(part.layers) == len(chosen)
        for j, i in enumerate(chosen):
            ours, theirs = part.layers[j].state_dict(), whole.layers[i].state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(CheckpointError, match=r"layers = \[0, 7\] must be different numbers from 0 to 6"):
        take_layers(preset("tiny-moe"), [0, 7])


def test_widths_follow_their_layers() -> None:
    """One width per `-` layer: the kept layers keep theirs."""
    config = type(preset("tiny-dense")).model_validate({**preset("tiny-dense").model_dump(), "ffn": (40, 48, 56)})
    pattern = config.pattern
    assert pattern == "M-M*-M-"
    taken = take_layers(config, [0, 4, 6])
    assert [mixer.ffn for mixer in taken.mixers[1:]] == [48, 56]


# names of other writers


@pytest.mark.parametrize("prefix", ["model.", "language_model.backbone.", "model.language_model.", "module.model.", ""])
def test_prefixes_of_other_writers(prefix: str, tmp_path: Path) -> None:
    """The same tensors under any prefix; a multimodal file's other parts are left alone."""
    model = make("tiny-moe")
    alloy.save(model, tmp_path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {name.replace("backbone.", prefix): tensor for name, tensor in tensors.items()}
        if "language_model" in prefix:
            renamed = {name.replace("lm_head", "language_model.lm_head"): tensor for name, tensor in renamed.items()}
            renamed["vision_model.patch.weight"] = torch.zeros(3)
        return renamed

    rewrite(tmp_path, change)
    assert_same(model, load(tmp_path))


def test_stacked_experts_and_an_old_embedding_name(tmp_path: Path) -> None:
    """experts.up_proj (experts, ffn, width), and backbone.embedding.weight of a third-party merge."""
    model = make("tiny-latent")
    alloy.save(model, tmp_path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
        for layer in (1, 4):
            for part in ("up_proj", "down_proj"):
                names = [f"backbone.layers.{layer}.mixer.experts.{e}.{part}.weight" for e in range(8)]
                tensors[f"backbone.layers.{layer}.mixer.experts.{part}"] = torch.stack([tensors.pop(n) for n in names])
        return tensors

    rewrite(tmp_path, change)
    assert_same(model, load(tmp_path))


def test_fused_gate_and_up_of_transformers_5(tmp_path: Path) -> None:
    """qwen3_moe in that library's memory layout: gate above up in one tensor of all experts."""
    model = make("tiny-qwen3-moe")
    alloy.save(model, tmp_path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in (1, 3):
            stem = f"model.layers.{layer}.mlp.experts"
            parts = {
                part: torch.stack([tensors.pop(f"{stem}.{e}.{part}_proj.weight") for e in range(5)])
                for part in ("gate", "up", "down")
            }
            tensors[f"{stem}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
            tensors[f"{stem}.down_proj"] = parts["down"]
        return tensors

    rewrite(tmp_path, change)
    assert_same(model, load(tmp_path))


def test_bf16_islands_are_read_into_fp32(tmp_path: Path) -> None:
    """A_log, D and dt_bias may be stored in bfloat16; they compute in fp32."""
    alloy.save(make("tiny-dense", torch.bfloat16), tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    state = load(tmp_path).state_dict()
    assert state["layers.0.mixer.A_log"].dtype == torch.float32
    assert state["embed.weight"].dtype == torch.bfloat16


def test_mtp_that_another_library_dropped_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Config says one depth, the weights are gone: the model is loaded without, and says so."""
    model = make("tiny-mtp")
    alloy.save(model, tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("mtp.")})
    logger = logging.getLogger("alloy")
    logger.propagate = True
    with caplog.at_level(logging.WARNING, logger="alloy"):
        again = load(tmp_path)
    assert "there are no mtp.* weights" in caplog.text
    assert not again.has_mtp
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    """Early llama files carry inv_freq."""
    model = make("tiny-llama")
    alloy.save(model, tmp_path)
    rewrite(tmp_path, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same(model, load(tmp_path))


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.layers.0.mixer.D"), r"1 missing \(backbone.layers.0.mixer.D\). Likely cause: an incomplete"),
        (lambda t: t.pop("lm_head.weight"), r"1 missing \(lm_head.weight\). Likely cause: a tied head"),
        (lambda t: t.update({"backbone.layers.9.norm.weight": torch.ones(56)}), r"1 unexpected \(backbone.layers.9.norm.weight\)"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.ones(57)}), r"1 of another shape \(backbone.norm_f.weight is \[57\], needs \[56\]\). Likely cause: config.json belongs to another size"),
        (lambda t: {f"transformer.{k}": v for k, v in t.items()}, r"44 missing \(.*, and 34 more\); 44 unexpected .* Likely cause: a wrong prefix"),
        (lambda t: t.update({"model.norm_f.weight": torch.ones(56)}), "1 unexpected"),
    ],
    ids=["missing", "tied-head", "unexpected", "shape", "prefix", "twice"],
)  # fmt: skip
def test_tensors_that_do_not_match(change: Any, message: str, tmp_path: Path) -> None:
    """Up to ten names, counts, and why that usually happens."""
    alloy.save(make("tiny-dense"), tmp_path)
    rewrite(tmp_path, lambda tensors: result if isinstance(result := change(tensors), dict) else tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    """Cut at any place: in the length, the header, the data; or with a tail."""
    alloy.save(make("tiny-dense"), tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    for end in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="truncated"):
            load(tmp_path)
    (tmp_path / SINGLE).write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="extra bytes"):
        load(tmp_path)
    (tmp_path / SINGLE).write_bytes(whole[:8] + b"{" * (len(whole) - 8))
    with pytest.raises(CheckpointError, match="damaged header"):
        load(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": [0, 224]}, "begins at byte .*, the tensor before it ends at"),
        ({"dtype": "I32"}, r"1 weights are stored as whole numbers \(norm_f.weight\)"),
        ({"dtype": "C64"}, 'norm_f.weight has dtype "C64", which cannot be read'),
        ({"shape": [float("inf")]}, "damaged header"),
        ({"shape": [10**30]}, "damaged header"),
        ({"data_offsets": [0]}, "damaged header"),
        ({"shape": None}, "damaged header"),
    ],
    ids=["overlap", "integers", "dtype", "infinite", "huge", "offsets", "null"],
)
def test_headers_that_lie(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One entry of the header is wrong while the file's length is right."""
    alloy.save(make("tiny-dense"), tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header["backbone.norm_f.weight"] |= changes
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_deeply_nested_header_is_damaged(tmp_path: Path) -> None:
    """No recursion error."""
    alloy.save(make("tiny-dense"), tmp_path)
    (tmp_path / SINGLE).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(CheckpointError, match="damaged header"):
        load(tmp_path)


def test_shapes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    """A config.json of a petabyte beside small weights is a mismatch, not a failed allocation."""
    alloy.save(make("tiny-dense"), tmp_path)
    edit_config(tmp_path, vocab_size=2**30, intermediate_size=2**30)
    with pytest.raises(CheckpointError, match="of another shape"):
        load(tmp_path)


def test_an_index_and_stop_tokens_of_another_type(tmp_path: Path) -> None:
    """weight_map holds file names; eos_token_id of generation_config.json holds ids."""
    alloy.save(make("tiny-moe"), tmp_path, max_shard_bytes=60_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = 3
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map of tensors and file names"):
        load(tmp_path)
    alloy.save(make("tiny-moe"), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="eos_token_id = </s> is neither a token id nor a list of them"):
        load(tmp_path)


def test_absent_shards_and_a_missing_index(tmp_path: Path) -> None:
    """An index that names files that are not there, tensors that are elsewhere, and shards without an index."""
    alloy.save(make("tiny-moe"), tmp_path, max_shard_bytes=60_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"names {len(shards)} shards, 1 of them absent: model-00002-of"):
        load(tmp_path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match="tensors that their shards do not hold"):
        load(tmp_path)
    shards[1].write_bytes(kept)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"{len(shards)} safetensors files but no {INDEX}"):
        load(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Pickles, adapters, quantised weights, nothing at all."""
    alloy.save(make("tiny-dense"), tmp_path)
    with pytest.raises(CheckpointError, match="no such path, and not a hub id"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "config.json")
    rewrite(tmp_path, lambda t: {k: v.to(torch.float8_e4m3fn) if k == "lm_head.weight" else v for k, v in t.items()})
    with pytest.raises(CheckpointError, match=r"quantised weights \(1 tensors in 8-bit floats, such as lm_head.weight"):
        load(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model.bin\)"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load(tmp_path)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """transformers does not tie nemotron_h, whatever the config says."""
    alloy.save(make("tiny-dense"), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true but lm_head.weight differs"):
        load(tmp_path)


def test_settings_are_checked(tmp_path: Path) -> None:
    """dtype, device, compat and style that do not exist."""
    alloy.save(make("tiny-dense"), tmp_path)
    with pytest.raises(RecipeError, match='dtype = "bf17"'):
        load(tmp_path, dtype="bf17")
    with pytest.raises(RecipeError, match='device = "tpu"'):
        alloy.load(tmp_path, device="tpu")
    with pytest.raises(RecipeError, match='compat = "transformers-4" is not known'):
        load(tmp_path, compat="transformers-4")
    style: Any = "megatron"
    with pytest.raises(RecipeError, match="config style"):
        alloy.save(make("tiny-dense"), tmp_path, config_style=style)


def test_nan_scan(tmp_path: Path) -> None:
    """Names and counts of tensors with NaN or infinity."""
    alloy.save(make("tiny-dense"), tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.norm_f.weight"][3] = float("nan")
        tensors["lm_head.weight"][1, :2] = float("inf")

    rewrite(tmp_path, change)
    assert bad_values(stored_tensors(tmp_path)) == {"backbone.norm_f.weight": 1, "lm_head.weight": 2}


# saving


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when a file is flushed: the old one is whole, no temporary file stays."""
    old, new = make("tiny-dense"), make("tiny-dense", torch.bfloat16)
    alloy.save(old, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"model.safetensors"):
        alloy.save(new, tmp_path)
    monkeypatch.undo()
    assert_same(old, load(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_generation_config_and_tokenizer(tmp_path: Path) -> None:
    """Stop tokens of generation_config.json reach the model; its other keys and the tokenizer are written back."""
    alloy.save(make("tiny-llama"), tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11], "temperature": 0.6}))
    vocabulary = {f"t{i}": i for i in range(17)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")))
    tokenizer.save_pretrained(tmp_path / "a")
    model, loaded = alloy.load(tmp_path / "a", device="cpu")
    assert model.config.eos_ids == (2, 11)
    assert loaded is not None
    alloy.save(model, tmp_path / "b", loaded)
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["temperature"] == 0.6
    again = alloy.load(tmp_path / "b", device="cpu")[1]
    assert again is not None
    assert again.get_vocab() == vocabulary
    assert alloy.load(tmp_path / "b", device="cpu")[0].config == model.config


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer.json", None), ("tokenizer_config.json", '{"a": ')],
    ids=["empty", "no-keys", "another-model", "cut"],
)
def test_a_damaged_tokenizer_is_refused(name: str, content: str | None, tmp_path: Path) -> None:
    """Whatever the tokenizers library raises, the message names the folder."""
    words = models.WordLevel({"t0": 0, "t1": 1}, "t0")
    alloy.save(make("tiny-llama"), tmp_path, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)))
    text = (tmp_path / name).read_text().replace("WordLevel", "Unknown") if content is None else content
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json or tokenizer_config.json is damaged"):
        load(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    """Ids beyond the embedding would fail later, or read other rows."""
    alloy.save(make("tiny-llama"), tmp_path)
    words = models.WordLevel({f"t{i}": i for i in range(300)}, "t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the tokenizer has 300 tokens but the embedding 259 rows"):
        load(tmp_path)
