"""`alloy data`: from web pages and text to tokenizers and token shards."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alloy.cli.data_stages import add_stage_command
from alloy.cli.run_command import DryRun, Json, Overrides, Quiet, RecipeName, Resume, RunDirOption, run_recipe_command
from alloy.cli.train_scorer import train_scorer
from alloy.core.recipe import RunOptions
from alloy.data.pipeline import STAGES
from alloy.errors import DataError, RecipeError

if TYPE_CHECKING:
    from alloy.data.io import Document

app = typer.Typer(no_args_is_help=True, add_completion=False, help="From web pages to training tokens.")

# the stages that work on rows; `tokenize` has options of its own
for _name in STAGES.names():
    add_stage_command(app, _name)
app.command("train-scorer")(train_scorer)

Texts = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Text, .jsonl[.gz|.zst], .parquet, or folders.")]
Column = Annotated[str, typer.Option(help="Key or column that holds the text of .jsonl and .parquet.")]


@app.command()
def tokenizer(
    paths: Texts,
    out: Annotated[Path, typer.Option(help="Folder to write (a transformers fast tokenizer).")],
    vocab: Annotated[int, typer.Option(help="Size, the 256 bytes and special tokens included.")] = 32_768,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Train on a random choice of documents of this size.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of that choice.")] = 0,
    column: Column = "text",
) -> None:
    """Train a byte-level BPE tokenizer."""
    from alloy.data.io import texts
    from alloy.data.tokens import TextEncoder, save_tokenizer, train_tokenizer

    trained = train_tokenizer(texts(_documents(paths, column)), vocab, max_bytes=max_bytes, seed=seed)
    if len(trained) < vocab:
        typer.echo(f"the text is used up at {len(trained)} tokens, fewer than the {vocab} asked for", err=True)
    save_tokenizer(trained, out)
    # a sample measures the tokenizer: a million characters, each of which must come back
    encoder = TextEncoder(trained)
    num_bytes = num_tokens = num_chars = 0
    for document in _documents(paths, column):
        (ids,) = encoder.encode([document.text])
        if trained.decode(ids, skip_special_tokens=False) != document.text:
            raise DataError(
                f"{document.name} does not survive the round trip through the tokenizer; please report this."
            )
        num_bytes += len(document.text.encode())
        num_tokens += len(ids)
        num_chars += len(document.text)
        if num_chars >= 1_000_000:
            break
    typer.echo(f"{out}: {len(trained):,} tokens, {num_bytes / num_tokens:.2f} bytes per token, round trip checked")


@app.command()
def tokenize(
    paths: Texts,
    out: Annotated[Path, typer.Option(help="Folder to write: .bin/.idx shards and manifest.json.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer, or of a checkpoint that has one.")],
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a shard, about.")] = 1 << 28,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the corpus that is there.")] = False,
    column: Column = "text",
) -> None:
    """Turn documents into memory-mapped token shards (Megatron's .bin/.idx format)."""
    from alloy.core.logging import short_count
    from alloy.data.tokens import load_tokenizer, tokenize_corpus

    start = told = time.monotonic()

    def progress(documents: int, tokens: int, num_bytes: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= 2:
            told = now
            rate = short_count(tokens / (now - start))
            typer.echo(f"{documents:,} documents  {short_count(tokens)} tokens  {rate} tok/s", err=True)

    manifest = tokenize_corpus(
        _documents(paths, column), load_tokenizer(tokenizer), out, shard_tokens, overwrite, progress
    )
    typer.echo(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['bytes']:,} bytes, "
        f"{len(manifest['shards'])} shard(s), {time.monotonic() - start:.1f} s"
    )


@app.command("inspect")
def inspect_file(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A folder of shards, or one .bin or .idx file.")],
    documents: Annotated[int, typer.Option(min=0, help="How many documents to print.")] = 3,
    first: Annotated[int, typer.Option(min=0, help="Number of the first one, from 0.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Print text instead of ids.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what token shards hold, and print some documents."""
    from alloy.data.tokens import TokenCorpus, load_tokenizer

    corpus = TokenCorpus(path)
    if first >= corpus.num_documents:
        raise RecipeError(f"--first = {first}: {path} holds {corpus.num_documents:,} documents, numbered from 0")
    decode = load_tokenizer(tokenizer).decode if tokenizer else None
    shown = range(first, min(first + documents, corpus.num_documents))
    facts: dict[str, Any] = {
        "path": str(path),
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "shards": len(corpus.shards),
        "dtype": corpus.shards[0].dtype.name,
        "shortest": int(corpus.lengths.min()),
        "longest": int(corpus.lengths.max()),
        "tokenizer": corpus.tokenizer_hash,
    }
    if as_json:
        content = {str(i): decode(corpus[i]) if decode else corpus[i].tolist() for i in shown}
        typer.echo(json.dumps({**facts, "content": content}))
        return
    for name, value in facts.items():
        typer.echo(f"{name.ljust(10)} {'unknown' if value is None else value}")
    for i in shown:
        ids = corpus[i]
        typer.echo(f"--- document {i}, {len(ids):,} tokens")
        # one screen of each
        typer.echo(decode(ids[:400]) if decode else " ".join(map(str, ids[:200].tolist())))


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run the stages of a recipe one after the other; with --resume auto go on where an earlier run stopped."""
    options = RunOptions(run_dir=run_dir, resume=resume, dry_run=dry_run, quiet=quiet, json=json)
    run_recipe_command("data run", recipe, overrides, options)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of a stage, or of a run of several.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a stage.")] = False,
) -> None:
    """Say how far the stages of a folder are, running or finished."""
    from alloy.data.status import stage_states

    states = stage_states(folder)
    if as_json:
        for state in states:
            typer.echo(json.dumps(state))
        return
    from rich.table import Table

    from alloy.core.logging import console

    columns = ["stage", "status", "parts", "rows_in", "rows_out", "failed", "rows_per_s"]
    table = Table(*(name.replace("_", " ") for name in columns), box=None)
    for state in states:
        table.add_row(
            *(f"{v:,}" if isinstance(v, int) else "-" if v is None else str(v) for v in map(state.get, columns))
        )
    console().print(table)


@app.command()
def card(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of stages in order, or one run.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: the run.")] = None,
    title: Annotated[str, typer.Option(help="Of the data set.")] = "",
    license: Annotated[str, typer.Option(help="Identifier, such as odc-by.")] = "",
    export: Annotated[bool, typer.Option(help="Write dataset/ beside the report.")] = True,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
) -> None:
    """Write report.html, stats.json and dataset/ with its card from what stages made."""
    from alloy.data.card import CardTable, write_card
    from alloy.data.status import stage_folders

    stages = [stage for folder in folders for stage in stage_folders(folder)]
    where = out or (folders[0] if len(folders) == 1 and stages != folders else None)
    if where is None:
        raise RecipeError("several folders have no common place for a card; give --out.")
    write_card(stages, where, CardTable(title=title, license=license, export=export, seed=seed))
    typer.echo(f"{where}: report.html, stats.json" + (", dataset/" if export else ""))


def _documents(paths: list[Path], column: str) -> "Iterator[Document]":
    from alloy.data.io import read_documents

    return itertools.chain.from_iterable(read_documents(path, column) for path in paths)
