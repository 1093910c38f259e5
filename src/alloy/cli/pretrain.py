"""`alloy pretrain RECIPE`."""

import os

from alloy.cli.run_command import (
    DryRun,
    Json,
    Overrides,
    Profile,
    Quiet,
    RecipeName,
    Resume,
    RunDirOption,
    run_recipe_command,
)
from alloy.core.recipe import RunOptions


def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
    profile: Profile = False,
) -> None:
    """Train a language model from scratch, or go on with one. Under torchrun every process is one rank."""
    # torch is loaded here, not when the command line lists its commands
    from alloy.parallel.mesh import clean_exit

    if os.environ.get("RANK", "0") != "0":
        quiet, json = True, False
    options = RunOptions(run_dir=run_dir, resume=resume, dry_run=dry_run, quiet=quiet, json=json, profile=profile)
    with clean_exit():
        run_recipe_command("pretrain", recipe, overrides, options)
