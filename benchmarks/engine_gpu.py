"""The engine on one GPU: decoding beside what memory can deliver, a prefix that is known, drafts, and load on a server.

    python benchmarks/engine_gpu.py --out benchmarks/results/engine_gpu.json [--only decode|ttft|drafts|serve] [--models NAME ...]

Random weights in bf16; prompts are random tokens, answers greedy and of full length.

decode: so many requests at once, 1k in and 1k out, and 8k in; the median step of the rounds in which all rows ran, by the clock
around `engine.step()`. Floor: bytes of a step in the middle of the answers (`alloy.bench.cases.model.step_bytes`) over the rate
of a 2 GiB copy. Replay: the captured step alone, with nothing between two of them; the rest of the engine's step is its gap.

ttft: from handing a request in to its first token, for a prompt of 8k tokens that nobody sent, for the same again, and for one
that shares 8k with others and ends in 64 tokens of its own (the third of its kind: the second leaves a state at the branch).

drafts: tokens a second of one request with three drafts a step, of which each is kept with probability 0.7 whatever the model
says, beside none; a model without multi-token prediction gets one block of attention and MLP for it.

serve: `alloy serve` on a checkpoint of those weights, `alloy bench serve` at rising rates of requests, at 1k/1k with 64 at once, and at
8k/16k with 16.
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from streams import free_port, server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import alloy
from alloy.bench.cases.model import decode_step, draw_decode, step_bytes
from alloy.bench.timing import copy_bytes_per_s, read_bytes_per_s, time_ms
from alloy.bench.worker import machine
from alloy.engine import runner
from alloy.engine.core import LLM
from alloy.engine.request import Output, Request, SamplingParams
from alloy.engine.sampler import Sampler
from alloy.models.base import CausalLM
from alloy.models.configs import HybridConfig
from alloy.models.presets import PRESETS, preset
from alloy.models.registry import build

KEPT = 0.7
DRAFTS = 3
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Setting:
    """Sizes: those of the report, or small ones that show that everything runs."""

    def __init__(self, quick: bool) -> None:
        self.shapes = [(1, 64, 16), (4, 64, 16)] if quick else [(1, 1024, 512), (64, 1024, 1024), (64, 8192, 256)]
        self.prefix, self.tail, self.repeats = (256, 16, 2) if quick else (8192, 64, 5)
        self.answer = 32 if quick else 384
        # input, output, at once, requests
        self.loads = [(32, 16, 4, 8)] if quick else [(1024, 1024, 64, 64), (8192, 16384, 16, 16)]
        self.sweep = ("8", 32, 16, 16) if quick else ("4,8,16", 1024, 128, 64)


def model_of(name: str, device: str, has_drafts: bool = False) -> CausalLM:
    """Random weights of a preset; with a block of attention and MLP that drafts, where it has none of its own."""
    config = preset(name)
    if has_drafts and isinstance(config, HybridConfig) and not config.mtp_depths:
        config = HybridConfig.model_validate({**config.model_dump(), "mtp_depths": 1, "mtp_pattern": "*-"})
    return build(config, device, torch.bfloat16).eval()


def greedy(length: int) -> SamplingParams:
    """The likeliest tokens, so many."""
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def run(llm: LLM, requests: list[Request]) -> tuple[list[list[Output]], list[float]]:
    """Answer requests together: what each round said, and its seconds."""
    engine = llm.engine()
    for request in requests:
        engine.add(request)
    said, seconds = list[list[Output]](), list[float]()
    while engine.busy:
        start = time.perf_counter()
        said.append(engine.step())
        seconds.append(time.perf_counter() - start)
    return said, seconds


def draw(llm: LLM, count: int, prompt: int, answer: int, r: random.Random) -> list[Request]:
    """Requests of random tokens."""
    vocab = llm.model.config.vocab
    return [
        Request(id=f"{i}", token_ids=[r.randrange(vocab) for _ in range(prompt)], params=greedy(answer))
        for i in range(count)
    ]


def clear() -> None:
    """Give the memory of what is gone back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decode(name: str, device: str, setting: Setting) -> Iterator[dict[str, Any]]:
    """A row for each shape."""
    rate = copy_bytes_per_s() if device == "cuda" else read_bytes_per_s()
    clear()
    for batch, prompt, answer in setting.shapes:
        with torch.device(device):
            serving = draw_decode(name, prompt + answer // 2, batch)
            floor_ms = step_bytes(prompt + answer // 2, serving) / rate * 1e3
            with torch.inference_mode():
                replay_ms = time_ms(lambda s=serving: decode_step(s), device=device)
        model = serving.model
        del serving
        clear()
        llm = LLM(model, max_model_len=prompt + answer + 8, max_seqs=batch, speculate=0)
        run(llm, draw(llm, 2, 80, 4, random.Random(1)))
        said, seconds = run(llm, draw(llm, batch, prompt, answer, random.Random(0)))
        tokens = [sum(len(c.token_ids) for output in outputs for c in output.completions) for outputs in said]
        # of rounds that read prompts the first tokens are among them
        first = tokens.index(batch) if batch in tokens else len(tokens)
        full = [s for s, count in zip(seconds[first + 1 :], tokens[first + 1 :], strict=True) if count == batch]
        ms = statistics.median(full) * 1e3
        yield {
            "model": name, "batch": batch, "prompt": prompt, "answer": answer, "step_ms": ms, "replay_ms": replay_ms,
            "gap": 1 - replay_ms / ms, "floor_ms": floor_ms, "of_bandwidth": floor_ms / ms, "bytes_per_s": rate,
            "tokens_per_s": batch / ms * 1e3, "prompts_s": sum(seconds[: first + 1]),
            "prompt_tokens_per_s": batch * prompt / sum(seconds[: first + 1]), "graphs": llm.graphs is not None,
        }  # fmt: skip
        del llm, model
        clear()


def ttft(name: str, device: str, setting: Setting) -> Iterator[dict[str, Any]]:
    """Milliseconds to the first token with nothing known, all known, and a shared beginning."""
    llm = LLM(model_of(name, device), max_model_len=setting.prefix + 2 * setting.tail, max_seqs=8, speculate=0)
    r, vocab = random.Random(0), llm.model.config.vocab
    run(llm, draw(llm, 2, setting.prefix, 2, r))
    taken: dict[str, list[float]] = {"miss": [], "hit": [], "shared": []}

    def ask(tokens: list[int], kind: str | None) -> int:
        said, seconds = run(llm, [Request(id="a", token_ids=tokens, params=greedy(1))])
        if kind is not None:
            taken[kind].append(sum(seconds) * 1e3)
        return said[-1][0].cached_tokens

    def random_tokens(count: int) -> list[int]:
        return [r.randrange(vocab) for _ in range(count)]

    for _ in range(setting.repeats):
        prompt = random_tokens(setting.prefix)
        ask(prompt, "miss")
        cached = ask(prompt, "hit")
        assert cached == len(prompt) - 1, f"{cached} tokens of {len(prompt)} were found"
        ask(prompt + random_tokens(setting.tail), None)
        ask(prompt + random_tokens(setting.tail), None)
        cached = ask(prompt + random_tokens(setting.tail), "shared")
        assert cached >= len(prompt) - 1, f"{cached} tokens of {len(prompt)} were found"
    medians = {kind: statistics.median(values) for kind, values in taken.items()}
    yield {
        "model": name, "prefix": setting.prefix, "tail": setting.tail, "repeats": setting.repeats,
        **{f"{kind}_ms": value for kind, value in medians.items()},
        "hit_over_miss": medians["hit"] / medians["miss"], "shared_over_miss": medians["shared"] / medians["miss"],
    }  # fmt: skip


class Agreeing(Sampler):
    """Does the work of a sampler, and then keeps each draft with probability `KEPT`, whatever the model says."""

    drawn = random.Random(0)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # or captured steps do without it
        self.plain = False

    def choose(self, logits: Tensor, drafts: Tensor | None = None) -> list[list[int]]:
        """See `Sampler.choose`."""
        chosen = super().choose(logits, drafts)
        if drafts is not None:
            for row, guesses in zip(chosen, drafts.tolist(), strict=True):
                for j, guess in enumerate(guesses):
                    row[j] = guess if self.drawn.random() < KEPT else (guess + 1) % logits.shape[-1]
        return chosen


def drafts(name: str, device: str, setting: Setting) -> Iterator[dict[str, Any]]:
    """Tokens a second of one request, with and without drafts."""
    model, rates = model_of(name, device, has_drafts=True), dict[int, float]()
    kept = 0.0
    runner.Sampler = Agreeing
    try:
        for length in (0, DRAFTS):
            llm = LLM(model, max_model_len=1024 + setting.answer, max_seqs=1, speculate=length)
            run(llm, draw(llm, 1, 64, setting.answer, random.Random(1)))
            llm.engine().stats = runner.EngineStats()
            said, seconds = run(llm, draw(llm, 1, 64, setting.answer, random.Random(0)))
            begun = next(i for i, outputs in enumerate(said) if outputs)
            rates[length] = (setting.answer - 1) / sum(seconds[begun + 1 :])
            kept = llm.engine().stats.acceptance_rate or kept
            del llm
            clear()
    finally:
        runner.Sampler = Sampler
    yield {
        "model": name, "drafts": DRAFTS, "kept_of_drafted": kept, "without_tokens_per_s": rates[0],
        "with_tokens_per_s": rates[DRAFTS], "ratio": rates[DRAFTS] / rates[0],
    }  # fmt: skip


def write_checkpoint(name: str, device: str, folder: Path) -> None:
    """Random weights with a tokenizer that has a text for every token."""
    model = model_of(name, device)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"Ġ{i}" for i in range(len(letters), model.config.vocab))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alloy.save(model, folder, PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE))


