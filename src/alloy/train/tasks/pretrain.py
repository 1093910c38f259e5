"""Pretraining: next-token prediction on a mixture of token shards, with multi-token prediction and router balancing.

Papers: Nemotron-H arXiv:2504.03624; DeepSeek-V3 arXiv:2412.19437 (multi-token prediction, balancing without an auxiliary
loss); Nemotron 3 Super (tech report): bias step 1e-3, sequence loss 1e-4, two depths of one repeated MTP block.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from alloy.core.device import memory_bytes, peak_flops, resolve_device
from alloy.core.hub import resolve, text_path
from alloy.core.logging import short_time
from alloy.core.recipe import Config, RunOptions, RunResult
from alloy.data.blend import (
    Blend,
    BlendPhase,
    BlendSource,
    PlanLine,
    load_blend,
    mixture_phases,
    plan_blend,
    refuse_epochs,
)
from alloy.data.io import read_documents
from alloy.data.mixture import Batch, Mixture, Pack, Phase, Source
from alloy.data.shards import MANIFEST, TokenCorpus
from alloy.data.tokens import load_tokenizer, save_tokenizer, tokenize_corpus, train_tokenizer
from alloy.errors import RecipeError, ResourceError
from alloy.losses.base import Loss
from alloy.losses.likelihood import document_nats
from alloy.losses.lm import count_labels, linear_cross_entropy, mtp_labels
from alloy.models import sizes
from alloy.models.base import CausalLM, Layout, RouterStats
from alloy.models.configs import DecoderConfig, HybridConfig
from alloy.models.moe import Gate
from alloy.models.registry import build, inspect, load, save
from alloy.ops.documents import segment_ids
from alloy.ops.moe import update_router_bias
from alloy.parallel.mesh import World
from alloy.train.launch import Plan, launch
from alloy.train.precision import DTYPES, parameter_dtype
from alloy.train.recipe import TrainingRecipe, micro_batches


class FromCheckpoint(Config):
    """`[model]` of a continued pretraining: a Hugging Face folder or hub id."""

    path: str


def _model_form(value: object) -> str | None:
    """Which of the three forms a `[model]` table has; None: it is no table."""
    if not isinstance(value, (dict, Config)):
        return None
    table = value if isinstance(value, dict) else vars(value)
    if "path" in table:
        return "checkpoint"
    return "hybrid" if str(table.get("kind", "nemotron_h")).startswith("nemotron_h") else "decoder"


ModelTable = Annotated[
    Annotated[FromCheckpoint, Tag("checkpoint")]
    | Annotated[HybridConfig, Tag("hybrid")]
    | Annotated[DecoderConfig, Tag("decoder")],
    Discriminator(
        _model_form,
        custom_error_type="model_form",
        custom_error_message="Input should be an object: sizes of a new model, or the path of a checkpoint",
    ),
]


class InitTable(Config):
    """`[init]`: how new weights are drawn."""

    # "megatron" is what the published runs used
    style: Literal["megatron", "transformers"] = "megatron"
    # smallest and largest initial step of Mamba-2; None: the model config's time_step_min and time_step_max
    dt_range: tuple[float, float] | None = None


class DataTable(Config):
    """`[data]`. A source is a folder of token shards, or text (file, JSONL, Parquet, folder) to be tokenized in the run directory."""

    seq: Annotated[int, Field(gt=1)] = 512
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] | None = None
    # a blend file or preset, in place of sources; `alloy data blend check` prints what it means
    blend: str | None = None
    # leave out the sources of the blend that have no path, and scale up the rest
    renormalise: bool = False
    # weights that change on the way, by the name of the source, or its path; in place of those of the blend
    phases: tuple[BlendPhase, ...] = ()
    # folder with tokenizer.json, needed for text unless `vocab` asks for a new one; None: a checkpoint's own
    tokenizer: str | None = None
    # train a tokenizer of this size on the text sources
    vocab: int | None = None
    pack: Pack = "concat"
    # part of each source's documents that is held out
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    # most held-out tokens that are measured
    validation_tokens: int = 65_536
    # steps whose batches are passed over when resuming, to get past a bad one
    skip_steps: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.tokenizer is not None and self.vocab is not None:
            raise ValueError("tokenizer and vocab are both set; give a finished tokenizer, or the size of a new one")
        if (self.sources is None) == (self.blend is None):
            raise ValueError("give either sources or a blend: shards, texts, or a file that names them")
        return self

    def mixed(self) -> Blend:
        """What is mixed, as a blend."""
        blend = load_blend(self.blend) if self.blend else Blend(datasets=tuple(map(_blended, self.sources or ())))
        return blend.model_copy(update={"phases": self.phases}) if self.phases else blend

    def all_sources(self) -> list[Source]:
        """The sources that are there, with paths as they are written."""
        if self.sources is not None:
            return list(self.sources)
        return [
            Source(path=d.place, weight=d.weight, name=d.name, column=d.text_field, max_epochs=d.max_epochs)
            for d in self.mixed().datasets
            if d.place is not None
        ]


def _blended(source: Source) -> BlendSource:
    name = source.name or source.path
    return BlendSource(name=name, path=source.path, weight=source.weight, max_epochs=source.max_epochs)


class PretrainRecipe(TrainingRecipe):
    """A recipe for `alloy pretrain`."""

    command: Literal["pretrain"] = "pretrain"
    model: ModelTable
    init: InitTable = InitTable()
    data: DataTable

    def run(self, options: RunOptions) -> RunResult:
        """Train, or with `--dry-run` say what it would take."""
        if options.dry_run:
            return dry_run(self, options)
        return launch(
            self, options, lambda world: plan(self, world.size), lambda world, folder: PretrainTask(self, world, folder)
        )


def plan(recipe: PretrainRecipe, ranks: int) -> Plan:
    """Check the batch and count what the run takes, from the config alone."""
    table, data = recipe.train, recipe.data
    config = inspect(resolve(recipe.model.path))[0] if isinstance(recipe.model, FromCheckpoint) else recipe.model
    accumulation = micro_batches(table.batch_tokens, ranks, table.micro_batch, data.seq)
    depths = mtp_depths(config, table.mtp_weight)
    per_token = 3.0 * sizes.flops_per_token(config, data.seq)
    per_token += 3.0 * depths * table.mtp_rows * sizes.mtp_flops_per_token(config, data.seq)
    memory = sizes.training_bytes(
        config,
        tokens=table.micro_batch * data.seq,
        ranks=ranks,
        moments=2 if table.optimizer == "adamw" else 1,
        dtype="float32" if table.precision == "fp32" else "bfloat16",
        parameter_bytes=parameter_dtype(table.precision).itemsize,
        checkpointing=table.checkpointing,
    )
    total, active = sizes.parameters(config), sizes.parameters(config, active=True)
    tokens = table.steps * table.batch_tokens if table.steps else None
    lines = plan_data(data, [_shard_tokens(source.path) for source in data.all_sources()], tokens)
    mtp = sizes.mtp_parameters(config)
    rows: dict[str, object] = {
        "model": f"{config.kind}, {_layout(config)}",
        "parameters": f"{total:,}"
        + (f" ({active:,} active)" if active != total else "")
        + (f" + {mtp:,} MTP" if mtp else ""),
        "tokens": f"{tokens:,} in {table.steps:,} steps" if tokens else f"as many as {table.seconds:g} s allow",
        "batch": f"{table.batch_tokens:,} tokens = {ranks} ranks x {accumulation} x {table.micro_batch} rows x {data.seq}",
        "optimizer": f"{table.optimizer}, {table.schedule}, {table.precision}",
        "compute": f"{per_token:.3g} FLOPs a token" + (f", {per_token * tokens:.3g} in all" if tokens else ""),
        "memory": f"about {memory / 2**30:.2f} GiB a rank",
    }
    # what is mixed alike all the time needs no table
    if data.blend or data.phases or any(line.max_epochs for line in lines):
        rows |= {f"data {line.phase}, {line.source}": _shown(line) for line in lines}
    return Plan(rows, accumulation, per_token, memory)


def plan_data(data: DataTable, unique: list[int | None], tokens: int | None) -> list[PlanLine]:
    """What the phases take of the sources; RecipeError where a source would be seen too often, or weights make no sense.

    Args:
        data: the table
        unique: training tokens of each of `data.all_sources()`; None: not known yet
        tokens: of the run; None: ended by the clock
    """
    blend = data.mixed()
    mixture_phases(blend, data.seq, data.renormalise)
    if tokens is None:
        if any(source.max_epochs for source in blend.datasets):
            raise RecipeError(
                "max_epochs of a source needs train.steps: a run by the clock does not know how far it gets."
            )
        return []
    names = [dataset.name for dataset in blend.datasets if dataset.place is not None]
    known = {dataset.name: dataset.tokens for dataset in blend.datasets}
    known |= {name: count for name, count in zip(names, unique, strict=True) if count}
    lines = plan_blend(blend, known, tokens, data.renormalise)
    refuse_epochs(lines)
    return lines


def _shard_tokens(path: str) -> int | None:
    return TokenCorpus(path).num_tokens if is_shards(path) else None


def _shown(line: PlanLine) -> str:
    epochs = "epochs not known yet" if line.epochs is None else f"{line.epochs:.3g} epochs by its end"
    return f"{line.share:.2%}, {line.tokens:,} tokens, {epochs}"


def dry_run(recipe: PretrainRecipe, options: RunOptions) -> RunResult:
    """Print the plan; ResourceError where the memory of this machine is less than it takes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = resolve_device(recipe.device)
    known = plan(recipe, ranks)
    if not isinstance(recipe.model, FromCheckpoint):
        # shapes without memory: a config that cannot be built is refused here
        build(recipe.model, device="meta")
    rows = {**known.rows, "time": _time_estimate(recipe, known, device, ranks)}
    if not options.json:
        width = max(map(len, rows))
        sys.stdout.write("".join(f"{name.ljust(width)}  {value}\n" for name, value in rows.items()))
    available = memory_bytes(device)
    if known.memory_bytes > available:
        raise ResourceError(
            f"the run takes about {known.memory_bytes / 2**30:.1f} GiB a rank and {device} has {available / 2**30:.1f} GiB. "
            "Lower train.micro_batch or set train.checkpointing=full; more ranks share parameters and optimizer state."
        )
    return RunResult(dir=Path(), metrics=rows)


