"""`alloy data`: from web pages and text to tokenizers and token shards."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alloy.cli.data_blend import app as blend_app
from alloy.cli.data_extract import eval_extract
from alloy.cli.data_stages import add_stage_command
from alloy.cli.run_command import DryRun, Json, Overrides, Quiet, RecipeName, Resume, RunDirOption, run_recipe_command
from alloy.cli.train_scorer import train_scorer
from alloy.core.recipe import RunOptions
from alloy.data.pipeline import STAGES
from alloy.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from alloy.data.io import Document

app = typer.Typer(no_args_is_help=True, add_completion=False, help="From web pages to training tokens.")
app.command("eval-extract")(eval_extract)

# the stages that work on rows; `tokenize` has options of its own
for _name in (name for name in STAGES.names() if name != "tokenize"):
    add_stage_command(app, _name)
app.command("train-scorer")(train_scorer)
app.add_typer(blend_app, name="blend")

Texts = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Text, .jsonl[.gz|.zst], .parquet, or folders.")]
Column = Annotated[str, typer.Option(help="Key or column that holds the text of .jsonl and .parquet.")]


@app.command()
def tokenizer(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH...", help="Text, .jsonl[.gz|.zst], .parquet, or folders.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write (a transformers fast tokenizer).")] = ...,  # type: ignore[assignment]  required
    vocab: Annotated[int, typer.Option(help="Size, the 256 bytes and special tokens included.")] = 32_768,
    pieces: Annotated[
        Literal["words", "gpt4", "nemotron"], typer.Option(help="What texts are cut into before merging.")
    ] = "words",
    digits: Annotated[int, typer.Option(min=1, help="Most digits of a number that stay together.")] = 1,
    special_tokens: Annotated[
        str, typer.Option(help="Further special tokens, separated by commas, or a file of one a line.")
    ] = "",
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Train on a random choice of documents of this size.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Above 1, small sources (PATHs) give more of --max-bytes.")] = 1.0,
    compare: Annotated[list[Path] | None, typer.Option(help="Folders of tokenizers to measure beside it.")] = None,
    extend: Annotated[
        Path | None, typer.Option(help="Add --special-tokens to this tokenizer, or checkpoint, instead of training.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of documents.")] = 0,
    column: Column = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer, or add tokens to one, and measure it."""
    from alloy.data.io import read_documents
    from alloy.data.tokens import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_tokenizer
    from alloy.data.vocabulary import Texts, balanced_texts, measure_tokenizer

    sources: dict[str, Texts] = {
        str(path): lambda path=path: (document.text for document in read_documents(path, column))
        for path in paths or ()
    }
    added = _token_list(special_tokens)
    if extend is not None:
        trained = _extend(extend, added, out)
    else:
        if not sources:
            raise RecipeError("there is no PATH to train on; name texts, or a tokenizer with --extend.")
        if temperature != 1 and max_bytes is None:
            raise RecipeError(f"--temperature = {temperature} shares out --max-bytes among the sources; set that too.")
        if temperature != 1 and max_bytes is not None:
            texts, max_bytes = balanced_texts(sources, max_bytes, temperature, seed), None
        else:
            texts = itertools.chain.from_iterable(read() for read in sources.values())
        special = [*SPECIAL_TOKENS, *added]
        trained = train_tokenizer(texts, vocab, special, max_bytes, seed, pieces, digits)
        if len(trained) < vocab:
            typer.echo(f"the text is used up at {len(trained)} tokens, fewer than the {vocab} asked for", err=True)
        save_tokenizer(trained, out)
    if not sources:
        typer.echo(f"{out}: {len(trained):,} tokens")
        return
    measured = {str(out): trained, **{str(folder): load_tokenizer(folder) for folder in compare or ()}}
    report = {name: measure_tokenizer(one, sources) for name, one in measured.items()}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    mine = report[str(out)]
    if mine["lossless"] < 1:
        raise DataError(
            f"{1 - mine['lossless']:.2%} of the texts do not survive {out}; its own normaliser changes them."
        )
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(f"{'tokenizer':24} {'source':32} {'bytes/token':>11} {'tokens/word':>11} {'unused':>8} {'lossless':>8}")
    for name, figures in report.items():
        for source, row in figures["sources"].items():
            typer.echo(
                f"{name[-24:]:24} {source[-32:]:32} {row['bytes_per_token']:11.3f} {row['fertility']:11.3f} "
                f"{figures['unused']:8,} {row['lossless']:8.2%}"
            )
    size = sum(row["bytes"] for row in mine["sources"].values())
    tokens = sum(row["tokens"] for row in mine["sources"].values())
    typer.echo(f"{out}: {len(trained):,} tokens, {size / tokens:.2f} bytes per token, round trip checked")


