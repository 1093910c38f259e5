"""Blends: refusals, shares within bounds, plans by hand, presets, and what the command prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.blend import (
    PRESETS,
    Blend,
    BlendPhase,
    BlendSource,
    load_blend,
    mixture_phases,
    phase_shares,
    plan_blend,
    refuse_epochs,
)
from alloy.data.shards import write_shard
from alloy.errors import RecipeError
from tests.data.test_data_cli import run


def blend(weights: dict[str, float], phases=(), **options) -> Blend:
    sources = [BlendSource(name=name, path=f"/{name}", weight=weight) for name, weight in weights.items()]
    return Blend(datasets=tuple(sources), phases=tuple(BlendPhase(**phase) for phase in phases), **options)


def test_a_nemotron_file_is_read(tmp_path) -> None:
    """Comments are passed over, missing categories are holes, TOML says the same."""
    data = {
        "_comment": "x",
        "_missing_categories": {"code": {"weight": 14.0, "description": "closed"}},
        "datasets": [
            {"name": "a", "path": "hf://o/a", "subset": "3", "split": "train", "text_field": "t", "weight": 6}
        ],
    }
    (tmp_path / "b.json").write_text(json.dumps(data))
    read = load_blend(tmp_path / "b.json")
    assert [(d.name, d.path, d.text_field, d.weight) for d in read.datasets] == [
        ("a", "hf://o/a", "t", 6.0),
        ("code", None, "text", 14.0),
    ]
    (tmp_path / "b.toml").write_text(
        '[[datasets]]\nname = "a"\npath = "hf://o/a"\n[[phases]]\nname = "p"\ntokens = 7\n'
    )
    assert load_blend(tmp_path / "b.toml").phases[0].tokens == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ('{"datasets": []}', "datasets"),
        ('{"datasets": [{"name": "a", "wieght": 1}]}', r"datasets\[0\]\.wieght|datasets\.0\.wieght"),
        ('{"datasets": [{"name": "a"}, {"name": "a"}]}', "two of one name"),
        ('{"datasets": [{"name": "a"}], "phases": [{"name": "x"}, {"name": "y"}]}', "every phase but the last"),
        ('{"datasets": [{"name": "a"}], "phases": [{"name": "x", "tokens": 2, "ramp": 3}]}', "ramp = 3 is longer"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_blend(tmp_path / "b.json")


def test_weights_that_make_no_sense_are_refused() -> None:
    """Negative, not finite, all zero, unknown names, holes without renormalise."""
    phase = BlendPhase(name="p")
    for weights, message in [
        ({"a": -1.0}, 'weight -1.0 of "a"'),
        ({"a": float("nan")}, "finite and not negative"),
        ({"a": 0.0, "b": 0.0}, "all weights are 0"),
    ]:
        with pytest.raises(RecipeError, match=message):
            phase_shares(blend(weights), phase)
    with pytest.raises(RecipeError, match='phase "p": weight of an unknown source "x"; known: a, b'):
        phase_shares(blend({"a": 1.0, "b": 1.0}), BlendPhase(name="p", weights={"x": 1.0}))
    holes = Blend(datasets=(BlendSource(name="a", path="/a", weight=1.0), BlendSource(name="code", weight=14.0)))
    with pytest.raises(RecipeError, match='missing "code", weight 14'):
        phase_shares(holes, phase)
    assert phase_shares(holes, phase, renormalise=True) == {"a": 1.0, "code": 0.0}
    with pytest.raises(RecipeError, match=r"no such blend file, nor a preset of that name \(nano3, super3, ultra3\)"):
        load_blend("nano4")


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 0.3), st.floats(0.2, 1)), min_size=2, max_size=6))
def test_bounds_equal_a_search_for_the_scale(rows) -> None:
    """Shares are clip(scale * weight, min, max) for the one scale at which they add up to 1, found by bisection."""
    weights, low, high = (np.array(column) for column in zip(*rows, strict=True))
    high = np.maximum(low, high)
    sources = [
        BlendSource(name=str(i), path="/x", weight=w, min_share=lo, max_share=hi)
        for i, (w, lo, hi) in enumerate(zip(weights, low, high, strict=True))
    ]
    made = Blend(datasets=tuple(sources))
    if low.sum() > 1 or high.sum() < 1:
        with pytest.raises(RecipeError, match="1 must lie between"):
            phase_shares(made, BlendPhase(name="p"))
        return
    bottom, top = 0.0, 1e6
    for _ in range(200):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if np.clip(middle * weights, low, high).sum() < 1 else (bottom, middle)
    expected = np.clip(top * weights, low, high)
    np.testing.assert_allclose(list(phase_shares(made, BlendPhase(name="p")).values()), expected, atol=1e-6)


def test_a_plan_by_hand() -> None:
    """Two phases of 1,000 and 500 tokens, a ramp of 100: tokens, epochs that add up, and the cap."""
    phases = [
        {"name": "one", "tokens": 1000},
        {"name": "two", "tokens": 500, "weights": {"a": 1.0, "b": 3.0}, "ramp": 100},
    ]
    made = blend({"a": 3.0, "b": 1.0}, phases)
    lines = plan_blend(made, {"a": 500, "b": None})
    # the ramp takes the mean of both shares: 50 of a, where the phase's own share would be 25
    expected = [("one", "a", 750), ("one", "b", 250), ("two", "a", 100 + 50), ("two", "b", 300 + 50)]
    assert [(line.phase, line.source, line.tokens) for line in lines] == expected
    assert [line.epochs for line in lines] == [1.5, None, pytest.approx(1.8), None]
    # a training that ends in the second phase
    assert [line.tokens for line in plan_blend(made, {}, tokens=1100)] == [750, 250, 50, 50]
    capped = made.model_copy(
        update={"datasets": (made.datasets[0].model_copy(update={"max_epochs": 1.7}), made.datasets[1])}
    )
    with pytest.raises(
        RecipeError, match=r'"a" would be seen 1.80 times by the end of phase "two", above its max_epochs'
    ):
        refuse_epochs(plan_blend(capped, {"a": 500}))
    refuse_epochs(plan_blend(capped, {"a": 500}, tokens=1000))


def test_stretches_for_the_mixture() -> None:
    """Phases end at the nearest row, counted from the start; a ramp is sixteen steps between two shares."""
    phases = [{"name": str(i), "tokens": 105, "weights": {"a": 1.0, "b": float(i)}} for i in range(4)]
    stretches = mixture_phases(blend({"a": 1.0, "b": 1.0}, phases), seq=10)
    assert np.cumsum([rows for rows, _ in stretches]).tolist() == [10, 21, 32, 42]
    assert [shares for _, shares in stretches] == [(1.0, 0.0), (0.5, 0.5), (1 / 3, 2 / 3), (0.25, 0.75)]
    phases[1]["ramp"] = 32
    stretches = mixture_phases(blend({"a": 1.0, "b": 1.0}, phases[:2]), seq=1)
    assert [rows for rows, _ in stretches] == [105, *[2] * 16, 105 - 32]
    np.testing.assert_allclose([shares[1] for _, shares in stretches[1:17]], (np.arange(16) + 0.5) / 32)
    with pytest.raises(RecipeError, match=r"rows of 20 tokens and data.seq is 10; one run has one length"):
        mixture_phases(blend({"a": 1.0}, [{"name": "p", "seq_len": 20}]), seq=10)


@pytest.mark.parametrize("name", sorted(file.stem for file in PRESETS.glob("*.json")))
def test_presets_add_up(name) -> None:
    """Every phase has weights of about 100 percent; nothing is called missing that has a path, and something is."""
    made = load_blend(name)
    for phase in made.phases:
        assert sum((phase.weights or {}).values()) == pytest.approx(100, abs=0.3)
        phase_shares(made, phase, renormalise=True)
    holes = [source for source in made.datasets if source.path is None]
    assert {"code", "academic"} <= {source.name for source in holes} < {source.name for source in made.datasets}


def test_the_command(capsys, tmp_path) -> None:
    """Counts of shards that lie there, a warning for rows that no document fills, exit code 2 above the cap."""
    write_shard(tmp_path / "a", [np.arange(30), np.arange(50)])
    write_shard(tmp_path / "b", [np.arange(20)])
    data = {
        "datasets": [{"name": n, "path": str(tmp_path / n), "weight": 1.0, "max_epochs": 4} for n in "ab"],
        "phases": [{"name": "first", "tokens": 100, "seq_len": 64}, {"name": "second", "tokens": 100}],
    }
    file = tmp_path / "blend.json"
    file.write_text(json.dumps(data))
    code, out, _ = run(capsys, "data", "blend", "check", file, "--phase", 1, "--json")
    assert code == 0
    lines = {line["source"]: line for line in json.loads(out)["lines"]}
    assert (lines["a"]["unique"], lines["a"]["tokens"], lines["b"]["epochs"]) == (80, 50, 2.5)
    assert json.loads(out)["notes"] == [
        'warning: phase "first" has rows of 64 tokens, but no document here has more than 50'
    ]
    code, _, err = run(capsys, "data", "blend", "check", file)
    assert (code, '"b" would be seen 5.00 times by the end of phase "second"' in err) == (2, True)
    assert run(capsys, "data", "blend", "check", file, "--tokens", 120)[0] == 0
    code, _, err = run(capsys, "data", "blend", "check", file, "--phase", "third")
    assert (code, "there are first, second" in err) == (2, True)
    code, out, err = run(capsys, "data", "blend", "check", "super3", "--phase", 2, "--tokens", 5e9, "--renormalise")
    assert (code, 'missing "code"' in err) == (0, True)
    assert Path(PRESETS / "super3.json").exists()
