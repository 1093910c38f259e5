"""Long trials: one answer is the same token for token however it was computed (serving.md section 0.2)."""

import random
from dataclasses import replace

import pytest

from alloy.bench.exactness import NAMES, matrix, tie_or_difference
from alloy.bench.tiny import MODELS, build
from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams

PROMPTS = 12


def params_of(r: random.Random) -> SamplingParams:
    """Random rules, half of the time plain greedy."""
    params = SamplingParams(temperature=0, max_tokens=r.randint(1, 40))
    if r.random() < 0.5:
        return params
    return replace(
        params,
        temperature=r.choice([0, 0.5, 1.0]),
        top_k=r.choice([0, 1, 7]),
        top_p=r.choice([1.0, 0.7]),
        repetition_penalty=r.choice([1.0, 1.3]),
        frequency_penalty=r.choice([0.0, 0.5]),
        min_tokens=r.randint(0, params.max_tokens or 0),
        stop_token_ids=[r.randrange(256) for _ in range(8)],
        seed=r.randrange(1000),
        n=r.choice([1, 3]),
    )


def trial(seed: int) -> tuple[int, int]:
    """One random model and workload, alone and in random company: (answers, answers that differ after a tie)."""
    r = random.Random(seed)
    name = r.choice([*MODELS, "mtp", "mtp"])
    model = build(name, seed)
    prompts = [[r.randrange(256) for _ in range(r.randint(1, 60))] for _ in range(PROMPTS)]
    rules = [params_of(r) for _ in prompts]
    alone = LLM(model, max_seqs=3, speculate=0, prefix_cache=False)
    want = [alone.generate([p], q)[0] for p, q in zip(prompts, rules, strict=True)]
    seqs = r.randint(1, 16)
    company = LLM(
        model,
        max_seqs=seqs,
        max_step_tokens=r.choice([5, 33, 512]),
        speculate=r.choice([0, 1, 4, "auto"]) if model.has_mtp else 0,
        prefix_cache=r.random() < 0.8,
        checkpoint_every=r.choice([13, 1024]),
    )
    if r.random() < 0.5:
        # sequences are put back, snapshots and blocks go
        blocks, extra = r.randint(4, 12), r.randint(0, 6)
        company._new_pool = lambda: model.new_paged_cache(seqs + extra, blocks, company.max_model_len)
    answers = ties = 0
    # the second time much of it is found in the cache
    found = company.generate(prompts, rules) + company.generate(prompts, rules)
    for prompt, a, b in zip(prompts * 2, want * 2, found, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            answers += 1
            if x.token_ids == y.token_ids:
                assert (x.finish_reason, x.stop_reason) == (y.finish_reason, y.stop_reason)
                continue
            is_tie, words = tie_or_difference(model, prompt, x.token_ids, y.token_ids)
            assert is_tie, f"seed {seed}, {name}: {words}"
            ties += 1
    return answers, ties


@pytest.mark.soak
def test_answers_do_not_depend_on_company(soak_count: int, soak_seed: int) -> None:
    """Random models, prompts, rules, batch sizes, chunks, drafts, hits and preemption; ties are counted and printed."""
    counts = [trial(seed) for seed in range(soak_seed, soak_seed + soak_count)]
    answers, ties = (sum(c) for c in zip(*counts, strict=True))
    print(f"{answers} answers, {ties} differ after a tie")  # noqa: T201
    assert ties <= max(1, answers // 200)


@pytest.mark.soak
def test_every_way_gives_what_one_plain_pass_gives(soak_count: int, soak_seed: int) -> None:
    """The matrix of `benchmarks/exactness.py`, one family of models per trial."""
    seeds = range(soak_seed, soak_seed + soak_count)
    cells = [cell for seed in seeds for cell in matrix(72, seed, models=2, families=[[*NAMES][seed % len(NAMES)]])]
    answers, ties = sum(cell.answers for cell in cells), sum(len(cell.ties) for cell in cells)
    print(f"{answers} answers, {ties} have ties")  # noqa: T201
    assert [line for cell in cells for line in [*cell.differing, *cell.missing]] == []
    assert ties <= max(2, answers // 200)
