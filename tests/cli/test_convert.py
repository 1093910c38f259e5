"""`alloy convert --to vllm`: checkpoints that transformers makes, on their way to other engines."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import alloy
from alloy.errors import CheckpointError
from alloy.models.presets import preset
from alloy.models.registry import build
from tests.cli.test_model import run

NEMOTRON_3 = (
    "{% if tools %}<tool_call><function=f>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}<think></think>"
)
HERMES = "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
# unequal numbers, so that no key can stand for another
HYBRID: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 5,
    "intermediate_size": 33, "mamba_num_heads": 6, "mamba_head_dim": 7, "ssm_state_size": 9, "n_groups": 3,
    "conv_kernel": 3, "chunk_size": 8, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 16, "routed_scaling_factor": 2.5, "moe_latent_size": 20,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 37, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "dense": lambda: transformers.NemotronHConfig(
        **HYBRID, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"]
    ),
    "moe": lambda: transformers.NemotronHConfig(
        **HYBRID, **EXPERTS, layers_block_type=["linear_attention", "moe", "full_attention", "moe"]
    ),
    "llama": lambda: transformers.LlamaConfig(**DECODER, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "tied": lambda: transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    ),
}


def theirs(name: str, path: Path, template: str = NEMOTRON_3) -> Any:
    """A folder that transformers alone has written, with a tokenizer; returns the model."""
    torch.manual_seed(0)
    config = MODELS[name]()
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path)
    words = Tokenizer(tokenizer_models.WordLevel({f"t{i}": i for i in range(40)}, "t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return model


def edit(path: Path, **changes: Any) -> None:
    """Change keys of config.json; ... takes one out."""
    data = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of the two hybrids, to be copied and broken."""
    root = tmp_path_factory.mktemp("exports")
    for name in ("dense", "moe"):
        theirs(name, root / "source" / name)
        assert run("convert", root / "source" / name, root / name, "--to", "vllm") == 0
    return root


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_makes_passes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported, the model is the same to transformers, every engine's column is in order, and it comes back bit-equal."""
    model = theirs(name, tmp_path / "a")
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "vllm", "--check") == 0
    output = capsys.readouterr().out
    assert "differs" not in output
    assert "missing" not in output
    tokens = torch.arange(14).reshape(2, 7)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert run("convert", tmp_path / "b", tmp_path / "c", "--config-style", "transformers5") == 0
    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert run("convert", tmp_path / "c", "--to", "vllm", "--check") == (1 if name in ("dense", "moe") else 0)


def test_released_keys_are_written(exported: Path) -> None:
    """The names that vLLM and llama.cpp read, from a file that has others; keys of experts only where there are some."""
    dense, moe = (json.loads((exported / name / "config.json").read_text()) for name in ("dense", "moe"))
    source = json.loads((exported / "source" / "dense" / "config.json").read_text())
    assert "hybrid_override_pattern" not in source
    assert source["num_experts_per_tok"] == 2
    assert (dense["hybrid_override_pattern"], dense["num_hidden_layers"]) == ("M-*-", 4)
    assert (dense["mamba_n_groups"], moe["mamba_n_groups"]) == (3, 3)
    assert not set(EXPERTS) & set(dense)
    assert {key: moe[key] for key in EXPERTS} == EXPERTS
    assert dense["architectures"] == ["NemotronHForCausalLM"]


