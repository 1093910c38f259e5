"""`alloy model` and `alloy convert`, as a user runs them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import alloy
from alloy.cli import main
from alloy.models.presets import preset
from alloy.models.registry import build


def run(*arguments: object) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint with MTP."""
    model = build(preset("tiny-mtp"))
    alloy.save(model, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_info_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """What a person reads first: counts, parameters, memory, and that 128k tokens fit 22 GiB."""
    assert run("model", "info", "nemotron-nano-9b-v2", "--context", "128k", "--gpu-mem", "22GiB") == 0
    text = capsys.readouterr().out
    for part in (
        "27 mamba, 25 mlp, 4 attention",
        "8,888,227,328 without MTP",
        "16.556 GiB",
        "fits 22.00 GiB; largest batch at 131,072 tokens: 1",
    ):
        assert part in text


def test_info_that_does_not_fit_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed all the same."""
    assert run("model", "info", "nemotron-nano-12b-v2", "--context", 131_072, "--gpu-mem", "22GiB") == 3
    output = capsys.readouterr()
    assert "does not fit 22.00 GiB" in output.out
    assert "error: does not fit: needs 27.74 GiB" in output.err


def test_info_as_json_of_a_file_and_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers from the name, the folder and its config.json; memory adds up."""
    found = []
    for what in ("tiny-mtp", folder, folder / "config.json"):
        assert run("model", "info", what, "--json", "--batch", 3, "--kv-dtype", "fp8", "--gpu-mem", "1GiB") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] | {"name": ""} == found[1] | {"name": ""} == found[2] | {"name": ""}
    memory = found[0]["memory"]
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert found[0]["mtp_parameters"] == 40_160
    assert found[0]["fit"]["fits"]


def test_info_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest name is offered."""
    assert run("model", "info", "qwen3-9b") == 2
    assert 'neither the name of a size nor a path. Did you mean "qwen3-8b"?' in capsys.readouterr().err
    assert run("model", "info", "qwen3-8b", "--context", "many") == 2
    assert "is not a number of tokens" in capsys.readouterr().err


def test_info_of_numbers_that_mean_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused with and without --gpu-mem, before anything is printed."""
    for option, value, message in (
        ("--tp", 0, "tp = 0 must be at least 1"),
        ("--prefill-chunk", 0, "prefill_chunk = 0 must be at least 1"),
        ("--graphs", -1, "graphs = -1 must be at least 0"),
        ("--gpu-mem", 22, '--gpu-mem = "22" is 22 bytes. Write a unit, such as 22GiB'),
    ):
        assert run("model", "info", "qwen3-8b", option, value) == 2
        output = capsys.readouterr()
        assert (output.out, output.err) == ("", f"error: {message}\n")


def test_init_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random checkpoint passes its own check, is reproducible, and tied where the size is."""
    for name in ("tiny-mtp", "tiny-qwen3", "tiny-puzzle"):
        for out in ("a", "b"):
            assert run("model", "init", name, "--out", tmp_path / name / out, "--dtype", "float32", "--seed", 7) == 0
        first, second = (alloy.load(tmp_path / name / out, device="cpu")[0] for out in ("a", "b"))
        assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
        capsys.readouterr()
        assert run("model", "check", tmp_path / name / "a") == 0
        assert capsys.readouterr().out.endswith("ok\n")


def test_check_finds_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN and a missing tensor in one message, exit code 4; MTP and the dt limit are told."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["backbone.norm_f.weight"][2] = float("nan")
    del tensors["backbone.layers.0.mixer.D"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert run("model", "check", folder) == 4
    output = capsys.readouterr()
    assert "1 missing (backbone.layers.0.mixer.D)" in output.err
    assert "backbone.norm_f.weight holds 1 NaN or infinite values" in output.err
    assert "MTP        1 depth(s) of *E" in output.out
    assert "clamped to [0, inf] (time_step_limit); transformers 5.23 floors it at time_step_min = 0.001" in output.out


def test_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another style, dtype and shard size; other files of the folder come along."""
    (folder / "README.md").write_text("about")
    out = tmp_path / "out"
    options = ("--config-style", "transformers5", "--dtype", "bfloat16", "--max-shard-size", "100KB", "--check")
    assert run("convert", folder, out, *options) == 0
    assert "check: tensors and logits are equal" in capsys.readouterr().out
    assert "layers_block_type" in json.loads((out / "config.json").read_text())
    assert len(list(out.glob("*.safetensors"))) > 2
    assert (out / "README.md").read_text() == "about"
    before, after = alloy.load(folder, device="cpu")[0], alloy.load(out, device="cpu")[0]
    assert torch.equal(before.embed.weight.bfloat16(), after.embed.weight)


def test_convert_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source as target, a format that is not there yet."""
    assert run("convert", folder, folder) == 2
    assert "are the same folder" in capsys.readouterr().err
    assert run("convert", folder, folder.parent / "x", "--to", "gguf") == 2
    assert '--to = "gguf" is not known. Use hf or vllm' in capsys.readouterr().err


def test_a_checkpoint_is_not_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`init` and `convert` refuse a folder that holds one; a file in the place of the folder is named."""
    before = (folder / "model.safetensors").read_bytes()
    assert run("model", "init", "tiny-dense", "--out", folder) == 2
    alloy.save(build(preset("tiny-dense")), folder.parent / "other")
    assert run("convert", folder.parent / "other", folder) == 2
    assert capsys.readouterr().err.count(f"{folder} holds a checkpoint already; choose another folder") == 2
    assert (folder / "model.safetensors").read_bytes() == before
    (folder.parent / "file").write_text("mine")
    assert run("model", "init", "tiny-dense", "--out", folder.parent / "file") == 2
    assert "file: File exists; a file stands where a folder is wanted" in capsys.readouterr().err
    assert (folder.parent / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "{}", "[]", ""])
def test_damaged_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A tokenizer.json that is cut short or something else: the file and the mend."""
    (folder / "tokenizer.json").write_text(text)
    assert run("model", "check", folder) == 4
    assert "tokenizer.json or tokenizer_config.json is damaged" in capsys.readouterr().err


def test_no_memory_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    """--gpu-mem 0 is a device without memory, not a missing option."""
    assert run("model", "info", "tiny-dense", "--gpu-mem", "0") == 3
    assert "does not fit" in capsys.readouterr().err


def test_init_of_what_memory_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before a weight is drawn, with both sizes; nothing is written."""
    assert run("model", "init", "nemotron-3-ultra-550b-a55b", "--out", tmp_path / "big") == 3
    assert "GiB of weights in bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "big").exists()
