"""Recipes: composition, overrides, validation, messages."""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

import alloy
from alloy.core.recipe import COMMANDS, Config, Recipe, RunOptions, RunResult, load_recipe, run
from alloy.core.toml import dotted, dump_toml
from alloy.errors import RecipeError


class Hybrid(Config):
    kind: Literal["hybrid"] = "hybrid"
    hidden: int
    pattern: str = "M-"
    limit: tuple[float, float] = (0.0, math.inf)


class Decoder(Config):
    kind: Literal["llama", "qwen3"]
    hidden: int = 64
    num_heads: int = 4
    num_kv_heads: int = 4

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        return self


class Checkpoint(Config):
    path: Path


class Source(Config):
    path: Path
    weight: float = 1.0


class Data(Config):
    seq: int = 128
    sources: tuple[Source, ...] = ()


class Train(Config):
    steps: int = 10
    lr: float = 1e-3
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: Literal["adamw", "muon"] = "adamw"
    compile: bool = True
    note: str | None = None


class ToyRecipe(Recipe):
    model: Annotated[Hybrid | Decoder, Field(discriminator="kind")]
    start: Hybrid | Checkpoint | None = None
    data: Data = Data()
    train: Train = Train()

    def run(self, options: RunOptions) -> RunResult:
        assert options.loaded is not None
        return RunResult(dir=Path(options.loaded.name), metrics={"steps": self.train.steps})


if "toy" not in COMMANDS:
    COMMANDS.add("toy", ToyRecipe)

BASE = """\
command = "toy"
[model]
kind = "hybrid"
hidden = 64

[train]
steps = 7
lr = 3e-4
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files into the working directory; returns the last one's path."""
    monkeypatch.chdir(tmp_path)

    def write_all(**texts: str) -> Path:
        for name, text in texts.items():
            path = tmp_path / f"{name}.toml"
            path.write_text(text, encoding="utf-8")
        return path

    return write_all


