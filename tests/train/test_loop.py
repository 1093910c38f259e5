"""The loop: what must not change a loss, what must survive a restart, and what stops a run."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from alloy.core.recipe import RunOptions, run
from alloy.core.runs import RunDir
from alloy.errors import AlloyError, InterruptedRun, RecipeError
from alloy.models.registry import load
from alloy.train.loop import StopSignals
from alloy.train.recipe import TrainTable, micro_batches
from tests.train.tiny import curve, losses, tiny, train


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, and its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    train(folder, "whole")
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.micro_batch=1",),
        ("train.micro_batch=6",),
        ("train.micro_batch=12", "train.checkpointing=full"),
        ("train.micro_batch=12", "train.checkpointing=selective"),
    ],
)
def test_micro_batch_and_checkpointing_leave_the_loss(reference: Path, overrides: tuple[str, ...]) -> None:
    """Every part of the loss, router statistics included, is the same for any cut of the batch."""
    name = "-".join(overrides)
    train(reference, name, "train.precision=fp32", "train.optimizer=adamw", *overrides)
    if not (reference / "adamw").exists():
        train(reference, "adamw", "train.optimizer=adamw")
    torch.testing.assert_close(losses(reference / name), losses(reference / "adamw"), rtol=0, atol=5e-6)
    for mine, other in zip(curve(reference / name), curve(reference / "adamw"), strict=True):
        assert mine.get("max_vio_by_layer") == other.get("max_vio_by_layer")


def test_bf16_stays_near_fp32(reference: Path) -> None:
    """Under autocast the curve is that of fp32 within bf16's error; parameters and the exported model stay fp32."""
    train(reference, "bf16", "train.precision=bf16")
    whole = [line["loss"] for line in curve(reference / "whole") if "loss" in line]
    low = [line["loss"] for line in curve(reference / "bf16") if "loss" in line]
    torch.testing.assert_close(low, whole, rtol=2e-2, atol=0)
    assert low != whole


def test_bf16_pure_holds_everything_in_bf16(reference: Path) -> None:
    """Half the bytes of parameters and moments, the curve near fp32's; the exported model is bf16 with fp32 islands."""
    train(reference, "pure", "train.precision=bf16-pure", "train.optimizer=adamw")
    if not (reference / "adamw").exists():
        train(reference, "adamw", "train.optimizer=adamw")
    whole = [line["loss"] for line in curve(reference / "adamw") if "loss" in line]
    low = [line["loss"] for line in curve(reference / "pure") if "loss" in line]
    torch.testing.assert_close(low, whole, rtol=3e-2, atol=0)
    norms = torch.tensor([line["grad_norm"] for line in curve(reference / "pure") if "grad_norm" in line])
    assert not torch.equal(norms, norms.bfloat16().float())
    model, _ = load(reference / "pure" / "checkpoint")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert fp32 == {name for name in dtypes if name.endswith(("A_log", "dt_bias", ".D"))}


