"""A MoE hybrid with multi-token prediction on random documents: small, and with everything that training has to get right."""

import json
from pathlib import Path

import numpy as np

from alloy.core.recipe import LoadedRecipe, RunOptions, RunResult, load_recipe, run
from alloy.data.shards import write_shard

RECIPE = """
command = "pretrain"
seed = 3

[model]
kind = "nemotron_h"
vocab = 61
hidden = 24
pattern = "ME*"
tie_embeddings = true
num_heads = 3
num_kv_heads = 1
head_dim = 8
ssm_heads = 3
ssm_head_dim = 8
ssm_state = 5
ssm_groups = 1
chunk = 8
num_experts = 5
top_k = 2
expert_ffn = 12
shared_ffn = 16
mtp_depths = 1
mtp_pattern = "*E"

[data]
seq = 21
validation = 0.1
sources = [{ path = "SHARDS", weight = 1.0 }]

[train]
steps = 12
batch_tokens = 252
micro_batch = 4
lr = 2e-3
muon_lr = 0.01
save_every = 5
eval_every = 5
mtp_rows = 0.5

[log]
every = 1
"""


def write_recipe(folder: Path) -> Path:
    """A recipe and its shards: 60 documents of 2 to 40 tokens, each counting upwards from a random start."""
    generator = np.random.default_rng(5)
    documents = [
        (start + np.arange(length)) % 61 for start, length in generator.integers((0, 2), (61, 41), size=(60, 2))
    ]
    write_shard(folder / "shards", documents)
    path = folder / "tiny.toml"
    path.write_text(RECIPE.replace("SHARDS", str(folder / "shards")))
    return path


def train(folder: Path, run_dir: str, *overrides: str, resume: str | None = None) -> RunResult:
    """Run the recipe in `folder` in this process."""
    loaded = tiny(folder, *overrides)
    options = RunOptions(run_dir=None if resume else folder / run_dir, resume=resume, quiet=True, loaded=loaded)
    return run(loaded.recipe, options)


def tiny(folder: Path, *overrides: str) -> LoadedRecipe:
    """The recipe in `folder`, written if it is not there."""
    path = folder / "tiny.toml"
    if not path.exists():
        write_recipe(folder)
    return load_recipe(path, overrides)


# what depends on the clock or the machine
CLOCK = ("time", "elapsed_s", "tokens_per_s", "memory_bytes", "mfu")


def curve(run_dir: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def losses(run_dir: Path) -> list[float]:
    """All parts of the training loss, step after step."""
    return [float(value) for line in curve(run_dir) for name, value in line.items() if name.endswith("loss")]  # type: ignore[arg-type]
