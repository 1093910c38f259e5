"""The command line: a table of commands, each imported only when it is invoked.

A new command is one file here and one line in `COMMANDS`.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from alloy.errors import AlloyError, InterruptedRun, RecipeError, from_os_error


class Command(NamedTuple):
    """Where a command lives ("module:attribute", a function or a typer app) and its line in `alloy --help`."""

    target: str
    help: str


COMMANDS = {
    "data": Command("alloy.cli.data:app", "From text to tokenizers and token shards."),
    "pretrain": Command("alloy.cli.pretrain:pretrain", "Train a language model from scratch, or go on with one."),
    "model": Command("alloy.cli.model:app", "Sizes and memory of a configuration; look at or make a checkpoint."),
    "convert": Command("alloy.cli.convert:convert", "Rewrite a checkpoint: dtype, config style, shard size."),
    "eval": Command("alloy.cli.eval:evaluate", "Measure a model: bits per byte of a text."),
    "generate": Command("alloy.cli.generate:generate", "Continue a prompt, or a file of prompts."),
    "chat": Command("alloy.cli.chat:chat", "Talk to a model in the terminal."),
    "serve": Command("alloy.cli.serve:serve", "Serve a model over HTTP, as OpenAI's API has it."),
    "bench": Command("alloy.cli.bench:bench", "Speed against other packages and against the machine's own limits."),
    "bench serve": Command("alloy.cli.bench_serve:serve", "Load on an OpenAI-compatible server: rates and latencies."),
    "demo": Command("alloy.cli.demo:demo", "The whole chain on this machine, in minutes."),
    "report": Command("alloy.cli.report:report", "Rebuild or compare HTML reports of runs."),
    "recipes": Command("alloy.cli.recipes:app", "List, show and check recipes."),
    "doctor": Command("alloy.cli.doctor:doctor", "Versions, devices, backends, and what each extra would add."),
}


class LazyGroup(TyperGroup):
    """Lists stand-ins that only know their help line; imports the command that is invoked."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The real command, once it is known which one is meant; a name of two words goes before its first word."""
        if " ".join(args[:2]) in COMMANDS:
            args = [" ".join(args[:2]), *args[2:]]
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name and stand_in else stand_in, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C anywhere in it is an interruption with exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedRun("interrupted", 130) from error
        except BrokenPipeError:
            # the reader of our output went away, as `alloy ... | head` does; the rest must not fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(0)


def load_command(name: str) -> Any:
    """Import a command and make it what typer runs."""
    entry = COMMANDS[name]
    module, _, attribute = entry.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help=entry.help, no_args_is_help=False)(target)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One toolkit for the whole life of an efficient language model.",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(value: bool) -> None:
    if value:
        from alloy import __version__

        typer.echo(f"alloy-lm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """What stands before the command."""


def load_plugins() -> None:
    """Run each plug-in (entry points of group "alloy.plugins") once; they call `alloy.register_*`."""
    for entry in entry_points(group="alloy.plugins"):
        try:
            plugin = entry.load()
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                f'plug-in "{entry.name}" ({entry.value}) cannot be loaded: {error}. Mend or remove it.'
            ) from error
        plugin()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: an AlloyError is one message and its code, anything else Python's traceback and 1."""
    # torchrun and schedulers stop a process so; raising lets half-written files go away. Training has its own answer.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        load_plugins()
        app(list(arguments) if arguments is not None else None, prog_name="alloy")
    except AlloyError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    except OSError as error:
        known = from_os_error(error)
        if known is None:
            raise
        sys.stderr.write(f"error: {known}\n")
        sys.exit(known.exit_code)


def _terminated(number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does, with 143."""
    raise InterruptedRun("terminated", 128 + number)
