"""Long trials: random corpora mixed on changing numbers of ranks, stopped and resumed at random."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from alloy.data.mixture import Mixture, Source
from alloy.data.shards import write_shard
from alloy.errors import AlloyError

pytestmark = pytest.mark.soak

TRIALS = 10


def random_sources(r: random.Random, folder: Path) -> list[Source]:
    """Shards of short and long documents; ids count up within a document, and 100 apart between documents."""
    sources = []
    for k in range(r.randint(1, 3)):
        lengths = [r.choice([1, 1, 2, 3, r.randint(1, 60)]) for _ in range(r.randint(1, 25))]
        write_shard(folder / f"s{k}", [np.arange(i * 100, i * 100 + n) for i, n in enumerate(lengths)])
        sources.append(Source(path=str(folder / f"s{k}"), weight=r.choice([1.0, 0.3, 2.0, 1e-3, 0.0 if k else 1.0])))
    return sources


def test_any_stops_and_ranks_give_one_sequence(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """The rows that changing numbers of ranks draw, resumed from any state, are those of one rank; labels stay inside."""
    for seed in range(soak_seed * TRIALS, (soak_seed + soak_count) * TRIALS):
        r = random.Random(seed)
        (folder := tmp_path / str(seed)).mkdir()
        settings = {"seed": seed, "seq": r.randint(2, 40), "pack": r.choice(["concat", "best_fit"])}
        sources, total = random_sources(r, folder), 4 * r.randint(4, 30)
        whole = Mixture(sources, **settings).batch(total)
        known = whole.labels != -100
        assert torch.equal(whole.labels[known], whole.tokens[known] + 1)
        same = (whole.documents[:, 1:] == whole.documents[:, :-1]) & (whole.documents[:, 1:] >= 0)
        assert torch.equal(whole.labels[:, :-1][same], whole.tokens[:, 1:][same])
        assert (whole.labels[whole.documents < 0] == -100).all()
        state, done = Mixture(sources, **settings).state(), 0
        while done < total:
            world = r.choice([1, 2, 4])
            rows = r.randint(1, max(1, (total - done) // world))
            ranks = [Mixture(sources, rank=rank, world=world, **settings) for rank in range(world)]
            for rank, mixture in enumerate(ranks):
                mixture.load_state(state)
                part = mixture.batch(rows)
                for name in ("tokens", "labels", "documents"):
                    expected = getattr(whole, name)[done + rank : done + rows * world : world]
                    assert torch.equal(getattr(part, name)[: len(expected)], expected), (seed, name)
            done += rows * world
            state = ranks[-1].state()
            assert all(mixture.state() == state for mixture in ranks)


def test_damaged_shards(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """A file cut or gone, or a byte of the index changed, is refused, or it is the same corpus."""
    rows = np.random.default_rng(0).integers(2, 40, 20)
    write_shard(tmp_path / "whole", [np.arange(n) for n in rows])
    sound = Mixture([Source(path=str(tmp_path / "whole"))], seed=0, seq=9).batch(9)
    for seed in range(soak_seed * 40, (soak_seed + soak_count) * 40):
        r = random.Random(seed)
        for suffix in ("bin", "idx"):
            (tmp_path / f"spoilt.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes())
        file = tmp_path / f"spoilt.{r.choice(['bin', 'idx', 'idx'])}"
        data = file.read_bytes()
        if file.suffix == ".bin" or r.random() < 0.3:
            file.write_bytes(data[: r.randrange(len(data))])
        else:
            place = r.randrange(len(data))
            file.write_bytes(data[:place] + bytes([data[place] ^ r.randrange(1, 256)]) + data[place + 1 :])
        try:
            batch = Mixture([Source(path=str(tmp_path / "spoilt"))], seed=0, seq=9).batch(9)
        except AlloyError:
            continue
        assert torch.equal(batch.tokens, sound.tokens), seed
