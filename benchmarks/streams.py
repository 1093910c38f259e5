"""Eight concurrent streams against one on a CPU: in the engine, through `alloy serve`, and through `transformers serve`.

    python benchmarks/streams.py [--quick] [--only hybrid|llama] [--peer/--no-peer] [--out benchmarks/results/streams.json]

Two random models of 0.3 million parameters, a Mamba-2 hybrid and a Llama; 22 tokens in, 24 out, greedy, one thread a process, nothing
to reuse (the prefix cache is off). In the engine: medians of waves taken in turn, requests handed in together, process time. Through
a server: medians of runs of `alloy bench serve`, which needs a core of its own, wall time. transformers answers a hybrid one
request at a time; a Llama also with --continuous-batching.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import alloy
from alloy.bench.worker import machine
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.registry import build

INPUT, OUTPUT = 22, 24
STREAMS = (1, 8)
SHARED = {"vocab": 256, "hidden": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24, "max_positions": 2048}
MODELS = {
    "hybrid": lambda: HybridConfig(
        pattern="M-M*-", ffn=256, ssm_heads=8, ssm_head_dim=24, ssm_state=32, ssm_groups=2, eos_ids=(), **SHARED
    ),
    "llama": lambda: DecoderConfig(kind="llama", num_layers=3, ffn=256, eos_ids=(), **SHARED),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def write_model(kind: str, folder: Path) -> None:
    """A checkpoint of random weights whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = build(MODELS[kind]())
    model.init_weights(0)
    alloy.save(model.eval(), folder, PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE))


def engine_rates(folder: Path, waves: int) -> dict[int, list[float]]:
    """Tokens per second of process time of each number of streams, wave by wave."""
    from alloy.engine.request import Request, SamplingParams

    engine = alloy.LLM(str(folder), max_seqs=max(STREAMS), prefix_cache=False).engine()
    drawn = random.Random(0)

    def wave(streams: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        prompts = [[drawn.randrange(256) for _ in range(INPUT)] for _ in range(streams)]
        start = time.process_time()
        for i, prompt in enumerate(prompts):
            engine.add(Request(id=str(i), token_ids=prompt, params=params))
        tokens = 0
        while engine.busy:
            tokens += sum(len(c.token_ids) for output in engine.step() for c in output.completions)
        assert tokens == streams * OUTPUT, f"{tokens} tokens came from {streams} streams"
        return tokens / (time.process_time() - start)

    rates: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    for i in range(waves + 1):
        for streams in STREAMS:
            rate = wave(streams)
            if i:
                rates[streams].append(rate)
    engine.close()
    return rates


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def server(command: list[str], port: int) -> Iterator[str]:
    """The address of a server while it runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT, env=environment) as it,
    ):
        try:
            end = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                except OSError:
                    if it.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise SystemExit(f"{command[0]} did not start: {log.read().decode()[-2000:]}") from None
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            it.terminate()


def served_rates(
    command: Callable[[int], list[str]], name: str, runs: int, requests: int
) -> dict[int, list[dict[str, Any]]]:
    """What `alloy bench serve` saves of each number of streams, run by run."""
    port = free_port()
    found: dict[int, list[dict[str, Any]]] = {streams: [] for streams in STREAMS}
    with server(command(port), port) as url, tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "run.json"
        load = [sys.executable, "-m", "alloy", "bench", "serve", "--url", url, "--model", name, "--save", str(saved)]
        load += ["--input-len", str(INPUT), "--output-len", str(OUTPUT), "--no-ignore-eos"]
        for run in range(runs + 1):
            for streams in STREAMS:
                more = [
                    "--max-concurrency",
                    str(streams),
                    "--percentiles",
                    "95",
                    "--num-prompts",
                    str(requests * streams),
                    "--seed",
                    str(run),
                ]
                done = subprocess.run([*load, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(f"alloy bench serve failed: {done.stderr[-2000:]}")
                if run:
                    found[streams].append(json.loads(saved.read_text()))
    return found


def measure(kind: str, quick: bool, has_peer: bool) -> list[dict[str, Any]]:
    """A row for each way to ask the model."""
    waves, runs, requests = (5, 1, 5) if quick else (60, 5, 30)
    rows: list[dict[str, Any]] = []

    def row(way: str, rates: dict[int, float], **more: Any) -> None:
        one, eight = (rates[streams] for streams in STREAMS)
        rows.append({"model": kind, "way": way, "one": one, "eight": eight, "ratio": eight / one, **more})
        print(f"{kind:7} {way:40} {one:8.0f} {eight:8.0f} {eight / one:6.2f}x  {more or ''}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(kind, folder)
        row("alloy engine", {n: statistics.median(rates) for n, rates in engine_rates(folder, waves).items()})
        ways = {
            "alloy serve": lambda port: [
                *["alloy", "serve", str(folder), "--port", str(port), "engine.prefix_cache=false", "--served-name", "m"]
            ]
        }
        if has_peer:
            peer = lambda port: ["transformers.cli.transformers", "serve", str(folder), "--port", str(port)]  # noqa: E731
            ways["transformers serve"] = peer
            if kind == "llama":
                ways["transformers serve --continuous-batching"] = lambda port: [*peer(port), "--continuous-batching"]
        for way, command in ways.items():
            found = served_rates(command, "m" if way == "alloy serve" else str(folder), runs, requests)
            rates = {n: statistics.median(r["output_throughput"] for r in reports) for n, reports in found.items()}
            late = statistics.median(r["p95_ttft_ms"] for r in found[max(STREAMS)])
            row(way, rates, ttft_p95_ms=round(late, 1), failed=sum(r["failed"] for n in found for r in found[n]))
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, for a look")
    parser.add_argument("--only", choices=MODELS, help="one model")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=find_spec("accelerate") is not None)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()
    print(f"{'model':7} {'way':40} {'1 tok/s':>8} {'8 tok/s':>8} {'ratio':>7}")
    rows = [row for kind in MODELS if chosen.only in (None, kind) for row in measure(kind, chosen.quick, chosen.peer)]
    if chosen.out:
        head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **machine("cpu")}
        chosen.out.write_text(json.dumps({**head, "input": INPUT, "output": OUTPUT, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
