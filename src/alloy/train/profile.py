"""Where the time of a training step goes, by kind of layer: what `--profile` prints."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from alloy.core.logging import get_logger

log = get_logger(__name__)

# attributes under which blocks hold their mixers
MIXERS = ("mixer", "attention", "mlp")


class LayerTimer:
    """Times every mixer forward and backward for the first model calls, then takes its hooks off and logs a table.

    Backward is the time between the gradient of a mixer's output and that of its input; with activation checkpointing it
    holds the second forward pass. The device is waited for at each mark, so profiled steps are slower than plain ones.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        self.model, self.calls = model, calls
        self.forward_s: defaultdict[str, float] = defaultdict(float)
        self.backward_s: defaultdict[str, float] = defaultdict(float)
        self.layers: defaultdict[str, int] = defaultdict(int)
        self._hooks: list[Any] = []
        self._seen = 0
        self._began = 0.0
        self._total_s = 0.0

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in MIXERS:
                kind = type(module).__name__
                self.layers[kind] += 1
                self._hooks += self._time(module, kind)
        self._hooks.append(self.model.register_forward_pre_hook(self._next_call))
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()

    def _time(self, module: nn.Module, kind: str) -> list[Any]:
        marks: dict[str, float] = {}

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(ended)
            marks["forward"] = self._now()

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.forward_s[kind] += self._now() - marks["forward"]
            result = output[0] if isinstance(output, tuple) else output
            if result.requires_grad:
                result.register_hook(started)

        def started(_: Tensor) -> None:
            marks["backward"] = self._now()

        def ended(_: Tensor) -> None:
            if "backward" in marks:
                self.backward_s[kind] += self._now() - marks.pop("backward")

        hooks: list[Callable[..., None]] = [before, after]
        return [module.register_forward_pre_hook(hooks[0]), module.register_forward_hook(hooks[1])]

    def _next_call(self, *_: object) -> None:
        if not self.model.training:
            return
        now = self._now()
        if self._seen == self.calls:
            self._total_s = now - self._began
            self._finish()
            return
        if self._seen == 0:
            self._began = now
        self._seen += 1

    def _finish(self) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._seen:
            total = self._total_s or self._now() - self._began
            log.info("%s", self.table(total))

    def table(self, total_s: float) -> str:
        """Milliseconds per micro-batch by kind of layer, and their share; "other" is loss, optimizer, data and the rest."""
        rows = [f"{'layer':<12}{'count':>6}{'forward':>11}{'backward':>11}{'share':>8}"]
        scale = 1e3 / max(self._seen, 1)
        for kind, count in self.layers.items():
            forward, backward = self.forward_s[kind], self.backward_s[kind]
            share = (forward + backward) / total_s
            rows.append(f"{kind:<12}{count:>6}{forward * scale:>8.1f} ms{backward * scale:>8.1f} ms{share:>8.0%}")
        rest = total_s - sum(self.forward_s.values()) - sum(self.backward_s.values())
        rows.append(f"{'other':<12}{'':>6}{rest * scale:>8.1f} ms{'':>11}{rest / total_s:>8.0%}")
        return f"profile of {self._seen} micro-batches, times of one\n" + "\n".join(rows)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
