"""Recipe files into one table: `extends`, merging, `"@unset"`, dotted overrides, and where each key came from.

Rules (complete): `extends` lists files relative to the file or shipped names, merged left to right before the file's own
keys; tables merge by key; arrays replace; `key = "@unset"` removes an inherited key; an override addresses list elements
by number (`data.sources.0.weight=0.3`) and its value is a TOML value, or a string where it is none.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from alloy.core.toml import Key, Table, dotted, is_list, is_table, key_lines
from alloy.errors import RecipeError

SHIPPED = Path(__file__).parent.parent / "recipes"
UNSET = "@unset"


@dataclass
class Composed:
    """A merged recipe.

    Attributes:
        path: the file that was asked for.
        data: merged keys, without `extends`.
        origins: path of each table, key and list element -> "file:line" or 'override "a.b=1"'.
    """

    path: Path
    data: Table = field(default_factory=dict[str, Any])
    origins: dict[Key, str] = field(default_factory=dict[Key, str])

    def where(self, key: Key) -> str:
        """Where `key`, or else the nearest table around it, was written."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.origins:
                return self.origins[key[:end]]
        return display_path(self.path)


def compose(name: str | Path, overrides: Sequence[str] = ()) -> Composed:
    """Read the recipe called `name` (a path or a shipped name) with all it extends, then apply the overrides."""
    path = find_recipe(str(name), None)
    merged = Composed(path)
    _merge_file(merged, path, ())
    for text in overrides:
        _override(merged, text)
    return merged


def compose_overrides(overrides: Sequence[str]) -> Composed:
    """Overrides alone, for a command whose settings come from no file."""
    merged = Composed(Path())
    for text in overrides:
        _override(merged, text)
    return merged


def find_recipe(name: str, base: Path | None, origin: str = "") -> Path:
    """The file behind a recipe name: relative to `base` (default: the working directory), or shipped."""
    near = Path(name) if base is None else base / name
    for path in (near, SHIPPED / name, SHIPPED / f"{name}.toml"):
        if path.is_file():
            return path.resolve()
    shipped = shipped_names()
    close = difflib.get_close_matches(name.removesuffix(".toml"), shipped, n=1)
    hint = f'Did you mean "{close[0]}"?' if close else "`alloy recipes list` shows the shipped ones."
    raise RecipeError(f'{origin}no recipe "{name}": neither a file nor a shipped name. {hint}')


def shipped_names() -> list[str]:
    """Names of all files below `alloy/recipes`, fragments included."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.toml"))


def display_path(path: Path) -> str:
    """A path as messages print it: relative to the working directory or to the package when below them."""
    for root in (Path.cwd(), SHIPPED.parent.parent):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.as_posix()


def read_toml(path: Path) -> tuple[Table, dict[Key, int]]:
    """A TOML file as a table, and the line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), key_lines(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = place.removeprefix("line ").split(",")[0]
        line = line if line.isdigit() else str(len(path.read_text(encoding="utf-8").splitlines()))
        raise RecipeError(
            f"{display_path(path)}:{line}: not valid TOML: {message[:1].lower()}{message[1:]}."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{display_path(path)}: not UTF-8 at byte {error.start}. Save the file as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{display_path(path)}: cannot be read: {error.strerror}.") from error


def leaves(value: Any, key: Key = ()) -> Iterator[Key]:
    """Paths of all values that are neither tables nor lists of tables; an empty table counts as a value."""
    if is_table(value) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*key, name))
    elif is_list(value) and any(is_table(element) for element in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*key, index))
    elif key:
        yield key


