"""The resolved recipe that a run writes is the recipe: it loads to what was resolved, and running it repeats the run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from alloy.cli import app
from alloy.core.compose import shipped_names
from alloy.core.recipe import COMMANDS, Config, LoadedRecipe, Recipe, load_recipe
from alloy.data.mixture import Source
from alloy.errors import RecipeError
from alloy.models.configs import HybridConfig
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import load
from alloy.train.recipe import TrainTable
from alloy.train.tasks.pretrain import DataTable, FromCheckpoint, PretrainRecipe
from tests.train.tiny import curve, train, write_recipe

# fragments are no recipes by themselves
SHIPPED = [name for name in shipped_names() if not name.startswith("base/")]


def again(loaded: LoadedRecipe, folder: Path) -> LoadedRecipe:
    """The recipe after it was written as a run writes it, and read."""
    path = folder / "recipe.toml"
    path.write_text(loaded.to_toml(), encoding="utf-8")
    return load_recipe(path)


def built(model: object) -> PretrainRecipe:
    """A recipe made in Python."""
    return PretrainRecipe.model_validate(
        {"model": model, "data": DataTable(sources=(Source(path="a b"),)), "train": TrainTable(steps=1)}
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_again(tmp_path: Path, name: str) -> None:
    """The same object, the same fingerprint, hence the same run to resume."""
    first = load_recipe(name)
    second = again(first, tmp_path)
    assert second.recipe == first.recipe
    assert second.hash == first.hash


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_of_every_preset_load_again(tmp_path: Path, name: str) -> None:
    """Hybrids, decoders, multi-token prediction, single layers of their own, layers without attention or MLP."""
    recipe = built(preset(name))
    second = again(recipe.loaded, tmp_path)
    assert second.recipe == recipe
    assert second.hash == recipe.loaded.hash


@pytest.mark.parametrize(
    "model",
    [
        FromCheckpoint(path="runs/x y/checkpoint"),
        HybridConfig(pattern="M-*/-/-", ffn=(40,), time_step_limit=(0.001, 0.1)),
        HybridConfig(pattern="M-*-", ffn=(40, 72), pad_id=None, bos_id=7, eos_ids=(3, 5)),
        HybridConfig(pattern="M-", eos_ids=()),
    ],
)
def test_recipes_of_other_models_load_again(tmp_path: Path, model: Config) -> None:
    """A checkpoint, Megatron's notation of multi-token prediction, lists of widths and ids."""
    recipe = built(model)
    assert again(recipe.loaded, tmp_path).recipe == recipe


def test_megatron_notation_in_a_file(tmp_path: Path) -> None:
    """ "main/mtp/mtp" is cut up, an explicit number of depths wins, and the resolved recipe says what came out."""
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("mtp_depths = 1\n", ""))
    loaded = load_recipe(path, ["model.pattern=ME*|/*E/*E"])
    model = loaded.recipe.model  # type: ignore[attr-defined]  # a PretrainRecipe
    assert (model.pattern, model.mtp_pattern, model.mtp_depths) == ("ME*", "*E", 2)
    assert again(loaded, tmp_path).recipe == loaded.recipe
    one = load_recipe(path, ["model.pattern=ME*/*E/*E", "model.mtp_depths=1"])
    assert one.recipe.model.mtp_depths == 1  # type: ignore[attr-defined]