def message(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_extends_merges_tables_and_replaces_arrays(write: Write) -> None:
    """Left to right, later wins, then the file itself; origins name the file that won."""
    write(
        one=BASE + '[[data.sources]]\npath = "a"\nweight = 2.0\n[[data.sources]]\npath = "b"\n',
        two="seed = 5\n[train]\nlr = 1e-2\nbetas = [0.8, 0.9]\n",
        top='extends = ["one.toml", "two.toml"]\n[train]\nsteps = 9\n[[data.sources]]\npath = "c"\n',
    )
    loaded = load_recipe("top.toml")
    recipe = loaded.recipe
    assert isinstance(recipe, ToyRecipe)
    assert (recipe.train.steps, recipe.train.lr, recipe.train.betas, recipe.seed) == (9, 1e-2, (0.8, 0.9), 5)
    assert [str(source.path) for source in recipe.data.sources] == ["c"]
    assert loaded.origins["train.lr"] == "two.toml:3"
    assert loaded.origins["train.steps"] == "top.toml:3"
    assert loaded.origins["data.sources.0.path"] == "top.toml:5"
    assert loaded.origins["data.sources.0.weight"] == "default"
    assert loaded.origins["model.hidden"] == "one.toml:4"
    assert loaded.data["train"] == {"steps": 9, "lr": 1e-2, "betas": [0.8, 0.9]}
    assert loaded.name == "top"


def test_unset_removes_an_inherited_key(write: Write) -> None:
    """The default is back; unsetting what nobody set is an error with its line."""
    write(base=BASE, top='extends = ["base.toml"]\n[train]\nlr = "@unset"\n')
    loaded = load_recipe("top.toml")
    assert isinstance(loaded.recipe, ToyRecipe)
    assert loaded.recipe.train.lr == 1e-3
    assert loaded.origins["train.lr"] == "default"
    assert isinstance(load_recipe("base.toml", ["train.steps=@unset"]).recipe, ToyRecipe)
    write(bad='extends = ["base.toml"]\n[train]\nlrr = "@unset"\n')
    assert message("bad.toml") == 'bad.toml:3: train.lrr = "@unset", but nothing inherited sets it.'


def test_unset_of_a_whole_table_lets_another_kind_in(write: Write) -> None:
    """An override replaces the table that was removed."""
    write(base=BASE)
    recipe = load_recipe("base.toml", ["model=@unset", "model.kind=llama"]).recipe
    assert isinstance(recipe, ToyRecipe)
    assert recipe.model == Decoder(kind="llama")


def test_cycle_is_printed(write: Write) -> None:
    """The whole circle, in order."""
    write(a='extends = ["b.toml"]\n', b='extends = ["c.toml"]\n', c='extends = ["b.toml"]\n')
    assert "circle: b.toml -> c.toml -> b.toml" in message("a.toml")


def test_diamond_is_no_cycle(write: Write) -> None:
    """Two files may extend the same one."""
    write(
        root=BASE, a='extends = ["root.toml"]\n', b='extends = ["root.toml"]\n', top='extends = ["a.toml", "b.toml"]\n'
    )
    assert load_recipe("top.toml").origins["model.hidden"] == "root.toml:4"


def test_missing_parent_names_the_line(write: Write) -> None:
    """File and line of the `extends` entry."""
    write(top='extends = [\n  "nothere.toml",\n]\n')
    assert message("top.toml").startswith('top.toml:2: no recipe "nothere.toml"')
    write(top="extends = 3\n")
    assert "top.toml:1: extends = 3: must be a list" in message("top.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nlr_warmup = 3\n", 'x.toml:5: unknown key "train.lr_warmup". Did you mean "train.warmup_steps"?'),
        ("[train]\nstpes = 3\n", 'x.toml:5: unknown key "train.stpes". Did you mean "train.steps"?'),
        ("lr = 3\n", 'x.toml:4: unknown key "model.lr". Did you mean "train.lr"?'),
        ("hiden = 3\n", 'x.toml:4: unknown key "model.hiden". Did you mean "model.hidden"?'),
        ("zzz = 3\n", 'x.toml:4: unknown key "model.zzz". Known here: hidden, kind, limit, pattern.'),
        (
            'data = { sources = [{ path = "a" },\n{ path = "b", weigth = 2 }] }',
            'x.toml:5: unknown key "data.sources.1.weigth". Did you mean "data.sources.1.weight"?',
        ),
        (
            '[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\nweigth = 2\n',
            'x.toml:8: unknown key "data.sources.1.weigth". Did you mean "data.sources.1.weight"?',
        ),
    ],
)
def test_unknown_key_names_file_line_and_nearest(write: Write, text: str, expected: str) -> None:
    """In tables, unions, and lists of tables."""
    head = 'command = "toy"\nmodel.kind = "hybrid"\nmodel.hidden = 8\n'
    if text[0] in "[d":
        write(x=head + text)
    else:
        write(x=f'command = "toy"\n[model]\nhidden = 8\n{text}kind = "hybrid"\n')
    assert message("x.toml") == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", 'train.steps = "many": must be a valid integer.'),
        ("train.steps=1e3", "train.steps = 1000.0: must be a valid integer. Write 1000."),
        ("train.steps='12'", 'train.steps = "12": must be a valid integer.'),
        ("train.compile=1", "train.compile = 1: must be a valid boolean."),
        ("train.lr=true", "train.lr = true: must be a valid number."),
        ("train.betas=[0.9]", "train.betas.1"),
        ("train.optimizer=sgd", "train.optimizer = \"sgd\": must be 'adamw' or 'muon'."),
        ("train.note=12", "Quote it: 'train.note=\"12\"'."),
        ("model.hidden=[1]", "model.hidden = [1]: must be a valid integer."),
        ("train=3", "train = 3: must be a table."),
        ("model.kind=hybird", 'model.kind = "hybird" is not known. Did you mean "hybrid"?'),
        ("model.kind=@unset", '"model.kind" is missing. Add it'),
        ("model.hidden=@unset", '"model.hidden" is missing and has no default.'),
        ("start.hidden=x", 'start.hidden = "x": must be a valid integer.'),
        ("start.pth=x", 'unknown key "start.pth". Did you mean "start.path"?'),
    ],
)
def test_wrong_values(write: Write, override: str, expected: str) -> None:
    """The value, what it must be, and where it came from."""
    write(x=BASE)
    said = message("x.toml", override)
    assert expected in said
    if "@unset" not in override:
        assert f'override "{override}": ' in said


def test_wrong_type_names_the_line(write: Write) -> None:
    """A file's own mistake has file and line."""
    write(x=BASE.replace("steps = 7", 'steps = "many"'))
    assert message("x.toml") == 'x.toml:7: train.steps = "many": must be a valid integer.'


def test_validators_get_the_line_of_the_key_they_name(write: Write) -> None:
    """A model's own check speaks of values; the loader adds the place."""
    write(x='command = "toy"\n[model]\nkind = "qwen3"\nhidden = 8\nnum_heads = 3\nnum_kv_heads = 2\n')
    assert message("x.toml") == "x.toml:5: model: num_heads = 3 is not a multiple of num_kv_heads = 2"


