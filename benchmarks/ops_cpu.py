"""What the ops cost on one CPU thread, beside the matmuls of the layer they belong to.

Layers: Mamba (in_proj, out_proj), attention (q, k, v, o) and MoE (the chosen experts) at hidden 512, 16 heads of 64, state
128, 8 groups, 4 taps, 8 / 2 attention heads of 64, 32 experts of 256 with 4 a token; batch 1, fp32. Times are process time,
medians of interleaved rounds; training is forward and backward, compared with three times the layer's matmuls. A decode
step is compared with reading the layer's weights once at the rate that a sum over large tensors reaches.

    python benchmarks/ops_cpu.py --tokens 512 --rounds 15
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy import ops

HIDDEN, HEADS, HEAD_DIM, STATE, GROUPS, KERNEL = 512, 16, 64, 128, 8, 4
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
EXPERTS, FFN, TOP_K = 32, 256, 4
Case = Callable[[], object]


def medians(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Milliseconds of process time of each case; the rounds go through all cases, so that drift hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 2):
        for name, case in cases.items():
            start = time.process_time()
            case()
            if i >= 2:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def forward(fn: Case) -> Case:
    def run() -> None:
        with torch.no_grad():
            fn()

    return run


def training(fn: Callable[..., Tensor], *tensors: Tensor) -> Case:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        gradient = torch.randn_like(fn(*leaves))
    return lambda: torch.autograd.grad(fn(*leaves), leaves, gradient)


def mamba_cases(tokens: int) -> tuple[dict[str, Case], dict[str, Case], dict[str, Case]]:
    """Prefill, training and decode of one Mamba layer; the first case of each is the comparison."""
    w_in, w_out = torch.randn(INNER + CHANNELS + HEADS, HIDDEN), torch.randn(HIDDEN, INNER)
    projected = torch.randn(1, tokens, INNER + CHANNELS + HEADS)
    z, xbc, dt = projected.split([INNER, CHANNELS, HEADS], dim=-1)
    weight, bias, norm = torch.randn(CHANNELS, KERNEL), torch.randn(CHANNELS), torch.randn(INNER)
    A, D, dt_bias = -torch.linspace(1, 16, HEADS), torch.ones(HEADS), torch.linspace(-7, -2.3, HEADS)
    h, y = torch.randn(1, tokens, HIDDEN), torch.randn(1, tokens, INNER)
    x, B, C = torch.randn(1, tokens, CHANNELS).split([INNER, GROUPS * STATE, GROUPS * STATE], dim=-1)
    x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1))

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        return ops.ssd_scan(x, dt, A, B, C, D, dt_bias=dt_bias)

    def gated(y: Tensor, z: Tensor, norm: Tensor) -> Tensor:
        return ops.gated_rms_norm(y, z, norm, 1e-5, INNER // GROUPS)

    def rms(h: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(h, weight, 1e-5)

    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "ssd_scan": (scan, (x, dt, A, B, C, D, dt_bias)),
        "causal_conv1d": (ops.causal_conv1d, (xbc, weight, bias)),
        "gated_rms_norm": (gated, (y, z, norm)),
        "rms_norm": (rms, (h, torch.ones(HIDDEN))),
    }
    matmuls = forward(lambda: (F.linear(h, w_in), F.linear(y, w_out)))
    prefill = {"matmuls": matmuls} | {name: forward(lambda fn=fn, a=a: fn(*a)) for name, (fn, a) in calls.items()}
    train = {"matmuls": matmuls} | {name: training(fn, *a) for name, (fn, a) in calls.items()}

    state, taps = torch.randn(1, HEADS, HEAD_DIM, STATE), torch.randn(1, KERNEL - 1, CHANNELS).transpose(1, 2)
    step_inputs = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D
    weights = [(torch.randn_like(w_in), torch.randn_like(w_out)) for _ in range(12)]
    turn = iter(range(10**9))

    def read() -> None:
        for w in weights[next(turn) % 12]:
            w.sum()

    def project() -> None:
        a, b = weights[next(turn) % 12]
        ops.linear(h[:, :1], a)
        ops.linear(y[:, :1], b)

    decode: dict[str, Case] = {
        "weights read": read,
        "linear": forward(project),
        "ssd_step": forward(lambda: ops.ssd_step(state, *step_inputs, dt_bias=dt_bias)),
        "causal_conv1d_step": forward(lambda: ops.causal_conv1d_step(taps, xbc[:, 0], weight, bias)),
        "gated_rms_norm": forward(lambda: gated(y[:, :1], z[:, :1], norm)),
        "rms_norm": forward(lambda: rms(h[:, :1], torch.ones(HIDDEN))),
    }
    return prefill, train, decode


def attention_cases(tokens: int) -> tuple[dict[str, Case], dict[str, Case]]:
    """Prefill and training of one attention layer."""
    h = torch.randn(1, tokens, HIDDEN)
    w_q, w_kv, w_o = torch.randn(512, HIDDEN), torch.randn(128, HIDDEN), torch.randn(HIDDEN, 512)
    q, k, v = (torch.randn(1, tokens, n, 64).transpose(1, 2) for n in (8, 2, 2))
    matmuls = forward(lambda: [F.linear(h, w) for w in (w_q, w_kv, w_kv, w_o)])
    prefill = {"matmuls": matmuls, "attention": forward(lambda: ops.attention(q, k, v))}
    return prefill, {"matmuls": matmuls, "attention": training(ops.attention, q, k, v)}


def moe_cases(tokens: int) -> tuple[dict[str, Case], dict[str, Case]]:
    """Prefill and training of one MoE layer; the comparison is its matmuls on rows that are sorted already."""
    h, w_gate = torch.randn(tokens, HIDDEN), torch.randn(EXPERTS, HIDDEN) / 20
    up, down = torch.randn(EXPERTS, FFN, HIDDEN) / 20, torch.randn(EXPERTS, HIDDEN, FFN) / 20
    chosen, weights, _ = ops.route(F.linear(h, w_gate), None, TOP_K)
    counts = ops.expert_counts(chosen, EXPERTS).tolist()
    rows, inner = torch.randn(tokens * TOP_K, HIDDEN).split(counts), torch.randn(tokens * TOP_K, FFN).split(counts)

    def matmuls() -> None:
        for e in range(EXPERTS):
            F.linear(rows[e], up[e])
            F.linear(inner[e], down[e])

    def experts(h: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ops.moe_experts(h, chosen, weights, up, down)

    logits = torch.randn(tokens, EXPERTS)
    prefill = {
        "matmuls": forward(matmuls),
        "moe_experts (all)": forward(lambda: experts(h, weights, up, down)),
        "route": forward(lambda: ops.route(logits, None, TOP_K)),
    }
    return prefill, {"matmuls": forward(matmuls), "moe_experts (all)": training(experts, h, weights, up, down)}


def few_row_cases(rows: int, inputs: int, outputs: int) -> dict[str, Case]:
    """One product with weights from memory or, where they are few, from the processor's cache; first what reading them costs."""
    count = max(1, (64 << 20) // (4 * inputs * outputs)) if inputs * outputs > 1 << 18 else 1
    weights, x = [torch.randn(outputs, inputs) for _ in range(count)], torch.randn(rows, inputs)
    turn = iter(range(10**9))

    def product(fn: Callable[[Tensor, Tensor], object]) -> Case:
        def run() -> None:
            with torch.inference_mode():
                # a call of the clock is a part of what is measured
                for _ in range(20):
                    fn(x, weights[next(turn) % count])

        return run

    return {
        "weights read": product(lambda _, w: w.sum()),
        "alloy": product(ops.linear),
        "torch (MKL)": product(F.linear),
        "oneDNN": product(lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")),
    }


def show(title: str, cases: dict[str, Case], rounds: int, factor: int = 1) -> None:
    """A table of milliseconds and shares of `factor` times the first case."""
    times = medians(cases, rounds)
    base = next(iter(times.values())) * factor
    print(f"\n{title}")
    for name, value in times.items():
        shown = value * factor if name == "matmuls" else value
        print(f"  {name:<22}{shown:>9.3f} ms{shown / base:>9.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="cpu", help="cpu or torch (the reference)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # freed once, a block of the size of a model's logits makes glibc keep memory between ops, as it does in a model
    torch.empty(6 << 20)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, {options.tokens} tokens")
    with ops.use_backend(options.backend):
        prefill, train, decode = mamba_cases(options.tokens)
        show("Mamba layer, prefill", prefill, options.rounds)
        show("Mamba layer, training (3 x matmuls)", train, options.rounds, factor=3)
        show("Mamba layer, one token", decode, options.rounds * 20)
        prefill, train = attention_cases(options.tokens)
        show("Attention layer, prefill", prefill, options.rounds)
        show("Attention layer, training (3 x matmuls)", train, options.rounds, factor=3)
        prefill, train = moe_cases(options.tokens)
        show("MoE layer, prefill", prefill, options.rounds)
        show("MoE layer, training (3 x matmuls)", train, options.rounds, factor=3)
        for rows, inputs, outputs in itertools.product((2, 4, 8), (96, 2048), (256, 2048)):
            if (inputs < 2048) == (outputs < 2048):
                title = f"20 products of {rows} rows, {inputs} x {outputs} weights"
                show(title, few_row_cases(rows, inputs, outputs), options.rounds * 5)


if __name__ == "__main__":
    main()
