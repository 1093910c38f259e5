"""Resumable training state on disk: complete or absent, never half.

    state/step-000200/   one .distcp file a rank (torch.distributed.checkpoint), .metadata, trainer.pt, digests.json
    state/latest         name of the newest complete state, written last

A state is written into a hidden folder, synced, checked into `digests.json` and renamed; only then `latest` moves on and old
states go. A process killed at any byte leaves the previous state in force, and what it left behind is swept by the next save.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from alloy.core.runs import atomic_write
from alloy.errors import CheckpointError, ResourceError
from alloy.parallel.mesh import World

TRAINER, DIGESTS, LATEST = "trainer.pt", "digests.json", "latest"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each shared tensor once, sharded where the model is."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def save_state(
    root: Path, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], world: World, keep_last: int
) -> Path:
    """Write the state after `step` steps under `root` and make it the latest.

    Args:
        root: the run's state/ folder.
        step: steps that are done.
        tensors: by name; DTensors are written as this rank's shards.
        trainer: what rank 0 knows besides: plain values and tensors.
        world: all ranks write, rank 0 makes the state valid.
        keep_last: how many states stay.
    """
    name = f"step-{step:06d}"
    folder, part = root / name, root / f".part-{name}"
    if latest_state(root) == folder:
        return folder
    failed: str | None = None
    try:
        if world.is_main:
            _sweep(root)
            part.mkdir(parents=True)
        world.barrier()
        values = {key: value.detach() for key, value in tensors.items()}
        with warnings.catch_warnings():
            # says that one process saves alone, which is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            save(values, storage_writer=FileSystemWriter(part), no_dist=world.mesh is None)
        if world.is_main:
            with open(part / TRAINER, "wb") as file:
                torch.save(trainer, file)
                file.flush()
                os.fsync(file.fileno())
    except (OSError, RuntimeError, CheckpointException) as error:
        failed = _disk_failure(error)
        if failed is None:
            raise
    if any(world.gather(failed)):
        if world.is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise ResourceError(
            f"cannot save the state of step {step} in {root}: {failed or 'another rank has no room'}. "
            "The previous state is intact: free space (or lower train.keep_last) and continue with --resume."
        )
    if world.is_main:
        digests = {path.name: _digest(path) for path in sorted(part.iterdir())}
        atomic_write(part / DIGESTS, json.dumps(digests, indent=1))
        if folder.exists():
            # left by a run that died between the rename and `latest`
            shutil.rmtree(folder)
        _sync_folder(part)
        part.rename(folder)
        _sync_folder(root)
        atomic_write(root / LATEST, name + "\n")
        for old in sorted(root.glob("step-*"))[:-keep_last]:
            shutil.rmtree(old)
    world.barrier()
    return folder


def load_state(folder: Path, tensors: dict[str, Tensor], world: World) -> dict[str, Any]:
    """Fill `tensors` in place from a state folder and return what `save_state` got as `trainer`."""
    verdict = world.first(_verify(folder) if world.is_main else None)
    if verdict is not None:
        raise CheckpointError(str(verdict))
    wanted = {key: value.detach() for key, value in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load(wanted, storage_reader=FileSystemReader(folder), no_dist=world.mesh is None)
    except (RuntimeError, ValueError, CheckpointException) as error:
        raise CheckpointError(
            f"state {folder} does not fit this model: {_first_cause(error)}. "
            "Resume with the recipe.toml of the same run directory."
        ) from error
    return torch.load(folder / TRAINER, map_location="cpu", weights_only=True)


def latest_state(root: Path) -> Path | None:
    """The newest complete state under `root` (a run's state/ folder), or None."""
    pointer = root / LATEST
    if not pointer.exists():
        return None
    folder = root / pointer.read_text(errors="replace").strip()
    if not folder.is_dir():
        raise CheckpointError(f"{pointer} names {folder.name}, which is not there; put the name of one that is into it")
    return folder


def replace_folder(part: Path, folder: Path) -> None:
    """Put the finished folder `part` in the place of `folder`."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _verify(folder: Path) -> str | None:
    """What is wrong with the files of a state, or None."""
    digests = folder / DIGESTS
    if not digests.exists():
        return f"state {folder} is not complete: {DIGESTS} is missing; choose another one in state/latest"
    try:
        written: dict[str, str] = json.loads(digests.read_bytes())
    except ValueError as error:
        return f"state {folder} is damaged: {DIGESTS} is not JSON ({error}); put an older state into {folder.parent / LATEST}"
    for name, digest in written.items():
        path = folder / name
        if not path.exists():
            return f"state {folder} is damaged: {name} is missing; put an older state into {folder.parent / LATEST}"
        if _digest(path) != digest:
            return (
                f"state {folder} is damaged: {name} ({path.stat().st_size} bytes) is not what was written; "
                f"put an older state into {folder.parent / LATEST}"
            )
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(root: Path) -> None:
    """Remove what a killed save left."""
    root.mkdir(parents=True, exist_ok=True)
    for part in root.glob(".part-*"):
        shutil.rmtree(part)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_failure(error: BaseException) -> str | None:
    """The system's words if the disk was full, else None."""
    cause: BaseException | None = _first_cause(error)
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return None


def _first_cause(error: BaseException) -> BaseException:
    if isinstance(error, CheckpointException):
        failures: dict[int, tuple[BaseException, Any]] = error.failures
        return next((cause for cause, _ in failures.values()), error)
    return error
