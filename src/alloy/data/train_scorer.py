"""Training a scorer of one's own: where grades come from, how hosts are kept apart, what is reported.

Pages of one host look alike, so that a scorer tested on hosts it was trained on is tested on what it knows by heart. Whole
hosts go to training or to the test, and rows without a host are refused.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

import alloy
from alloy.core.recipe import Config
from alloy.core.report import Curves, Table, write_report
from alloy.core.runs import atomic_write
from alloy.data.classifier import Classifier, batches, load_encoder, max_tokens
from alloy.data.prose import windows
from alloy.data.score import HIGHEST, int_score
from alloy.data.scorer import BITS, CENTRE_CHARS, FACTS_FILE, LinearScorer, features, fit_linear, read_facts
from alloy.data.stages.remove import Remove, RemoveConfig
from alloy.errors import CheckpointError, DataError, RecipeError

Grades = NDArray[np.float64]


class ScorerConfig(Config):
    """How a scorer is trained."""

    backend: Annotated[Literal["linear", "encoder"], Field(description="Hashed words, or a transformers encoder.")] = (
        "linear"
    )
    model: Annotated[str | None, Field(description="Folder or hub id of the encoder to begin with.")] = None
    test_share: Annotated[float, Field(gt=0, lt=1, description="Of the rows, in hosts of their own.")] = 0.1
    seed: Annotated[int, Field(description="Of the split, and of the encoder's head and batches.")] = 0
    bits: Annotated[int, Field(ge=8, le=26, description="Linear: log2 of the number of hashed places.")] = BITS
    decay: Annotated[float, Field(gt=0, description="Linear: weight of the squared length of the weights.")] = 0.3
    epochs: Annotated[int, Field(ge=1, description="Encoder: passes over the training rows.")] = 3
    lr: Annotated[float, Field(gt=0, description="Encoder: highest learning rate, after a tenth of the steps.")] = 5e-5
    batch_tokens: Annotated[int, Field(ge=1, description="Encoder: tokens in a batch, padding included.")] = 8192
    device: Annotated[str, Field(description="Encoder: auto, cpu, cuda, ...")] = "auto"


class Scorer(Protocol):
    """What gives texts scores from 0 to 5."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """A score for each text, in order."""
        ...


def load_scorer(folder: Path, device: str = "auto") -> Scorer:
    """The scorer that `train_scorer` left in a folder."""
    kind = read_facts(folder).get("kind")
    if kind == "linear":
        return LinearScorer.load(folder)
    if kind == "encoder":
        return Classifier(folder, device=device)
    raise CheckpointError(
        f'{folder / FACTS_FILE}: kind = "{kind}" is neither linear nor encoder; train the scorer again.'
    )


def train_scorer(
    texts: Sequence[str], grades: Sequence[float], groups: Sequence[str], config: ScorerConfig, out: Path
) -> dict[str, Any]:
    """Train on some hosts, measure on the others, and leave the scorer, `scorer.json` and `report.html` in a folder.

    Args:
        texts: of the documents
        grades: 0 to 5
        groups: the host of each document, or what else must not be on both sides
        config: how
        out: folder to write

    Returns:
        what `scorer.json` says: settings, counts, figures of the test hosts
    """
    if config.backend == "encoder" and config.model is None:
        raise RecipeError(
            "backend = encoder needs a model to begin with; give a folder or hub id, or take backend = linear."
        )
    wanted = np.asarray(grades, np.float64)
    outside = np.flatnonzero(~((wanted >= 0) & (wanted <= HIGHEST)))
    if len(outside):
        raise DataError(
            f"grade {grades[outside[0]]} of row {outside[0]} is not within 0 to {HIGHEST}; mend the labels."
        )
    is_test = split_groups(groups, config.test_share, config.seed)
    train, test = np.flatnonzero(~is_test).tolist(), np.flatnonzero(is_test).tolist()
    if len(np.unique(wanted[train])) < 2:
        raise DataError(
            f"all {len(train)} training rows have the grade {wanted[train[0]]}; nothing can be learned from one."
        )
    started = time.monotonic()
    scorer: Scorer
    if config.backend == "linear":
        rows = [features(texts[row], config.bits) for row in train]
        scorer = fit_linear(rows, wanted[train].tolist(), config.bits, config.decay)
        scorer.save(out)
    else:
        scorer = fit_encoder([texts[row] for row in train], wanted[train].tolist(), config, out)
    trained = time.monotonic()
    scores = np.asarray(scorer.score([texts[row] for row in test]))
    facts: dict[str, Any] = {
        "version": 1,
        "kind": config.backend,
        "alloy": alloy.__version__,
        "settings": config.model_dump(mode="json"),
        "train": {"rows": len(train), "hosts": len({groups[row] for row in train})},
        "test": {"rows": len(test), "hosts": len({groups[row] for row in test}), **measure(wanted[test], scores)},
    }
    atomic_write(out / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
    _write_report(out, facts, wanted[test], scores, trained - started)
    return facts


def split_groups(groups: Sequence[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are for the test: whole groups, in an order that the seed draws, up to a share of the rows.

    A group that would exceed the share is left to training; where all would, the smallest one is the test.
    """
    names, members = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f'all rows are of "{names[0] if len(names) else ""}": a scorer must not be tested on the host it was trained on. '
            "Give rows of at least two hosts."
        )
    sizes = np.bincount(members)
    most = max(1.0, share * len(members))
    chosen = np.zeros(len(names), bool)
    for index in sorted(range(len(names)), key=lambda index: _draw(names[index], seed)):
        if sizes[chosen].sum() + sizes[index] <= most:
            chosen[index] = True
    if not chosen.any():
        chosen[int(np.argmin(sizes))] = True
    return chosen[members]


