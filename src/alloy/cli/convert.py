"""`alloy convert`: a checkpoint folder in another dtype, config style or shard size, or for another engine."""

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alloy.errors import AlloyError, CheckpointError, RecipeError

if TYPE_CHECKING:
    from alloy.models.export import Export

# rewritten by every save, so never copied
REWRITTEN = {"config.json", "generation_config.json", "model.safetensors.index.json"}
# what the engines call the parsers of a tool format (alloy.serve.tools.FORMATS): vLLM, SGLang, TensorRT-LLM.
# None: there is none; that of Nemotron Nano v2 is a plug-in beside its release
TOOL_PARSERS: dict[str, tuple[str | None, str | None, str | None]] = {
    "qwen3_coder": ("qwen3_coder", "qwen3_coder", "qwen3_coder"),
    "hermes": ("hermes", "hermes", "qwen3"),
    "llama_json": ("llama3_json", "llama3", None),
    "nemotron": (None, None, None),
}
# and the parsers of thoughts between <think> and </think>, by family
REASONING_PARSERS = {
    "nemotron_3": ("nemotron_v3", "nemotron_3", "nano-v3"),
    "qwen3": ("qwen3", "qwen3", "qwen3"),
    "other": ("deepseek_r1", "deepseek-r1", "deepseek-r1"),
}


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    target: Annotated[
        Path | None,
        typer.Argument(help="Folder to write; none with --to vllm --check: SOURCE is looked over as it is."),
    ] = None,
    to: Annotated[
        str, typer.Option(help="hf; or vllm: the same folder in the form that vLLM and other engines read.")
    ] = "hf",
    config_style: Annotated[str, typer.Option(help="hybrid or transformers5.")] = "hybrid",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Load both and compare them. With --to vllm also: what vLLM, SGLang, TensorRT-LLM and llama.cpp read, with "
            "the mend and the commands that serve it; exit code 1 if vLLM would refuse the folder or read it otherwise.",
        ),
    ] = False,
) -> None:
    """Rewrite a checkpoint: names as released, dtype, config style, shard size; or look over one for other engines."""
    from alloy.core import hub
    from alloy.core.runs import atomic_path
    from alloy.models.hf.config import parse_style
    from alloy.models.registry import load, refuse_checkpoint, save
    from alloy.models.sizes import parse_bytes

    if to not in ("hf", "vllm"):
        raise RecipeError(f'--to = "{to}" is not known. Use hf or vllm')
    if to == "vllm" and config_style != "hybrid":
        raise RecipeError(f"--config-style {config_style} is not what vLLM reads; leave it out with --to vllm")
    form, limit = parse_style(config_style), parse_bytes(max_shard_size)
    folder = hub.resolve(source)
    if target is None:
        if to != "vllm" or not check:
            raise RecipeError("there is no folder to write; give one, or --to vllm --check to look the source over")
        _report(folder)
        return
    if target.resolve() == folder.resolve():
        raise RecipeError(f"source and target are the same folder, {target}. Give another target")
    refuse_checkpoint(target)
    with _Rate("loaded") as rate:
        model, tokenizer = load(folder, dtype=dtype, device="cpu", progress=rate.add)
    # before the model, whose config.json comes last and makes the folder a checkpoint
    for file in folder.iterdir():
        is_weight = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
        if file.is_file() and not is_weight and file.name not in REWRITTEN:
            with atomic_path(target / file.name) as temporary:
                shutil.copy2(file, temporary)
    with _Rate("saved") as rate:
        save(model, target, tokenizer, form, limit, rate.add)
    if check:
        _compare(folder, target, dtype)
    typer.echo(f"wrote {target}")
    if check and to == "vllm":
        _report(target)


