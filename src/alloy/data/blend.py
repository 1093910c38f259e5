"""Blends: which sources are mixed in which shares, phase after phase, checked before anything is trained.

A blend file is JSON or TOML: `{"datasets": [{name, path, subset, split, text_field, weight}]}` as Nemotron's recipes have it,
and beside that `max_epochs`, `min_share`, `max_share`, `tokens` (unique ones, where the shards are elsewhere) for a source and
`phases: [{name, tokens, weights, seq_len, seq_len_cycle, ramp}]`. A source without a path is a hole: it is named in a plan, and
training needs `renormalise` to go on without it. Keys that begin with "_" are comments; `_missing_categories` are holes.

Presets `nano3`, `super3`, `ultra3` have the shares of Nemotron 3's reports; what is open carries its data set's id.
Sources: data.md section 10; NVIDIA-NeMo/Nemotron, recipes/super3/stage0_pretrain; Nemotron 3 Nano (tech report), figure 3.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from alloy.core.explain import deepest
from alloy.core.recipe import Config
from alloy.core.toml import dotted
from alloy.errors import RecipeError

PRESETS = Path(__file__).parent / "blends"
# parts of equal length in which a ramp moves from one phase's shares to the next's
RAMP_STEPS = 16

Share = Annotated[float, Field(ge=0, le=1)]


class BlendSource(Config):
    """One data set of a blend."""

    name: str
    # shards, text, or hf://owner/name; None: a hole
    path: str | None = None
    subset: str | None = None
    split: str | None = None
    text_field: str = "text"
    weight: float = 1.0
    # most times that its tokens may be seen
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    min_share: Share = 0.0
    max_share: Share = 1.0
    # unique tokens, where no shards say
    tokens: Annotated[int, Field(gt=0)] | None = None
    note: str | None = None

    @property
    def place(self) -> str | None:
        """The path, with the subset's folder where there is one."""
        inner = None if self.path is None or self.subset is None else Path(self.path) / self.subset
        return str(inner) if inner and inner.exists() else self.path


