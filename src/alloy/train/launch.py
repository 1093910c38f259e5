"""From a recipe to a finished run directory: what every training command does around the loop."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from alloy.core.device import peak_flops, resolve_device, seed_everything
from alloy.core.logging import get_logger, setup, start_panel
from alloy.core.metrics import SINKS, Sink
from alloy.core.recipe import RunOptions, RunResult
from alloy.core.run_report import report_run
from alloy.core.runs import RunDir, atomic_write, full_disk_is_resource_error
from alloy.parallel.fsdp import parallelize
from alloy.parallel.mesh import World, start_world
from alloy.train.checkpoint import replace_folder
from alloy.train.loop import Task, Trainer
from alloy.train.precision import DTYPES
from alloy.train.profile import LayerTimer
from alloy.train.recipe import TrainingRecipe

log = get_logger(__name__)

PROFILE_STEPS = 5


@dataclass(frozen=True)
class Plan:
    """What is known before anything is allocated; `rows` are what the start panel and `--dry-run` show."""

    rows: Mapping[str, object]
    # micro-batches per step and rank
    accumulation: int
    # of a training step
    flops_per_token: float | None = None
    # of a rank, an estimate
    memory_bytes: float = 0.0


def launch(
    recipe: TrainingRecipe,
    options: RunOptions,
    plan: Callable[[World], Plan],
    make_task: Callable[[World, Path], Task[Any]],
) -> RunResult:
    """Run a training recipe in a new or resumed run directory.

    Args:
        recipe: the validated recipe.
        options: from the command line.
        plan: checks the recipe against the number of ranks; called before anything is allocated.
        make_task: builds the task for a rank, given the run directory.
    """
    loaded = options.loaded
    assert loaded is not None, "recipes are run through core.recipe.run, which fills `loaded` in"
    world = start_world(resolve_device(recipe.device))
    setup(console=not options.quiet and world.is_main)
    known = plan(world)
    with contextlib.ExitStack() as stack:
        run = _open_run(recipe, options, world, stack)
        folder = Path(str(world.first(str(run.path) if run else None)))
        if run:
            setup(console=not options.quiet, file=folder / "log.txt")
        seed_everything(recipe.seed)
        task = make_task(world, folder)
        model = task.build_model()
        parallelize(model, world)
        trainer = Trainer(
            task,
            model,
            world,
            folder,
            recipe.train,
            recipe.log,
            accumulation=known.accumulation,
            flops_per_token=known.flops_per_token,
            peak_flops=_peak(world, recipe),
            sinks=_sinks(recipe, folder, world),
        )
        resumed = trainer.restore()
        if run:
            run.update_manifest(data=task.provenance())
            rows = {**known.rows, "run": folder, **({"resumed": f"after step {trainer.step:,}"} if resumed else {})}
            start_panel(f"alloy {recipe.command}", rows)
        timer = LayerTimer(model, PROFILE_STEPS) if options.profile and world.is_main else contextlib.nullcontext()
        with timer:
            metrics = trainer.fit()
        checkpoint = folder / "checkpoint"
        export(task, model, world, checkpoint)
        if run:
            run.update_manifest(metrics=metrics, tokens=trainer.tokens, steps=trainer.step)
            atomic_write(checkpoint / "README.md", model_card(run, known.rows, metrics))
    if run:
        report_run(folder)
    world.barrier()
    return RunResult(dir=folder, metrics=dict(metrics), checkpoint=checkpoint)


def export(task: Task[Any], model: nn.Module, world: World, folder: Path) -> None:
    """Write the product so that `folder` holds a whole checkpoint at any time; rank 0 gathers a sharded model."""
    whole = model
    if world.mesh is not None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
        if world.is_main:
            whole = task.build_model()
            whole.load_state_dict({name: tensor.to(world.device) for name, tensor in tensors.items()})
    if world.is_main:
        with (
            full_disk_is_resource_error(folder),
            tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as part,
        ):
            task.export(whole, Path(part) / folder.name)
            replace_folder(Path(part) / folder.name, folder)
    world.barrier()


def model_card(run: RunDir, rows: Mapping[str, object], metrics: Mapping[str, object]) -> str:
    """README.md of a checkpoint, from what the run knows; what it does not know is said to be not measured."""
    manifest = run.manifest
    facts = [f"| {name} | {value} |" for name, value in rows.items()]
    scores = [
        f"| {name} | {metrics[name]:.4f} |" for name in ("loss", "val_loss", "val_bits_per_token") if name in metrics
    ]
    packages = ", ".join(f"{name} {version}" for name, version in manifest.get("packages", {}).items())
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            f"# {manifest.get('recipe', 'model')}",
            "",
            f"Made by `{manifest.get('command_line', '')}` with alloy-lm {manifest.get('alloy')} ({packages}).",
            f"Seed, data and all settings: `recipe.toml` of the run (hash {manifest.get('hash')}).",
            "",
            "## Training",
            "| | |",
            "|---|---|",
            *facts,
            "",
            "## Results",
            "| measure | value |",
            "|---|---|",
            *(scores or ["| held-out loss | not measured |"]),
            "",
            "Benchmarks: not measured.",
            "",
            "## Data",
            *_data_lines(manifest),
            "",
            "## Intended use and limits",
            "Not stated by the authors of this run. Safety: not measured.",
            "",
        ]
    )


def _data_lines(manifest: Mapping[str, Any]) -> list[str]:
    sources = manifest.get("data", [])
    lines = ["| source | documents | tokens | licence |", "|---|---|---|---|"]
    lines += [
        f"| {s['path']} | {s['documents']:,} | {s['tokens']:,} | {s.get('licence') or 'not stated'} |" for s in sources
    ]
    return lines if sources else ["Not recorded."]


def _open_run(recipe: TrainingRecipe, options: RunOptions, world: World, stack: contextlib.ExitStack) -> RunDir | None:
    """The run directory on rank 0, None elsewhere; a refusal on rank 0 ends all ranks."""
    if not world.is_main:
        return None
    assert options.loaded is not None
    return stack.enter_context(RunDir.create(options.loaded, options, recipe.command))


def _peak(world: World, recipe: TrainingRecipe) -> float | None:
    peak = peak_flops(world.device, DTYPES[recipe.train.precision])
    return peak * world.size if peak else None


def _sinks(recipe: TrainingRecipe, folder: Path, world: World) -> tuple[Sink, ...]:
    if not recipe.log.tensorboard or not world.is_main:
        return ()
    make: Any = SINKS.get("tensorboard")
    return (make(folder / "tensorboard"),)
