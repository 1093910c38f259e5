"""`alloy model`: sizes and memory of a configuration, a look at a checkpoint folder, a random checkpoint."""

import difflib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from alloy.errors import CheckpointError, RecipeError, ResourceError
from alloy.models import sizes
from alloy.models.configs import DecoderConfig, HybridConfig, MambaConfig
from alloy.models.hf.config import load_config
from alloy.models.presets import PRESETS, preset

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Sizes and memory of a configuration; look at or make a checkpoint.",
)

AnyConfig = HybridConfig | DecoderConfig
COUNTED = (
    "counted: weights, KV cache, recurrent and convolution state exactly; activations of one piece of a prompt, captured "
    "decoding steps, and what driver and allocator keep as estimates"
)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Name of a size, checkpoint folder, or config.json.")],
    context: Annotated[str | None, typer.Option(help="Tokens per sequence, such as 131072 or 128k.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences held at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights, conv state and activations.")] = "bfloat16",
    kv_dtype: Annotated[str | None, typer.Option(help="Of keys and values; default: --dtype.")] = None,
    state_dtype: Annotated[str, typer.Option(help="Of the recurrent state.")] = "float32",
    gpu_mem: Annotated[
        str | None, typer.Option(help="Device memory, such as 22GiB: exit code 3 if it does not fit.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens of a prompt that run at once.")] = 2048,
    tp: Annotated[int, typer.Option(help="Ranks that share every layer; numbers are of one.")] = 1,
    ep: Annotated[int, typer.Option(help="Ranks that share the routed experts.")] = 1,
    graphs: Annotated[int, typer.Option(help="Pools of captured decoding steps on the GPU; 0: none.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Parameters, FLOPs and memory of a model, from its configuration alone."""
    config = find_config(model)
    tokens = _tokens(context) if context is not None else min(config.max_positions, 8192)
    setting = sizes.Setting(
        dtype, kv_dtype or dtype, state_dtype, prefill_chunk=prefill_chunk, tp=tp, ep=ep, graphs=graphs
    )
    device = sizes.parse_bytes(gpu_mem) if gpu_mem is not None else None
    if device and device < 2**20:
        raise RecipeError(f'--gpu-mem = "{gpu_mem}" is {device} bytes. Write a unit, such as 22GiB')
    facts = describe(model, config, batch, tokens, setting)
    fit = sizes.fits(config, device, batch, tokens, setting) if device is not None else None
    if fit:
        facts["memory"] = {**asdict(fit.memory), "total": fit.memory.total}
        facts["fit"] = {key: value for key, value in asdict(fit).items() if key != "memory"}
        facts["fit"]["free"] = fit.available - fit.memory.total
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_table(facts, setting)))
    if fit:
        sizes.require_fit(fit)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    scan: Annotated[bool, typer.Option(help="Read every weight and look for NaN and infinity.")] = True,
) -> None:
    """Look a checkpoint folder over: names, shapes, NaN, MTP, dt limit, tokenizer; exit code 4 if something is wrong."""
    from alloy.core.tokenizer import load_tokenizer
    from alloy.models.hf.folder import audit, bad_values, explain
    from alloy.models.hf.names import bare_name
    from alloy.models.registry import build, inspect

    config, foreign, stored = inspect(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in build(config, "meta").state_dict().items()}
    result, wrong = audit(stored, shapes, config), []
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()})
    files, nbytes = len({tensor.file for tensor in stored.values()}), sum(tensor.size for tensor in stored.values())
    typer.echo(f"config     {config.kind}, {_layers(config)}, {sizes.parameters(config):,} parameters")
    if foreign:
        typer.echo(f"           keys kept as they are: {', '.join(foreign)}")
    typer.echo(f"tensors    {len(stored)} in {files} files, {nbytes / sizes.GIB:.3f} GiB, {', '.join(dtypes)}")
    if not result.is_clean:
        wrong.append(explain(result, path))
    if isinstance(config, HybridConfig):
        has_mtp = any(bare_name(name).startswith("mtp.") for name in stored)
        typer.echo(f"MTP        {f'{config.mtp_depths} depth(s) of {config.mtp_pattern}' if has_mtp else 'none'}")
        _echo_dt_limit(config)
    if scan:
        bad = bad_values(stored)
        wrong += [f"{path}: {name} holds {count} NaN or infinite values" for name, count in bad.items()]
        typer.echo(f"values     {'all finite' if not bad else f'{len(bad)} tensors with NaN or infinity'}")
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        typer.echo("tokenizer  none")
    else:
        typer.echo(f"tokenizer  {len(tokenizer)} tokens for an embedding of {config.vocab} rows")
        if len(tokenizer) > config.vocab:
            wrong.append(f"{path}: the tokenizer has {len(tokenizer)} tokens but the embedding {config.vocab} rows")
    if wrong:
        raise CheckpointError("\n".join(wrong))
    typer.echo("ok")


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Name of a size, or a config.json.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    config_style: Annotated[str, typer.Option(help="hybrid or transformers5.")] = "hybrid",
) -> None:
    """Write a checkpoint with random weights, which transformers and vLLM load."""
    import torch

    from alloy.core.device import memory_bytes, seed_everything
    from alloy.models.hf.config import parse_style
    from alloy.models.registry import build, refuse_checkpoint, save

    form = parse_style(config_style)
    refuse_checkpoint(out)
    config = find_config(model)
    needed = (sizes.parameters(config) + sizes.mtp_parameters(config)) * sizes.dtype_bytes(dtype)
    available = memory_bytes(torch.device("cpu"))
    if needed > available:
        raise ResourceError(
            f"{model} has {needed / sizes.GIB:.0f} GiB of weights in {dtype} and this machine {available / sizes.GIB:.0f} GiB "
            "of memory. Choose a smaller size, or bfloat16."
        )
    seed_everything(seed)
    random = build(config, "cpu", dtype)
    save(random, out, config_style=form)
    typer.echo(f"{out}: {sizes.parameters(random.config):,} parameters in {dtype}")


