"""States on disk: round trip, damage, full disk, how many stay."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alloy.errors import CheckpointError, ResourceError
from alloy.parallel.mesh import World
from alloy.train.checkpoint import latest_state, load_state, replace_folder, save_state

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(17, 3, generator=generator),
        "model.bf16": torch.randn(5, generator=generator).bfloat16(),
        "optimizer.weight/step": torch.tensor(float(seed)),
    }


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    """Tensors of several dtypes and plain values come back as they were."""
    trainer = {
        "step": 3,
        "window": {"loss_max": float("-inf"), "sums": {"loss": 0.1 + 0.2}},
        "rng": [torch.get_rng_state()],
    }
    folder = save_state(tmp_path, 3, tensors(1), trainer, WORLD, keep_last=2)
    empty = {name: torch.zeros_like(value) for name, value in tensors(1).items()}
    got = load_state(folder, empty, WORLD)
    for name, value in tensors(1).items():
        assert torch.equal(empty[name], value)
    assert got["window"] == trainer["window"]
    assert torch.equal(got["rng"][0], trainer["rng"][0])  # type: ignore[index]  # a list of tensors


def test_only_the_last_states_stay(tmp_path: Path) -> None:
    """keep_last counts the new one; `latest` names it; what a killed save left is swept."""
    (tmp_path / ".part-step-000001").mkdir()
    for step in (2, 10, 100):
        save_state(tmp_path, step, tensors(step), {}, WORLD, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000010", "step-000100"]
    assert latest_state(tmp_path) == tmp_path / "step-000100"


def test_half_renamed_state_is_replaced(tmp_path: Path) -> None:
    """A state whose run died before `latest` moved on is written again."""
    save_state(tmp_path, 1, tensors(1), {}, WORLD, keep_last=3)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "rubbish").touch()
    folder = save_state(tmp_path, 2, tensors(2), {}, WORLD, keep_last=3)
    assert not (folder / "rubbish").exists()
    load_state(folder, tensors(1), WORLD)


def test_no_state_is_none(tmp_path: Path) -> None:
    """A new run has no latest state; a pointer to nothing is an error that says what to do."""
    assert latest_state(tmp_path) is None
    (tmp_path / "latest").write_text("step-000009\n")
    with pytest.raises(CheckpointError, match="names step-000009, which is not there"):
        latest_state(tmp_path)
    (tmp_path / "latest").write_bytes(b"step-\xff\n")
    with pytest.raises(CheckpointError, match="which is not there"):
        latest_state(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "unfinished", "digests"])
def test_damage_is_found_on_load(tmp_path: Path, damage: str) -> None:
    """A changed, short or missing file is named before anything is loaded."""
    folder = save_state(tmp_path, 1, tensors(1), {}, WORLD, keep_last=1)
    file = next(folder.glob("*.distcp"))
    data = file.read_bytes()
    if damage == "flip":
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "remove":
        file.unlink()
    elif damage == "digests":
        (folder / "digests.json").write_bytes((folder / "digests.json").read_bytes()[:20])
    else:
        (folder / "digests.json").unlink()
    wanted = {
        "flip": "is not what was written",
        "cut": "is not what was written",
        "remove": "is missing",
        "unfinished": "not complete",
        "digests": "digests.json is not JSON",
    }
    with pytest.raises(CheckpointError, match=wanted[damage]):
        load_state(folder, tensors(1), WORLD)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    """A tensor of another shape is an error, not a silent reshape."""
    folder = save_state(tmp_path, 1, tensors(1), {}, WORLD, keep_last=1)
    other = tensors(1) | {"model.weight": torch.zeros(16, 3)}
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_state(folder, other, WORLD)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 20 kB: what the system says is an OSError in the middle of a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_previous_state(tmp_path: Path, small_files: None) -> None:
    """The message says what to do, the old state loads, and nothing half-written stays."""
    save_state(tmp_path, 1, tensors(1), {}, WORLD, keep_last=2)
    large = {"model.weight": torch.zeros(100_000)}
    with pytest.raises(ResourceError, match="previous state is intact: free space"):
        save_state(tmp_path, 2, large, {}, WORLD, keep_last=2)
    assert latest_state(tmp_path) == tmp_path / "step-000001"
    load_state(tmp_path / "step-000001", tensors(2), WORLD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    """The new folder takes the place of the old one, which goes."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]
