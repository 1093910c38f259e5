"""Speed of two small hybrids on one CPU thread: alloy beside transformers on the same checkpoint, against two ceilings.

    python benchmarks/cpu_hybrid.py [--quick] [--only dense|moe] [--out benchmarks/results/cpu_hybrid.json]

One thread, process time, batch 1, 512 tokens, fp32, all logits in prefill; medians of 5 after a warm-up, alloy, transformers and
ceilings taken in turn in one run. Ceilings: prefill, the model's linears alone (F.linear on random inputs of the same shapes, experts at an
even load) and, beside it, the same through `alloy.ops.linear`, which is faster on some processors; training, three times that; decode, every weight that one token needs read once at the read rate measured here.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import alloy
from alloy.models.configs import HybridConfig
from alloy.models.registry import build
from alloy.ops.linear import linear

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
DECODE_STEPS = 32


def median_s(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median process seconds of each of `runs`, taken in turn so that a slow spell of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:
                times[name].append(time.process_time() - start)
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
    """Bytes a second at which one thread reads a buffer far larger than the caches (the best of three ways of reading it)."""
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
    with torch.no_grad():
        error = (model(tokens).logits - peer(tokens).logits).abs().max().item()

    products = [(torch.randn(r, i), torch.randn(o, i)) for r, i, o in linear_weights(config)]

    def linears() -> None:
        with torch.no_grad():
            for x, weight in products:
                F.linear(x, weight)

    def fast_linears() -> None:
        with torch.no_grad():
            for x, weight in products:
                linear(x, weight)

    def prefill_alloy() -> Tensor:
        with torch.no_grad():
            return model(tokens).logits

    def prefill_peer() -> Tensor:
        with torch.no_grad():
            return peer(tokens, use_cache=False).logits

    prefill = median_s(
        {"linears": linears, "fast linears": fast_linears, "alloy": prefill_alloy, "transformers": prefill_peer},
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

    def decode_alloy() -> Callable[[], None]:
        cache = model.new_cache(batch=1, capacity=TOKENS + 6 * DECODE_STEPS + 64)
        with torch.inference_mode():
            model(tokens, cache=cache, logits="last")

        def run() -> None:
            token = tokens[:, :1]
            with torch.inference_mode():
                for _ in range(DECODE_STEPS):
                    token = model(token, cache=cache, logits="last").logits.argmax(-1).view(1, 1)

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

    decode = median_s({"alloy": decode_alloy(), "transformers": decode_peer()}, repeats)
    rate = read_rate()
    floor = token_bytes(config) / rate
    sides = ("alloy", "transformers")
    return {
        "shape": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "max_logit_difference": error,
        "prefill_ms": {k: 1e3 * v for k, v in prefill.items()},
        "prefill_of_ceiling": {k: prefill["linears"] / prefill[k] for k in sides},
        "prefill_of_fast_ceiling": {k: prefill["fast linears"] / prefill[k] for k in sides},
        "training_ms": {k: 1e3 * v for k, v in training.items()},
        "training_of_ceiling": {k: 3 * training["linears"] / training[k] for k in sides},
        "training_of_fast_ceiling": {k: 3 * training["fast linears"] / training[k] for k in sides},
        "read_rate_gb_s": rate / 1e9,
        "decode_ms_per_token": {k: 1e3 * v / DECODE_STEPS for k, v in decode.items()},
        "decode_of_ceiling": {k: floor * DECODE_STEPS / decode[k] for k in sides},
    }


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
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(name, 2 if options.quick else 5) for name in SHAPES if options.only in (None, name)]
    for result in results:
        print(
            f"{result['shape']}: {result['parameters']:,} parameters, logits differ by {result['max_logit_difference']:.1e}"
        )
        for phase in ("prefill", "training", "decode"):
            shares = result[f"{phase}_of_ceiling"]
            line = f"  {phase:9} alloy {shares['alloy']:.2f} of the ceiling, transformers {shares['transformers']:.2f}"
            if fast := result.get(f"{phase}_of_fast_ceiling"):
                line += f"; of alloy's own linears {fast['alloy']:.2f}, {fast['transformers']:.2f}"
            print(line)
    if options.out:
        machine = {
            "processor": processor(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        options.out.write_text(json.dumps({"machine": machine, "threads": 1, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