@app.command()
def tokenize(
    paths: Texts,
    out: Annotated[Path, typer.Option(help="Folder to write: .bin/.idx shards and manifest.json, or packed chats.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer, or of a checkpoint that has one.")],
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a shard, about.")] = 1 << 28,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the corpus that is there.")] = False,
    column: Annotated[
        str | None, typer.Option(help="Key or column of the text; default: cleaned_text where it is there, else text.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Rows that meet a condition: 'lang == \"en\"'.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes for .jsonl and .parquet; above 1 an interrupted run goes on.")
    ] = 1,
    seq: Annotated[int, typer.Option(min=2, help="Chats: most tokens in a packed row.")] = 4096,
    reasoning: Annotated[Literal["keep", "strip"], typer.Option(help="Chats: the thoughts of assistants.")] = "keep",
    too_long: Annotated[
        Literal["drop", "cut"], typer.Option(help="Chats longer than --seq: drop, or cut the end.")
    ] = "drop",
) -> None:
    """Turn documents into memory-mapped token shards (Megatron's .bin/.idx format), chats into packed Parquet."""
    from alloy.core.logging import short_count
    from alloy.data.io import ROW_SUFFIXES, list_files
    from alloy.data.tokens import load_tokenizer, tokenize_corpus

    start = told = time.monotonic()

    def progress(documents: int, tokens: int, num_bytes: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= 2:
            told = now
            rate = short_count(tokens / (now - start))
            typer.echo(f"{documents:,} documents  {short_count(tokens)} tokens  {rate} tok/s", err=True)

    files = [file for path in paths for file in (list_files(path) if path.is_dir() else [path]) if file.exists()]
    has_rows = bool(files) and all(file.name.endswith(ROW_SUFFIXES) for file in files)
    if workers > 1 and not has_rows:
        raise RecipeError(
            f"--workers = {workers} share out the parts of .jsonl and .parquet files alone; leave it out for text."
        )
    if only and not has_rows:
        raise RecipeError(
            f"--only {only}: conditions are for the rows of .jsonl and .parquet files; leave it out for text."
        )
    if has_rows:
        from alloy.data.executors import Executor
        from alloy.data.pipeline import run_stage
        from alloy.data.stages.tokenize import TokenizeConfig

        settings = {"seq": seq, "reasoning": reasoning, "too_long": too_long, "shard_tokens": shard_tokens}
        config = TokenizeConfig.model_validate(
            {"tokenizer": str(tokenizer), "column": column, "only": only, **settings}
        )
        executor = Executor(kind="process" if workers > 1 else "serial", workers=workers)
        manifest = run_stage(config, [str(file) for file in files], out, executor, overwrite)
        typer.echo(
            f"{out}: {manifest['rows_in']:,} documents, {manifest['rows_out']:,} written, {manifest['tokens']:,} tokens, "
            f"{time.monotonic() - start:.1f} s"
        )
        for reason, count in manifest["counts"].items():
            typer.echo(f"  {count:12,}  {reason}")
        return
    manifest = tokenize_corpus(
        _documents(paths, column or "text"), load_tokenizer(tokenizer), out, shard_tokens, overwrite, progress
    )
    typer.echo(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['bytes']:,} bytes, "
        f"{len(manifest['shards'])} shard(s), {time.monotonic() - start:.1f} s"
    )


@app.command()
def concat(
    paths: Annotated[list[Path], typer.Argument(metavar="CORPUS...", help="Folders of shards, or Megatron pairs.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a shard, about.")] = 1 << 28,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the corpus that is there.")] = False,
) -> None:
    """Lay corpora one after another, in new shards."""
    from alloy.data.shards import join_corpora

    manifest = join_corpora(paths, out, shard_tokens, overwrite)
    typer.echo(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {len(manifest['shards'])} shard(s)"
    )


@app.command("join-repo")
def join_repo(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One repository each.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, a row for each.")],
) -> None:
    """Make each repository one document, its files after what they import."""
    from alloy.data.io import write_jsonl
    from alloy.data.longdoc import join_repository

    write_jsonl(out, [join_repository(folder) for folder in folders])


@app.command("inspect")
def inspect_file(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A folder of shards, or one .bin or .idx file.")],
    documents: Annotated[int, typer.Option(min=0, help="How many documents to print.")] = 3,
    first: Annotated[int, typer.Option(min=0, help="Number of the first one, from 0.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Print text instead of ids.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the files with their checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what token shards hold, and print some documents."""
    from alloy.data.shards import TokenCorpus
    from alloy.data.tokens import load_tokenizer

    corpus = TokenCorpus(path)
    if check:
        corpus.check()
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


def _token_list(text: str) -> list[str]:
    """Tokens of an option: the lines of a file, or what stands between commas."""
    if text and Path(text).is_file():
        return [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line]
    return [token for token in text.split(",") if token]


def _extend(folder: Path, tokens: list[str], out: Path) -> "PreTrainedTokenizerFast":
    """Add tokens to a tokenizer or, with rows for them, to a checkpoint; the tokenizer that was written."""
    from alloy.data.tokens import load_tokenizer, save_tokenizer
    from alloy.data.vocabulary import extend_tokenizer

    tokenizer = load_tokenizer(folder)
    pieces = extend_tokenizer(tokenizer, tokens)
    if not pieces:
        raise RecipeError(f"--special-tokens names no token that {folder} lacks; there is nothing to extend.")
    if not (folder / "config.json").exists():
        save_tokenizer(tokenizer, out)
        return tokenizer
    from alloy.models.registry import load, refuse_checkpoint, save
    from alloy.models.vocabulary import grow_vocabulary

    refuse_checkpoint(out)
    model, _ = load(folder, device="cpu")
    save(grow_vocabulary(model, pieces, len(tokenizer)), out, tokenizer=tokenizer)
    return tokenizer
