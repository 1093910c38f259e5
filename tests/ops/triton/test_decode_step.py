"""A whole decode step of a model on Triton's kernels, as a captured graph runs it, against one pass in plain PyTorch."""

import math

import pytest
import torch

from alloy.models.paged import StaticView
from alloy.ops import use_backend
from tests.models.zoo import build, random_tokens

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["dense", "windowed", "puzzle", "nas"])
def test_steps_over_a_buffer_of_slots(device: torch.device, name: str) -> None:
    """Two rows among padding rows; slots and blocks of nobody hold NaN before and after."""
    model, tokens = build(name), random_tokens(2, 9)
    with torch.inference_mode():
        whole = model(tokens).logits.to(device)
        model, tokens = model.to(device), tokens.to(device)
        pool = model.new_paged_cache(slots=4, blocks=5, max_tokens=40)
        for tensor in (*pool.arenas, pool.states.ssm, pool.states.conv):
            tensor.fill_(math.nan)
        rows = pool.open(2)
        with use_backend("torch"):
            model(tokens[:, :6], cache=pool.view(rows))
        view = StaticView(pool, torch.tensor([-1, rows[1], rows[0], -1], dtype=torch.int32, device=device))
        for step in range(6, 9):
            pool.reserve(rows, 1)
            given = torch.zeros(4, 1, dtype=torch.int64, device=device)
            given[[2, 1]] = tokens[:, step : step + 1]
            with use_backend("triton"):
                logits = model(given, cache=view).logits
            pool.count(rows, 1)
            torch.testing.assert_close(logits[[2, 1], 0], whole[:, step], atol=1e-4, rtol=0)
    idle = [slot for slot in range(4) if slot not in rows]
    assert pool.states.ssm[idle].isnan().all()
    assert pool.states.conv[idle].isnan().all()
    assert pool.lengths[[*rows, *idle, -1]].tolist() == [9, 9, 0, 0, 0]
    for arena in pool.arenas:
        assert arena[:, 0].isnan().all()