def host_of(url: str | None) -> str:
    """The host of an address, without "www."; DataError where there is none."""
    try:
        host = urlsplit(url or "").hostname
    except ValueError:
        host = None
    if not host:
        raise DataError(
            f'url = "{url or ""}" names no host, and rows are split by host; fill it in, or name another column as group.'
        )
    return host.removeprefix("www.")


def grades_of_urls(urls: Sequence[str], good: Path, bad: Path | None = None) -> list[float | None]:
    """5 for addresses of the good list, 0 for those of the bad; None for the others, or 0 if there is no bad list.

    The lists are files as `alloy data remove` takes them: a URL, a host or the beginning of URLs and a * in each line.
    """
    lists = [Remove(RemoveConfig(urls=file)) for file in (good, bad) if file is not None]
    for entries in lists:
        entries.start(good.parent)
    grades: list[float | None] = []
    for url in urls:
        is_good, *is_bad = [entries.is_listed(url) for entries in lists]
        if is_good and any(is_bad):
            raise DataError(
                f"{url} is in the good list, {good}, and in the bad one, {bad}; take it out of one of them."
            )
        grades.append(float(HIGHEST) if is_good else None if is_bad == [False] else 0.0)
    return grades


def measure(grades: Grades, scores: Grades) -> dict[str, float | None]:
    """Figures of scores against grades, both (documents,): precision, recall and F1 of whole scores >= 3, Spearman, errors."""
    found = np.array([int_score(score) >= 3 for score in scores])
    wanted = np.array([int_score(grade) >= 3 for grade in grades])
    both = int((found & wanted).sum())
    precision = both / found.sum() if found.any() else None
    recall = both / wanted.sum() if wanted.any() else None
    f1 = 2 * both / (found.sum() + wanted.sum()) if found.any() or wanted.any() else None
    bins = calibration(grades, scores)
    return {
        "precision": precision,
        "recall": recall,
        "f1": None if f1 is None else float(f1),
        "share": float(wanted.mean()),
        "spearman": spearman(grades, scores),
        "mae": float(np.abs(grades - scores).mean()),
        "calibration_error": sum(count * abs(score - grade) for score, grade, count in bins) / len(grades),
    }


def calibration(grades: Grades, scores: Grades) -> list[tuple[float, float, int]]:
    """Mean score, mean grade and number of documents of each tenth of 0..5 that has any; both (documents,)."""
    bins = np.minimum((scores / HIGHEST * 10).astype(int), 9)
    return [
        (float(scores[bins == index].mean()), float(grades[bins == index].mean()), int((bins == index).sum()))
        for index in np.unique(bins)
    ]


def spearman(left: ArrayLike, right: ArrayLike) -> float | None:
    """Rank correlation of two lists of values (documents,), ties at their mean rank; None where one list is constant."""
    ranks = [_ranks(np.asarray(values)) for values in (left, right)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum()) * float((centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / scale if scale else None


def fit_encoder(texts: Sequence[str], grades: Sequence[float], config: ScorerConfig, out: Path) -> Classifier:
    """Fine-tune a whole encoder with one output on the squared error of the grades, and save it in transformers' format.

    AdamW, the rate warmed up over a tenth of the steps and then falling to 0; the output begins at the mean grade.
    """
    import torch

    from alloy.core.device import resolve_device, seed_everything

    seed_everything(config.seed)
    device = resolve_device(config.device)
    assert config.model is not None, "train_scorer checks"
    model, tokenizer = load_encoder(config.model, num_labels=1, problem_type="regression", ignore_mismatched_sizes=True)
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1]
    if heads and heads[-1].bias is not None:
        torch.nn.init.constant_(heads[-1].bias, float(np.mean(grades)))
    model.to(device).train()
    shown = [windows(text, 1, CENTRE_CHARS)[0] for text in texts]
    encoded = tokenizer(shown, truncation=True, max_length=max_tokens(model, tokenizer))["input_ids"]
    groups = batches([len(ids) for ids in encoded], config.batch_tokens)
    steps = config.epochs * len(groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for index in torch.randperm(len(groups), generator=generator).tolist():
            rows = groups[index]
            batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt").to(device)
            wanted = torch.tensor([grades[row] for row in rows], device=device)
            loss = torch.nn.functional.mse_loss(model(**batch).logits[:, 0].float(), wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Classifier(out, device=config.device, batch_tokens=config.batch_tokens)


def _draw(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, members, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[members]


def _write_report(out: Path, facts: dict[str, Any], grades: Grades, scores: Grades, seconds: float) -> None:
    bins = calibration(grades, scores)
    series = {
        "mean grade": ([score for score, _, _ in bins], [grade for _, grade, _ in bins]),
        "as it should be": ([0.0, float(HIGHEST)], [0.0, float(HIGHEST)]),
    }
    counts = np.zeros((HIGHEST + 1, HIGHEST + 1), int)
    np.add.at(counts, ([int_score(grade) for grade in grades], [int_score(score) for score in scores]), 1)
    test = facts["test"]
    figures = [[name, value] for name, value in test.items()]
    write_report(
        out / "report.html",
        f"scorer {out.name}",
        [
            Curves("calibration on hosts that were not trained on", series, smooth=False, x="score"),
            Table("figures of the test hosts", ["figure", "value"], figures),
            Table(
                "documents by grade (rows) and whole score",
                ["grade", *map(str, range(HIGHEST + 1))],
                [[grade, *map(int, counts[grade])] for grade in range(HIGHEST + 1)],
            ),
        ],
        {"training": f"{facts['train']['rows']:,} rows of {facts['train']['hosts']:,} hosts, {seconds:.1f} s"},
    )
