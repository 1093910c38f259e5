"""`alloy data run`: a chain of stages in one folder, each fed by the one before, resumable at any point.

runs/cc-math/
  01-render/  02-clean/  ...   one folder a stage (pipeline.py)
  recipe.toml  manifest.json   as every run has
  report.html  README.md       funnel, histograms, samples; the card of the data set (card.py)
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import Field, model_validator

from alloy.core.logging import get_logger, setup, short_count, short_time, start_panel
from alloy.core.recipe import Config, Recipe, RunOptions, RunResult, load_recipe
from alloy.core.recipe import run as run_recipe
from alloy.core.runs import RunDir
from alloy.data.card import CardTable, write_card
from alloy.data.executors import Executor
from alloy.data.parts import find_files
from alloy.data.pipeline import STAGES, StageConfig, Totals, new_stage, run_stage

log = get_logger(__name__)

if TYPE_CHECKING:
    StageTable = StageConfig
else:
    # every registered stage; which one a table is, its key `stage` says
    StageTable = Annotated[
        Union[tuple(STAGES.get(name).Config for name in STAGES)],  # noqa: UP007  the members are known when it runs
        Field(discriminator="stage"),
    ]

EVERY_S = 5.0


class ThenTable(Config):
    """`[then]`: another recipe, run on the shards of the last `tokenize`, such as pretrain/tiny."""

    recipe: str
    overrides: tuple[str, ...] = ()


class DataRecipe(Recipe):
    """A recipe for `alloy data run`."""

    command: Literal["data run"] = "data run"
    executor: Executor = Executor()
    stages: Annotated[tuple[StageTable, ...], Field(min_length=1)]
    card: CardTable = CardTable()
    then: ThenTable | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.stages[0].input is None:
            raise ValueError("stages[0] has no input; name files, a folder or a pattern")
        if self.then and not any(stage.stage == "tokenize" for stage in self.stages):
            raise ValueError("[then] trains on shards, but no stage is tokenize")
        return self

    def run(self, options: RunOptions) -> RunResult:
        """Run the stages one after the other, then what `[then]` names."""
        if options.dry_run:
            return self._dry_run(options)
        setup(console=not options.quiet)
        loaded = options.loaded or self.loaded
        run = RunDir.create(loaded, options, self.command)
        with run:
            start_panel(
                "alloy data run", {"stages": " -> ".join(stage.stage for stage in self.stages), "run": run.path}
            )
            manifests = [self._stage(index, run.path) for index in range(len(self.stages))]
            write_card([self.folder(index, run.path) for index in range(len(self.stages))], run.path, self.card)
            run.update_manifest(stages=[_facts(manifest) for manifest in manifests])
            metrics: dict[str, object] = {"stages": [_facts(manifest) for manifest in manifests]}
            if self.then is None:
                return RunResult(run.path, metrics)
            return self._then(run.path, metrics, options)

    def folder(self, index: int, run: Path) -> Path:
        """Of a stage."""
        return run / f"{index + 1:02d}-{self.stages[index].stage}"

    def inputs(self, index: int, run: Path) -> list[str]:
        """Of a stage: what it names, or what the nearest stage before it made."""
        named = self.stages[index].input
        if named is None:
            before = next(i for i in range(index - 1, -1, -1) if new_stage(self.stages[i]).writes_rows)
            return [str(self.folder(before, run))]
        return [named] if isinstance(named, str) else list(named)

    def _stage(self, index: int, run: Path) -> dict[str, Any]:
        config = self.stages[index]
        config = config if config.seed else config.model_copy(update={"seed": self.seed})
        start = told = time.monotonic()

        def progress(totals: Totals) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= EVERY_S:
                told = now
                done = totals.bytes_done / totals.bytes_all if totals.bytes_all else 1.0
                eta = (now - start) / done - (now - start) if done else float("inf")
                rate = short_count(totals.rows / (now - start))
                log.info("%s %.0f%%  %s rows/s  eta %s", config.stage, 100 * done, rate, short_time(eta))

        manifest = run_stage(config, self.inputs(index, run), self.folder(index, run), self.executor, False, progress)
        counts = ", ".join(f"{name} {number:,}" for name, number in manifest["counts"].items())
        log.info(
            "%s: %s rows in, %s out, %.1f s%s", config.stage, f"{manifest['rows_in']:,}", f"{manifest['rows_out']:,}",
            manifest["wall_s"], f" ({counts})" if counts else "",
        )  # fmt: skip
        return manifest

    def _then(self, run: Path, metrics: dict[str, object], options: RunOptions) -> RunResult:
        assert self.then is not None, "called where there is such a table"
        shards = max(index for index, stage in enumerate(self.stages) if stage.stage == "tokenize")
        source = json.dumps(str(self.folder(shards, run)))
        tokenizer = self.stages[shards].model_dump().get("tokenizer") or str(self.folder(shards, run) / "tokenizer")
        overrides = [f"data.sources=[{{path={source}, weight=1.0}}]", f"data.tokenizer={json.dumps(tokenizer)}"]
        overrides += ["data.vocab=@unset", *self.then.overrides]
        loaded = load_recipe(self.then.recipe, overrides)
        folder = run / loaded.recipe.command.replace(" ", "-")
        resume = str(folder) if (folder / "manifest.json").is_file() else None
        inner = RunOptions(run_dir=None if resume else folder, resume=resume, quiet=options.quiet, loaded=loaded)
        result = run_recipe(loaded.recipe, inner)
        return RunResult(run, {**metrics, loaded.recipe.command: result.metrics}, result.checkpoint)

    def _dry_run(self, options: RunOptions) -> RunResult:
        """Say what would be done, having looked at the first input."""
        files = find_files(self.inputs(0, Path()), new_stage(self.stages[0]).reads_pages)
        size = sum(file.stat().st_size for file in files)
        rows: dict[str, object] = {"input": f"{len(files)} files, {size / 1e6:,.1f} MB"}
        rows |= {f"{i + 1} {stage.stage}": _settings(stage) for i, stage in enumerate(self.stages)}
        rows["executor"] = f"{self.executor.kind}, {self.executor.workers or 'one a core'}"
        setup(console=not options.quiet)
        start_panel("alloy data run, dry", rows)
        return RunResult(Path())


def _settings(stage: StageConfig) -> str:
    """What a table sets besides the defaults."""
    given = stage.model_dump(mode="json", exclude_defaults=True, exclude={"stage"})
    return "  ".join(f"{name}={value}" for name, value in given.items()) or "defaults"


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        name: manifest.get(name) for name in ("stage", "status", "rows_in", "rows_out", "counts", "losses", "wall_s")
    }
