"""The keys of one config.json while it is read: aliases, what was used, errors in the file's own words. No torch here."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from alloy.errors import CheckpointError

Style = Literal["hybrid", "transformers5"]
# our field -> key of config.json
TOKEN_FIELDS = {"pad_id": "pad_token_id", "bos_id": "bos_token_id", "eos_ids": "eos_token_id"}
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "relu2": "relu2", "relu": "relu", "gelu": "gelu"}


class ConfigKeys:
    """The keys of one config.json: what was read is left out of `rest`."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = dict(data)
        self.source = source
        self.used: set[str] = set()

    def merge(self, aliases: Mapping[str, str]) -> None:
        """Move every alias to its own name; two spellings must agree."""
        for alias, name in aliases.items():
            if alias not in self.data:
                continue
            value = self.data.pop(alias)
            if value is None:
                continue
            if self.data.get(name) is not None and self.data[name] != value:
                raise self.refuse(f"{name} = {self.data[name]} and its alias {alias} = {value} differ; remove one")
            self.data[name] = value

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a key, `default` when it is absent or null."""
        self.used.add(name)
        value = self.data.get(name)
        return default if value is None else value

    def drop(self, *names: str) -> None:
        """Count a key as read, without using it."""
        self.used.update(names)

    def rest(self) -> dict[str, Any]:
        """Keys that nobody read, with their values."""
        return {name: value for name, value in self.data.items() if name not in self.used}

    def refuse(self, what: str) -> CheckpointError:
        """The error to raise, with the file in front."""
        return CheckpointError(f"{self.source}: {what}")


def token_ids(value: Any) -> tuple[int, ...]:
    """Token ids from one id, a list of them, or null."""
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)


def write_eos(ids: tuple[int, ...]) -> int | list[int] | None:
    """Token ids as config.json writes them: one id alone, several as a list."""
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)


def validated(model: type[Any], fields: dict[str, Any], names: Mapping[str, str], keys: ConfigKeys) -> Any:
    """The validated config; its errors are told in the names that config.json uses."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        known = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b(?= [=l]|$)")
        text = "; ".join(messages(error))
        raise keys.refuse(known.sub(lambda match: names[match[1]], text)) from error


def messages(error: ValidationError) -> list[str]:
    """What is wrong, one line each."""
    texts: list[str] = []
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            texts += messages(inner)
        elif item["loc"]:
            texts.append(f"{item['loc'][0]} = {item['input']!r}: {item['msg']}")
        else:
            texts.append(str(inner or item["msg"]))
    return texts
