"""`alloy convert`: a checkpoint folder in another dtype, config style or shard size."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from alloy.errors import CheckpointError, RecipeError

# rewritten by every save, so never copied
REWRITTEN = {"config.json", "generation_config.json", "model.safetensors.index.json"}


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format; hf is the only one so far.")] = "hf",
    config_style: Annotated[str, typer.Option(help="hybrid or transformers5.")] = "hybrid",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    check: Annotated[bool, typer.Option("--check", help="Load both and compare them.")] = False,
) -> None:
    """Rewrite a checkpoint: names as released, dtype, config style, shard size."""
    from alloy.core import hub
    from alloy.models.hf.config import parse_style
    from alloy.models.registry import load, refuse_checkpoint, save
    from alloy.models.sizes import parse_bytes

    if to != "hf":
        raise RecipeError(f'--to = "{to}" is not known; hf is the only format so far')
    form, limit = parse_style(config_style), parse_bytes(max_shard_size)
    folder = hub.resolve(source)
    if target.resolve() == folder.resolve():
        raise RecipeError(f"source and target are the same folder, {target}. Give another target")
    refuse_checkpoint(target)
    with _Rate("loaded") as rate:
        model, tokenizer = load(folder, dtype=dtype, device="cpu", progress=rate.add)
    with _Rate("saved") as rate:
        save(model, target, tokenizer, form, limit, rate.add)
    for file in folder.iterdir():
        is_weight = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
        if file.is_file() and not is_weight and file.name not in REWRITTEN and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
    if check:
        _compare(folder, target, dtype)
    typer.echo(f"wrote {target}")


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
