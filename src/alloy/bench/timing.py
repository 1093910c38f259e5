"""Timing on a CUDA device: medians of device events, graph replays for what is smaller than a launch, the two ceilings."""

import statistics
from collections.abc import Callable, Sequence

import torch

GIB = 2**30


def time_ms(fn: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one call of `fn` on the current CUDA device."""
    for _ in range(warmup):
        fn()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def time_graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median milliseconds of one of `calls`, all captured in one CUDA graph: no launch gaps.

    Give each call inputs of its own, together several times the L2, so that nothing is found in the cache.
    """
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


def matmul_flops_per_s(size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a square product of random matrices: the ceiling of what multiplies."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / (time_ms(lambda: a @ b) * 1e-3)


def peak_extra_bytes(fn: Callable[[], object]) -> int:
    """Most bytes that `fn` held on the device beyond what was held when it began."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
