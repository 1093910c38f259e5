"""alloy: one PyTorch toolkit for the whole life of an efficient language model.

The public names below are imported on first use, so that `import alloy` costs nothing.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from alloy.core.recipe import Recipe, run
    from alloy.engine.core import LLM
    from alloy.engine.grammar import Grammar
    from alloy.engine.request import SamplingParams
    from alloy.errors import AlloyError
    from alloy.models.registry import MODELS, load, save

    register_model = MODELS.add

__all__ = [
    "LLM",
    "AlloyError",
    "Grammar",
    "Recipe",
    "SamplingParams",
    "__version__",
    "load",
    "register_model",
    "run",
    "save",
]

_PUBLIC = {
    "AlloyError": "alloy.errors:AlloyError",
    "Grammar": "alloy.engine.grammar:Grammar",
    "LLM": "alloy.engine.core:LLM",
    "Recipe": "alloy.core.recipe:Recipe",
    "SamplingParams": "alloy.engine.request:SamplingParams",
    "load": "alloy.models.registry:load",
    "register_model": "alloy.models.registry:MODELS.add",
    "run": "alloy.core.recipe:run",
    "save": "alloy.models.registry:save",
}

if any(Path(__file__).parent.parent.glob("alloy-[0-9]*.dist-info")):
    raise ImportError(
        "another distribution named `alloy` is installed over alloy-lm: "
        "pip uninstall alloy, then pip install --force-reinstall --no-deps alloy-lm"
    )


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alloy' has no attribute {name!r}")
    module, _, path = _PUBLIC[name].partition(":")
    value: object = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
