"""Pydantic's complaints as messages a user can act on: file, line, key, value, nearest valid key."""

import difflib
import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from alloy.core.compose import Composed
from alloy.core.toml import Key, dotted, is_list, is_table

# more complaints than this would hide the first
_MOST = 8
_MOST_KEYS = 16
# how much a complaint says that another member of a union was meant; all others count 1
_MISFIT = {"literal_error": 100, "union_tag_not_found": 15, "extra_forbidden": 10}

# what pydantic calls them -> what a user of JSON calls them
_SAID = {
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "json_type": "must be a string with a JSON object",
    "json_invalid": "must be a string with a JSON object",
    "missing": "is missing",
}


def explain(error: ValidationError, model: type[BaseModel], composed: Composed) -> str:
    """All complaints of `error` about `composed`, one a line, each with its place and a way out."""
    # unknown keys first: a misspelt key is also a missing one
    details = sorted(
        _relevant(error.errors(include_url=False), composed.data),
        key=lambda placed: placed[1]["type"] != "extra_forbidden",
    )
    texts = list(dict.fromkeys(_one(detail, key, model, composed) for key, detail in details))
    if len(texts) > _MOST:
        texts = [*texts[:_MOST], f"and {len(texts) - _MOST} more."]
    return "\n".join(texts)


def nearest_key(model: type[BaseModel], data: Any, key: Key) -> str:
    """A sentence that helps with an unknown key: the same name elsewhere, a similar one beside it, or all that exist."""
    holders = list(_models_at(model, data, key[:-1]))
    beside = sorted({name for holder in holders for name in holder.model_fields} - {str(key[-1])})
    name = str(key[-1])
    elsewhere = [path for path in _schema_keys(model, data) if path[-1] == name and path != key]
    if elsewhere:
        return f'Did you mean "{dotted(elsewhere[0])}"?'
    close = difflib.get_close_matches(name, beside, n=1, cutoff=0.55)
    if close:
        return f'Did you mean "{dotted((*key[:-1], close[0]))}"?'
    more = f" and {len(beside) - _MOST_KEYS} more" if len(beside) > _MOST_KEYS else ""
    return f"Known here: {', '.join(beside[:_MOST_KEYS])}{more}." if beside else ""


def deepest(error: ValidationError, data: object) -> tuple[Key, str]:
    """Of a JSON document that does not fit: where `error` reaches deepest, and what must be there; of a union, the member
    that was meant."""
    placed = [(_place(detail, data)[0], detail) for detail in error.errors(include_url=False)]
    key, _ = max(placed, key=lambda p: len(p[0]))
    said = [d for k, d in placed if k == key]
    # the member of a union whose type fits says more than those whose type does not
    said = [d for d in said if d["type"] not in _SAID] or said
    texts = list(dict.fromkeys(_SAID.get(d["type"], _lowered(d["msg"])) for d in said))
    musts = [t.removeprefix("must be ") for t in texts]
    return key, "must be " + " or ".join(musts) if all(t.startswith("must be ") for t in texts) else texts[0]


def _relevant(errors: list[ErrorDetails], data: Any) -> Iterator[tuple[Key, ErrorDetails]]:
    """Complaints with the path of the key they are about. Of a union that failed, only the best-fitting member speaks."""
    placed = [(*_place(detail, data), detail) for detail in errors]
    # (path of the union, member) -> how badly the member fits
    misfit: dict[tuple[Key, str], int] = {}
    for _, tag, detail in placed:
        if tag:
            misfit[tag] = misfit.get(tag, 0) + _MISFIT.get(detail["type"], 1)
    best: dict[Key, str] = {}
    for (key, member), badness in misfit.items():
        if key not in best or badness < misfit[key, best[key]]:
            best[key] = member
    spoken = [(key, detail) for key, tag, detail in placed if not tag or best[tag[0]] == tag[1]]
    # a table of an unknown kind: which keys belong there is not known either
    unknown = {key[:-1] for key, detail in spoken if key[-1:] == ("kind",) and detail["type"] == "literal_error"}
    for key, detail in spoken:
        if key[:-1] not in unknown or key[-1] == "kind":
            yield key, detail


def _place(detail: ErrorDetails, data: Any) -> tuple[Key, tuple[Key, str] | None]:
    """Path in the data of a complaint's `loc`, and the union member that spoke, if one did."""
    key: Key = ()
    tag: tuple[Key, str] | None = None
    here = data
    loc = detail["loc"]
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if _holds(here, part):
            here, key = here[part], (*key, part)
        elif is_last and detail["type"] in ("missing", "extra_forbidden"):
            key = (*key, part)
        elif tag is None:
            tag = (key, str(part))
    return key, tag


