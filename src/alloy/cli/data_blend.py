"""`alloy data blend`: what a blend file means, before anything is trained with it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alloy.errors import RecipeError

if TYPE_CHECKING:
    from alloy.data.blend import Blend, BlendPhase
    from alloy.data.shards import TokenCorpus

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Check the plan of a blend file.")


@app.callback()
def blend() -> None:
    """Blend files and presets (nano3, super3, ultra3)."""


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A blend file (JSON, TOML), or nano3, super3, ultra3.")],
    phase: Annotated[str | None, typer.Option(help="Name or number (from 1) of the only phase to show.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Of all phases together, or of --phase; else as the file says.")
    ] = None,
    renormalise: Annotated[bool, typer.Option("--renormalise", help="Leave sources without a path out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what every phase takes of every source, how often it is seen, and what is missing; refuse what cannot be."""
    from alloy.data.blend import load_blend, plan_blend, refuse_epochs, scale_phases

    plan = load_blend(file)
    if phase is not None:
        plan = plan.model_copy(update={"phases": (_chosen(plan, phase),)})
    if tokens is not None:
        plan = scale_phases(plan, int(tokens))
    corpora = _corpora(plan)
    unique = {source.name: source.tokens for source in plan.datasets}
    unique |= {name: corpus.num_tokens for name, corpus in corpora.items()}
    lines = plan_blend(plan, unique, None if tokens is None else int(tokens), renormalise)
    holes = {source.name: source.weight for source in plan.datasets if source.path is None and source.weight}
    notes = [f'missing "{name}", weight {weight:g}' for name, weight in holes.items()] + _too_long(plan, corpora)
    if as_json:
        typer.echo(json.dumps({"lines": [asdict(line) for line in lines], "notes": notes}))
    else:
        typer.echo(f"{'phase':16} {'source':44} {'share':>8} {'tokens':>20} {'unique':>18} {'epochs':>8}")
        for line in lines:
            known = "unknown" if line.unique is None else f"{line.unique:,}"
            epochs = "" if line.epochs is None else f"{line.epochs:.3f}"
            typer.echo(f"{line.phase:16} {line.source:44} {line.share:8.2%} {line.tokens:20,} {known:>18} {epochs:>8}")
        for note in notes:
            typer.echo(note, err=True)
    refuse_epochs(lines)


def _chosen(plan: "Blend", wanted: str) -> "BlendPhase":
    phases = plan.phase_list()
    for number, phase in enumerate(phases, start=1):
        if wanted in (phase.name, str(number)):
            return phase
    raise RecipeError(f"--phase {wanted}: there are {', '.join(phase.name for phase in phases)}.")


def _corpora(plan: "Blend") -> "dict[str, TokenCorpus]":
    """The shards of the sources that lie here."""
    from alloy.data.shards import MANIFEST, TokenCorpus

    found: dict[str, TokenCorpus] = {}
    for source in plan.datasets:
        if source.place and ((Path(source.place) / MANIFEST).exists() or Path(f"{source.place}.idx").exists()):
            found[source.name] = TokenCorpus(source.place)
    return found


def _too_long(plan: "Blend", corpora: "dict[str, TokenCorpus]") -> list[str]:
    """A line for every phase whose rows are longer than all documents."""
    longest = max((int(corpus.lengths.max()) for corpus in corpora.values()), default=0)
    rows = {phase.name: max([phase.seq_len or 0, *(seq for seq, _ in phase.seq_len_cycle)]) for phase in plan.phases}
    return [
        f'warning: phase "{name}" has rows of {seq:,} tokens, but no document here has more than {longest:,}'
        for name, seq in rows.items()
        if longest and seq > longest
    ]