def test_training_learns_and_logs(reference: Path) -> None:
    """The loss falls, and each line has what a person wants to see."""
    lines = [line for line in curve(reference / "whole") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3  # type: ignore[operator]  # numbers
    wanted = {"step", "loss", "loss_max", "mtp1_loss", "mtp2_loss", "balance_loss", "grad_norm", "lr", "tokens"}
    assert wanted | {"max_vio", "max_vio_by_layer", "dead_experts", "router_entropy"} <= lines[0].keys()
    assert len(lines[0]["max_vio_by_layer"]) == 2  # type: ignore[arg-type]  # one backbone layer, one MTP layer
    assert any("val_loss" in line for line in curve(reference / "whole"))
    assert RunDir(reference / "whole").status == "done"
    assert "| shards |" not in (reference / "whole" / "checkpoint" / "README.md").read_text()
    assert (reference / "whole" / "report.html").exists()


def test_resumed_run_is_bit_identical(reference: Path) -> None:
    """Stopped by SIGTERM in the middle and resumed, the metrics are those of the run that was left alone."""
    folder = reference / "stopped"

    def stop() -> None:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(InterruptedRun, match="stopped by SIGTERM after step") as stopped:
        train(reference, "stopped")
    thread.join()
    assert stopped.value.exit_code == 143
    assert RunDir(folder).status == "interrupted"
    assert len(curve(folder)) < len(curve(reference / "whole"))
    train(reference, "stopped", resume=str(folder))
    assert curve(folder) == curve(reference / "whole")
    a, b = (
        torch.load(path, weights_only=True) for path in sorted(reference.glob("*/state/step-000012/trainer.pt"))[:2]
    )
    assert a["task"] == b["task"]


def test_second_signal_ends_the_process_at_once() -> None:
    """The first SIGINT is a wish, the second one an end with code 130; tried in a child, which does nothing else."""
    child = os.fork()
    if child == 0:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            if stop.received != signal.SIGINT:
                os._exit(1)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_nan_keeps_the_state_before_and_names_the_rows(tmp_path: Path) -> None:
    """A loss that overflows stops the run; the state before it resumes with its batch passed over."""
    train(tmp_path, "run", "train.steps=3")
    state = torch.load(tmp_path / "run/state/step-000003/trainer.pt", weights_only=True)
    loaded = tiny(tmp_path, "train.steps=6", "train.muon_lr=1e30", "train.warmup_frac=0.0")
    with pytest.raises(AlloyError, match=r"became (NaN|infinite) at step 5 .*step-000005.json.*data.skip_steps=1"):
        run(loaded.recipe, RunOptions(resume=str(tmp_path / "run"), quiet=True, loaded=loaded))
    assert RunDir(tmp_path / "run").status == "failed"
    record = json.loads((tmp_path / "run/nan/step-000005.json").read_text())
    assert len(record["rows_by_rank"][0]) == 3
    assert len(record["rows_by_rank"][0][0]) == 4
    after = torch.load(tmp_path / "run/state/step-000004/trainer.pt", weights_only=True)
    assert after["step"] == 4
    used = after["task"]["mixture"]["counts"][0] - state["task"]["mixture"]["counts"][0]
    assert used == 12


def test_skipped_steps_use_up_their_rows(tmp_path: Path) -> None:
    """data.skip_steps passes over the batches of that many steps, once."""
    train(tmp_path, "run", "train.steps=2")
    train(tmp_path, "run", "train.steps=4", "data.skip_steps=1", resume=str(tmp_path / "run"))
    train(tmp_path, "run", "train.steps=6", "data.skip_steps=1", resume=str(tmp_path / "run"))
    state = torch.load(tmp_path / "run/state/step-000006/trainer.pt", weights_only=True)
    assert state["task"]["mixture"]["counts"] == [12 * 7]


def test_time_limit_ends_the_run_and_shapes_the_schedule(tmp_path: Path) -> None:
    """With train.seconds the rate follows the time that has passed and the run ends with it."""
    train(tmp_path, "run", "train.seconds=1.5", "train.steps=100000", "train.warmup_frac=0.0", "train.decay_frac=1.0")
    lines = [line for line in curve(tmp_path / "run") if "loss" in line]
    rates = [line["lr"] for line in lines]
    assert 3 < len(rates) < 1000
    assert rates == sorted(rates, reverse=True)  # type: ignore[type-var]  # numbers
    assert rates[0] > 1.5e-3 > 5e-4 > rates[-1]  # type: ignore[operator]  # numbers


def test_indivisible_batch_is_refused() -> None:
    """The message has all the factors."""
    with pytest.raises(
        RecipeError,
        match=r"batch_tokens = 100000 is not a multiple of ranks x micro_batch x seq = 8 x 4 x 4096 = 131072\.",
    ):
        micro_batches(100_000, 8, 4, 4096)
    assert micro_batches(262_144, 8, 4, 4096) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "say when the run ends"),
        ({"seconds": 5.0, "warmup_steps": 3}, "with seconds use warmup_frac"),
        ({"steps": 10, "lr": 1e-4, "min_lr": 1e-3}, "is more than lr"),
        ({"steps": 10, "warmup_steps": 6, "decay_steps": 6}, "together are longer than steps = 10"),
    ],
)
def test_impossible_schedules_are_refused(fields: dict[str, float], message: str) -> None:
    """Each clash of fields is named."""
    with pytest.raises(ValueError, match=message):
        TrainTable.model_validate(fields)
