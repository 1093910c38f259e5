"""Run directories: created once, written by one process, never half-written, found again for resuming.

runs/2026-01-31_142233_pretrain-tiny/
  recipe.toml    fully resolved, re-runnable         manifest.json  versions, commit, command line, status
  run.lock       pid and host of the only writer     log.txt, metrics.jsonl, state/, checkpoint/, report.html
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import alloy
from alloy.core.compose import leaves, read_toml
from alloy.core.logging import get_logger
from alloy.core.recipe import LoadedRecipe, RunOptions
from alloy.core.toml import Key, dotted, is_table, value_at
from alloy.errors import InterruptedRun, RecipeError, ResourceError

Status = Literal["running", "done", "interrupted", "failed"]

MANIFEST, RECIPE, LOCK = "manifest.json", "recipe.toml", "run.lock"
# files that a run killed before its manifest was written may leave behind
_EARLY = {RECIPE, LOCK, "log.txt"}
_PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "pydantic")

log = get_logger(__name__)


class RunDir:
    """One run's directory. As a context manager it ends the run: status by the way of leaving, lock given back."""

    def __init__(self, path: Path) -> None:
        """Look at an existing run; nothing is locked or written."""
        self.path = path
        self.resumed = False

    @classmethod
    def create(cls, loaded: LoadedRecipe, options: RunOptions, command: str, root: Path = Path("runs")) -> Self:
        """Start a run, or take up the one that `options.resume` asks for, and become its only writer."""
        path = _resume_path(loaded, options, command, root)
        resumed = path is not None
        if path is None:
            path = _new_path(options.run_dir, root, f"{command}-{loaded.name}".replace(" ", "-"))
        run = cls(path)
        acquire_lock(path)
        run.resumed = resumed
        atomic_write(path / RECIPE, loaded.to_toml())
        now, line = _now(), shlex.join(sys.argv)
        facts: dict[str, object]
        if resumed:
            entry = {"time": now, "command_line": line, "hash": loaded.hash}
            facts = {"resumed": [*run.manifest.get("resumed", []), entry], "finished": None}
        else:
            facts = {"command": command, "recipe": loaded.name, "created": now, "command_line": line, **environment()}
        # one write: a run killed here has a whole manifest or none
        run.update_manifest(**facts, status="running", hash=loaded.hash, origins=loaded.origins)
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says; empty before it is written."""
        return _read_json(self.path / MANIFEST)

    def update_manifest(self, **facts: object) -> None:
        """Set keys of manifest.json."""
        atomic_write(self.path / MANIFEST, json.dumps({**self.manifest, **facts}, indent=2, default=str) + "\n")

    @property
    def status(self) -> Status | None:
        """running | done | interrupted | failed; "running" is also what a killed run leaves."""
        return self.manifest.get("status")

    def finish(self, status: Status) -> None:
        """Write the final status and give the lock back."""
        try:
            self.update_manifest(status=status, finished=_now())
        finally:
            release_lock(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, InterruptedRun | KeyboardInterrupt)
        self.finish("done" if error is None else "interrupted" if stopped else "failed")


def find_resumable(root: Path, hash: str) -> Path | None:
    """The newest unfinished run below `root` whose resolved recipe has this hash."""
    for path in _unfinished(root):
        if RunDir(path).manifest.get("hash") == hash:
            return path
    return None


def differing_keys(loaded: LoadedRecipe, path: Path) -> list[str]:
    """Lines "key: there -> here" for what differs between a run's recipe and `loaded`."""
    there, _ = read_toml(path / RECIPE)
    here = loaded.resolved
    keys = dict.fromkeys([*leaves(there), *leaves(here)])
    return [
        f"{dotted(key)}: {_shown(there, key)} -> {_shown(here, key)}"
        for key in keys
        if value_at(there, key) != value_at(here, key)
    ]


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace the file at `path` in one step: readers see the old bytes or the new, also after a crash.

    A pipe or device, which a user may name where a file is wanted, is written to.
    """
    payload = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():
        path.write_bytes(payload)
        return
    with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as file:
        view = memoryview(payload)
        while view:
            view = view[os.write(file.fileno(), view) :]


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """A temporary path beside `path` for a writer that needs a file name; moved to `path` when the block ends well."""
    with full_disk_is_resource_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            _sync(temporary, os.O_RDONLY)
            temporary.replace(path)
            _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_is_resource_error(path: Path) -> Generator[None]:
    """Turns "no space left" and "quota exceeded" into a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"{path}: the disk is full or the quota used up ({error.strerror}). "
            "Free space and repeat the command (a run goes on with --resume), or choose another disk."
        ) from error


