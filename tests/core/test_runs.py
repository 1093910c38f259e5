"""Run directories: names, locks, atomic writes, resuming."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import alloy
from alloy.core import runs
from alloy.core.recipe import Config, LoadedRecipe, Recipe, RunOptions, load_recipe
from alloy.core.runs import (
    RunDir,
    acquire_lock,
    atomic_path,
    atomic_write,
    differing_keys,
    find_resumable,
    release_lock,
)
from alloy.errors import InterruptedRun, RecipeError, ResourceError

# other processes import the same source tree, from whatever directory
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(alloy.__file__).parents[1])}


class Train(Config):
    steps: int = 10
    lr: float = 1e-3


class ToyRecipe(Recipe):
    train: Train = Train()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text('command = "toy"\n')
    return tmp_path / "runs"


def load(*overrides: str) -> LoadedRecipe:
    return load_recipe("toy.toml", overrides, ToyRecipe)


def dead_pid() -> int:
    """A pid that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_new_run(root: Path) -> None:
    """Name, resolved recipe, manifest, lock; done and unlocked at the end."""
    with RunDir.create(load("train.steps=3"), RunOptions(), "toy", root) as run:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}_toy-toy", run.path.name)
        assert run.status == "running"
        assert not run.resumed
        assert json.loads((run.path / "run.lock").read_text())["pid"] == os.getpid()
        assert load_recipe(run.path / "recipe.toml", (), ToyRecipe).hash == load("train.steps=3").hash
        run.update_manifest(device="cpu")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["device"] == "cpu"
    assert manifest["command"] == "toy"
    assert manifest["packages"]["torch"]
    assert manifest["origins"]["train.steps"] == 'override "train.steps=3"'
    assert not (run.path / "run.lock").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(InterruptedRun("stop", 143), "interrupted"), (KeyboardInterrupt(), "interrupted"), (OSError(), "failed")],
)
def test_status_tells_how_it_ended(root: Path, error: BaseException, status: str) -> None:
    """The way out of the `with` block is the status."""
    with pytest.raises(type(error)), RunDir.create(load(), RunOptions(), "toy", root) as run:
        raise error
    assert run.status == status