def test_union_without_discriminator_lets_the_best_member_speak(write: Write) -> None:
    """One complaint, not one per member."""
    write(x=BASE + "[start]\nhidden = 8\npatern = 'M'\n")
    assert message("x.toml") == 'x.toml:11: unknown key "start.patern". Did you mean "start.pattern"?'


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('kind = "qwen3"\nhiden = 3\n', 'x.toml:4: unknown key "model.hiden". Did you mean "model.hidden"?'),
        ('kind = "hybird"\n', 'x.toml:3: model.kind = "hybird" is not known. Did you mean "hybrid"?'),
        ('pth = "a"\n', 'x.toml:3: unknown key "model.pth". Did you mean "model.path"?'),
        (
            'path = "a"\nzzz = 1\n',
            'x.toml:4: unknown key "model.zzz". Known here: hidden, kind, limit, num_heads, num_kv_heads, path, pattern.',
        ),
    ],
)
def test_discriminated_union_beside_a_plain_table(write: Write, table: str, expected: str) -> None:
    """[model] is one of several kinds, or the path of a checkpoint: the kind that was meant speaks."""

    class Either(Recipe):
        model: Annotated[Hybrid | Decoder, Field(discriminator="kind")] | Checkpoint

    path = write(x=f'command = "toy"\n[model]\n{table}')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, (), Either)
    assert str(caught.value).splitlines()[0] == expected


def test_several_mistakes_are_listed(write: Write) -> None:
    """One line each."""
    write(x=BASE + "note = 3\nlrr = 1\n")
    assert message("x.toml").splitlines() == [
        'x.toml:10: unknown key "train.lrr". Did you mean "train.lr"?',
        "x.toml:9: train.note = 3: must be a valid string.",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr=3e-3", 3e-3),
        ("train.note=M*M-", "M*M-"),
        ("train.note='quoted = text'", "quoted = text"),
        ('train.note="a\\tb"', "a\tb"),
        ("train.note=a=b", "a=b"),
        ("train.note=", ""),
        ("train.note=# no comment", "# no comment"),
        ("train.note=2024-01-02", "2024-01-02"),
        ("train.note=007", "007"),
        ("train.steps=1_000", 1000),
        ("train.compile=false", False),
        ("train.lr=inf", math.inf),
        ("train.betas=[0.5, 0.6]", (0.5, 0.6)),
        (" train.steps = 5 ", 5),
    ],
)
def test_override_values(write: Write, text: str, value: object) -> None:
    """TOML scalars; a bare word that is no TOML is a string."""
    write(x=BASE)
    loaded = load_recipe("x.toml", [text])
    assert isinstance(loaded.recipe, ToyRecipe)
    name = text.partition("=")[0].strip().removeprefix("train.")
    assert getattr(loaded.recipe.train, name) == value
    if not isinstance(value, tuple):
        assert loaded.origins[f"train.{name}"] == f'override "{text}"'


def test_override_of_list_elements(write: Write) -> None:
    """By number; out of range and wrong words are refused."""
    write(x=BASE + '[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\n')
    loaded = load_recipe("x.toml", ["data.sources.1.weight=0.3", "train.betas=[0.1,0.2]", "train.betas.0=0.5"])
    assert isinstance(loaded.recipe, ToyRecipe)
    assert [source.weight for source in loaded.recipe.data.sources] == [1.0, 0.3]
    assert loaded.recipe.train.betas == (0.5, 0.2)
    assert loaded.origins["data.sources.1.weight"] == 'override "data.sources.1.weight=0.3"'
    assert loaded.origins["data.sources.1.path"] == "x.toml:12"
    assert "data.sources is a list and '2' is no element of it (it has 2, numbered from 0)" in message(
        "x.toml", "data.sources.2.weight=1"
    )
    assert "'first' is no element" in message("x.toml", "data.sources.first.weight=1")
    assert "a list element cannot be unset" in message("x.toml", "data.sources.0=@unset")


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", ".=1"])
def test_malformed_overrides(write: Write, text: str) -> None:
    """No key or no value."""
    write(x=BASE)
    assert f'override "{text}": write dotted.key=value' in message("x.toml", text)


def test_override_below_a_single_value(write: Write) -> None:
    """A number has no keys."""
    write(x=BASE)
    assert "train.steps = 7 is a single value and has no key 'a'" in message("x.toml", "train.steps.a.b=3")
    assert "train.steps = 7 is a single value and has no key 'a'" in message("x.toml", "train.steps.a=3")
    assert "is not valid TOML" in message("x.toml", "train.betas=[1,")


def test_broken_files(write: Write, tmp_path: Path) -> None:
    """Syntax with its line, encoding with its byte, absence with the nearest name."""
    write(x="a = 1\nb = = 2\n")
    assert message("x.toml").startswith("x.toml:2: not valid TOML: ")
    write(x='a = 1\nb = """open\n')
    assert message("x.toml").startswith("x.toml:2: not valid TOML: ")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'\n")
    assert message("latin.toml") == "latin.toml: not UTF-8 at byte 5. Save the file as UTF-8."
    assert 'no recipe "nothere"' in message("nothere")


