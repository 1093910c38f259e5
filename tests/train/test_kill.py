"""SIGKILL at random moments: the run resumes and its metrics are those of a run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alloy.train.checkpoint import latest_state
from tests.train.tiny import curve, train, write_recipe

STEPS = 200
SETTINGS = [
    f"train.steps={STEPS}",
    "train.save_every=7",
    "train.eval_every=50",
    "train.keep_last=2",
    "train.micro_batch=12",
]


def start(folder: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """A process that runs or resumes the recipe."""
    command = [sys.executable, "-m", "alloy", "pretrain", str(folder / "tiny.toml"), *SETTINGS]
    options = ["--run-dir", str(run_dir), "--resume", "auto", "--quiet"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "1000",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(command + options, env=environment, stderr=subprocess.PIPE)


def kill_at(process: subprocess.Popen[bytes], run_dir: Path, rng: random.Random) -> None:
    """Kill at a random time, in half of the cases while a state is being written, unless the run ends before."""
    if rng.random() < 0.5:
        target = rng.randrange(1, STEPS // 7)
        seen, before = 0, None
        while process.poll() is None and seen < target:
            parts = list((run_dir / "state").glob(".part-*"))
            if parts and parts[0] != before:
                seen, before = seen + 1, parts[0]
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
    else:
        metrics = run_dir / "metrics.jsonl"
        lines = rng.randrange(0, STEPS)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def trial(folder: Path, seed: int, kills: int) -> None:
    """One run that is killed several times and then left to end."""
    rng = random.Random(seed)
    run_dir = folder / f"killed-{seed}"
    for _ in range(kills):
        kill_at(start(folder, run_dir), run_dir, rng)
        # whatever `latest` names is there
        latest_state(run_dir / "state")
    process = start(folder, run_dir)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()
    assert curve(run_dir) == curve(folder / "whole")
    assert not list((run_dir / "state").glob(".part-*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe and the curve of a run that was left alone."""
    folder = tmp_path_factory.mktemp("kill")
    write_recipe(folder)
    train(folder, "whole", *SETTINGS)
    return folder


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(folder: Path) -> None:
    """Two kills, one of them aimed at a save."""
    trial(folder, seed=4, kills=2)


@pytest.mark.soak
def test_many_kills(folder: Path, soak_count: int, soak_seed: int) -> None:
    """The same with many seeds."""
    for seed in range(soak_seed, soak_seed + soak_count):
        trial(folder, seed=1000 + seed, kills=3)