def acquire_lock(path: Path) -> None:
    """Become the only writer of a run directory, taking over from a dead process of this host."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # held only while looking, so that two processes cannot both take over a stale lock
        fcntl.flock(directory, fcntl.LOCK_EX)
        holder = _read_json(path / LOCK)
        if holder and not _is_stale(holder):
            away = (
                "" if holder.get("host") == socket.gethostname() else f", if that process is gone, delete {path / LOCK}"
            )
            raise ResourceError(
                f"{path} is being written by process {holder.get('pid')} on {holder.get('host')}. "
                f"Wait for it, stop it, or choose another --run-dir{away}."
            )
        pid = os.getpid()
        atomic_write(
            path / LOCK, json.dumps({"pid": pid, "host": socket.gethostname(), "start": _start_time(pid)}) + "\n"
        )
    finally:
        os.close(directory)
    sweep(path)


def sweep(folder: Path) -> None:
    """Remove what writers of this host that are gone have left half-written below `folder`."""
    for leftover in folder.rglob(".*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and leftover.is_file():
            leftover.unlink(missing_ok=True)


def release_lock(path: Path) -> None:
    """Give the lock back, if this process holds it."""
    holder = _read_json(path / LOCK)
    if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
        (path / LOCK).unlink(missing_ok=True)


def environment() -> dict[str, object]:
    """What a result depends on besides the recipe: versions, commit, machine."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "alloy": alloy.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _resume_path(loaded: LoadedRecipe, options: RunOptions, command: str, root: Path) -> Path | None:
    """Directory of the run to continue; None for a new one."""
    if options.resume is None:
        return None
    if options.resume != "auto":
        path = Path(options.resume)
        if not (path / MANIFEST).is_file():
            raise RecipeError(f"--resume {path}: no run there ({MANIFEST} is missing). Give a directory below {root}/.")
        if options.run_dir is not None and options.run_dir.resolve() != path.resolve():
            raise RecipeError(
                f"--resume {path} and --run-dir {options.run_dir} name two directories. Give one of them."
            )
        changed = differing_keys(loaded, path)
        if changed:
            log.warning("resuming %s with a changed recipe: %s", path, "; ".join(changed))
        return path
    if options.run_dir is not None:
        return _same_recipe(loaded, options.run_dir) if (options.run_dir / MANIFEST).is_file() else None
    path = find_resumable(root, loaded.hash)
    if path is not None:
        return path
    for other in _unfinished(root):
        manifest = RunDir(other).manifest
        if manifest.get("command") == command and manifest.get("recipe") == loaded.name:
            return _same_recipe(loaded, other)
    return None


def _same_recipe(loaded: LoadedRecipe, path: Path) -> Path:
    """`path`, unless the run there has another recipe."""
    if RunDir(path).manifest.get("hash") == loaded.hash:
        return path
    changed = "\n  ".join(differing_keys(loaded, path))
    raise RecipeError(
        f"{path} is unfinished but its recipe differs (there -> here):\n  {changed}\n"
        f"Continue it all the same with --resume {path}, or leave --resume out to start anew."
    )


def _new_path(wanted: Path | None, root: Path, name: str) -> Path:
    """Make the directory of a new run."""
    with full_disk_is_resource_error(wanted or root):
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            strangers = {file.name for file in wanted.iterdir()} - _EARLY
            if MANIFEST in strangers:
                raise RecipeError(
                    f"{wanted} holds a run already ({RunDir(wanted).status}). "
                    f"Continue it with --resume {wanted}, or choose another --run-dir."
                )
            if strangers:
                raise RecipeError(f"--run-dir {wanted} is not empty ({sorted(strangers)[0]}). Choose a new directory.")
            return wanted
        root.mkdir(parents=True, exist_ok=True)
        stem = f"{time.strftime('%Y-%m-%d_%H%M%S')}_{name}"
        for attempt in range(1, 1000):
            path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    raise ResourceError(f"{root / stem}: a thousand runs of this name started in one second. Give --run-dir.")


def _unfinished(root: Path) -> list[Path]:
    """Runs below `root` that did not end well, newest first."""
    paths = [file.parent for file in root.glob(f"*/{MANIFEST}")]
    found = [path for path in paths if RunDir(path).status in ("running", "interrupted", "failed")]
    return sorted(found, key=lambda path: (str(RunDir(path).manifest.get("created", "")), path.name), reverse=True)


def _is_stale(holder: Mapping[str, object]) -> bool:
    """Whether a lock's process is known to be gone: it ran on this host, and its pid is free or was given away."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return holder.get("start") != _start_time(pid)


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where /proc does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the second field is the name in parentheses, which may hold spaces
    return stat.rpartition(")")[2].split()[19]


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecipeError(f"{path} is damaged: {error}. Delete it if no process writes that run.") from error
    return value if is_table(value) else {}


def _commit() -> str | None:
    """Commit of the source tree this package is imported from; None for an installed package."""
    folder = Path(alloy.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _shown(table: Any, key: Key) -> str:
    value = value_at(table, key)
    return "(not set)" if value is None else json.dumps(value, default=str)
