"""Where a prompt goes: to a replica that knows the beginning of it, within a bound on the load."""

import random

import pytest

from alloy.engine.request import Request, SamplingParams
from alloy.serve.affinity import BOUND, RUN, Affinity


def request_of(tokens: list[int], salt: str = "") -> Request:
    return Request(id="prompt-1", token_ids=tokens, params=SamplingParams(), salt=salt)


def run_of(seed: int, runs: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(runs * RUN)]


def test_a_prompt_goes_where_most_of_it_is_known() -> None:
    affinity = Affinity(seed=0)
    idle = {"a": 0, "b": 0, "c": 0}
    system, talk = run_of(1, 2), run_of(2, 3)
    affinity.note(request_of(system), "a")
    affinity.note(request_of(system + talk), "b")

    def chosen(tokens: list[int], salt: str = "") -> set[str | None]:
        return {affinity.choose(request_of(tokens, salt), idle) for _ in range(100)}

    assert chosen([*system, *talk, 7]) == {"b"}
    # less than a run in common, or another tenant
    assert chosen(system[: RUN - 1]) == {"a", "b", "c"}
    assert chosen(system + talk, salt="other") == {"a", "b", "c"}
    # as much is known in two places: the less loaded
    assert affinity.choose(request_of(system + run_of(3, 1)), {"a": 1, "b": 0, "c": 0}) == "b"
    assert affinity.choose(request_of(system + run_of(3, 1)), {"a": 0, "b": 1, "c": 0}) == "a"
    affinity.keep({"a", "c"})
    assert chosen(system + talk) == {"a"}
    assert affinity.choose(request_of(system), {}) is None


def test_a_replica_with_too_much_to_do_is_passed_over() -> None:
    affinity = Affinity(seed=0)
    prompt = request_of(run_of(1, 4))
    affinity.note(prompt, "a")
    # the bound is BOUND times the mean with this request, rounded up: 1.5 * 7 / 2 -> 6
    assert BOUND == 1.5
    assert affinity.choose(prompt, {"a": 5, "b": 1}) == "a"
    assert affinity.choose(prompt, {"a": 6, "b": 0}) == "b"


def test_many_requests_of_one_prefix_stay_within_the_bound() -> None:
    affinity = Affinity(seed=0)
    loads = dict.fromkeys("abcd", 0)
    for i in range(400):
        prompt = request_of([*run_of(1, 2), i])
        name = affinity.choose(prompt, loads)
        assert name is not None
        affinity.note(prompt, name)
        loads[name] += 1
        assert loads[name] <= BOUND * sum(loads.values()) / 4 + 1


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently sent goes first."""
    monkeypatch.setattr("alloy.serve.affinity.MOST_RUNS", 5)
    affinity = Affinity(seed=0)
    old, new = run_of(1, 3), run_of(2, 4)
    affinity.note(request_of(old), "a")
    affinity.note(request_of(new), "a")
    idle = {"a": 1, "b": 0}
    assert affinity.choose(request_of(new), idle) == "a"
    assert affinity.choose(request_of(old), idle) == "b"
