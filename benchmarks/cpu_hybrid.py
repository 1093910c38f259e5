"""Speed of two small hybrids on a CPU: alloy beside transformers on the same checkpoint, against two ceilings.

    python benchmarks/cpu_hybrid.py [--quick] [--only dense|moe] [--threads 1 2] [--out benchmarks/results/cpu_hybrid.json]

Batch 1, 512 tokens, fp32, all logits in prefill; medians of 5 (decode: of 20 short runs) after a warm-up, alloy, transformers and
ceilings taken in turn in one run; process time on one thread, wall time on more. Ceilings: prefill, the model's linears alone (F.linear
on random inputs of the same shapes, experts at an even load) and, beside it, the same through `alloy.ops.linear`, which is faster on some
processors; training, three times that; decode, every weight that one token needs, in the width it is stored in, read once at the read
rate measured here. Rows "bf16" and "int8" are alloy with weights of that precision; their logits' error against transformers' is beside
their times.
"""

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import alloy
from alloy.models.base import CausalLM
from alloy.models.configs import HybridConfig
from alloy.models.quant import quantize_weights, weight_bytes
from alloy.models.registry import build
from alloy.ops.linear import linear
from alloy.ops.quant import WEIGHTS, Weights

SHARED = {
    "vocab": 8192, "hidden": 512, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64,
    "ssm_heads": 16, "ssm_head_dim": 64, "ssm_state": 128, "ssm_groups": 8, "time_step_min": 1e-9,
}  # fmt: skip
SHAPES = {
    "dense": HybridConfig(pattern="M-M-M-M*-M-M-M*-M-", ffn=2048, **SHARED),
    "moe": HybridConfig(
        pattern="MEMEM*EMEMEM*EMEME",
        num_experts=32,
        top_k=4,
        expert_ffn=256,
        shared_ffn=512,
        router_scale=1.0,
        **SHARED,
    ),
}
TOKENS = 512
DECODE_STEPS = 8
# bytes of a stored weight
WIDTH = {"alloy": 4, "transformers": 4, "bf16": 2, "int8": 1}


