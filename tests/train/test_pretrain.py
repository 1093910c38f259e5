"""The pretraining task and command: counts by hand, text sources, refusals, dry runs, continued training, shipped recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alloy.cli import app
from alloy.core.recipe import RunOptions, load_recipe, run
from alloy.data.shards import write_shard
from alloy.errors import DataError, RecipeError, ResourceError
from alloy.models.registry import load
from alloy.parallel.mesh import World
from alloy.train.tasks.pretrain import PretrainRecipe, PretrainTask, count_sequences, mtp_depths, plan
from tests.train.tiny import curve, tiny, train, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe, shards and one short finished run."""
    folder = tmp_path_factory.mktemp("pretrain")
    train(folder, "run", "train.steps=2")
    return folder


def test_sequences_are_counted_by_run() -> None:
    """Runs of equal numbers of a least length, padding left out."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, -1], [3, 4, 4, 4, 4, 5, 5], [-1] * 7])
    assert [count_sequences(documents, shortest) for shortest in (1, 2, 3, 4, 5)] == [6, 4, 2, 1, 0]
    # a number that comes again after another document is another run
    again = torch.tensor([[0, 1, 0, 0, 1, 0, -1]])
    assert [count_sequences(again, shortest) for shortest in (1, 2, 3)] == [5, 1, 0]


def test_checkpoint_opens_and_carries_the_tokenizer(folder: Path) -> None:
    """The product is a Hugging Face folder with a model card."""
    model, tokenizer = load(folder / "run" / "checkpoint")
    assert tokenizer is None
    assert model.has_mtp
    card = (folder / "run" / "checkpoint" / "README.md").read_text()
    assert "hash" in card
    assert "not measured" in card


def test_training_goes_on_from_a_checkpoint(folder: Path) -> None:
    """`model.path` starts at the loss where the checkpoint ended, without the file's model table."""
    text = (folder / "tiny.toml").read_text()
    start, _, rest = text.partition("[model]")
    again = folder / "again.toml"
    again.write_text(f'{start}[model]\npath = "{folder}/run/checkpoint"\n\n[data]{rest.partition("[data]")[2]}')
    loaded = load_recipe(again, ["train.steps=1", "train.lr=1e-9", "train.muon_lr=1e-9"])
    run(loaded.recipe, RunOptions(run_dir=folder / "again", quiet=True, loaded=loaded))
    whole = [line["val_loss"] for line in curve(folder / "run") if "val_loss" in line]
    new = [line["val_loss"] for line in curve(folder / "again") if "val_loss" in line]
    assert new[-1] == pytest.approx(whole[-1], abs=1e-5)


def test_text_is_tokenized_in_the_run_directory(tmp_path: Path) -> None:
    """Text sources and `vocab` make a tokenizer, shards and a checkpoint that carries both the tokenizer and its ids."""
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Number {i} is followed by {i + 1}. " * 20)
    settings = [f'data.sources=[{{path="{tmp_path}/text"}}]', "data.vocab=300", "model.vocab=304", "train.steps=1"]
    train(tmp_path, "run", *settings)
    model, tokenizer = load(tmp_path / "run" / "checkpoint")
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("Number 7"), skip_special_tokens=True) == "Number 7"
    assert model.config.eos_ids == (tokenizer.eos_token_id,)
    assert "| 9 |" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    # going on from that checkpoint on text needs neither tokenizer nor vocab
    again = tmp_path / "again.toml"
    again.write_text(
        f'command = "pretrain"\n[model]\npath = "{tmp_path}/run/checkpoint"\n[data]\nseq = 21\nsources = [{{ path = "{tmp_path}/text" }}]\n'
        "[train]\nsteps = 1\nbatch_tokens = 42\nmicro_batch = 2\n"
    )
    loaded = load_recipe(again)
    result = run(loaded.recipe, RunOptions(run_dir=tmp_path / "again", quiet=True, loaded=loaded))
    assert result.checkpoint is not None
    _, same = load(result.checkpoint)
    assert same is not None
    assert same.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["train.batch_tokens=100"],
            RecipeError,
            r"batch_tokens = 100 is not a multiple of ranks x micro_batch x seq = 1 x 4 x 21 = 84",
        ),
        (
            ['data.sources.0.path="nowhere"'],
            RecipeError,
            r'data.sources\[0\].path = "nowhere": no .idx files there. Run `alloy data tokenize`',
        ),
        (['data.sources=[{path="package:nosuchpackage"}]', "data.vocab=300"], DataError, "no such Python package"),
        (['device="cuda:7"'], RecipeError, 'device = "cuda:7": there is no such device'),
        (["train.micro_batch=4000000", "train.batch_tokens=84000000"], None, ""),
    ],
)
def test_refusals_come_before_training(
    tmp_path: Path, overrides: list[str], error: type[Exception] | None, message: str
) -> None:
    """Each bad setting has its message; the last is refused by a dry run only, for want of memory."""
    if error is not None:
        with pytest.raises(error, match=message):
            train(tmp_path, "run", *overrides)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return
    loaded = tiny(tmp_path, *overrides)
    with pytest.raises(ResourceError, match=r"Lower train\.micro_batch"):
        run(loaded.recipe, RunOptions(dry_run=True, json=True, loaded=loaded))