def test_command_picks_the_class(write: Write) -> None:
    """A missing or unknown command says what there is."""
    write(x="seed = 1\n")
    assert "no `command` names what runs this recipe" in message("x.toml")
    write(x='seed = 1\ncommand = "tooy"\n')
    assert message("x.toml") == 'x.toml:2: command = "tooy": unknown command "tooy". Did you mean "toy"?'


def test_resolved_recipe_is_rerunnable(write: Write, tmp_path: Path) -> None:
    """The written recipe loads to the same object and hash, infinities and None included."""
    write(x=BASE + '[[data.sources]]\npath = "a b/c"\n')
    first = load_recipe("x.toml", ["train.lr=inf"])
    for origins in (False, True):
        (tmp_path / "again.toml").write_text(first.to_toml(origins=origins))
        again = load_recipe("again.toml")
        assert again.recipe == first.recipe
        assert again.hash == first.hash
    assert "lr = inf" in first.to_toml()
    assert "steps = 7  # x.toml:7" in first.to_toml(origins=True)
    assert "warmup_steps = 0  # default" in first.to_toml(origins=True)
    assert load_recipe("x.toml", ["train.steps=8"]).hash != first.hash


def test_public_api_runs_a_recipe(write: Write) -> None:
    """Recipe.load picks the class; run hands it its origins; an object built in Python runs too."""
    write(toy=BASE)
    recipe = alloy.Recipe.load("toy.toml", ["train.steps=4"])
    assert isinstance(recipe, ToyRecipe)
    assert recipe.loaded.origins["train.steps"] == 'override "train.steps=4"'
    assert alloy.run(recipe) == RunResult(Path("toy"), {"steps": 4})
    built = ToyRecipe(command="toy", model=Hybrid(hidden=3))
    assert run(built).metrics == {"steps": 10}
    assert built.loaded.origins["model.hidden"] == "python"
    assert built.loaded.origins["train.steps"] == "default"
    assert tomllib.loads(built.loaded.to_toml())["model"]["hidden"] == 3


_NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
_TRAIN = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(0, 10**9),
        "lr": st.floats(min_value=0, allow_nan=False),
        "betas": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list),
        "optimizer": st.sampled_from(["adamw", "muon"]),
        "compile": st.booleans(),
        "note": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    },
)


@given(train=_TRAIN, seed=st.integers(0, 2**31), paths=st.lists(_NAMES, max_size=3))
@settings(max_examples=40, deadline=None)
def test_round_trip_through_toml(
    tmp_path_factory: pytest.TempPathFactory, train: Any, seed: int, paths: list[str]
) -> None:
    """dump_toml -> load gives the values back; writing the resolved recipe and loading it again changes nothing."""
    folder = tmp_path_factory.mktemp("recipes")
    data = {"command": "toy", "seed": seed, "model": {"kind": "hybrid", "hidden": 3}, "train": train}
    data["data"] = {"sources": [{"path": path} for path in paths]}
    file = folder / "x.toml"
    file.write_text(dump_toml(data), encoding="utf-8")
    loaded = load_recipe(file)
    recipe = loaded.recipe
    assert isinstance(recipe, ToyRecipe)
    expected = Train.model_validate({**train, "betas": tuple(train.get("betas", (0.9, 0.95)))})
    assert (recipe.train, recipe.seed) == (expected, seed)
    file.write_text(loaded.to_toml(), encoding="utf-8")
    assert load_recipe(file).recipe == recipe


@given(train=_TRAIN, unknown=_NAMES)
@settings(max_examples=40, deadline=None)
def test_random_overrides(tmp_path_factory: pytest.TempPathFactory, train: dict[str, Any], unknown: str) -> None:
    """Overrides written as TOML give the values that pydantic gives for the same keys; an unknown key is refused."""
    file = tmp_path_factory.mktemp("recipes") / "x.toml"
    file.write_text(BASE, encoding="utf-8")
    texts = [
        dump_toml({name: value}).strip("\n").replace(f"{name} = ", f"train.{name}=", 1) for name, value in train.items()
    ]
    loaded = load_recipe(file, texts)
    assert isinstance(loaded.recipe, ToyRecipe)
    given_values = {"steps": 7, "lr": 3e-4, **train}
    assert loaded.recipe.train.model_dump(include=set(given_values), mode="json") == given_values
    assert {name for name, origin in loaded.origins.items() if origin.startswith("override")} == {
        dotted(("train", name)) for name in train
    }
    if unknown not in Train.model_fields:
        with pytest.raises(RecipeError, match=f'unknown key "train.{unknown}"'):
            load_recipe(file, [f"train.{unknown}=1"])
