"""What all training recipes share: the `[train]` and `[log]` tables, the device, and the arithmetic of the batch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alloy.core.recipe import Config, Recipe
from alloy.errors import RecipeError
from alloy.models.configs import Checkpointing
from alloy.train.precision import Precision

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class TrainTable(Config):
    """The `[train]` table. Optimizer defaults: Nemotron-H and Nemotron 3 (AdamW betas, decay, clip), Jordan et al. (Muon)."""

    # optimizer steps; with `seconds`, the most there will be
    steps: Positive | None = None
    # wall-clock limit, resumed time included; schedules then follow the time that has passed
    seconds: Annotated[float, Field(gt=0)] | None = None
    # tokens of a step over all ranks
    batch_tokens: Positive = 4096
    # sequences per rank in one forward pass; changes memory and speed, never the loss
    micro_batch: Positive = 8

    optimizer: Literal["adamw", "muon"] = "muon"
    # AdamW's peak rate
    lr: Annotated[float, Field(gt=0)] = 4e-3
    # Muon's peak rate for matrices of the blocks
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: Annotated[float, Field(gt=0)] = 1.0

    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    # in steps, or as a part of the run; with `seconds` only the latter
    warmup_steps: int | None = None
    warmup_frac: Fraction = 0.03
    decay_steps: int | None = None
    decay_frac: Fraction = 0.5
    # how "wsd" falls; "minus_sqrt": Nemotron 3 Super and Ultra
    decay_shape: Literal["linear", "minus_sqrt"] = "linear"
    # lowest AdamW rate; Muon's falls to the same part of its peak
    min_lr: float = 0.0

    precision: Precision = "fp32"
    # what is computed again in the backward pass: nothing, all but matmuls and attention, or whole blocks
    checkpointing: Checkpointing = "none"

    save_every: Positive = 100
    keep_last: Positive = 2
    eval_every: Positive = 100

    # step of the routers' correction bias (DeepSeek-V3, Nemotron 3)
    router_bias_rate: float = 1e-3
    # coefficient of the sequence-balance loss
    balance_weight: float = 1e-4
    # lambda of the multi-token-prediction loss; None: the model config's
    mtp_weight: float | None = None
    # part of the rows on which multi-token prediction is trained
    mtp_rows: Fraction = 1.0

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.steps is None and self.seconds is None:
            raise ValueError("neither train.steps nor train.seconds is set; say when the run ends")
        if self.seconds is not None and (self.warmup_steps is not None or self.decay_steps is not None):
            raise ValueError(
                "warmup_steps and decay_steps need a known number of steps; with seconds use warmup_frac and decay_frac"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is more than lr = {self.lr}")
        if self.steps is not None and self.warmup + (self.decay if self.schedule == "wsd" else 0.0) > 1.0:
            raise ValueError(
                f"warm-up ({self.warmup:.0%} of the run) and decay ({self.decay:.0%}) together are longer than steps = {self.steps}"
            )
        return self

    @property
    def warmup(self) -> float:
        """Part of the run in which the rate rises."""
        return self.warmup_frac if self.warmup_steps is None or self.steps is None else self.warmup_steps / self.steps

    @property
    def decay(self) -> float:
        """Last part of the run in which "wsd" falls."""
        return self.decay_frac if self.decay_steps is None or self.steps is None else self.decay_steps / self.steps


class LogTable(Config):
    """The `[log]` table."""

    # steps between lines of metrics.jsonl and of a plain console
    every: Positive = 10
    tensorboard: bool = False


class TrainingRecipe(Recipe):
    """Base of the recipes of all training commands."""

    train: TrainTable
    log: LogTable = LogTable()
    device: str = "auto"


def micro_batches(batch_tokens: int, ranks: int, micro_batch: int, seq: int) -> int:
    """Micro-batches per step and rank; RecipeError where the batch does not divide."""
    unit = ranks * micro_batch * seq
    if batch_tokens % unit:
        raise RecipeError(
            f"batch_tokens = {batch_tokens} is not a multiple of ranks x micro_batch x seq = "
            f"{ranks} x {micro_batch} x {seq} = {unit}. Use {max(1, round(batch_tokens / unit)) * unit}, or change one of them."
        )
    return batch_tokens // unit