def test_small_vocabulary_is_refused(tmp_path: Path) -> None:
    """A tokenizer with more ids than the model's table is named with both numbers."""
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / "text" / f"{i}.txt").write_text("some words " * 30)
    with pytest.raises(RecipeError, match=r"the tokenizer has \d+ ids but model.vocab = 61"):
        train(tmp_path, "run", f'data.sources=[{{path="{tmp_path}/text"}}]', "data.vocab=300")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('model.pattern="MXE"', r'"X" at position 2 is not a layer'),
        ("train.lr_warmup=3", r'unknown key "train.lr_warmup"'),
        ('train.lr="fast"', r"train.lr"),
        ("model.ssm_groups=2", r"tiny\.toml:\d+: model: ssm_heads = 3 is not a multiple of ssm_groups = 2"),
        ("model.ssm_state=300", r"model: ssm_head_dim = 8 and ssm_state = 300; both must be at most 256"),
        ("model.top_k=6", r'"model.top_k=6": model: top_k = 6 is more than the 5 experts that routing may choose from'),
        ("train.precision=nvfp4", r"train.precision = \"nvfp4\": must be 'fp32', 'bf16' or 'bf16-pure'"),
        ("model.vocabulary=3", r'unknown key "model.vocabulary". Did you mean "model.vocab"'),
    ],
)
def test_recipe_errors_name_the_key(tmp_path: Path, override: str, message: str) -> None:
    """Errors inside the model's union read like any other."""
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