def serve(name: str, device: str, setting: Setting) -> Iterator[dict[str, Any]]:
    """What `alloy bench serve` says of each load."""
    with tempfile.TemporaryDirectory() as place:
        folder, saved = Path(place) / "model", Path(place) / "run.json"
        write_checkpoint(name, device, folder)
        clear()
        longest = max(given + taken for given, taken, *_ in setting.loads) + 64
        rates, given, taken, count = setting.sweep
        kinds = [[*_sizes(given, taken, count), "--rate-sweep", rates]]
        kinds += [[*_sizes(i, o, n), "--max-concurrency", str(at_once)] for i, o, at_once, n in setting.loads]
        port = free_port()
        command = ["alloy", "serve", str(folder), "--port", str(port), "--served-name", "m"]
        command += [f"engine.device={device}", f"engine.max_model_len={longest}", "engine.dtype=bfloat16"]
        with server(command, port) as url:
            load = [sys.executable, "-m", "alloy", "bench", "serve", "--url", url, "--save", str(saved)]
            # what is compiled at first use is not measured
            subprocess.run([*load, *_sizes(given, 16, 8)], check=True, stdout=subprocess.DEVNULL)
            for seed, kind in enumerate(kinds, 1):
                # text of its own, which the cache does not know
                command = [*load, *kind, "--percentiles", "50,95,99", "--seed", str(100 * seed)]
                subprocess.run(command, check=True, stdout=sys.stderr)
                yield {"model": name, "options": " ".join(kind), **json.loads(saved.read_text())}


