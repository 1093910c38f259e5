"""The one training loop.

What is trained, on what and for what is a `Task`; when, how often and with which safety is the loop's:
accumulation, reduction over ranks, clipping, schedule, logging, validation, saving, resuming and stopping.
"""

import itertools
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from alloy.core.device import peak_memory_bytes, rng_state, set_rng_state
from alloy.core.logging import ProgressLine
from alloy.core.metrics import Meter, MetricLog, Sink
from alloy.core.runs import atomic_write
from alloy.errors import AlloyError, InterruptedRun
from alloy.losses.base import Loss
from alloy.parallel.fsdp import release
from alloy.parallel.mesh import World
from alloy.train.checkpoint import latest_state, load_state, model_tensors, save_state
from alloy.train.optim import Optimizers, clip_gradients, gradient_norm, lr_factor
from alloy.train.precision import DTYPES, compute_in
from alloy.train.recipe import LogTable, TrainTable

Batch = TypeVar("Batch")


class Task(Protocol[Batch]):
    """What a training command adds to the loop; one class a command in `train/tasks/`.

    The task owns the data, the model's construction, the objective and what is measured; it knows its rank's share of the
    data. The loop owns parameters' updates, gradients, time, randomness, files and signals, and calls the task in this
    order: `build_model`, perhaps `load_state`, `batches`, then per step `counts` of every micro-batch, `loss` of every
    micro-batch, `after_step`; `validate` and `state` between steps; `export` at the end. A batch stays opaque to the loop.
    """

    def build_model(self) -> nn.Module:
        """The model with its initial weights, on the task's device, not yet sharded."""
        ...

    def batches(self, rows: int) -> Iterator[Batch]:
        """Endless micro-batches of `rows` rows for this rank, from the current position on."""
        ...

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many terms each part of the loss will have; known before any forward pass, the same keys on all ranks."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sums of the parts over one micro-batch; called under the run's autocast."""
        ...

    def after_step(self, model: nn.Module, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Act on the statistics of the global batch (router biases) after an update; returns metrics, read when logged."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out metrics, the same on all ranks; `val_loss` is shown with its change. Empty: there is nothing to measure."""
        ...

    def describe(self, batch: Batch) -> object:
        """What identifies the rows of a micro-batch, as JSON values, for a person who looks for a bad one."""
        ...

    def provenance(self) -> list[dict[str, Any]]:
        """The data's sources with their counts, for manifest and model card."""
        ...

    def state(self) -> dict[str, Any]:
        """Position in the data as plain values, the same on all ranks."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the product, a Hugging Face folder; called on rank 0 with an unsharded model."""
        ...


@dataclass
class Window:
    """Sums of what is logged together; part of the state, so that a resumed run logs the same numbers."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    loss_max: float = -math.inf

    def add(self, values: dict[str, float]) -> None:
        """Count one step."""
        self.steps += 1
        self.loss_max = max(self.loss_max, values["loss"])
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Means since the last line, and the highest loss, so that a spike is not averaged away."""
        return {name: total / self.steps for name, total in self.sums.items()} | {"loss_max": self.loss_max}


class Trainer(Generic[Batch]):
    """Runs a task to its end.

    Besides model, optimizers, data position and random numbers, a state holds `step`, `elapsed`, `tokens`, `window`, `latest`.
    """

    def __init__(
        self,
        task: Task[Batch],
        model: nn.Module,
        world: World,
        folder: Path,
        table: TrainTable,
        log_table: LogTable,
        *,
        accumulation: int,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        sinks: tuple[Sink, ...] = (),
    ) -> None:
        """
        Args:
            task: what is trained.
            model: from `task.build_model`, sharded.
            world: the ranks.
            folder: run directory; holds metrics.jsonl, state/ and nan/.
            table: the recipe's `[train]`.
            log_table: the recipe's `[log]`.
            accumulation: micro-batches per step and rank.
            flops_per_token: of a training step, for the MFU.
            peak_flops: of all devices together; None: no MFU is shown.
            sinks: further metric sinks.
        """
        self.task, self.model, self.world, self.folder = task, model, world, folder
        self.table, self.log_every, self.accumulation = table, log_table.every, accumulation
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.optimizers = Optimizers(
            model,
            table.optimizer,
            lr=table.lr,
            muon_lr=table.muon_lr,
            betas=table.betas,
            eps=table.eps,
            weight_decay=table.weight_decay,
            muon_dtype=DTYPES[table.precision],
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        self.window = Window()
        self.latest: dict[str, Any] = {}
        self.meter = Meter()
        self.metrics = MetricLog(folder / "metrics.jsonl", sinks) if world.is_main else None
        self.line = ProgressLine(table.steps, log_table.every, enabled=world.is_main)

    # state

    def restore(self) -> bool:
        """Load the newest state of the run directory; False if there is none."""
        found = self.world.first(latest_state(self.folder / "state") if self.world.is_main else None)
        if found is None:
            # killed before the first save: the run starts anew
            self._cut_metrics()
            return False
        assert isinstance(found, Path), "latest_state gives a path or None"
        trainer = load_state(found, self._tensors(), self.world)
        self.step, self.tokens, self.elapsed = trainer["step"], trainer["tokens"], trainer["elapsed"]
        self.window = Window(**trainer["window"])
        self.latest = trainer["latest"]
        self.task.load_state(trainer["task"])
        states = trainer["rng"]
        if self.world.rank < len(states):
            set_rng_state(states[self.world.rank])
        self._cut_metrics()
        return True

    def save(self, position: dict[str, Any] | None = None) -> Path:
        """Write the state of now; `position` replaces the task's own where that has run ahead."""
        release(self.model)
        trainer = {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "window": asdict(self.window),
            "latest": self.latest,
            "task": position or self.task.state(),
            "rng": self.world.gather(rng_state()),
        }
        return save_state(self.folder / "state", self.step, self._tensors(), trainer, self.world, self.table.keep_last)

    def _cut_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.truncate_after(self.step)

    def _tensors(self) -> dict[str, Tensor]:
        model = {f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()}
        return model | {f"optimizer.{name}": tensor for name, tensor in self.optimizers.tensors().items()}

    # the run

    @property
    def progress(self) -> float:
        """Part of the run that has passed at the middle of the coming step: of the steps, or of the time if it is further."""
        parts = []
        if self.table.steps is not None:
            parts.append((self.step + 0.5) / self.table.steps)
        if self.table.seconds is not None:
            parts.append(self.elapsed / self.table.seconds)
        return max(parts)

    @property
    def finished(self) -> bool:
        """Whether all steps are done or the time is over."""
        by_steps = self.table.steps is not None and self.step >= self.table.steps
        return by_steps or (self.table.seconds is not None and self.elapsed >= self.table.seconds)

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the last metrics. Raises InterruptedRun after saving when a signal asked to stop."""
        self.model.train()
        batches = self.task.batches(self.table.micro_batch)
        clock = time.monotonic() - self.elapsed
        with StopSignals(notify=self.world.is_main) as stop, self.line:
            while not self.finished:
                began = time.monotonic()
                values, extra = self.train_step(batches)
                self.meter.add(self.table.batch_tokens, time.monotonic() - began)
                asked, self.elapsed = self._agree(stop.received, time.monotonic() - clock)
                self.latest |= self._log(values, extra)
                if self.step % self.table.eval_every == 0 or self.finished:
                    self.latest |= self._validate()
                if self.step % self.table.save_every == 0 or self.finished or asked:
                    self.save()
                if asked:
                    break
            # asked during the last save, too: resuming then only writes the product
            asked, _ = self._agree(stop.received, self.elapsed)
        if asked:
            name = signal.Signals(asked).name
            raise InterruptedRun(
                f"stopped by {name} after step {self.step}; go on with --resume {self.folder}", 128 + asked
            )
        return self.latest

    def train_step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """One update from `accumulation` micro-batches of every rank; returns what the loop and what the task measured."""
        position = self.task.state()
        micro = list(itertools.islice(batches, self.accumulation))
        counts = self._global_counts(micro)
        totals: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for batch in micro:
            with compute_in(self.table.precision, self.world.device):
                loss = self.task.loss(self.model, batch)
            # ranks' gradients are averaged, hence the factor
            parts = [total * (loss.weights[name] * self.world.size / counts[name]) for name, total in loss.sums.items()]
            torch.stack(parts).sum().backward()
            # a micro-batch need not have every part
            weights |= loss.weights
            _add(totals, loss.sums)
            _add(stats, loss.stats)
        own, totals, stats = totals, self._reduce(totals), self._reduce(stats)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = gradient_norm(gradients)
        # the one wait for the device in a step
        *measured, grad_norm = torch.stack([*totals.values(), norm]).tolist()
        means = {name: value / counts[name] for name, value in zip(totals, measured, strict=True)}
        total = sum(weights[name] * mean for name, mean in means.items())
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            self._refuse_step(total, grad_norm, own, micro, position)
        clip_gradients(gradients, grad_norm, self.table.grad_clip)
        factor = self._set_lr()
        self.optimizers.step()
        extra = self.task.after_step(self.model, stats)
        self.step += 1
        self.tokens += self.table.batch_tokens
        main, *others = means
        values = {"loss": means[main], "grad_norm": grad_norm, "lr": self.table.lr * factor}
        return values | {f"{name}_loss": means[name] for name in others}, extra

    def _set_lr(self) -> float:
        table = self.table
        factor = lr_factor(
            self.progress,
            table.schedule,
            warmup=table.warmup,
            decay=table.decay,
            shape=table.decay_shape,
            floor=table.min_lr / table.lr,
        )
        self.optimizers.set_lr(factor)
        return factor

    def _global_counts(self, micro: list[Batch]) -> dict[str, int]:
        """Terms of each part over all micro-batches and ranks; at least 1, a part without terms has the mean 0."""
        counts: dict[str, int] = {}
        for batch in micro:
            for name, count in self.task.counts(batch).items():
                counts[name] = counts.get(name, 0) + count
        if self.world.size > 1:
            values = torch.tensor(list(counts.values()), dtype=torch.int64, device=self.world.device)
            counts = dict(zip(counts, self.world.sum(values).tolist(), strict=True))
        return {name: max(count, 1) for name, count in counts.items()}

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add every tensor up over the ranks, in one collective."""
        if self.world.size == 1 or not totals:
            return totals
        flat = self.world.sum(torch.cat([value.double().flatten() for value in totals.values()]))
        pieces = flat.split([value.numel() for value in totals.values()])
        return {
            name: piece.view_as(totals[name]).to(totals[name].dtype) for name, piece in zip(totals, pieces, strict=True)
        }

    def _agree(self, received: int, elapsed: float) -> tuple[int, float]:
        """The signal that any rank received and the longest time, so that all ranks stop after the same step."""
        if self.world.size == 1:
            return received, elapsed
        values = torch.tensor([received, elapsed], dtype=torch.float64, device=self.world.device)
        signal_number, elapsed = self.world.max(values).tolist()
        return int(signal_number), elapsed

    def _refuse_step(
        self, total: float, grad_norm: float, own: dict[str, Tensor], micro: list[Batch], position: dict[str, Any]
    ) -> NoReturn:
        """Keep the state before a step whose loss or gradient is not finite, write down its rows, and stop.

        `own` are this rank's sums, which tell whose rows are to blame.
        """
        self.optimizers.zero_grad()
        self.save(position)
        rows = self.world.gather([self.task.describe(batch) for batch in micro])
        is_finite = self.world.gather(all(bool(value.isfinite().all()) for value in own.values()))
        rank = is_finite.index(False) if False in is_finite else 0
        step = self.step + 1
        file = self.folder / "nan" / f"step-{step:06d}.json"
        if self.world.is_main:
            record = {"step": step, "loss": repr(total), "grad_norm": repr(grad_norm), "rank": rank}
            atomic_write(file, json.dumps(record | {"position": position, "rows_by_rank": rows}, indent=1))
        what, value = ("gradient norm", grad_norm) if math.isfinite(total) else ("loss", total)
        raise AlloyError(
            f"{what} became {'NaN' if math.isnan(value) else 'infinite'} at step {step} (rank {rank}, batch ids in {file}). "
            f"Try train.grad_clip={self.table.grad_clip / 2:g}, a lower train.lr, or --resume with data.skip_steps=1."
        )

    # what a person sees

    def _log(self, values: dict[str, float], extra: dict[str, Tensor]) -> dict[str, Any]:
        """Count the step; every `log.every` steps write what came since the last time and return it."""
        self.window.add(values)
        rate, memory = self.meter.recent, peak_memory_bytes(self.world.device)
        mfu = (
            rate * self.flops_per_token / self.peak_flops if rate and self.peak_flops and self.flops_per_token else None
        )
        is_due = self.step % self.log_every == 0 or self.finished
        shown = self.window.means() if is_due else values
        left = self.elapsed * (1.0 / max(self.progress, 1e-9) - 1.0)
        self.line.update(
            self.step, loss=shown["loss"], lr=values["lr"], tokens_per_s=rate, mfu_frac=mfu, grad=shown["grad_norm"],
            memory_bytes=memory, eta_s=max(left, 0.0),
        )  # fmt: skip
        if not is_due:
            return {}
        record: dict[str, Any] = shown | {"lr": values["lr"], "tokens": self.tokens}
        record |= {name: value.tolist() for name, value in extra.items()}
        record |= {"elapsed_s": round(self.elapsed, 3), "tokens_per_s": rate, "memory_bytes": memory}
        if mfu is not None:
            record["mfu"] = mfu
        if self.metrics is not None:
            self.metrics.log(self.step, **record)
        self.window = Window()
        return record

    def _validate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad(), compute_in(self.table.precision, self.world.device):
            values = self.task.validate(self.model)
        release(self.model)
        self.model.train()
        if not values:
            return {}
        if self.metrics is not None:
            self.metrics.log(self.step, **values)
        if "val_loss" in values:
            before = self.latest.get("val_loss")
            change = "" if before is None else f" ({values['val_loss'] - before:+.3f})"
            self.line.note(f"step {self.step:,}  validation loss {values['val_loss']:.3f}{change}")
        return values


def _add(totals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a wish, `received`; the second one ends the process at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notify: bool = True) -> None:
        self.received = 0
        self._notify = notify
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        if self._notify:
            # not through the log: the signal may have come in the middle of a write to the same stream
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing this step, then saving; a second signal stops at once\n".encode())