def find_config(name: str) -> AnyConfig:
    """The configuration a name of a size, a folder or a config.json means."""
    if name in PRESETS:
        return preset(name)
    if Path(name).exists():
        return load_config(Path(name))[0]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f'Did you mean "{near[0]}"?' if near else f"Names: {', '.join(PRESETS)}."
    raise RecipeError(f'"{name}" is neither the name of a size nor a path. {hint}')


def describe(name: str, config: AnyConfig, batch: int, context: int, setting: sizes.Setting) -> dict[str, Any]:
    """Everything `alloy model info` says, as plain values."""
    memory = sizes.memory(config, batch, context, setting)
    return {
        "name": name,
        "kind": config.kind,
        "pattern": config.pattern if isinstance(config, HybridConfig) else None,
        "layers": sizes.layer_counts(config),
        "parameters": sizes.parameters(config),
        "mtp_parameters": sizes.mtp_parameters(config),
        "active_parameters": sizes.parameters(config, active=True),
        "active_parameters_without_input_embedding": sizes.parameters(config, active=True, input_embedding=False),
        "flops_per_token": sizes.flops_per_token(config, context),
        "context": context,
        "batch": batch,
        "kv_bytes_per_token": sizes.kv_bytes(config, 1, 1, setting.kv_dtype),
        "ranks": "" if setting.tp == setting.ep == 1 else f", one rank of tp {setting.tp} x ep {setting.ep}",
        "memory": {**asdict(memory), "total": memory.total},
    }


def _table(facts: dict[str, Any], setting: sizes.Setting) -> list[str]:
    memory, fit = facts["memory"], facts.get("fit")
    dtypes = {"weights": setting.dtype, "kv": setting.kv_dtype, "state": setting.state_dtype, "conv": setting.dtype}
    lines = [f"{facts['name']} ({facts['kind']})"]
    if facts["pattern"]:
        lines.append(f"  pattern      {facts['pattern']}")
    lines += [
        f"  layers       {', '.join(f'{count} {kind}' for kind, count in facts['layers'].items())}",
        f"  parameters   {facts['parameters']:,} without MTP, {facts['mtp_parameters']:,} in MTP",
        f"  active       {facts['active_parameters']:,} with the input embedding, "
        f"{facts['active_parameters_without_input_embedding']:,} without",
        f"  FLOPs        {facts['flops_per_token'] / 1e9:.4g} G forward per token, mean over {facts['context']:,} tokens",
        f"  KV           {facts['kv_bytes_per_token']:,} bytes per token",
        f"memory for {facts['batch']} x {facts['context']:,} tokens{facts['ranks']}",
    ]
    for part, size in memory.items():
        if size or part == "total":
            lines.append(f"  {part:12} {size / sizes.GIB:9.3f} GiB  {dtypes.get(part, '')}".rstrip())
    if fit:
        lines += [
            f"  {'free':12} {fit['free'] / sizes.GIB:9.3f} GiB",
            f"  {'fits' if fit['fits'] else 'does not fit'} {fit['available'] / sizes.GIB:.2f} GiB; largest batch at "
            f"{facts['context']:,} tokens: {fit['largest_batch']:,}; largest context at batch {facts['batch']}: "
            f"{fit['largest_context']:,}",
            f"  {COUNTED}",
        ]
    return lines


def _echo_dt_limit(config: HybridConfig) -> None:
    if any(isinstance(mixer, MambaConfig) for mixer in config.mixers):
        low, high = config.time_step_limit
        typer.echo(
            f"dt         clamped to [{low:g}, {high:g}] (time_step_limit); transformers 5.23 floors it at time_step_min = "
            f"{config.time_step_min:g} in prefill instead"
        )


def _layers(config: AnyConfig) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sizes.layer_counts(config).items())


def _tokens(text: str) -> int:
    """Number of tokens in "131072", "128k" or "1M" (powers of 1024)."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text.replace("_", "").replace(",", ""))
    if not match or not int(match[1]):
        raise RecipeError(f'--context = "{text}" is not a number of tokens. Write 131072 or 128k')
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]