def test_names_are_unique_within_a_second(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that start together get numbered directories."""
    monkeypatch.setattr(runs.time, "strftime", lambda form: "2026-01-31_142233")
    paths: list[Path] = []

    def start() -> None:
        paths.append(RunDir.create(load(), RunOptions(), "toy", root).path)

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = sorted(path.name for path in paths)
    assert names == sorted(["2026-01-31_142233_toy-toy", *(f"2026-01-31_142233_toy-toy-{n}" for n in (2, 3, 4, 5))])


def test_second_writer_is_refused_with_the_pid(root: Path) -> None:
    """Another living process: its pid is in the message, and the run is left alone."""
    with RunDir.create(load(), RunOptions(run_dir=root / "x"), "toy", root):
        code = f"from pathlib import Path; from alloy.core.runs import acquire_lock; acquire_lock(Path({str(root / 'x')!r}))"
        other = subprocess.run(
            [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert other.returncode == 1
        assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in other.stderr
        with pytest.raises(ResourceError, match=f"process {os.getpid()}"):
            RunDir.create(load(), RunOptions(resume=str(root / "x")), "toy", root)


def test_stale_locks_are_taken_over(tmp_path: Path) -> None:
    """A dead pid of this host, or a pid that now belongs to another process."""
    acquire_lock(tmp_path)
    lock = json.loads((tmp_path / "run.lock").read_text())
    for stale in ({**lock, "pid": dead_pid()}, {**lock, "start": "1"}):
        (tmp_path / "run.lock").write_text(json.dumps(stale))
        acquire_lock(tmp_path)
        assert json.loads((tmp_path / "run.lock").read_text()) == lock
    release_lock(tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    """Whether its process lives cannot be known; the message says what to delete. It is not ours to release."""
    (tmp_path / "run.lock").write_text(json.dumps({"pid": dead_pid(), "host": "elsewhere", "start": "1"}))
    with pytest.raises(ResourceError, match=r"on elsewhere.*delete .*run\.lock"):
        acquire_lock(tmp_path)
    release_lock(tmp_path)
    assert (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_only_one_of_many_takes_a_stale_lock(tmp_path: Path) -> None:
    """Processes that find the same stale lock at once: one wins."""
    (tmp_path / "run.lock").write_text(json.dumps({"pid": dead_pid(), "host": socket.gethostname(), "start": "1"}))
    code = (
        "import sys, pathlib\nfrom alloy.core.runs import acquire_lock\nfrom alloy.errors import ResourceError\n"
        f"path = pathlib.Path({str(tmp_path)!r})\nprint('ready', flush=True); sys.stdin.readline()\n"
        "try:\n    acquire_lock(path); print('won', flush=True)\nexcept ResourceError:\n    print('lost', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for other in others:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
    for other in others:
        assert other.stdin
        other.stdin.write("go\n")
        other.stdin.flush()
    said = [other.stdout.readline().strip() for other in others if other.stdout]
    for other in others:
        other.communicate("end\n")
    assert sorted(said) == ["lost", "lost", "won"]


def test_run_dir_must_be_new(root: Path) -> None:
    """A run is not overwritten, nor a folder with other files; leftovers of a run killed at its start are."""
    with RunDir.create(load(), RunOptions(run_dir=root / "x"), "toy", root):
        pass
    with pytest.raises(RecipeError, match=r"holds a run already \(done\)\. Continue it with --resume"):
        RunDir.create(load(), RunOptions(run_dir=root / "x"), "toy", root)
    (root / "y").mkdir()
    (root / "y" / "thesis.tex").touch()
    with pytest.raises(RecipeError, match=r"is not empty \(thesis\.tex\)"):
        RunDir.create(load(), RunOptions(run_dir=root / "y"), "toy", root)
    (root / "z").mkdir()
    (root / "z" / "recipe.toml").write_text("half")
    assert RunDir.create(load(), RunOptions(run_dir=root / "z"), "toy", root).status == "running"


def interrupted(root: Path, name: str, *overrides: str) -> Path:
    """A run that was interrupted."""
    run = RunDir.create(load(*overrides), RunOptions(run_dir=root / name), "toy", root)
    run.finish("interrupted")
    return run.path


def test_resume_auto_takes_the_newest_with_the_same_recipe(root: Path) -> None:
    """Finished runs and other recipes are passed over; the manifest keeps the history."""
    old = interrupted(root, "a")
    new = interrupted(root, "b")
    other = interrupted(root, "c", "train.lr=1")
    RunDir(old).update_manifest(created="2026-01-01")
    RunDir(new).update_manifest(created="2026-01-02")
    RunDir(other).update_manifest(created="2026-01-03")
    assert find_resumable(root, load().hash) == new
    run = RunDir.create(load(), RunOptions(resume="auto"), "toy", root)
    assert (run.path, run.resumed, run.status) == (new, True, "running")
    assert len(run.manifest["resumed"]) == 1
    run.finish("done")
    assert find_resumable(root, load().hash) == old


def test_resume_auto_starts_anew_when_nothing_is_unfinished(root: Path) -> None:
    """The same command line works for the first start and for every restart."""
    run = RunDir.create(load(), RunOptions(resume="auto"), "toy", root)
    assert not run.resumed
    named = RunOptions(resume="auto", run_dir=root / "named")
    first = RunDir.create(load(), named, "toy", root)
    assert not first.resumed
    first.finish("failed")
    assert RunDir.create(load(), named, "toy", root).resumed


def test_resume_auto_refuses_another_recipe_and_prints_the_difference(root: Path) -> None:
    """Unless --resume DIR says which."""
    path = interrupted(root, "a", "train.lr=0.5")
    for options in (RunOptions(resume="auto"), RunOptions(resume="auto", run_dir=path)):
        with pytest.raises(RecipeError) as caught:
            RunDir.create(load("train.steps=11"), options, "toy", root)
        assert "train.steps: 10 -> 11\n" in str(caught.value)
        assert "train.lr: 0.5 -> 0.001\n" in str(caught.value)
        assert f"--resume {path}" in str(caught.value)
    assert differing_keys(load("train.lr=0.5"), path) == []
    run = RunDir.create(load("train.steps=11"), RunOptions(resume=str(path)), "toy", root)
    assert run.resumed
    assert load_recipe(path / "recipe.toml", (), ToyRecipe).recipe == load("train.steps=11").recipe


def test_resume_of_nothing(root: Path) -> None:
    """The directory must hold a run, and agree with --run-dir."""
    with pytest.raises(RecipeError, match=r"--resume nowhere: no run there \(manifest\.json is missing\)"):
        RunDir.create(load(), RunOptions(resume="nowhere"), "toy", root)
    path = interrupted(root, "a")
    with pytest.raises(RecipeError, match="name two directories"):
        RunDir.create(load(), RunOptions(resume=str(path), run_dir=root / "b"), "toy", root)


def test_killed_run_can_be_resumed(root: Path) -> None:
    """kill -9 leaves status running and a lock; both are seen through."""
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from alloy.core.recipe import Recipe, RunOptions, load_recipe\nfrom alloy.core.runs import RunDir\n"
        "RunDir.create(load_recipe('toy.toml', (), Recipe), RunOptions(run_dir=Path('runs/k')), 'toy')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert RunDir(root / "k").status == "running"
    run = RunDir.create(load_recipe("toy.toml", (), Recipe), RunOptions(resume="auto"), "toy", root)
    assert run.path == root / "k"


def test_damaged_manifest(root: Path) -> None:
    """Named, with what to do."""
    path = interrupted(root, "a")
    (path / "manifest.json").write_text('{"status": ')
    with pytest.raises(RecipeError, match=r"manifest\.json is damaged"):
        RunDir(path).status  # noqa: B018


def test_atomic_write_replaces_in_one_step(tmp_path: Path) -> None:
    """Text and bytes, new folders, nothing left beside the file."""
    path = tmp_path / "deep" / "file"
    atomic_write(path, "old é")
    atomic_write(path, b"new\x00")
    assert path.read_bytes() == b"new\x00"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_atomic_write_syncs_file_before_name_and_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which the kernel is told: bytes of the file, then the name, then the directory."""
    order: list[str] = []
    path = tmp_path / "file"

    def sync(descriptor: int) -> None:
        kind = "directory" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file"
        order.append(f"{kind} {'renamed' if path.exists() else 'temporary'}")

    monkeypatch.setattr(os, "fsync", sync)
    atomic_write(path, "x")
    assert order == ["file temporary", "directory renamed"]


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """The old file stays, no temporary file is left, and the message names the path and what to do."""
    path = tmp_path / "state"
    atomic_write(path, "old")

    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            ResourceError, match=rf"{re.escape(str(path))}: the disk is full or the quota used up.*repeat the command"
        ):
            atomic_write(path, "new" * 1000)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_other_write_errors_are_not_renamed(tmp_path: Path) -> None:
    """Only a full disk becomes a ResourceError."""
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass

    def stop_half_way() -> None:
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


def test_partial_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.write may take fewer bytes than it is given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    atomic_write(tmp_path / "x", b"0123456789" * 5)
    assert (tmp_path / "x").read_bytes() == b"0123456789" * 5


def test_half_written_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    """Of processes that run, and of other names, nothing is touched."""
    (tmp_path / "stage").mkdir()
    gone = [tmp_path / ".a.json.4194999.tmp", tmp_path / "stage" / ".part-00000.parquet.4194998.tmp"]
    kept = [tmp_path / f".b.json.{os.getpid()}.tmp", tmp_path / ".c.tmp", tmp_path / "d.4194999.tmp"]
    for path in (*gone, *kept):
        path.write_text("{")
    acquire_lock(tmp_path)
    assert [path.exists() for path in gone] == [False, False]
    assert all(path.exists() for path in kept)