def _merge_file(merged: Composed, path: Path, chain: tuple[Path, ...]) -> None:
    name = display_path(path)
    if path in chain:
        circle = " -> ".join(display_path(file) for file in (*chain[chain.index(path) :], path))
        raise RecipeError(f"recipes extend each other in a circle: {circle}. Remove one of these `extends`.")
    data, lines = read_toml(path)
    where = {key: f"{name}:{line}" for key, line in lines.items()}
    parents: Any = data.pop("extends", [])
    if not is_list(parents) or not all(isinstance(parent, str) for parent in parents):
        raise RecipeError(
            f'{where[("extends",)]}: extends = {parents!r}: must be a list of recipe names, ["base/model"].'
        )
    for index, parent in enumerate(parents):
        origin = f"{where[('extends', index)]}: "
        _merge_file(merged, find_recipe(parent, path.parent, origin), (*chain, path))
    _merge_table(merged, merged.data, data, (), lambda key: where[key])


def _merge_table(merged: Composed, into: Table, table: Table, at: Key, where: Callable[[Key], str]) -> None:
    for name, value in table.items():
        key = (*at, name)
        if value == UNSET:
            if name not in into:
                raise RecipeError(f'{where(key)}: {dotted(key)} = "{UNSET}", but nothing inherited sets it.')
            _forget(merged, key)
            del into[name]
        elif is_table(value):
            inner = into.get(name)
            if not is_table(inner):
                _forget(merged, key)
                inner = into[name] = {}
            merged.origins[key] = where(key)
            _merge_table(merged, inner, value, key, where)
        else:
            _forget(merged, key)
            into[name] = value
            for inner_key in _paths(value, key):
                merged.origins[inner_key] = where(inner_key)


def _forget(merged: Composed, key: Key) -> None:
    """Drop the origins of `key` and of all below it."""
    for known in [known for known in merged.origins if known[: len(key)] == key]:
        del merged.origins[known]


def _paths(value: Any, key: Key) -> Iterator[Key]:
    """`key` and every path below it."""
    yield key
    inner = value.items() if is_table(value) else enumerate(value) if is_list(value) else ()
    for name, element in inner:
        yield from _paths(element, (*key, name))


def _override(merged: Composed, text: str) -> None:
    """Apply one `dotted.key=value`."""
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f'override "{text}": write dotted.key=value, such as train.lr=3e-4.')
    origin = f'override "{text}"'
    value = parse_value(value_text.strip(), origin)
    holder: Any = merged.data
    key: Key = ()
    for part in parts[:-1]:
        step = _step(holder, part, key, origin)
        key = (*key, step)
        if is_table(holder):
            holder = holder.setdefault(part, {})
        elif is_list(holder):
            holder = holder[int(step)]
        merged.origins.setdefault(key, origin)
    last = _step(holder, parts[-1], key, origin)
    if is_table(holder):
        _merge_table(merged, holder, {str(last): value}, key, lambda key: origin)
    elif is_list(holder):
        if value == UNSET:
            raise RecipeError(f"{origin}: a list element cannot be unset; give the whole list {dotted(key)}=[...].")
        _forget(merged, (*key, last))
        holder[int(last)] = value
        merged.origins.update(dict.fromkeys(_paths(value, (*key, last)), origin))


def _step(holder: Any, part: str, key: Key, origin: str) -> str | int:
    """`part` as a key of `holder`: a name in a table, a number in a list."""
    if is_table(holder):
        return part
    if not is_list(holder):
        raise RecipeError(f"{origin}: {dotted(key)} = {holder!r} is a single value and has no key {part!r}.")
    if not part.isdigit() or int(part) >= len(holder):
        have = f"it has {len(holder)}, numbered from 0" if holder else "it is empty"
        raise RecipeError(f"{origin}: {dotted(key)} is a list and {part!r} is no element of it ({have}).")
    return int(part)


def parse_value(text: str, origin: str) -> Any:
    """A TOML value; a bare word that is no TOML (and a date) is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise RecipeError(f"{origin}: {text} is not valid TOML: {error}.") from error
        return text
    value = parsed["value"]
    if len(parsed) > 1 or text.startswith("#") or isinstance(value, date | time):
        return text
    return value
