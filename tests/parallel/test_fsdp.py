"""Two processes are one: same losses at the same global batch, same files, clean exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alloy.models.registry import load
from tests.train.tiny import curve, losses, train, write_recipe

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def torchrun(folder: Path, run_dir: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe with two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "alloy", "pretrain", str(folder / "tiny.toml"), "--run-dir", str(folder / run_dir), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(launcher + command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Twelve steps with MoE, MTP, packing, accumulation and validation agree to 1e-5; so does the exported model.

    Muon trains the blocks, AdamW the rest, so both see sharded parameters.
    """
    write_recipe(tmp_path)
    settings = ["train.optimizer=muon", "train.steps=12", "train.micro_batch=3"]
    done = torchrun(tmp_path, "two", *settings)
    assert done.returncode == 0, done.stderr
    # only rank 0 writes
    assert done.stderr.count("step 12/12") == 1
    train(tmp_path, "one", *settings)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    for mine, other in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert mine.get("max_vio_by_layer") == other.get("max_vio_by_layer")
    two, one = (load(tmp_path / name / "checkpoint")[0] for name in ("two", "one"))
    for (name, a), (_, b) in zip(two.state_dict().items(), one.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_sharded_state_resumes_and_errors_end_cleanly(tmp_path: Path) -> None:
    """A sharded run goes on in one process with the same losses; a refusal has its message and its exit code."""
    write_recipe(tmp_path)
    settings = ["train.optimizer=adamw", "train.micro_batch=3"]
    refused = torchrun(tmp_path, "refused", *settings, "train.batch_tokens=63")
    assert "batch_tokens = 63 is not a multiple of ranks x micro_batch x seq = 2 x 3 x 21 = 126." in refused.stderr
    assert "exitcode  : 2" in refused.stderr
    assert torchrun(tmp_path, "two", *settings, "train.steps=5", "train.schedule=constant").returncode == 0
    train(tmp_path, "two", *settings, "train.steps=9", "train.schedule=constant", resume=str(tmp_path / "two"))
    train(tmp_path, "one", *settings, "train.steps=9", "train.schedule=constant")
    mine = [line["loss"] for line in curve(tmp_path / "two") if "loss" in line]
    other = [line["loss"] for line in curve(tmp_path / "one") if "loss" in line]
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