def _sizes(given: int, taken: int, count: int) -> list[str]:
    return ["--input-len", str(given), "--output-len", str(taken), "--num-prompts", str(count)]


PARTS: dict[str, Callable[[str, str, Setting], Iterator[dict[str, Any]]]] = {
    "decode": decode, "ttft": ttft, "drafts": drafts, "serve": serve,
}  # fmt: skip
MODELS = {
    "decode": ["nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b"],
    "ttft": ["nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b"],
    "drafts": ["nemotron-nano-9b-v2", "nemotron-3.5-lightning-30b-a3b"],
    "serve": ["nemotron-nano-9b-v2"],
}


def main() -> None:
    """Measure, print; the file is whole after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="some parts; the others in the file stay")
    parser.add_argument("--models", choices=PRESETS, nargs="+", metavar="NAME", help="presets, for every part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick --models tiny-moe shows that it runs")
    setting, kept = Setting(options.quick), dict[str, Any]()
    if options.out and options.out.exists():
        kept = json.loads(options.out.read_text())
    for part in options.only or PARTS:
        rows: list[dict[str, Any]] = []
        for name in options.models or MODELS[part]:
            for row in PARTS[part](name, options.device, setting):
                rows.append(row)
                print(json.dumps({"part": part, **row}), flush=True)
                if options.out:
                    command = " ".join(["python", "benchmarks/engine_gpu.py", *sys.argv[1:]])
                    kept[part] = {"machine": machine(options.device), "command": command, "rows": rows}
                    half = options.out.with_suffix(".part")
                    half.write_text(json.dumps(kept, indent=1) + "\n")
                    half.replace(options.out)
            clear()


if __name__ == "__main__":
    main()
