"""lm-eval's `local-completions` against the server: every number is the one that the library computes in process."""

import importlib.util
import json
import math
import os
import pydoc_data.topics
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from tests.serve.conftest import serving

TEXTS = [" ".join(text.split()) for text in pydoc_data.topics.topics.values()]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "tiny_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 40},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def documents() -> list[dict[str, Any]]:
    """Sentences of Python's documentation, each with its own end and two of others."""
    draw = random.Random(0)
    sentences = draw.sample([s for t in TEXTS for s in re.split(r"(?<=\.) ", t) if 60 < len(s) < 200], 15)
    # lm-eval counts spaces at the end of a context as part of what follows
    halves = [(s[:cut], s[cut:]) for s in sentences for cut in [s.index(" ", 30)]]
    found: list[dict[str, Any]] = []
    for i, (start, end) in enumerate(halves):
        gold = draw.randrange(3)
        choices = [halves[(i + 1) % 15][1], halves[(i + 2) % 15][1]]
        choices.insert(gold, end)
        found.append({"context": start, "choices": choices, "gold": gold, "text": sentences[i]})
    return found


def evaluate(url: str, tokenizer: Path, folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run lm-eval: its results, and what it noted of each document."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents()))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task, "target_delimiter": ""}))
    model = {
        "model": "tiny", "base_url": f"{url}/v1/completions", "tokenizer_backend": "huggingface",
        "tokenizer": tokenizer, "max_length": 900, "num_concurrent": 4,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
        ",".join(f"{k}={v}" for k, v in model.items()), "--tasks", ",".join(TASKS), "--include_path", str(folder),
        "--output_path", str(folder / "out"), "--log_samples", "--batch_size", "3",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home"), "no_proxy": "*"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]
    samples = {
        name: [json.loads(x) for x in next((folder / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in TASKS
    }
    return results, samples


def likelihood(llm: LLM, context: list[int], text: str) -> float:
    """Log probability of a text behind a context, in process."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    scores = llm.generate([[*context, *llm.encode(text)]], params)[0].prompt_logprobs
    assert scores is not None
    return sum(e.model for e in scores[len(context) :] if e is not None and e.model is not None)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='needs pip install "lm-eval[api]"')
def test_lm_eval_says_what_the_library_computes(tiny_llm: LLM, tmp_path: Path) -> None:
    """Likelihoods of choices and of whole texts to the last bit, and answers to the letter."""
    assert tiny_llm.tokenizer is not None
    tiny_llm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with serving(tiny_llm, tiny_llm.engine()) as site:
        results, samples = evaluate(site.url, tmp_path / "tokenizer", tmp_path)
    alone = LLM(tiny_llm.model, tiny_llm.tokenizer, max_model_len=1000)
    docs = documents()
    right = 0
    for sample in samples["tiny_choice"]:
        doc = docs[sample["doc_id"]]
        want = [likelihood(alone, alone.encode(doc["context"]), choice) for choice in doc["choices"]]
        assert [float(answer[0][0]) for answer in sample["resps"]] == want
        right += want.index(max(want)) == doc["gold"]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / 15, rel=1e-12)
    total = 0.0
    for sample in samples["tiny_rolling"]:
        # lm-eval puts the end of sequence before a text
        want = likelihood(alone, [256], docs[sample["doc_id"]]["text"])
        assert float(sample["resps"][0][0]) == want
        total += want
    size = sum(len(d["text"].encode()) for d in docs)
    assert results["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-12)
    params = SamplingParams(temperature=0, max_tokens=40, stop=["e"])
    for sample in samples["tiny_generate"]:
        want_text = alone.generate(docs[sample["doc_id"]]["context"], params)[0].text
        assert sample["resps"][0][0] == want_text
    assert [len(samples[name]) for name in TASKS] == [15, 15, 15]