def mtp_depths(config: HybridConfig | DecoderConfig, weight: float | None) -> int:
    """Depths of multi-token prediction that are trained: two where one stored depth repeats."""
    if not isinstance(config, HybridConfig) or not config.mtp_depths or weight == 0.0:
        return 0
    return 2 if config.mtp_depths == 1 and config.mtp_repeated else config.mtp_depths


@dataclass
class PretrainBatch:
    """Rows of one micro-batch; multi-token prediction is trained on the first `mtp_rows` of them."""

    batch: Batch
    mtp_rows: int


class PretrainTask:
    """See `train.loop.Task`. Parts of the loss: "lm", "mtp1", "mtp2", ..., "balance", "mtp_balance"."""

    def __init__(self, recipe: PretrainRecipe, world: World, folder: Path) -> None:
        self.recipe, self.world = recipe, world
        self.tokenizer, sources = prepare_data(recipe, world, folder)
        data = recipe.data
        self.mixture = Mixture(
            sources,
            seed=recipe.seed,
            seq=recipe.data.seq,
            pack=recipe.data.pack,
            validation=recipe.data.validation,
            tokenizer=self.tokenizer,
            rank=world.rank,
            world=world.size,
            phases=[Phase(*stretch) for stretch in mixture_phases(data.mixed(), data.seq, data.renormalise)]
            if data.blend or data.phases
            else (),
        )
        self.skipped = 0
        table = recipe.train
        steps = None if table.steps is None else table.steps * table.batch_tokens
        plan_data(data, [rows.num_tokens for rows in self.mixture.sources], steps)
        self.local_rows = table.batch_tokens // recipe.data.seq // world.size
        # the same share of MTP rows on every rank, so that all ranks call the MTP blocks together
        self.mtp_rows = min(self.local_rows, math.ceil(self.local_rows * table.mtp_rows))
        self.depths = 0
        self.mtp_weight = 0.0

    def build_model(self) -> nn.Module:
        """A new model, or the checkpoint's."""
        recipe, dtype = self.recipe, parameter_dtype(self.recipe.train.precision)
        if isinstance(recipe.model, FromCheckpoint):
            model, _ = load(resolve(recipe.model.path), dtype=dtype, device=self.world.device)
        else:
            model = build(self._config(recipe.model), device=self.world.device, dtype=torch.float32)
            model.init_weights(recipe.seed, init=recipe.init.style, dt_range=recipe.init.dt_range)
            # a seed gives the same weights in every format, but for the rounding
            model.to(dtype)
        model.checkpointing = recipe.train.checkpointing
        config = model.config
        if self.tokenizer is not None and len(self.tokenizer) > config.vocab:
            raise RecipeError(
                f"the tokenizer has {len(self.tokenizer)} ids but model.vocab = {config.vocab}; set model.vocab to at least that."
            )
        self.depths = mtp_depths(config, recipe.train.mtp_weight) if self.mtp_rows else 0
        if self.depths and isinstance(config, HybridConfig):
            weight = recipe.train.mtp_weight
            self.mtp_weight = (config.mtp_loss_scale if weight is None else weight) / self.depths
        return model

    def batches(self, rows: int) -> Iterator[PretrainBatch]:
        """Rows of the mixture, after those that `data.skip_steps` passes over."""
        for _ in range(self.skipped, self.recipe.data.skip_steps):
            self.mixture.batch(self.local_rows)
        self.skipped = max(self.skipped, self.recipe.data.skip_steps)
        while True:
            for first in range(0, self.local_rows, rows):
                yield PretrainBatch(self.mixture.batch(rows), min(max(self.mtp_rows - first, 0), rows))

    def counts(self, batch: PretrainBatch) -> dict[str, int]:
        """Labels of each prediction, sequences of each balance loss."""
        rows = batch.batch
        labels, documents = rows.labels[: batch.mtp_rows], rows.documents[: batch.mtp_rows]
        counts = {"lm": count_labels(rows.labels)}
        for depth in range(1, self.depths + 1):
            counts[f"mtp{depth}"] = count_labels(mtp_labels(labels, documents, depth))
        depths = range(1, self.depths + 1)
        ahead = sum(count_sequences(documents, depth + 1) for depth in depths)
        return counts | {"balance": count_sequences(rows.documents, 1), "mtp_balance": ahead}

    def loss(self, model: nn.Module, batch: PretrainBatch) -> Loss:
        """Next-token loss of all rows, multi-token loss of the first ones, balance of every router."""
        model = cast(CausalLM, model)
        rows, table = batch.batch.to(self.world.device), self.recipe.train
        output = model(rows.tokens, documents=rows.documents, logits=None)
        routers, num_backbone = output.routers, len(output.routers)
        sums = {"lm": linear_cross_entropy(output.last_hidden, model.head.weight, rows.labels)}
        if self.depths and batch.mtp_rows:
            tokens, labels, documents = (part[: batch.mtp_rows] for part in (rows.tokens, rows.labels, rows.documents))
            ahead, stats = model.run_mtp(output.last_hidden[: batch.mtp_rows], Layout(tokens, documents), self.depths)
            routers = routers + stats
            for depth, hidden in enumerate(ahead, start=1):
                sums[f"mtp{depth}"] = linear_cross_entropy(
                    hidden, model.head.weight, mtp_labels(labels, documents, depth)
                )
        for name, members in (("balance", routers[:num_backbone]), ("mtp_balance", routers[num_backbone:])):
            if members and table.balance_weight:
                sums[name] = torch.stack([router.balance * router.sequences for router in members]).sum()
        weights = {"lm": 1.0, "balance": table.balance_weight, "mtp_balance": table.balance_weight}
        weights |= {f"mtp{depth}": self.mtp_weight for depth in range(1, self.depths + 1)}
        return Loss(sums, weights, router_stats(model, routers))

    def after_step(self, model: nn.Module, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move the correction biases by the counts of the global batch; returns the balance of every router."""
        if not stats:
            return {}
        gates = cast(list[Gate], cast(CausalLM, model).gates())
        counts = stats["router_counts"].split([gate.weight.shape[0] for gate in gates])
        for gate, used in zip(gates, counts, strict=True):
            if gate.bias is not None and self.recipe.train.router_bias_rate:
                update_router_bias(gate.bias, used, self.recipe.train.router_bias_rate)
        # a router that was not used in this step (MTP without rows) has no balance
        violation = torch.stack([used.max() / used.float().mean().clamp_min(1e-9) - 1.0 for used in counts])
        violation = violation.clamp_min(0.0)
        tokens = torch.stack([used.sum() for used in counts]).clamp_min(1)
        return {
            "max_vio": violation.max(),
            "max_vio_by_layer": violation,
            "dead_experts": torch.stack([(used == 0).sum() for used in counts]).sum(),
            "router_entropy": (stats["router_entropy"] / tokens).mean(),
        }

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean next-token loss on held-out documents, each token once; every rank measures all of them."""
        data = self.recipe.data
        documents = self.mixture.validation_documents(data.validation_tokens) if data.validation else []
        nats = document_nats(cast(CausalLM, model), documents, data.seq)
        count = sum(len(part) for part in nats)
        if not count:
            return {}
        loss = float(sum(part.sum() for part in nats)) / count
        return {"val_loss": loss, "val_bits_per_token": loss / math.log(2)}

    def describe(self, batch: PretrainBatch) -> object:
        """The first tokens of every row, to find it in the data."""
        return [
            {"tokens": row[:32].tolist(), "documents": int(d.max()) + 1}
            for row, d in zip(batch.batch.tokens, batch.batch.documents, strict=True)
        ]

    def provenance(self) -> list[dict[str, Any]]:
        """What was trained on."""
        return [
            {
                "path": source.path,
                "weight": source.weight,
                "documents": rows.corpus.num_documents,
                "tokens": rows.corpus.num_tokens,
            }
            for source, rows in zip(self.recipe.data.all_sources(), self.mixture.sources, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Position in the mixture, and how many steps were passed over."""
        return {"mixture": self.mixture.state(), "skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.mixture.load_state(state["mixture"])
        self.skipped = state["skipped"]

    def export(self, model: nn.Module, folder: Path) -> None:
        """A Hugging Face folder."""
        save(cast(CausalLM, model), folder, tokenizer=self.tokenizer)

    def _config(self, config: HybridConfig | DecoderConfig) -> HybridConfig | DecoderConfig:
        """Special tokens are the tokenizer's where the recipe does not say."""
        if self.tokenizer is None:
            return config
        ids = {"pad_id": self.tokenizer.pad_token_id, "bos_id": self.tokenizer.bos_token_id}
        if self.tokenizer.eos_token_id is not None:
            ids["eos_ids"] = (self.tokenizer.eos_token_id,)
        return config.model_copy(
            update={name: value for name, value in ids.items() if getattr(config, name) in (None, ())}
        )


def router_stats(model: CausalLM, routers: list[RouterStats]) -> dict[str, Tensor]:
    """Counts (experts of all routers,) and entropy times tokens (routers,); routers that were not used are zero.

    `routers` follow `model.gates()` and may be short of the last ones, the MTP blocks'.
    """
    if not routers:
        return {}
    missing = cast(list[Gate], model.gates())[len(routers) :]
    counts = [router.counts for router in routers]
    counts += [counts[0].new_zeros(gate.weight.shape[0]) for gate in missing]
    entropy = [router.entropy.nan_to_num() * router.counts.sum() for router in routers]
    entropy += [torch.zeros_like(entropy[0]) for _ in missing]
    return {"router_counts": torch.cat(counts), "router_entropy": torch.stack(entropy)}


def count_sequences(documents: Tensor, shortest: int) -> int:
    """Runs of at least `shortest` equal document numbers in the rows; padding does not count. documents: (rows, seq)."""
    segments, starts = segment_ids(documents)
    long_enough = starts[:, shortest - 1 :].clone()
    starts[:, 1:] &= documents[:, 1:] != documents[:, :-1]
    last = documents.shape[1] - shortest + 1
    long_enough &= segments[:, shortest - 1 :] == segments[:, :last]
    return int((starts[:, :last] & long_enough).sum())


def prepare_data(
    recipe: PretrainRecipe, world: World, folder: Path
) -> tuple[PreTrainedTokenizerFast | None, list[Source]]:
    """The tokenizer, if it is known, and sources that are all token shards; text is tokenized below `folder` by rank 0."""
    data, known = recipe.data, _tokenizer_folder(recipe)
    given = data.all_sources()
    texts = {i: text_path(source.path) for i, source in enumerate(given) if not is_shards(source.path)}
    tokenizer_folder = known or folder / "tokenizer"
    if texts and known is None and data.vocab is None:
        i = next(iter(texts))
        raise RecipeError(
            f'data.sources[{i}].path = "{given[i].path}": no .idx files there. Run `alloy data tokenize` first, point at '
            "its output folder, or set data.tokenizer (or data.vocab, for a new one) to train on text directly."
        )
    if texts and world.is_main:
        if not (tokenizer_folder / "tokenizer.json").exists():
            assert data.vocab is not None, "checked above"
            documents = (d.text for i, path in texts.items() for d in read_documents(path, given[i].column))
            save_tokenizer(train_tokenizer(documents, data.vocab, seed=recipe.seed), tokenizer_folder)
        for i, path in texts.items():
            if not is_shards(shards := folder / "data" / f"source-{i}"):
                tokenize_corpus(read_documents(path, given[i].column), load_tokenizer(tokenizer_folder), shards)
    world.barrier()
    sources = [
        source.model_copy(update={"path": str(folder / "data" / f"source-{i}")}) if i in texts else source
        for i, source in enumerate(given)
    ]
    return (load_tokenizer(tokenizer_folder) if texts or known else None), sources


def _tokenizer_folder(recipe: PretrainRecipe) -> Path | None:
    """Where the tokenizer is that the recipe names, else the checkpoint's own; None for a new one or an unknown one."""
    if recipe.data.tokenizer is not None:
        return resolve(recipe.data.tokenizer)
    if recipe.data.vocab is not None or not isinstance(recipe.model, FromCheckpoint):
        return None
    folder = resolve(recipe.model.path)
    return folder if (folder / "tokenizer.json").exists() else None


def is_shards(path: str | Path) -> bool:
    """Whether `path` is a finished folder of token shards or the prefix of a .bin/.idx pair."""
    return Path(f"{path}.idx").exists() or (Path(path) / MANIFEST).exists()


def _layout(config: HybridConfig | DecoderConfig) -> str:
    return config.pattern if isinstance(config, HybridConfig) else f"{config.num_layers} layers of {config.hidden}"


def _time_estimate(recipe: PretrainRecipe, known: Plan, device: torch.device, ranks: int) -> str:
    """At 40% of the device's peak, the middle of what well-fed GPUs reach."""
    peak = peak_flops(device, DTYPES[recipe.train.precision])
    if recipe.train.steps is None or known.flops_per_token is None or peak is None:
        return "not known for this device" if recipe.train.seconds is None else f"{recipe.train.seconds:g} s"
    seconds = known.flops_per_token * recipe.train.steps * recipe.train.batch_tokens / (0.4 * peak * ranks)
    return f"about {short_time(seconds)} at 40% of peak"
