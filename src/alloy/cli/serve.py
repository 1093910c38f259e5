"""`alloy serve`: a model behind OpenAI's API, with a page to talk to it."""

import asyncio
import os
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alloy.core.logging import get_logger
from alloy.errors import AlloyError, RecipeError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    import torch

    from alloy.engine.core import LLM
    from alloy.engine.engine import Gauges
    from alloy.serve.driver import Backend
    from alloy.serve.model import ServedModel
    from alloy.serve.process import RemoteEngine
    from alloy.serve.settings import ServerSettings

log = get_logger(__name__)

MAX_SEQS, MAX_SEQS_CPU = 64, 16
LENGTHS = (2048, 8192)
# of text that shows what weights of low precision cost
PPL_TOKENS = 4096
BLOCK = 64


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as engine.max_seqs=8.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that clients must send; may be repeated. Also ALLOY_API_KEY.")
    ] = None,
    served_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in requests; may be repeated. Default: its folder's.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="The same as engine.max_model_len.")] = None,
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C, which let running answers finish."""
    from alloy.core.device import require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, extra="serve", why="alloy serve works")
    from alloy.core import logging
    from alloy.serve.guard import Keys
    from alloy.serve.listen import Listener, open_socket
    from alloy.serve.settings import read_settings

    # settings and the socket come first: a mistake there is known before the model is read
    if max_model_len is not None:
        settings = [*(settings or []), f"engine.max_model_len={max_model_len}"]
    chosen = read_settings(settings or [])
    limits = chosen.serve
    given = [*(api_key or []), os.environ.get("ALLOY_API_KEY", "")]
    if api_key and not all(api_key):
        raise RecipeError("--api-key is empty; give a key, or leave it out")
    file = Path(limits.api_key_file) if limits.api_key_file is not None else None
    keys = Keys([key for key in given if key], file)
    if limits.replicas > 1:
        # read when Ray is imported: it neither starts again by itself while it ends, nor reports its use
        os.environ |= {"RAY_ENABLE_AUTO_CONNECT": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        require("ray", extra="scale", why=f"serve.replicas = {limits.replicas} works")
    with open_socket(host, port, len(keys) > 0, limits.insecure) as bound:
        logging.setup()
        names = served_name or [_name(model)]
        with _computing(model, chosen.engine.chosen, names, limits) as (served, backend, rows):
            address, number = bound.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            url = f"http://{shown}:{number}"
            logging.start_panel("serving", {"model": ", ".join(names), **rows, "url": url})
            listener = Listener(served, backend, keys)
            # uvloop where it is installed
            with asyncio.Runner(loop_factory=listener.config.get_loop_factory()) as runner:
                runner.run(listener.listen(bound))


@contextmanager
def _computing(
    model: str, settings: Mapping[str, Any], names: Sequence[str], limits: "ServerSettings"
) -> "Generator[tuple[ServedModel, Backend, Mapping[str, str]]]":
    """The model as the server knows it, what computes its answers, and rows of the start-up table."""
    from alloy.core.pipe import beside

    found = str(Path(model).resolve()) if Path(model).exists() else model
    if limits.replicas == 1:
        with beside("engine", _run_engine, found, dict(settings)) as (process, pipe):
            # while weights are loaded there
            served = _front(model, settings, names, limits)
            try:
                backend, served.llm.max_model_len, rows = _loaded(process, pipe)
                yield served, backend, rows
            finally:
                if code := process.exitcode:
                    log.error("the engine's process ended with code %d; -9: killed, as when memory runs out", code)
        return
    from alloy.serve.fleet import launch

    served = _front(model, settings, names, limits)
    with launch(partial(_load, found), settings, limits, start_rows) as fleet:
        served.llm.max_model_len = fleet.max_model_len
        yield served, fleet, fleet.rows


def _front(model: str, settings: Mapping[str, Any], names: Sequence[str], limits: "ServerSettings") -> "ServedModel":
    """What the server itself must know of a model: the tokenizer and the shapes."""
    from alloy.engine.core import LLM
    from alloy.serve.model import ServedModel

    return ServedModel(LLM(model, device="meta", max_model_len=settings.get("max_model_len", 1)), names, limits)


def _run_engine(pipe: socket.socket, model: str, settings: Mapping[str, Any]) -> None:
    """The engine's process: says what it has loaded, or why it cannot, and serves."""
    from alloy.core import logging
    from alloy.core.pipe import send
    from alloy.serve.process import EngineLoop

    logging.setup()
    # without a server it ends wherever it is, such as in the middle of loading
    loop = EngineLoop(pipe, partial(os._exit, 0))
    try:
        llm, cost = _load(model, settings)
        llm.warm_up()
        engine = llm.engine()
        gauges = engine.gauges()
        send(pipe, (gauges, llm.max_model_len, start_rows(llm, gauges) | cost))
    except (AlloyError, OSError) as error:
        send(pipe, error)
    else:
        loop.run(engine, llm.check)