def test_a_folder_of_transformers_is_looked_over(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a target nothing is written; what vLLM would not read is named, with the mend."""
    source = exported / "source" / "dense"
    before = sorted(file.name for file in source.iterdir())
    assert run("convert", source, "--to", "vllm", "--check") == 1
    output = capsys.readouterr()
    assert f"error: {source} is not ready for vLLM: hybrid_override_pattern; num_hidden_layers" in output.err
    assert "hybrid_override_pattern missing for vLLM, SGLang, llama.cpp: not every release knows" in output.out
    assert 'the string "M-*-" is needed; alloy convert SRC DST --to vllm writes it' in output.out
    assert "num_experts_per_tok differs for llama.cpp: a model without experts is taken for one" in output.out
    assert sorted(file.name for file in source.iterdir()) == before
    assert run("convert", source, "--to", "vllm") == 2
    assert "there is no folder to write; give one, or --to vllm --check" in capsys.readouterr().err
    assert run("convert", source, tmp_path / "x", "--to", "vllm", "--config-style", "transformers5") == 2
    assert "is not what vLLM reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("dense", "vocab_size", 48),
        ("dense", "hidden_size", 20),
        ("dense", "num_attention_heads", 8),
        ("dense", "num_key_value_heads", 3),
        ("dense", "head_dim", 10),
        ("dense", "intermediate_size", 34),
        ("dense", "mamba_num_heads", 12),
        ("dense", "mamba_head_dim", 8),
        ("dense", "ssm_state_size", 10),
        ("dense", "n_groups", 2),
        ("dense", "conv_kernel", 4),
        ("moe", "n_routed_experts", 5),
        ("moe", "moe_intermediate_size", 13),
        ("moe", "moe_shared_expert_intermediate_size", 17),
        ("moe", "moe_latent_size", 21),
    ],
)
def test_a_number_that_the_weights_contradict(
    name: str, key: str, wrong: int, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong or left out, the key is named, with what the weights have (as a product where they tell no more)."""
    shutil.copytree(exported / name, tmp_path / "x")
    named = {"head_dim": "num_attention_heads", "ssm_state_size": "n_groups"}.get(key, key)
    aliases = {"mamba_n_groups": ...} if key == "n_groups" else {}
    edit(tmp_path / "x", **aliases, **{key: wrong})
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 1
    output = capsys.readouterr()
    assert named in output.err
    assert re.search(rf"{named} differs for vLLM.*: .*{key}.* is \d+ but the weights have \d+", output.out)
    edit(tmp_path / "x", **aliases, **{key: ...})
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") in (1, 4)
    output = capsys.readouterr()
    assert key in output.err
    assert re.search(rf"{key} (missing|differs) for vLLM", output.out) or not output.out


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "dense",
            {"architectures": ["NemotronHModel"]},
            "architectures differs for vLLM, SGLang, TensorRT-LLM, llama.cpp",
        ),
        ("dense", {"architectures": ...}, "architectures missing"),
        ("dense", {"hybrid_override_pattern": "M*--"}, "hybrid_override_pattern differs for vLLM"),
        ("dense", {"torch_dtype": ...}, "dtype missing for vLLM"),
        ("dense", {"torch_dtype": "bfloat16"}, "dtype differs for vLLM"),
        ("dense", {"time_step_limit": [0.0, 0.1]}, "time_step_limit differs for vLLM, SGLang, TensorRT-LLM, llama.cpp"),
        ("dense", {"residual_in_fp32": True}, "residual_in_fp32 differs for vLLM"),
        ("dense", {"use_conv_bias": ...}, "use_conv_bias missing for vLLM"),
        ("dense", {"layer_norm_epsilon": ..., "norm_eps": 1e-5}, "layer_norm_epsilon missing for vLLM"),
        ("moe", {"norm_topk_prob": ...}, "norm_topk_prob missing"),
        ("moe", {"num_experts_per_tok": ...}, "num_experts_per_tok missing"),
        ("moe", {"routed_scaling_factor": ...}, "routed_scaling_factor missing"),
        ("moe", {"n_shared_experts": ...}, "n_shared_experts missing"),
        # the weights are 16 wide in all: vLLM would take 32
        ("moe", {"n_shared_experts": 2}, "n_shared_experts differs for vLLM, SGLang, TensorRT-LLM: "),
    ],
)
def test_a_key_that_engines_read_otherwise(
    name: str, changes: Any, message: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported / name, tmp_path / "x")
    edit(tmp_path / "x", **changes)
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_n_groups": ...}, "mamba_n_groups missing for SGLang: 8 is taken without it, and n_groups is 3"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok differs for llama.cpp"),
        ({"intermediate_size": [33, 33]}, "intermediate_size differs for TensorRT-LLM, llama.cpp"),
        ({"sliding_window": 4}, "sliding_window differs for TensorRT-LLM, llama.cpp"),
    ],
)
def test_what_vllm_does_not_mind(
    changes: Any, message: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other engines' troubles are told; the exit code is vLLM's."""
    shutil.copytree(exported / "dense", tmp_path / "x")
    edit(tmp_path / "x", **changes)
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 0
    assert message in capsys.readouterr().out


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith("backbone.layers.1.mixer.experts.") and "up_proj" in name]
    stacked = torch.stack([tensors.pop(name) for name in sorted(names)])
    return {**tensors, "backbone.layers.1.mixer.experts.up_proj": stacked}


def _short(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[:3] if name == "backbone.layers.0.mixer.D" else t for name, t in tensors.items()}


def _less(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name != "backbone.layers.0.mixer.D"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "differs for vLLM, SGLang, TensorRT-LLM, llama.cpp: the hub has other names, such as backbone."),
        (_stacked, "backbone.layers.1.mixer.experts.up_proj differs"),
        (_less, "backbone.layers.0.mixer.D missing"),
        (_short, "backbone.layers.0.mixer.D is [3], config.json means [6]"),
        (lambda tensors: {**tensors, "backbone.spare": torch.zeros(2)}, "backbone.spare differs"),
    ],
    ids=["prefix", "stacked", "absent", "shape", "unknown"],
)
def test_tensors_that_engines_do_not_find(
    change: Any, message: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported / "moe", tmp_path / "x")
    tensors = change(tensors_of(tmp_path / "x"))
    safetensors.torch.save_file(tensors, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 1
    assert message in capsys.readouterr().out


def test_heads_of_tied_hybrids(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM ties none; the export holds it."""
    shutil.copytree(exported / "dense", tmp_path / "x")
    tensors = tensors_of(tmp_path / "x")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    edit(tmp_path / "x", tie_word_embeddings=True)
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 1
    assert "lm_head.weight missing for vLLM, TensorRT-LLM" in capsys.readouterr().out
    assert run("convert", tmp_path / "x", tmp_path / "y", "--to", "vllm", "--check") == 0
    written = tensors_of(tmp_path / "y")
    assert torch.equal(written["lm_head.weight"], tensors["backbone.embeddings.weight"])


@pytest.mark.parametrize(
    ("name", "template", "expected"),
    [
        (
            "dense",
            NEMOTRON_3,
            "--reasoning-parser nemotron_v3 --enable-auto-tool-choice --tool-call-parser qwen3_coder",
        ),
        (
            "qwen3",
            HERMES + "<think></think>",
            "--reasoning-parser qwen3 --enable-auto-tool-choice --tool-call-parser hermes",
        ),
        (
            "llama",
            HERMES.replace("<tool_call>", "<|python_tag|>"),
            "--enable-auto-tool-choice --tool-call-parser llama3_json",
        ),
        ("llama", "{{ messages }}", ""),
    ],
)
def test_commands(name: str, template: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsers are those of the template's formats."""
    theirs(name, tmp_path / "a b", template)
    assert run("convert", tmp_path / "a b", tmp_path / "out", "--to", "vllm", "--check", "--dtype", "bfloat16") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"vllm serve {tmp_path / 'out'} {expected}".strip() in lines
    assert any(line.startswith(f"python convert_hf_to_gguf.py {tmp_path / 'out'} ") for line in lines)


def test_float32_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engines compute float32 weights in 16 bits by themselves; a path with a space is quoted."""
    theirs("llama", tmp_path / "a b", "")
    assert run("convert", tmp_path / "a b", "--to", "vllm", "--check") == 0
    output = capsys.readouterr().out
    assert f"vllm serve '{tmp_path}/a b' --dtype float32\n" in output
    assert "no chat template: completions alone, no chat" in output


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alloy.save(build(preset("tiny-mtp")), tmp_path / "x")
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 1
    assert "is not ready for vLLM: tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "engines"),
    [("tiny-puzzle", ("llama.cpp",)), ("tiny-nas", ("vLLM", "SGLang", "TensorRT-LLM")), ("tiny-nemotron", ("SGLang",))],
)
def test_architectures_that_an_engine_lacks(name: str, engines: tuple[str, ...], tmp_path: Path) -> None:
    from alloy.models.export import ENGINES, look_over

    alloy.save(build(preset(name)), tmp_path / "x")
    export = look_over(tmp_path / "x")
    assert {e for e in ENGINES if export.state("architecture", e) != "ok"} == set(engines)
    assert {export.state("weights", e) for e in ENGINES} == {"ok"}


def test_quantised_weights_are_refused(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(exported / "dense", tmp_path / "x")
    edit(tmp_path / "x", quantization_config={"quant_method": "modelopt"})
    assert run("convert", tmp_path / "x", "--to", "vllm", "--check") == 4
    assert 'quantization_config with method "modelopt"' in capsys.readouterr().err


KILLED = """
import sys, time
from alloy.models.hf import files
real, calls = files.TensorReader.__init__, []
import alloy.models.hf.folder as folder
write = folder.write_tensors
def slow(path, tensors, progress=None):
    calls.append(path)
    if len(calls) == 2:
        print("writing", flush=True)
        time.sleep(60)
    write(path, tensors, progress)
folder.write_tensors = slow
from alloy.cli import main
main(sys.argv[1:])
"""


def test_a_killed_export_is_no_checkpoint(exported: Path, tmp_path: Path) -> None:
    """kill -9 between two shards: neither alloy nor transformers takes what is there; the command can be repeated."""
    out = tmp_path / "out"
    arguments = ["convert", str(exported / "dense"), str(out), "--to", "vllm", "--max-shard-size", "8KB"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(out.glob("model-*.safetensors"))
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        alloy.load(out, device="cpu")
    with pytest.raises(Exception, match=r"config.json|model_type|Unrecognized"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    assert run(*arguments, "--check") == 0