def _holds(data: Any, part: str | int) -> bool:
    """Whether `data` is a table or list with an element `part`."""
    return part in data if is_table(data) else is_list(data) and isinstance(part, int) and part < len(data)


def _one(detail: ErrorDetails, key: Key, model: type[BaseModel], composed: Composed) -> str:
    kind, value, name = detail["type"], detail["input"], dotted(key)
    where = composed.where(key)
    if kind == "extra_forbidden":
        return f'{where}: unknown key "{name}". {nearest_key(model, composed.data, key)}'.rstrip()
    if kind == "missing":
        return f'{where}: "{name}" is missing and has no default. Add it.'
    if kind in ("value_error", "assertion_error"):
        message = detail["msg"].partition(", ")[2]
        return f"{_guess_line(message, key, composed)}: {name + ': ' if name else ''}{message}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        context = detail.get("ctx", {})
        tag, known = context["discriminator"].strip("'"), str(context.get("expected_tags", ""))
        if kind == "union_tag_not_found":
            return f'{where}: "{name}.{tag}" is missing. Add it{" as one of " + known if known else ""}.'
        close = difflib.get_close_matches(str(context["tag"]), re.findall(r"'([^']*)'", known), n=1)
        hint = f'Did you mean "{close[0]}"?' if close else f"Known: {known}."
        return f'{composed.where((*key, tag))}: {name}.{tag} = "{context["tag"]}" is not known. {hint}'
    if kind == "literal_error" and key[-1:] == ("kind",):
        # of all the tables that may stand here, not only of the one that was tried
        holders = [holder.model_fields.get("kind") for holder in _models_at(model, None, key[:-1])]
        kinds = list(dict.fromkeys(str(value) for info in holders if info for value in get_args(info.annotation)))
        close = difflib.get_close_matches(str(value), kinds, n=1)
        hint = f'Did you mean "{close[0]}"?' if close else f"Known: {', '.join(kinds)}."
        return f"{where}: {name} = {_shown(value)} is not known. {hint}"
    if kind in ("too_long", "too_short"):
        context = detail.get("ctx", {})
        bound = f"most {context['max_length']}" if kind == "too_long" else f"least {context['min_length']}"
        wish = f"must be a list of at {bound}, not {context['actual_length']}"
        return f"{where}: {name} = {_shown(value)}: {wish}."
    wish = (
        detail["msg"]
        .replace("Input should be", "must be")
        .replace("an object", "a table")
        .replace("valid array", "list")
    )
    hint = ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        hint = f" Write {int(value)}."
    elif kind == "string_type" and "override" in where:
        hint = f""" Quote it: '{name}="{value}"'."""
    return f"{where}: {name} = {_shown(value)}: {wish[:1].lower()}{wish[1:]}.{hint}"


def _lowered(text: str) -> str:
    text = text.removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _guess_line(message: str, key: Key, composed: Composed) -> str:
    """The line of the first key that a validator's message names, else of the table it is about."""
    for word in re.findall(r"\w+", message):
        if (*key, word) in composed.origins:
            return composed.origins[*key, word]
    return composed.where(key)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _models_at(annotation: Any, data: Any, key: Key) -> Iterator[type[BaseModel]]:
    """Pydantic models that may stand at `key` below `annotation`, as far as the data's literal fields leave open."""
    for member in _members(annotation, data):
        if not key:
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield member
            continue
        part, rest = key[0], key[1:]
        yield from _models_at(_child(member, part), _inner(data, part), rest)


def _members(annotation: Any, data: Any) -> list[Any]:
    """The alternatives of a type: unions opened, models whose literal fields contradict the data left out."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0], data)
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member, data)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and is_table(data):
        for name, info in annotation.model_fields.items():
            if name in data and get_origin(info.annotation) is Literal and data[name] not in get_args(info.annotation):
                return []
    return [annotation]


def _child(annotation: Any, part: str | int) -> object:
    """Type of the element `part` of a model, a mapping or a sequence; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        info = annotation.model_fields.get(str(part))
        return info.annotation if info else None
    arguments = get_args(annotation)
    if not arguments:
        return None
    if get_origin(annotation) is tuple and isinstance(part, int) and arguments[-1] is not Ellipsis:
        return arguments[part] if part < len(arguments) else None
    return arguments[0] if isinstance(part, int) else arguments[-1]


def _inner(data: Any, part: str | int) -> Any:
    return data[part] if _holds(data, part) else None


def _schema_keys(model: Any, data: Any, at: Key = ()) -> Iterator[Key]:
    """Dotted keys that the tables (not the lists) of a model have."""
    for member in _members(model, data):
        if isinstance(member, type) and issubclass(member, BaseModel):
            for name, info in member.model_fields.items():
                yield (*at, name)
                yield from _schema_keys(info.annotation, _inner(data, name), (*at, name))