def _loaded(process: "SpawnProcess", pipe: socket.socket) -> "tuple[RemoteEngine, int, Mapping[str, str]]":
    """Wait for the engine's process: its engine, max_model_len, and rows; raises what it could not do."""
    from alloy.core.pipe import receive
    from alloy.serve.process import RemoteEngine

    try:
        said = receive(pipe)
    except EOFError as error:
        process.join()
        raise AlloyError("the engine ended before the model was loaded; the log above says why") from error
    if isinstance(said, Exception):
        raise said
    gauges, *rest = said
    return RemoteEngine(pipe, gauges), *rest


def _load(model: str, settings: Mapping[str, Any]) -> tuple["LLM", dict[str, str]]:
    """The model, and what its weights of low precision cost; called in the process of an engine."""
    from alloy.cli import load_plugins
    from alloy.core.device import resolve_device
    from alloy.engine.core import LLM

    load_plugins()
    settings = dict(settings)
    device = resolve_device(settings.get("device", "auto"))
    settings.setdefault("max_seqs", MAX_SEQS_CPU if device.type == "cpu" else MAX_SEQS)
    weights = settings.pop("weights", None)
    if weights is None:
        return LLM(model, **settings), {}
    return _load_low(model, weights, device, settings)


def _load_low(
    model: str, weights: str, device: "torch.device", settings: dict[str, Any]
) -> tuple["LLM", dict[str, str]]:
    """As `_load`, with the perplexity before and after the matrices are turned into `weights`."""
    from transformers import PreTrainedTokenizerFast

    from alloy.data.corpus import topics
    from alloy.engine.core import LLM
    from alloy.eval.ppl import LONGEST_WINDOW, with_weights
    from alloy.models.quant import check_place, parse_weights, quantize_weights
    from alloy.models.registry import load

    kind = parse_weights(weights)
    check_place(kind, device)
    loaded, tokenizer = load(model, dtype=settings.pop("dtype", None), device=settings.pop("device", "auto"))
    texts: list[str] = []
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        left = PPL_TOKENS
        for topic in topics():
            texts.append(topic.text)
            left -= len(tokenizer.encode(topic.text))
            if left <= 0:
                break
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not texts:
        quantize_weights(loaded, kind)
        return LLM(loaded, tokenizer, **settings), {"perplexity": "not measured: no tokenizer.json, or no text"}
    window = min(loaded.config.max_positions, LONGEST_WINDOW)
    full, low = with_weights(loaded, tokenizer, texts, window, kind)
    dtype = str(loaded.embed.weight.dtype).removeprefix("torch.")
    row = f"{low.perplexity:.3f}, {full.perplexity:.3f} in {dtype} ({full.tokens:,} tokens of pydoc_data.topics)"
    return LLM(loaded, tokenizer, **settings), {"perplexity": row}


def start_rows(llm: "LLM", gauges: "Gauges") -> dict[str, str]:
    """What the start-up table says: sizes in memory, and how many sequences of some lengths fit."""
    from alloy.core.logging import short_count
    from alloy.models import sizes
    from alloy.models.quant import weight_bytes
    from alloy.ops.backend import choices

    model, config = llm.model, llm.model.config
    device = model.embed.weight.device
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    block = sizes.kv_bytes(config, 1, BLOCK, dtype, model.has_mtp)
    state = sizes.state_bytes(config, 1, llm.state_dtype.removesuffix("-sr"), model.has_mtp)
    lengths = [n for n in LENGTHS if n < llm.max_model_len]
    fits = {n: _fit(n, gauges, block > 0, llm.max_seqs) for n in (*lengths, llm.max_model_len)}
    backends = sorted({c[device.type] for c in choices((device.type,))})
    return {
        "parameters": short_count(sizes.parameters(config)),
        "device": f"{device}, {dtype}" + (f", weights {model.weights}" if model.weights else ""),
        "weights": _size(weight_bytes(model)),
        "keys and values": f"{_size(block * gauges.blocks)}, {gauges.blocks:,} blocks of {BLOCK} tokens",
        "states": f"{_size(state * gauges.slots)}, {gauges.slots:,} slots" if state else "none: no recurrent layers",
        "fit at once": ", ".join(f"{count:,} of {n:,} tokens" for n, count in fits.items()),
        "backends": ", ".join(backends),
    }


def _fit(tokens: int, gauges: "Gauges", has_blocks: bool, max_seqs: int) -> int:
    by_blocks = gauges.blocks // -(-tokens // BLOCK) if has_blocks else max_seqs
    return min(max_seqs, by_blocks)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.exists() else model
