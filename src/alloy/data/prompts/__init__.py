"""What models are asked: prompts as data files, with a version and a fingerprint that goes into the rows they made.

A file has `user`, in which `{text}` stands for the text, and optionally `system`. Prompts for labels name what can be said.
"""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from alloy.core.generator import Prompt, Sampling
from alloy.errors import RecipeError

SUFFIX = ".toml"
_SCORE = re.compile(r"final score:?\W*(\d+)\W*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class PromptFile:
    """A prompt: its name, fingerprint (16 hex digits of the file's sha256) and what the file says."""

    name: str
    sha: str
    version: int
    user: str
    system: str = ""
    choices: tuple[str, ...] = ()
    highest: int | None = None
    # of a conversation, and those of them who know
    speakers: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def fill(self, text: str, sampling: Sampling) -> Prompt:
        """The question about one text."""
        user = {"role": "user", "content": self.user.replace("{text}", text)}
        return Prompt(({"role": "system", "content": self.system}, user) if self.system else (user,), sampling)

    def label(self, answer: str) -> str | None:
        """The choice or score that an answer gives; None where it gives none."""
        if self.highest is not None:
            scores = [score for score in _SCORE.findall(answer) if int(score) <= self.highest]
            return scores[-1] if scores else None
        said = answer.strip().strip("*.\"'").lower()
        named = [choice for choice in self.choices if re.search(rf"\b{choice.lower()}\b", said)]
        # a word on the way to the answer is not the answer
        return named[0] if len(named) == 1 else None


def names() -> list[str]:
    """The prompts that ship with the package."""
    return sorted(f.name.removesuffix(SUFFIX) for f in resources.files(__name__).iterdir() if f.name.endswith(SUFFIX))


@cache
def load_prompt(name: str) -> PromptFile:
    """The shipped prompt called `name`, or the one in a file of the user's."""
    shipped = resources.files(__name__) / f"{name}{SUFFIX}"
    path = shipped if name in names() else Path(name)
    if not path.is_file():
        raise RecipeError(f'prompt = "{name}" is neither a file nor one of {", ".join(names())}.')
    data = path.read_bytes()
    try:
        table: dict[str, Any] = tomllib.loads(data.decode())
    except ValueError as error:
        raise RecipeError(f"{name} is not TOML: {error}") from error
    user = table.get("user")
    if not isinstance(user, str) or "{text}" not in user:
        raise RecipeError(f'{name}: a prompt has a text "user" with {{text}} where the text of the page goes.')
    known = {key: table[key] for key in ("version", "system", "highest") if key in table}
    known |= {key: tuple(table[key]) for key in ("choices", "speakers", "answers") if key in table}
    sha = hashlib.sha256(data).hexdigest()[:16]
    stem = Path(name).stem
    return PromptFile(stem, sha, **{"version": 1, **known}, user=user)
