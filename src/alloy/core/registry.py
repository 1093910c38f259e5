"""The project's only registry: a name leads to an object that is imported on first use."""

import difflib
import importlib
from collections.abc import Iterator

from alloy.errors import RecipeError


class Registry:
    """Maps names to objects. A target may be a "module:attribute" string, resolved on first use,
    so that listing names imports nothing."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._targets: dict[str, object] = {}

    def add(self, name: str, target: object) -> None:
        """Register `target` under `name`; a name can be taken once."""
        if name in self._targets:
            raise ValueError(f'{self.what} "{name}" is registered already')
        self._targets[name] = target

    def get(self, name: str) -> object:
        """The object behind `name`; RecipeError with the nearest name if there is none."""
        if name not in self._targets:
            near = difflib.get_close_matches(name, self._targets, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else f" Known: {', '.join(self.names())}."
            raise RecipeError(f'unknown {self.what} "{name}".{hint}')
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target

    def names(self) -> list[str]:
        """Registered names, in order of registration."""
        return list(self._targets)

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)