def tables(annotation: Any) -> Iterator[type[Config]]:
    """All tables below a type."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
        for info in annotation.model_fields.values():
            yield from tables(info.annotation)
    for inner in get_args(annotation):
        yield from tables(inner)


def test_no_table_forbids_its_own_resolved_form() -> None:
    """The two rules of `Config`, for every table that a command's recipe holds."""
    recipes = [kind for name in COMMANDS if isinstance(kind := COMMANDS.get(name), type) and issubclass(kind, Recipe)]
    found = {table for recipe in recipes for table in tables(recipe)}
    assert HybridConfig in found
    early = [
        f"{table.__name__}.{name}"
        for table in found
        for name, decorator in table.__pydantic_decorators__.model_validators.items()
        if decorator.info.mode != "after"
    ]
    unsayable = [
        f"{table.__name__}.{name}"
        for table in found
        for name, info in table.model_fields.items()
        if type(None) in get_args(info.annotation) and info.get_default(call_default_factory=True) is not None
    ]
    assert (early, unsayable) == ([], [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('time_step_limit = "wide"', 'model.time_step_limit = "wide": must be a list.'),
        ("time_step_limit = [0.0]", '"model.time_step_limit.1" is missing and has no default. Add it.'),
        (
            "time_step_limit = [0.0, 1.0, 2.0]",
            "model.time_step_limit = [0.0, 1.0, 2.0]: must be a list of at most 2, not 3.",
        ),
        ('time_step_limit = [0.0, "a"]', 'model.time_step_limit.1 = "a": must be a valid number.'),
        ("eos_ids = 2", "model.eos_ids = 2: must be a list."),
        ("eos_ids = [1.5]", "model.eos_ids.0 = 1.5: must be a valid integer."),
        ("layers = [{ fnf = 3 }, {}, {}]", 'unknown key "model.layers.0.fnf". Did you mean "model.layers.0.ffn"?'),
        ("ffn = [1, 2]", "model: ffn lists 2 widths but pattern has 0 `-` layers; give one, or one per layer"),
    ],
)
def test_wrong_lists_are_refused_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    """File, line, key, and what would be right."""
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("[model]\n", f"[model]\n{line}\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"tiny.toml:6: {message}"


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("lama", 'Did you mean "llama"?'),
        ("nemotron-h", 'Did you mean "nemotron_h"?'),
        ("gpt2", "Known: nemotron_h, nemotron_h_puzzle, llama, qwen3, qwen3_moe, nemotron, nemotron-nas."),
    ],
)
def test_unknown_kind_of_model_speaks_alone(tmp_path: Path, kind: str, hint: str) -> None:
    """Not one complaint for each key of the kind that was meant, and the kinds of every family."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path), [f"model.kind={kind}"])
    assert str(caught.value) == f'override "model.kind={kind}": model.kind = "{kind}" is not known. {hint}'


@pytest.mark.parametrize("value", ["nemotron-nano-9b-v2", 3, [1]])
def test_a_model_that_is_no_table_is_refused(tmp_path: Path, value: object) -> None:
    """A name or a path in the place of the table."""
    shown = json.dumps(value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path), [f"model={shown}"])
    wish = "must be a table: sizes of a new model, or the path of a checkpoint."
    assert str(caught.value) == f'override "model={shown}": model = {shown}: {wish}'


def test_running_the_written_recipe_repeats_the_run(tmp_path: Path) -> None:
    """Losses, weights and special tokens, which a tokenizer trained in the run gives, are the same bits."""
    (tmp_path / "text").mkdir()
    for i in range(9):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Number {i} is followed by {i + 1}. " * 20)
    settings = [f'data.sources=[{{path="{tmp_path}/text"}}]', "data.vocab=300", "model.vocab=304", "train.steps=2"]
    train(tmp_path, "first", *settings)
    arguments = ["pretrain", f"{tmp_path}/first/recipe.toml", "--run-dir", f"{tmp_path}/second", "--quiet"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = [(tmp_path / name / "recipe.toml").read_text() for name in ("first", "second")]
    assert written[0] == written[1]
    assert curve(tmp_path / "first") == curve(tmp_path / "second")
    (model, _), (same, _) = (load(tmp_path / name / "checkpoint") for name in ("first", "second"))
    assert same.config == model.config
    assert model.config.eos_ids
    torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_no_sources_are_refused() -> None:
    """Before a dry run counts what they would take."""
    with pytest.raises(RecipeError, match=r"data\.sources = \[\]: must be a list of at least 1, not 0"):
        load_recipe("pretrain/tiny", ["data.sources=[]"])