class BlendPhase(Config):
    """A stretch of training with shares of its own."""

    name: str
    # None: to the end of training
    tokens: Annotated[int, Field(gt=0)] | None = None
    # by source; sources not named give nothing. None: the weights of the sources
    weights: dict[str, float] | None = None
    seq_len: Annotated[int, Field(gt=1)] | None = None
    # (length, share of the iterations), never mixed in one iteration
    seq_len_cycle: tuple[tuple[int, float], ...] = ()
    # tokens at its beginning in which shares move from those of the phase before
    ramp: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.tokens is not None and self.ramp > self.tokens:
            raise ValueError(f"ramp = {self.ramp} is longer than the phase, tokens = {self.tokens}")
        if self.seq_len_cycle and not math.isclose(sum(share for _, share in self.seq_len_cycle), 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of seq_len_cycle = {self.seq_len_cycle} do not add up to 1")
        return self


class Blend(Config):
    """Sources and the phases that mix them; without phases, one that lasts as long as training."""

    datasets: Annotated[tuple[BlendSource, ...], Field(min_length=1)]
    phases: tuple[BlendPhase, ...] = ()

    @model_validator(mode="after")
    def check(self) -> Self:
        for kind, names in (("dataset", [d.name for d in self.datasets]), ("phase", [p.name for p in self.phases])):
            if len(set(names)) < len(names):
                raise ValueError(f"two of one name among the {kind}s: {', '.join(names)}")
        if any(phase.tokens is None for phase in self.phases[:-1]):
            raise ValueError("every phase but the last needs `tokens`, or nothing says when the next one begins")
        return self

    def phase_list(self) -> Sequence[BlendPhase]:
        """The phases; one if the file names none."""
        return self.phases or (BlendPhase(name="all"),)


@dataclass(frozen=True)
class PlanLine:
    """What a source gives to a phase; `epochs` are those of all phases up to its end, None where unknown."""

    phase: str
    source: str
    share: float
    tokens: int
    unique: int | None
    epochs: float | None
    max_epochs: float | None


def load_blend(name: str | Path) -> Blend:
    """A blend file, or a preset by its name."""
    path = Path(name)
    preset = PRESETS / f"{path.stem}.json"
    if not path.is_file():
        if not preset.is_file():
            known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.json")))
            raise RecipeError(f"{name}: no such blend file, nor a preset of that name ({known}).")
        path = preset
    try:
        data = tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
    except ValueError as error:
        raise RecipeError(f"{path} is not {path.suffix.removeprefix('.').upper() or 'JSON'}: {error}.") from error
    if not isinstance(data, dict):
        raise RecipeError(f'{path} holds no object; a blend is {{"datasets": [...]}}.')
    holes = data.get("_missing_categories", {})
    data = _without_comments(data)
    data.setdefault("datasets", []).extend({"name": key, "weight": hole["weight"]} for key, hole in holes.items())
    try:
        return Blend.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        key, text = deepest(error, data)
        raise RecipeError(f"{path}: {dotted(key)} {text}.") from error


def phase_shares(blend: Blend, phase: BlendPhase, renormalise: bool = False) -> dict[str, float]:
    """The share of every source in a phase, in the order of the blend; refuses what cannot be followed.

    Args:
        blend: the sources
        phase: one of its phases
        renormalise: leave holes out and scale up the rest
    """
    sources = {source.name: source for source in blend.datasets}
    weights = {name: source.weight for name, source in sources.items()} if phase.weights is None else phase.weights
    where = f'phase "{phase.name}"'
    for name, weight in weights.items():
        if name not in sources:
            raise RecipeError(f'{where}: weight of an unknown source "{name}"; known: {", ".join(sources)}.')
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f'{where}: weight {weight} of "{name}"; weights are finite and not negative.')
    holes = {name: weight for name, weight in weights.items() if weight and sources[name].path is None}
    if holes and not renormalise:
        missing = ", ".join(f'missing "{name}", weight {weight:g}' for name, weight in holes.items())
        raise RecipeError(f"{where}: {missing}. Name paths for them, or share out what is left with renormalise.")
    weights = {name: 0.0 if name in holes else weights.get(name, 0.0) for name in sources}
    total = sum(weights.values())
    if not total:
        raise RecipeError(f"{where}: all weights are 0; give at least one source that is there a positive weight.")
    return _bounded({name: weight / total for name, weight in weights.items()}, sources, where)


def plan_blend(
    blend: Blend, unique: Mapping[str, int | None], tokens: int | None = None, renormalise: bool = False
) -> list[PlanLine]:
    """What every phase takes of every source.

    Args:
        blend: to plan
        unique: tokens that there are, by source
        tokens: of the whole training; phases end there. None: as many as the phases have
        renormalise: see `phase_shares`
    """
    lines: list[PlanLine] = []
    given = dict.fromkeys(unique, 0.0)
    start = 0
    before: dict[str, float] | None = None
    for phase in blend.phase_list():
        room = None if tokens is None else max(tokens - start, 0)
        length = phase.tokens if room is None else room if phase.tokens is None else min(room, phase.tokens)
        if length is None:
            raise RecipeError(f'phase "{phase.name}" lasts to the end of training; say how many tokens that is.')
        shares = phase_shares(blend, phase, renormalise)
        ramp = min(phase.ramp, length) if before else 0
        for source in blend.datasets:
            share = shares[source.name]
            # over a ramp the mean of both shares
            wanted = share * (length - ramp) + ramp * (share + (before or shares)[source.name]) / 2
            known = unique.get(source.name)
            given[source.name] = given.get(source.name, 0.0) + wanted
            epochs = given[source.name] / known if known else None
            if wanted:
                lines.append(PlanLine(phase.name, source.name, share, round(wanted), known, epochs, source.max_epochs))
        before, start = shares, start + length
    return lines


def refuse_epochs(lines: Sequence[PlanLine]) -> None:
    """RecipeError for a source that would be seen more often than its max_epochs."""
    for line in lines:
        if line.epochs is not None and line.max_epochs is not None and line.epochs > line.max_epochs * (1 + 1e-9):
            raise RecipeError(
                f'source "{line.source}" would be seen {line.epochs:.2f} times by the end of phase "{line.phase}", above its '
                f"max_epochs = {line.max_epochs:g}; lower its weight, add data, or raise max_epochs."
            )


