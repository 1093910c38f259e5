"""Parameters are checked when they are made; the message names field and value."""

from typing import Any

import pytest

from alloy.engine.request import SamplingParams
from alloy.errors import RequestError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens = 1.5 is not a whole number"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens = 4 is more than max_tokens = 3"),
        ({"min_tokens": -1}, "min_tokens = -1"),
        ({"n": 0}, "n = 0 must be within 1..1024"),
        ({"n": True}, "n = True is not a whole number"),
        ({"temperature": -0.1}, "temperature = -0.1 must be within 0..100"),
        ({"temperature": float("nan")}, "temperature = nan is not a finite number"),
        ({"temperature": "hot"}, "temperature = 'hot' is not a finite number"),
        ({"top_k": -1}, "top_k = -1 must be at least 0; 0 turns it off"),
        ({"top_p": 0}, r"top_p = 0 is outside \(0, 1\]; 1 turns it off"),
        ({"min_p": 1.1}, "min_p = 1.1 must be within 0..1"),
        ({"presence_penalty": 2.1}, "presence_penalty = 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty = -3"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0 is outside"),
        ({"logit_bias": {5: 101}}, "logit_bias.5. = 101 is outside -100..100"),
        ({"logit_bias": {"5": 1}}, "logit_bias has the key '5'"),
        ({"seed": 2**64}, "seed = 18446744073709551616 does not fit"),
        ({"stop": [""]}, r"stop\[0\] = '' is not a string of at least one character"),
        ({"stop": ["a"] * 17}, "stop has 17 strings; at most 16"),
        ({"stop_token_ids": [-2]}, r"stop_token_ids\[0\] = -2 is not a token id"),
        ({"logprobs": 21}, "logprobs = 21 must be within 0..20"),
        ({"logprobs_of": "all"}, "logprobs_of = .'all',. is unknown"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1"),
        ({"thinking_budget": -1}, "thinking_budget = -1 must be at least 0; None means no limit"),
        ({"grammar": "x"}, "grammar = 'x' is not a Grammar"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    """Each with the field's name and its value."""
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_good_values_are_normalised() -> None:
    """One stop string is a list of one; an equal set of parameters is equal."""
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop_token_ids=[1, 2]) == SamplingParams(stop_token_ids=(1, 2))
    assert SamplingParams(logprobs_of="sampled").logprobs_of == ("sampled",)
    assert SamplingParams(temperature=0, max_tokens=5).plain
    assert not SamplingParams(temperature=0, logit_bias={1: 2}).plain