def test_dry_run_prints_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, tokens, FLOPs and memory, exit code 0, no run directory."""
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(app, ["pretrain", str(folder / "tiny.toml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    for word in ("parameters", "active", "MTP", "3,024 in 12 steps", "FLOPs", "GiB", "time"):
        assert word in result.output
    assert sorted(folder.iterdir()) == before


def test_plan_counts_what_the_model_has(folder: Path) -> None:
    """The plan's parameters are those of the built model, MTP apart."""
    recipe = tiny(folder).recipe
    assert isinstance(recipe, PretrainRecipe)
    model, _ = load(folder / "run" / "checkpoint")
    total = sum(tensor.numel() for name, tensor in model.state_dict().items() if name != "head.weight")
    mtp = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith("mtp."))
    known = plan(recipe, ranks=1)
    assert known.accumulation == 3
    assert f"{total - mtp:,} " in str(known.rows["parameters"])
    assert f"{mtp:,} MTP" in str(known.rows["parameters"])
    assert mtp_depths(model.config, None) == 2
    assert mtp_depths(model.config, 0.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny-llama"])
def test_shipped_tiny_recipes_learn(tmp_path: Path, name: str) -> None:
    """Each shipped tiny recipe runs as it is and its loss falls."""
    loaded = load_recipe(f"pretrain/{name}")
    result = run(loaded.recipe, RunOptions(run_dir=tmp_path / name, quiet=True, loaded=loaded))
    values = [float(line["loss"]) for line in curve(result.dir) if "loss" in line]  # type: ignore[arg-type]  # numbers
    assert values[-1] < values[0] - 1.0
    assert result.checkpoint is not None
    _, tokenizer = load(result.checkpoint)
    assert tokenizer is not None


def test_profile_names_the_layers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--profile logs the time of each kind of layer, forward and backward, and does not change the loss."""
    train(tmp_path, "plain", "train.steps=7")
    loaded = tiny(tmp_path, "train.steps=7")
    run(loaded.recipe, RunOptions(run_dir=tmp_path / "profiled", profile=True, loaded=loaded))
    log = (tmp_path / "profiled" / "log.txt").read_text()
    assert "profile of 5 micro-batches" in log
    for kind in ("Mamba", "MoE", "Attention", "other"):
        assert kind in log
    assert curve(tmp_path / "profiled") == curve(tmp_path / "plain")


def test_phases_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sources, weights that change at a token: the mixture gives them so; too many epochs and what makes no sense are refused."""
    write_recipe(tmp_path)
    (tmp_path / "shards.idx").rename(tmp_path / "a.idx")
    (tmp_path / "shards.bin").rename(tmp_path / "a.bin")
    write_shard(tmp_path / "b", [np.arange(5, 20 + i) for i in range(40)])
    sources = f'data.sources=[{{path="{tmp_path}/a", name="a"}}, {{path="{tmp_path}/b", name="b", max_epochs=9}}]'
    phases = 'data.phases=[{name="x", tokens=1260, weights={a=1}}, {name="y", weights={a=1, b=3}}]'
    train(tmp_path, "whole", sources, phases)
    loaded = tiny(tmp_path, sources, phases)
    assert isinstance(loaded.recipe, PretrainRecipe)
    task = PretrainTask(loaded.recipe, World(0, 1, torch.device("cpu")), tmp_path / "x")
    for _, rows in zip(range(60), iter(lambda: task.mixture.batch(1), None), strict=False):
        assert rows.tokens.shape == (1, 21)
    assert task.mixture.counts == [60, 0]
    task.mixture.batch(40)
    assert task.mixture.counts == [70, 30]
    stopped = tiny(tmp_path, sources, phases)
    result = run(stopped.recipe, RunOptions(run_dir=tmp_path / "dry", loaded=stopped, dry_run=True))
    assert "25.00%" in str(result.metrics["data y, a"])
    assert "epochs by its end" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r'source "b" would be seen .* above its max_epochs = 9'):
        train(tmp_path, "much", sources, phases, "train.steps=4000", "train.warmup_frac=0.1")
    for override, message in [
        ("data.phases=[{name='x', weights={c=1}}]", 'weight of an unknown source "c"'),
        ("data.phases=[{name='x', seq_len=64}]", "rows of 64 tokens and data.seq is 21"),
        ("data.phases=[{name='x', weights={a=-1}}]", "not negative"),
    ]:
        with pytest.raises(RecipeError, match=message):
            train(tmp_path, "no", sources, override)


def test_a_blend_of_texts_and_shards(tmp_path: Path) -> None:
    """`data.blend` names the sources; one is text in a column of its own; a hole needs renormalise."""
    write_recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(50)))
    entry = {"name": "rows", "path": str(tmp_path / "rows.jsonl"), "text_field": "body"}
    (tmp_path / "blend.json").write_text(json.dumps({"datasets": [entry, {"name": "closed", "weight": 3}]}))
    settings = ['data.sources="@unset"', f'data.blend="{tmp_path}/blend.json"', "data.vocab=270", "model.vocab=272"]
    with pytest.raises(RecipeError, match='missing "closed", weight 3'):
        train(tmp_path, "no", *settings)
    result = train(tmp_path, "run", *settings, "data.renormalise=true", "train.steps=1")
    assert (result.dir / "data" / "source-0" / "manifest.json").exists()
    with pytest.raises(RecipeError, match="either sources or a blend"):
        tiny(tmp_path, f'data.blend="{tmp_path}/blend.json"')