def scale_phases(blend: Blend, tokens: int) -> Blend:
    """The blend with all phases longer or shorter by one factor, so that they have `tokens` in all."""
    total = sum(phase.tokens or 0 for phase in blend.phases)
    if not total:
        return blend
    phases = [
        phase.model_copy(
            update={
                "tokens": None if phase.tokens is None else max(1, phase.tokens * tokens // total),
                "ramp": phase.ramp * tokens // total,
            }
        )
        for phase in blend.phases
    ]
    return blend.model_copy(update={"phases": tuple(phases)})


def mixture_phases(blend: Blend, seq: int, renormalise: bool = False) -> list[tuple[int | None, tuple[float, ...]]]:
    """(rows, shares of the sources that are there) of each stretch of constant shares; rows None: to the end.

    Boundaries are at the row nearest to the token where a phase ends, so that rounding does not add up.
    """
    there = [source.name for source in blend.datasets if source.path is not None]
    stretches: list[tuple[int | None, dict[str, float]]] = []
    start = 0
    before: dict[str, float] | None = None
    for number, phase in enumerate(blend.phase_list()):
        if phase.seq_len not in (None, seq) or phase.seq_len_cycle:
            raise RecipeError(
                f'phases[{number}] ("{phase.name}") has rows of {phase.seq_len or phase.seq_len_cycle} tokens and data.seq is '
                f"{seq}; one run has one length: train the phase in a run of its own, from the checkpoint of the one before."
            )
        shares = phase_shares(blend, phase, renormalise)
        ends: list[tuple[int | None, dict[str, float]]] = []
        if before and phase.ramp:
            for step in range(RAMP_STEPS):
                part = (step + 0.5) / RAMP_STEPS
                mixed = {name: (1 - part) * before[name] + part * shares[name] for name in shares}
                ends.append((start + phase.ramp * (step + 1) // RAMP_STEPS, mixed))
        end = None if phase.tokens is None else start + phase.tokens
        stretches += [*ends, (end, shares)]
        before, start = shares, end or 0
    rows: list[tuple[int | None, tuple[float, ...]]] = []
    done = 0
    for end, shares in stretches:
        here = None if end is None else max(round(end / seq) - done, 0)
        rows.append((here, tuple(shares[name] for name in there)))
        done += here or 0
    return rows


def _bounded(shares: dict[str, float], sources: Mapping[str, BlendSource], where: str) -> dict[str, float]:
    """Shares moved into the bounds of their sources; the others keep their proportions."""
    used = [name for name, share in shares.items() if share > 0]
    low, high = sum(sources[name].min_share for name in used), sum(sources[name].max_share for name in used)
    if low > 1 + 1e-9 or high < 1 - 1e-9:
        raise RecipeError(
            f"{where}: min_share of its sources add up to {low:g} and max_share to {high:g}; 1 must lie between."
        )
    fixed: dict[str, float] = {}
    while True:
        free = {name: share for name, share in shares.items() if name not in fixed and share > 0}
        room, total = 1 - sum(fixed.values()), sum(free.values())
        scaled = {name: share * room / total for name, share in free.items()}
        over = {n: sources[n].max_share for n, share in scaled.items() if share > sources[n].max_share + 1e-12}
        under = {n: sources[n].min_share for n, share in scaled.items() if share < sources[n].min_share - 1e-12}
        if not over and not under:
            return {name: fixed.get(name, scaled.get(name, 0.0)) for name in shares}
        # the side that is further out first, for the other may come to lie within its bounds; both if they cancel
        excess = sum(scaled[n] - bound for n, bound in over.items())
        lack = sum(bound - scaled[n] for n, bound in under.items())
        fixed |= (over if excess > lack - 1e-12 else {}) | (under if lack > excess - 1e-12 else {})


def _without_comments(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_comments(inner) for key, inner in value.items() if not key.startswith("_")}
    return [_without_comments(inner) for inner in value] if isinstance(value, list) else value
