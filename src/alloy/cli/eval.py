"""`alloy eval MODEL --ppl FILE`: how well a model predicts a text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from alloy.eval.ppl import Score


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")],
    ppl: Annotated[
        Path, typer.Option("--ppl", metavar="FILE", help="Text, .jsonl, .parquet or a folder: its bits per byte.")
    ],
    seq: Annotated[
        int | None, typer.Option(help="Tokens in a window (default: the model's max_positions, at most 4096).")
    ] = None,
    column: Annotated[str, typer.Option(help="Key or column that holds the text of .jsonl and .parquet.")] = "text",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... (default: as stored)")] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="bf16|int8", help="Measure again with the matrices in this precision, on a CPU."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bits per byte, nats per token and perplexity of a text under a model."""
    from transformers import PreTrainedTokenizerFast

    from alloy.core.device import resolve_device
    from alloy.data.io import read_documents
    from alloy.eval.ppl import LONGEST_WINDOW, bits_per_byte, with_weights
    from alloy.models.quant import check_place, parse_weights
    from alloy.models.registry import load

    kind = None if weights is None else parse_weights(weights)
    if kind is not None:
        check_place(kind, resolve_device(device))
    documents = list(read_documents(ppl, column))
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{model} has no tokenizer.json, so a text cannot be measured; copy the tokenizer into the folder."
        )
    window = seq if seq is not None else min(loaded.config.max_positions, LONGEST_WINDOW)
    if kind is None:
        score, low = bits_per_byte(loaded, tokenizer, documents, window), None
    else:
        score, low = with_weights(loaded, tokenizer, documents, window, kind)
    if as_json:
        data = {"model": model, "file": str(ppl), "seq": window, **score.as_dict()}
        typer.echo(json.dumps(data if low is None else {**data, "weights": {"name": kind, **low.as_dict()}}))
    else:
        typer.echo(describe(score, window))
    if low is not None and not as_json:
        typer.echo(describe_cost(score, low, str(kind)))


def describe_cost(full: "Score", low: "Score", weights: str) -> str:
    """What weights of low precision cost, one number a line: with them, and the difference."""
    rows = (
        ("bits per byte", full.bits_per_byte, low.bits_per_byte, 4),
        ("nats per token", full.nats_per_token, low.nats_per_token, 4),
        ("perplexity", full.perplexity, low.perplexity, 3),
    )
    lines = [f"{name:<16} {now:.{places}f} ({now - was:+.{places + 1}f})" for name, was, now, places in rows]
    return "\n".join([f"with weights {weights}, and the difference:", *lines])


def describe(score: "Score", seq: int) -> str:
    """The numbers, one a line, and how they were taken."""
    return "\n".join(
        [
            f"bits per byte    {score.bits_per_byte:.4f}",
            f"nats per token   {score.nats_per_token:.4f}",
            f"perplexity       {score.perplexity:.3f}",
            f"tokens           {score.tokens:,}",
            f"bytes            {score.bytes:,}",
            f"documents        {score.documents:,}",
            f"windows of {seq} tokens, half overlapping; the end of each document is charged, its beginning given",
        ]
    )
