"""`alloy bench serve`: load on an OpenAI-compatible server, and what its clients see."""

import asyncio
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from alloy.bench.load import METRICS, Endpoint, Lanes, Measured, Pace, Target, count_words, first_model, measure
from alloy.bench.prompts import SYNTHETIC, Dataset, Lengths, Shape, Talk, make_talks
from alloy.cli.bench import check_target
from alloy.core.client import api_root
from alloy.core.runs import atomic_write
from alloy.errors import AlloyError, InterruptedRun, RecipeError

# what --goodput can bound: a request has one value of each
_GOODPUT = ("ttft", "tpot", "e2el")
# a client that computes for longer than this measures itself
_BUSY = 0.8
_SYNTHETIC_TEXT = ", ".join(SYNTHETIC)


def serve(
    url: Annotated[str, typer.Option(help="Address of the server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ALLOY_API_KEY", help="Bearer key of the server.")] = None,
    endpoint: Annotated[str, typer.Option(metavar="|".join(get_args(Endpoint)))] = "chat",
    dataset: Annotated[str, typer.Option(metavar="|".join(get_args(Dataset)))] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="File of sharegpt or jsonl.")] = None,
    input_len: Annotated[int, typer.Option(help=f"Tokens per prompt ({_SYNTHETIC_TEXT}).")] = 512,
    output_len: Annotated[
        int | None, typer.Option(help="Tokens per answer; default: 128, or the length recorded in the file.")
    ] = None,
    range_ratio: Annotated[float, typer.Option(help="Share by which lengths vary, from 0 to below 1.")] = 0.0,
    prefix_len: Annotated[int, typer.Option(help="Tokens per shared prefix (prefix-repetition).")] = 256,
    num_prefixes: Annotated[int, typer.Option(help="Shared prefixes (prefix-repetition).")] = 10,
    turns: Annotated[int, typer.Option(help="Requests per conversation (multi-turn).")] = 4,
    num_prompts: Annotated[int, typer.Option(help="Requests in all; in a sweep, for every rate.")] = 200,
    request_rate: Annotated[float, typer.Option(help="Requests (multi-turn: conversations) per second.")] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gamma distribution of gaps; 1: Poisson, less: burstier.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests at work at once.")] = None,
    rate_sweep: Annotated[str | None, typer.Option(metavar="1,2,4,8", help="Measure each of these rates.")] = None,
    seed: Annotated[int, typer.Option(help="Of text, lengths and arrivals.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos/--no-ignore-eos", help=f"Default: for {_SYNTHETIC_TEXT}.")
    ] = None,
    extra_body: Annotated[str | None, typer.Option(metavar="JSON", help="More fields of every request.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 600.0,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="METRIC:MS ...", help="Limits of a good request: ttft:500 tpot:50.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    percentiles: Annotated[str, typer.Option(help="Of every latency.")] = "90,99",
    save: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a sweep as SVG: throughput and TTFT over the rate.")] = None,
) -> None:
    """Requests at a rate or at a concurrency, and the latencies that clients see.

    With a rate, latencies count from the moment a request is due; with --max-concurrency alone, from when one before it ended.
    Tokens are those of the server's `usage`.
    """
    if more and not goodput:
        raise RecipeError(f'"{more[0]}" is not an option; `alloy bench serve --help` lists them')
    limits = _limits([*(goodput or []), *(more or [])])
    marks = _numbers("--percentiles", percentiles, 0, 100)
    rates = [request_rate] if rate_sweep is None else _numbers("--rate-sweep", rate_sweep, 0, 1e6)
    _check_least(input_len=input_len, output_len=output_len, num_prompts=num_prompts, turns=turns)
    _check_least(prefix_len=prefix_len, num_prefixes=num_prefixes, max_concurrency=max_concurrency)
    _check_above_0(request_rate=min(rates), burstiness=burstiness, timeout=timeout)
    if not 0 <= range_ratio < 1:
        raise RecipeError(f"--range-ratio = {range_ratio:g} must be from 0 to below 1")
    endpoint = cast(Endpoint, _known("--endpoint", endpoint, get_args(Endpoint)))
    dataset = cast(Dataset, _known("--dataset", dataset, get_args(Dataset)))
    if (dataset_path is None) == (dataset not in SYNTHETIC):
        raise RecipeError("--dataset sharegpt and jsonl read the file of --dataset-path, and the others read none")
    if plot is not None and (rate_sweep is None or plot.suffix.lower() != ".svg"):
        raise RecipeError(f"--plot = {plot}: needs --rate-sweep and a name that ends in .svg")
    for path in (save, plot):
        if path is not None:
            check_target(path)
    own = {"ignore_eos": True} if (dataset in SYNTHETIC if ignore_eos is None else ignore_eos) else {}
    body = {"temperature": temperature, **own, **_object("--extra-body", extra_body)}
    target = Target(api_root(url), model or "", endpoint, api_key, body, timeout)
    paces = [Pace(rate, burstiness, max_concurrency, seed + i) for i, rate in enumerate(rates)]
    lengths = Lengths(input_len, output_len, range_ratio)
    shape = Shape(dataset_path, prefix_len, num_prefixes, turns)

    def talks_of(pace: Pace, words_in: Callable[[int], int]) -> list[Talk]:
        # every rate has text of its own, which the server's cache does not know
        return make_talks(dataset, num_prompts, lengths, shape, words_in, pace.seed)

    # a bad file is reported before the server is asked
    talks_of(paces[0], lambda tokens: 1)
    found, target = asyncio.run(_measure_all(target, paces, talks_of, input_len if dataset in SYNTHETIC else 64))
    reports = [run.report(marks, limits) for run in found]
    if save is not None:
        settings = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **{"base_url": target.root, "model_id": target.model, "endpoint": endpoint, "dataset": dataset},
            **{"seed": seed, "input_len": input_len, "output_len": output_len, "range_ratio": range_ratio},
            "goodput": limits or None,
        }
        data = {**settings, **reports[0]} if rate_sweep is None else {**settings, "runs": reports}
        # a link, such as /dev/stdout, stays
        atomic_write(save.resolve(), json.dumps(data, indent=2) + "\n")
    _show(reports, marks, target)
    if plot is not None:
        from alloy.bench.plot import draw_sweep

        draw_sweep(reports, plot.resolve(), target.model)
    _judge(found, len(paces), save)