def median_s(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each of `runs`, taken in turn so that a slow spell of the machine meets all of them: of the process,
    which others on the machine disturb less, or of the wall where there are several threads."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if i:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def linear_weights(config: HybridConfig) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every matrix product of one forward over TOKENS tokens, experts at an even load."""
    shapes: list[tuple[int, int, int]] = []
    hidden = config.hidden
    for symbol in config.pattern:
        if symbol == "M":
            inner = config.ssm_heads * config.ssm_head_dim
            width = 2 * inner + 2 * config.ssm_groups * config.ssm_state + config.ssm_heads
            shapes += [(TOKENS, hidden, width), (TOKENS, inner, hidden)]
        elif symbol == "*":
            queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            shapes += [
                (TOKENS, hidden, queries),
                (TOKENS, hidden, keys),
                (TOKENS, hidden, keys),
                (TOKENS, queries, hidden),
            ]
        elif symbol == "-":
            shapes += [(TOKENS, hidden, config.ffn), (TOKENS, config.ffn, hidden)]
        else:
            load = TOKENS * config.top_k // config.num_experts
            pair = [(load, hidden, config.expert_ffn), (load, config.expert_ffn, hidden)]
            shapes += config.num_experts * pair
            shapes += [
                (TOKENS, hidden, config.num_experts),
                (TOKENS, hidden, config.shared_ffn),
                (TOKENS, config.shared_ffn, hidden),
            ]
    return [*shapes, (TOKENS, hidden, config.vocab)]


def token_bytes(config: HybridConfig) -> int:
    """Bytes of the fp32 weights that one decoded token needs: every matrix but the embedding, top_k experts of each layer."""
    from alloy.models import sizes

    return 4 * sizes.parameters(config, active=True, input_embedding=False)


def read_rate() -> float:
    """Bytes a second at which the threads read a buffer far larger than the caches (the best of three ways of reading it)."""
    data = torch.randn(64 * 2**20)
    vector = torch.randn(4096)
    ways = {"sum": data.sum, "dot": lambda: torch.dot(data, data), "matvec": lambda: data.view(-1, 4096) @ vector}
    return data.numel() * 4 / min(median_s(ways, 5).values())


def measure(name: str, repeats: int) -> dict[str, object]:
    """All figures of one shape."""
    config = SHAPES[name]
    torch.manual_seed(0)
    model = build(config)
    model.init_weights(0)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        alloy.save(model, folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, config.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    low = {kind: low_copy(config, model, kind) for kind in WEIGHTS}
    with torch.no_grad():
        truth = peer(tokens).logits
        errors = {kind: logit_error(m(tokens).logits, truth) for kind, m in {"alloy": model, **low}.items()}

    products = [(torch.randn(r, i), torch.randn(o, i)) for r, i, o in linear_weights(config)]

    def linears() -> None:
        with torch.no_grad():
            for x, weight in products:
                F.linear(x, weight)

    def fast_linears() -> None:
        with torch.no_grad():
            for x, weight in products:
                linear(x, weight)

    def prefill(m: CausalLM) -> Callable[[], Tensor | None]:
        def run() -> Tensor | None:
            with torch.no_grad():
                return m(tokens).logits

        return run

    def prefill_peer() -> Tensor:
        with torch.no_grad():
            return peer(tokens, use_cache=False).logits

    prefills = median_s(
        {
            "linears": linears,
            "fast linears": fast_linears,
            "alloy": prefill(model),
            "transformers": prefill_peer,
            **{kind: prefill(m) for kind, m in low.items()},
        },
        repeats,
    )

    def train(module: torch.nn.Module, logits: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            loss = F.cross_entropy(logits()[0, :-1], tokens[0, 1:])
            loss.backward()
            module.zero_grad(set_to_none=True)

        return step

    model.train()
    peer.train()
    training = median_s(
        {
            "linears": linears,
            "fast linears": fast_linears,
            "alloy": train(model, lambda: model(tokens).logits),
            "transformers": train(peer, lambda: peer(tokens, use_cache=False).logits),
        },
        repeats,
    )
    model.eval()
    peer.eval()

    def decode_alloy(m: CausalLM) -> Callable[[], None]:
        cache = m.new_cache(batch=1, capacity=TOKENS + (4 * repeats + 1) * DECODE_STEPS)
        with torch.inference_mode():
            m(tokens, cache=cache, logits="last")

        def run() -> None:
            token = tokens[:, :1]
            with torch.inference_mode():
                for _ in range(DECODE_STEPS):
                    token = m(token, cache=cache, logits="last").logits.argmax(-1).view(1, 1)

        return run

    def decode_peer() -> Callable[[], None]:
        with torch.inference_mode():
            cache = peer(tokens, use_cache=True).past_key_values

        def run() -> None:
            token = tokens[:, :1]
            with torch.inference_mode():
                for _ in range(DECODE_STEPS):
                    token = peer(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1).view(1, 1)

        return run

    ways = {"alloy": decode_alloy(model), "transformers": decode_peer()}
    decode = median_s({**ways, **{kind: decode_alloy(m) for kind, m in low.items()}}, 4 * repeats)
    rate = read_rate()
    floor = token_bytes(config) / 4 / rate
    sides = ("alloy", "transformers")
    return {
        "shape": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_mb": {
            kind: weight_bytes(m) / 1e6 for kind, m in {"alloy": model, "transformers": peer, **low}.items()
        },
        "logit_error": errors,
        "prefill_ms": {k: 1e3 * v for k, v in prefills.items()},
        "prefill_of_ceiling": {k: prefills["linears"] / prefills[k] for k in sides},
        "prefill_of_fast_ceiling": {k: prefills["fast linears"] / prefills[k] for k in sides},
        "training_ms": {k: 1e3 * v for k, v in training.items()},
        "training_of_ceiling": {k: 3 * training["linears"] / training[k] for k in sides},
        "training_of_fast_ceiling": {k: 3 * training["fast linears"] / training[k] for k in sides},
        "read_rate_gb_s": rate / 1e9,
        "decode_ms_per_token": {k: 1e3 * v / DECODE_STEPS for k, v in decode.items()},
        "decode_of_ceiling": {k: floor * WIDTH[k] * DECODE_STEPS / v for k, v in decode.items()},
        "times_transformers": {
            "prefill": {k: prefills["transformers"] / prefills[k] for k in WIDTH},
            "training": {"alloy": training["transformers"] / training["alloy"]},
            "decode": {k: decode["transformers"] / decode[k] for k in WIDTH},
        },
    }


def low_copy(config: HybridConfig, model: CausalLM, kind: Weights) -> CausalLM:
    """The same model with weights of low precision."""
    copy = build(config)
    copy.load_state_dict(model.state_dict())
    quantize_weights(copy, kind)
    return copy


def logit_error(logits: Tensor | None, truth: Tensor) -> dict[str, float]:
    """Of all logits: the largest difference, and the norm of the difference over that of the truth."""
    assert logits is not None, "the call asked for logits"
    difference = logits - truth
    return {"largest": difference.abs().max().item(), "relative": (difference.norm() / truth.norm()).item()}


def report(result: dict[str, Any]) -> None:
    """Print what `measure` gives."""
    errors, times = result["logit_error"], result["times_transformers"]
    print(
        f"{result['shape']}, {result['threads']} thread(s), load {result['load']:.1f}: {result['parameters']:,} parameters, "
        f"logits differ by {errors['alloy']['largest']:.1e}, read rate {result['read_rate_gb_s']:.1f} GB/s"
    )
    for phase in ("prefill", "training", "decode"):
        shares = result[f"{phase}_of_ceiling"]
        line = f"  {phase:9} alloy {shares['alloy']:.2f} of the ceiling, transformers {shares['transformers']:.2f}"
        if fast := result.get(f"{phase}_of_fast_ceiling"):
            line += f"; of alloy's own linears {fast['alloy']:.2f}, {fast['transformers']:.2f}"
        print(f"{line}; {times[phase]['alloy']:.2f} times transformers")
    for kind in WEIGHTS:
        print(
            f"  {kind:9} decode {result['decode_ms_per_token'][kind]:.2f} ms ({times['decode'][kind]:.2f} times transformers, "
            f"{result['decode_of_ceiling'][kind]:.2f} of the ceiling), prefill {result['prefill_ms'][kind]:.0f} ms "
            f"({times['prefill'][kind]:.2f} times), {result['weights_mb'][kind]:.0f} MB of {result['weights_mb']['alloy']:.0f}, "
            f"logits off by {errors[kind]['relative']:.1e}"
        )


def processor() -> str:
    """The processor's name, where Linux tells it."""
    names = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="medians of 2 instead of 5")
    parser.add_argument("--only", choices=sorted(SHAPES), help="one shape")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure with")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in SHAPES:
            if options.only in (None, name):
                results.append(measure(name, 2 if options.quick else 5))
                report(results[-1])
    if options.out:
        machine = {
            "processor": processor(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
