"""Recipes: TOML files with `extends` and dotted overrides, checked by pydantic models.

A command's recipe is a subclass of `Recipe` that adds tables and a `run`. `load_recipe` composes the file
(`core.compose`), picks the subclass by the recipe's `command`, validates, and turns every complaint into
"file:line: what is wrong. What to do." (`core.explain`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from alloy.core.compose import Composed, compose, leaves
from alloy.core.explain import explain
from alloy.core.registry import Registry
from alloy.core.toml import Key, Table, dotted, dump_toml, is_list, is_table
from alloy.errors import RecipeError

COMMANDS = Registry("command")
COMMANDS.add("pretrain", "alloy.train.tasks.pretrain:PretrainRecipe")
COMMANDS.add("data run", "alloy.data.run:DataRecipe")


class Config(BaseModel):
    """Base of recipe tables and model configs: frozen, typed, unknown keys refused.

    What a recipe resolves to must load again. Hence validators of whole tables run "after": a "before" or "wrap" one turns
    what is read into Python objects, for which strict checking refuses a list as a tuple. And a field that may be None has
    None as its default, because TOML cannot say None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Recipe(Config):
    """What every command's recipe has. Subclasses add tables and `run`."""

    # name in COMMANDS of the command that runs this recipe
    command: str
    seed: int = 0

    _loaded: "LoadedRecipe | None" = PrivateAttr(default=None)

    @property
    def loaded(self) -> "LoadedRecipe":
        """This recipe with the origin of each key: as `load` read it, or as built in Python."""
        return self._loaded or _built(self)

    @classmethod
    def load(cls, name: str | Path, overrides: Sequence[str] = ()) -> Self:
        """The recipe called `name` (a path or a shipped name), validated, as the class its command asks for."""
        loaded = load_recipe(name, overrides, None if cls == Recipe else cls)
        recipe = loaded.recipe
        assert isinstance(recipe, cls), "load_recipe validates with the class it is given"
        recipe._loaded = loaded
        return recipe

    def run(self, options: "RunOptions") -> "RunResult":
        """Do what the recipe says."""
        raise NotImplementedError(f"{type(self).__name__} does not define run")


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and where it came from.

    Attributes:
        recipe: the validated object.
        data: the merged table as written, without defaults.
        origins: dotted key of every value, defaults included -> "file:line", 'override "..."' or "default".
        name: stem of the recipe's file.
    """

    recipe: Recipe
    data: Table
    origins: dict[str, str]
    name: str

    @property
    def resolved(self) -> Table:
        """All values including defaults; None (not set) is left out."""
        return _without_none(self.recipe.model_dump(mode="json"))

    @property
    def hash(self) -> str:
        """Fingerprint of the resolved values: equal for recipes that do the same."""
        text = json.dumps(self.resolved, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_toml(self, origins: bool = False) -> str:
        """The resolved recipe as a re-runnable file, with each key's origin as a comment on request."""
        return dump_toml(self.resolved, (lambda key: self.origins.get(dotted(key))) if origins else None)


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe; nothing here changes the result."""

    run_dir: Path | None = None
    # "auto", a run directory, or None for a new run
    resume: str | None = None
    dry_run: bool = False
    quiet: bool = False
    json: bool = False
    profile: bool = False
    loaded: LoadedRecipe | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its directory, final metrics, and the checkpoint folder if it made one."""

    dir: Path
    metrics: dict[str, object] = field(default_factory=dict[str, object])
    checkpoint: Path | None = None


def load_recipe(name: str | Path, overrides: Sequence[str] = (), kind: type[Recipe] | None = None) -> LoadedRecipe:
    """Compose and validate a recipe.

    Args:
        name: path of a TOML file, or the name of a shipped recipe.
        overrides: "dotted.key=value" texts, applied in order.
        kind: the class to validate with; None: the class of the recipe's `command`.
    """
    composed = compose(name, overrides)
    model = kind or _kind_of(composed)
    try:
        # through JSON, so that strict checking still lets lists become tuples and strings become paths
        recipe = model.model_validate_json(json.dumps(composed.data, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(explain(error, model, composed)) from error
    return LoadedRecipe(recipe, composed.data, _origins(recipe, composed), composed.path.stem)


def run(recipe: Recipe, options: RunOptions | None = None) -> RunResult:
    """Run a recipe, loaded from a file or built in Python; what the command line calls."""
    options = options or RunOptions()
    if options.loaded is None:
        options = replace(options, loaded=recipe.loaded)
    return recipe.run(options)


def _built(recipe: Recipe) -> LoadedRecipe:
    data = recipe.model_dump(mode="json", exclude_unset=True)
    origins = {dotted(key): "default" for key in leaves(recipe.model_dump(mode="json"))}
    origins.update({dotted(key): "python" for key in leaves(data)})
    return LoadedRecipe(recipe, data, origins, recipe.command)


def _kind_of(composed: Composed) -> type[Recipe]:
    command = composed.data.get("command")
    if not isinstance(command, str):
        raise RecipeError(
            f"{composed.where(('command',))}: no `command` names what runs this recipe. "
            f"Add one of {', '.join(COMMANDS.names())}, or extend a recipe that has it."
        )
    try:
        kind = COMMANDS.get(command)
    except RecipeError as error:
        raise RecipeError(f'{composed.where(("command",))}: command = "{command}": {error}') from error
    assert isinstance(kind, type), f"{command} is not registered with a class"
    assert issubclass(kind, Recipe), f"{command} is not registered with a Recipe class"
    return kind


def _origins(recipe: Recipe, composed: Composed) -> dict[str, str]:
    def origin(key: Key) -> str:
        return composed.origins.get(key, "default")

    return {dotted(key): origin(key) for key in leaves(_without_none(recipe.model_dump(mode="json")))}


def _without_none(value: Any) -> Any:
    if is_table(value):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if is_list(value):
        return [_without_none(element) for element in value]
    return value


__all__ = [
    "COMMANDS",
    "Config",
    "LoadedRecipe",
    "Recipe",
    "RunOptions",
    "RunResult",
    "dump_toml",
    "load_recipe",
    "run",
]