def _report(folder: Path) -> None:
    """Print what other engines make of a folder; AlloyError if vLLM would refuse it or read it otherwise."""
    from alloy.models.export import ENGINES, VLLM, look_over
    from alloy.models.registry import GENERATION

    export = look_over(folder)
    width = max(len(part) for part in export.parts)
    typer.echo("  ".join([" " * width, *(f"{engine:12}" for engine in ENGINES)]).rstrip())
    for part in export.parts:
        typer.echo("  ".join([f"{part:{width}}", *(f"{export.state(part, e):12}" for e in ENGINES)]).rstrip())
    for found in export.findings:
        typer.echo(f"{found.name} {found.state} for {', '.join(found.engines)}: {found.text}")
    if not export.template:
        typer.echo("no chat template: completions alone, no chat")
    if not (folder / GENERATION).is_file():
        typer.echo(f"no {GENERATION}: the engines' own sampling defaults")
    for engine, command in zip(ENGINES, commands(folder, export), strict=True):
        typer.echo(f"\n{engine}\n  {command}")
    wrong = list(dict.fromkeys(found.name for found in export.findings if VLLM in found.engines))
    if wrong:
        raise AlloyError(f"{folder} is not ready for vLLM: {'; '.join(wrong)}. The lines above say how to mend it")


def commands(folder: Path, export: "Export") -> list[str]:
    """What serves a folder with each engine; parsers are those of the chat template's formats."""
    from alloy.serve.tools import format_of

    template, kind, path = export.template, export.config.kind, shlex.quote(str(folder))
    format = format_of(template)
    family = "qwen3" if kind.startswith("qwen3") else "nemotron_3" if format == "qwen3_coder" else "other"
    thinks, calls = "</think>" in template, "tools" in template
    reasoning = REASONING_PARSERS[family] if thinks else (None, None, None)
    tools = TOOL_PARSERS[format] if calls else (None, None, None)
    # these two compute float32 weights in 16 bits unless told otherwise
    exact = " --dtype float32" if export.dtype == "float32" else ""
    vllm = f"vllm serve {path}{exact}{_option('--reasoning-parser', reasoning[0])}"
    if tools[0]:
        vllm += f" --enable-auto-tool-choice --tool-call-parser {tools[0]}"
    sglang = f"python -m sglang.launch_server --model-path {path}{exact}"
    sglang += _option("--reasoning-parser", reasoning[1]) + _option("--tool-call-parser", tools[1])
    trtllm = f"trtllm-serve {path}{_option('--reasoning_parser', reasoning[2])}{_option('--tool_parser', tools[2])}"
    gguf = shlex.quote(f"{str(folder).rstrip('/')}.gguf")
    jinja = " --jinja" if template else ""
    return [
        vllm,
        sglang,
        trtllm,
        f"python convert_hf_to_gguf.py {path} --outfile {gguf} && llama-server -m {gguf}{jinja}",
    ]


def _option(name: str, value: str | None) -> str:
    return f" {name} {value}" if value else ""


def _compare(source: Path, target: Path, dtype: str | None) -> None:
    """Load both folders in the target's dtype and compare tensors and logits."""
    import torch

    from alloy.models.registry import load

    ours, _ = load(target, device="cpu")
    theirs, _ = load(source, dtype=dtype, device="cpu")
    before, after = theirs.state_dict(), ours.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed or before.keys() != after.keys():
        raise CheckpointError(f"{target} differs from {source} in {len(changed)} tensors, such as {changed[:3]}")
    tokens = torch.randint(ours.config.vocab, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        distance = (ours(tokens).logits - theirs(tokens).logits).abs().max().item()
    if distance != 0:
        raise CheckpointError(f"{target}: logits differ from those of {source} by {distance:.3g}")
    typer.echo("check: tensors and logits are equal")


class _Rate:
    """A live line with the bytes moved and GB/s on a terminal; one plain line at the end."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.done = 0

    def __enter__(self) -> "_Rate":
        import time

        from rich.live import Live

        from alloy.core.logging import console

        self._clock = time.perf_counter
        self._start = self._clock()
        self._live = Live(console=console(), transient=True, refresh_per_second=4) if console().is_terminal else None
        if self._live:
            self._live.start()
        return self

    def add(self, count: int) -> None:
        """Count bytes."""
        self.done += count
        if self._live:
            self._live.update(self._text())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        if kind is None:
            typer.echo(self._text(), err=True)

    def _text(self) -> str:
        seconds = max(self._clock() - self._start, 1e-9)
        return f"{self.verb} {self.done / 2**30:.2f} GiB in {seconds:.1f} s ({self.done / seconds / 1e9:.2f} GB/s)"