async def _measure_all(
    target: Target,
    paces: Sequence[Pace],
    talks_of: Callable[[Pace, Callable[[int], int]], list[Talk]],
    probe_tokens: int,
) -> tuple[list[Measured], Target]:
    """Every pace in turn, up to the one that a signal ended; and the target with the name of its model."""
    found: list[Measured] = []
    lanes = Lanes(target)
    try:
        if not target.model:
            target = replace(target, model=await first_model(lanes, target.root))
        words_in = await count_words(lanes, target, probe_tokens)
        for pace in paces:
            progress = _Progress()
            found.append(await measure(lanes, target, talks_of(pace, words_in), pace, progress))
            progress.close()
            if found[-1].stopped_by:
                break
    finally:
        await lanes.close()
    return found, target


class _Progress:
    """One line on standard error: rewritten on a terminal, otherwise at most once in five seconds."""

    def __init__(self) -> None:
        self.is_live = sys.stderr.isatty()
        self.shown = 0.0

    def __call__(self, found: Measured) -> None:
        now = time.monotonic()
        done = len(found.answers)
        if now - self.shown < (0.1 if self.is_live else 5.0) and done < found.planned:
            return
        self.shown = now
        failed = sum(answer.failure is not None for answer in found.answers)
        line = f"rate {_rate_name(found.pace.rate)}: {done:,} of {found.planned:,} requests, {failed:,} failed, {found.duration_s:.1f} s"
        sys.stderr.write(f"\r\x1b[K{line}" if self.is_live else line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the line."""
        if self.is_live:
            sys.stderr.write("\n")


def _rate_name(rate: float | None) -> str:
    return "unlimited" if rate is None or math.isinf(rate) else f"{rate:g}/s"


def _show(reports: Sequence[dict[str, Any]], marks: Sequence[float], target: Target) -> None:
    """The figures: rates of every run in one table, latencies below."""
    from rich.console import Console
    from rich.table import Table

    # nothing is folded away where the output is not a terminal
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"

    rates = Table(title=f"{target.model} at {target.root}", title_justify="left")
    columns = {
        "completed": "completed", "failed": "failed", "unfinished": "unfinished", "duration": "seconds", "total_input": "tokens in",
        "total_cached_tokens": "cached", "total_output": "tokens out", "request_throughput": "requests/s", "request_goodput": "good/s",
        "output_throughput": "out tok/s", "total_token_throughput": "all tok/s",
    }  # fmt: skip
    rates.add_column("rate", no_wrap=True)
    for name in columns.values():
        rates.add_column(name, justify="right", overflow="fold")
    latencies = Table()
    latencies.add_column("rate", no_wrap=True)
    latencies.add_column("ms")
    figures = ["mean", "median", "std", *(f"p{mark:g}" for mark in marks)]
    for name in figures:
        latencies.add_column(name, justify="right")
    for report in reports:
        name = _rate_name(report["request_rate"])
        rates.add_row(name, *(cell(report[key]) for key in columns))
        for metric in METRICS:
            latencies.add_row(name, metric.upper(), *(cell(report[f"{figure}_{metric}_ms"]) for figure in figures))
    console.print(rates)
    console.print(latencies)
    for report in reports:
        for kind, count in report["failures"].items():
            console.print(
                f"rate {_rate_name(report['request_rate'])}: {count:,} failed, {kind}: {report['messages'][kind]}",
                markup=False,
            )
        if report["client_busy_frac"] > _BUSY:
            console.print(
                f"this client was busy for {report['client_busy_frac']:.0%} of the time: the server may be faster than shown"
            )


def _judge(found: Sequence[Measured], planned: int, save: Path | None) -> None:
    """An interruption says what was kept; a run without any answer has failed."""
    last = found[-1]
    if last.stopped_by:
        runs = f" in run {len(found)} of {planned}" if planned > 1 else ""
        kept = f"and saved in {save}" if save else "(--save keeps it)"
        raise InterruptedRun(
            f"interrupted after {len(last.answers):,} of {last.planned:,} requests{runs}; what was measured is shown above {kept}",
            128 + last.stopped_by,
        )
    if not any(answer.failure is None for run in found for answer in run.answers):
        raise AlloyError(f"no request was answered; {next(iter(last.messages().values()))}")


def _limits(texts: Sequence[str]) -> dict[str, float]:
    """The limits of --goodput, "ttft:500 tpot:50"."""
    found: dict[str, float] = {}
    for text in re.split(r"[\s,]+", " ".join(texts).strip()) if texts else []:
        name, _, value = text.partition(":")
        if name not in _GOODPUT or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise RecipeError(
                f'--goodput = "{text}" must be a metric and milliseconds, such as ttft:500; metrics: {", ".join(_GOODPUT)}'
            )
        found[name] = float(value)
    return found


def _numbers(name: str, text: str, low: float, high: float) -> list[float]:
    """Numbers between commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= value <= high for value in values):
        raise RecipeError(f'{name} = "{text}" must be numbers from {low:g} to {high:g} with commas between them')
    return values


def _object(name: str, text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f'{name} = {text} must be a JSON object, such as {{"top_p": 0.9}}')
    return value


def _check_least(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')} = {value} must be at least 1")


def _check_above_0(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise RecipeError(f"--{name.replace('_', '-')} = {value:g} must be above 0")


def _known(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise RecipeError(f'{name} = "{value}" is not known; use {", ".join(known)}')
    return value
