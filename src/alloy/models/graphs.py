"""Decode steps as CUDA graphs: one launch for embedding, all layers, head, greedy choice and the count of lengths.

There is one graph per batch bucket; a batch is padded to the next bucket with rows whose slot is -1, which read and write
nothing. A replay reads its tokens and slots from fixed buffers and writes the chosen tokens back into the first, so that a
batch that stays as it is needs no copy to the device at all. All graphs share one memory pool: the largest is captured
first, and the others fit into its memory.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from alloy.models import sizes
from alloy.models.base import CausalLM
from alloy.models.configs import MambaConfig, MoEConfig
from alloy.models.mamba import Mamba
from alloy.models.paged import PagedCache, StaticView
from alloy.ops import backend
from alloy.ops.decode import take_largest

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# ops of a step, by what computes it
STEP_OPS: dict[type[object], tuple[str, ...]] = {MambaConfig: ("mamba_step",), MoEConfig: ("moe_route", "moe_experts")}


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves in fixed buffers, which the next step overwrites.

    Attributes:
        tokens: (rows, 1) int64 of the largest logits, -1 where they are not finite
        logits: (rows, 1, vocab) fp32
        hidden: (rows, 1, hidden) after the final norm
    """

    tokens: Tensor
    logits: Tensor
    hidden: Tensor


class DecodeGraphs:
    """Captured decode steps of a model over a paged cache.

    Args:
        model: in evaluation mode, on a CUDA device
        pool: the cache; its slots bound the batch
        buckets: batch sizes to capture; default: those of `BUCKETS` up to the first that holds all slots

    Attributes:
        buckets: what was captured, rising
        handle: of the memory that the graphs share, for others to be captured into
        pool_bytes: device memory that the graphs keep for themselves
        capture_s: seconds that capturing took
        replays: how often each bucket ran
    """

    def __init__(self, model: CausalLM, pool: PagedCache, buckets: Sequence[int] | None = None) -> None:
        self.model, self.pool = model, pool
        self.buckets = tuple(sorted(buckets or buckets_for(pool.slots)))
        self.replays = dict.fromkeys(self.buckets, 0)
        most, config, weight = self.buckets[-1], model.config, model.embed.weight
        self._tokens = torch.zeros(most, 1, dtype=torch.int64, device=weight.device)
        self._chosen = torch.zeros_like(self._tokens)
        self._slots = torch.full((most,), -1, dtype=torch.int32, device=weight.device)
        self._logits = torch.zeros(most, 1, config.vocab, dtype=torch.float32, device=weight.device)
        self._hidden = torch.zeros(most, 1, config.hidden, dtype=weight.dtype, device=weight.device)
        self._replays: dict[int, Callable[[], None]] = {}
        # the slots that the buffer names
        self._rows: list[int] = []
        self._places = _places(model)
        self.handle: Any = None
        self._capture()

    def refresh(self) -> bool:
        """Take in weights that were changed in place; False: others lie elsewhere, which the graphs do not read."""
        for module in self.model.modules():
            if isinstance(module, Mamba):
                module.held_rates()
        return _places(self.model) == self._places

    def step(self, rows: Sequence[int], tokens: Sequence[int] | None = None) -> StepOutput:
        """One token for each of `rows`, which are slots of the cache.

        Args:
            rows: as many as the largest bucket at most
            tokens: the newest token of each row, which the cache does not hold yet; None: what the step before chose
                for the same rows
        """
        count = len(rows)
        size = next(bucket for bucket in self.buckets if bucket >= count)
        self.pool.reserve(rows, 1)
        rows = list(rows)
        if rows != self._rows:
            assert tokens is not None, "other rows need their tokens"
            # rows that left must not be stepped on, in whatever bucket
            fill(self._slots, rows + [-1] * (len(self._slots) - count))
            self._rows = rows
        if tokens is not None:
            fill(self._tokens, tokens)
        self._replays[size]()
        self.pool.count(rows, 1)
        self.replays[size] += 1
        return StepOutput(self._chosen[:count], self._logits[:count], self._hidden[:count])

    @torch.inference_mode()
    def _capture(self) -> None:
        start = perf_counter()
        device = self._slots.device
        self.handle = torch.cuda.graph_pool_handle()
        runs = [partial(self._run, StaticView(self.pool, self._slots[:size])) for size in reversed(self.buckets)]
        replays, self.pool_bytes = capture(runs, device, self.handle)
        self._replays = dict(zip(reversed(self.buckets), replays, strict=True))
        self.capture_s = perf_counter() - start

    def _run(self, view: StaticView) -> None:
        rows = view.batch
        out = self.model(self._tokens[:rows], cache=view, logits=None)
        self._hidden[:rows].copy_(out.last_hidden)
        scores = self.model.head(out.last_hidden[:, 0])
        # a row that failed goes on with some token until it is taken out
        take_largest(scores, self._logits[:rows, 0], self._chosen[:rows, 0], self._tokens[:rows, 0])


def obstacle(model: CausalLM) -> str | None:
    """Why decode steps of this model cannot be captured here, or None."""
    if model.embed.weight.device.type != "cuda":
        return "the model is not on a CUDA device"
    if (missing := backend.missing_triton()) is not None:
        return missing
    mixers = [*sizes.backbone_mixers(model.config), *(m for m in model.cached_mixers()[1] if m is not None)]
    needed = {"attn_decode", "kv_append", *(op for mixer in mixers for op in STEP_OPS.get(type(mixer), ()))}
    # the twins in plain PyTorch look at slots or experts on the host
    lacking = sorted(op for op in needed if "triton" not in backend.TABLE[op])
    return f"no kernel for {', '.join(lacking)}" if lacking else None


def buckets_for(slots: int) -> tuple[int, ...]:
    """The buckets that serve up to `slots` rows."""
    return (*(b for b in BUCKETS if b < slots), next((b for b in BUCKETS if b >= slots), slots))


def _places(model: CausalLM) -> list[int]:
    """Where the weights lie."""
    return [t.data_ptr() for t in (*model.parameters(), *model.buffers())]


def capture(
    runs: Sequence[Callable[[], None]], device: torch.device, handle: Any
) -> tuple[list[Callable[[], None]], int]:
    """Calls that replay `runs`, captured in their order, and the bytes that this took; each is run once before."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    # inputs are written on the current stream
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.synchronize(device)
    # what a collection frees must not be freed inside a capture
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    graphs = [torch.cuda.CUDAGraph() for _ in runs]
    with torch.cuda.stream(side):
        for graph, run in zip(graphs, runs, strict=True):
            graph.capture_begin(pool=handle)
            try:
                run()
            finally:
                graph.capture_end()
    current.wait_stream(side)
    return [graph.replay for graph in graphs], torch.cuda.memory_reserved(device) - before


def fill(buffer: Tensor, values: Sequence[int]) -> None:
    """Write whole numbers into the first rows of `buffer` (rows, ...), without waiting for the device."""
    host = torch.tensor(values, dtype=buffer.dtype, pin_memory=buffer.is_cuda).view(-1, *buffer.shape[1:])
    buffer[: len(host)].copy_(host, non_blocking=True)
