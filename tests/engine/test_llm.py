"""Batched generation: the same tokens however a request is computed, and every rule that ends an answer."""

import random

import pytest
import torch

from alloy import errors
from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from alloy.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=13)
TIE = 1e-5


def prompts(count: int, seed: int = 3, longest: int = 19) -> list[list[int]]:
    """Ragged random prompts."""
    r = random.Random(seed)
    return [[r.randrange(256) for _ in range(r.randint(1, longest))] for _ in range(count)]


def same_until_tie(got: list[int], want: list[int], gaps: list[float]) -> bool:
    """Whether two greedy answers agree up to a position where the two best logits are as good as equal."""
    for a, b, gap in zip(got, want, gaps, strict=True):
        if gap < TIE:
            return True
        if a != b:
            return False
    return True


def test_batched_answers_are_those_of_single_passes(model, reference) -> None:
    """11 ragged prompts, 4 at a time, prompts in chunks of 7: the tokens of cacheless greedy decoding."""
    asked = prompts(11)
    outs = LLM(model, max_seqs=4, max_step_tokens=7, speculate=0).generate(asked, GREEDY)
    wide = LLM(model, max_seqs=32, speculate=0).generate(asked, GREEDY)
    for prompt, a, b in zip(asked, outs, wide, strict=True):
        want, gaps = reference(model, prompt, 13)
        assert same_until_tie(a.completions[0].token_ids, want, gaps)
        assert same_until_tie(b.completions[0].token_ids, want, gaps)
        assert a.completions[0].finish_reason == "length"
        assert a.finished
