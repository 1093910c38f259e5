"""Timing: medians of device events, graph replays for what is smaller than a launch, and the ceilings of a machine."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

GIB = 2**30
# calls that share the launch of a graph, which takes some microseconds
GRAPH_CALLS = 16


def time_ms(fn: Callable[[], object], repeats: int = 20, warmup: int = 3, device: str = "cuda") -> float:
    """Median milliseconds of one call of `fn`: between events of the CUDA device, or by the clock on a CPU."""
    for _ in range(warmup):
        fn()
    if device == "cpu":
        return statistics.median(_clock_s(fn) for _ in range(repeats)) * 1e3
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def time_graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median milliseconds of one of `calls`, captured in one CUDA graph as often as fits `GRAPH_CALLS`: no launch gaps.

    Give each call inputs of its own, together several times the L2, so that nothing is found in the cache.
    """
    calls = list(calls) * max(1, GRAPH_CALLS // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_ms(graph.replay, repeats) / len(calls)


def copy_bytes_per_s(gib: float = 2.0) -> float:
    """Bytes read and written per second by a copy of `gib` GiB: the ceiling of what moves bytes."""
    source = torch.randint(0, 255, (int(gib * GIB),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_ms(lambda: target.copy_(source)) * 1e-3)


def read_bytes_per_s(mib: int = 256) -> float:
    """Bytes per second at which the CPU reads a buffer far larger than its caches: the best of three ways of reading."""
    data, vector = torch.randn(mib * 2**18), torch.randn(4096)
    ways: list[Callable[[], object]] = [data.sum, lambda: torch.dot(data, data), lambda: data.view(-1, 4096) @ vector]
    return data.numel() * 4 / (min(time_ms(way, 5, 1, "cpu") for way in ways) * 1e-3)


def matmul_flops_per_s(size: int = 8192, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> float:
    """Operations per second of a square product of random matrices: the ceiling of what multiplies."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (time_ms(lambda: a @ b, device=device) * 1e-3)


def peak_extra_bytes(fn: Callable[[], object]) -> int:
    """Most bytes that `fn` held on the device beyond what was held when it began."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _clock_s(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start
