"""Scores of documents by an encoder with a regression head, such as FineMath's classifier.

`HuggingFaceTB/finemath-classifier` and its kin have one output, trained on grades 0-5 of the first 512 tokens. Long documents
are shown by their middle: the first 512 tokens of the centre 20,000 characters (as NeMo Curator does), of a copy; the row's
own text stays as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alloy.core.device import resolve_device, resolve_dtype
from alloy.core.hub import resolve
from alloy.data.prose import windows
from alloy.data.score import HIGHEST
from alloy.errors import CheckpointError

CENTRE_CHARS = 20_000
MAX_TOKENS = 512

Join = Literal["max", "mean"]


class Classifier:
    """Gives texts scores from 0 to 5.

    Args:
        model: folder or hub id of an `AutoModelForSequenceClassification` with one output
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights
        windows: places of the document that are shown to the model
        join: how their scores become one
        batch_tokens: tokens in a batch, padding included
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        dtype: str = "float32",
        windows: int = 1,
        join: Join = "mean",
        batch_tokens: int = 8192,
    ) -> None:
        self.device, self.windows, self.join, self.batch_tokens = resolve_device(device), windows, join, batch_tokens
        self.model, self.tokenizer = load_encoder(model)
        if self.model.config.num_labels != 1:
            raise CheckpointError(
                f"{model} has {self.model.config.num_labels} outputs, and a score is one; give a regression model such as "
                "HuggingFaceTB/finemath-classifier."
            )
        self.model.to(device=self.device, dtype=resolve_dtype(dtype)).eval()
        self.max_tokens = max_tokens(self.model, self.tokenizer)

    def score(self, texts: Sequence[str]) -> list[float]:
        """A score for each text, in order; 0 for a blank one."""
        pieces = [windows(text, self.windows, CENTRE_CHARS) if text.strip() else [] for text in texts]
        logits = self._logits([piece for group in pieces for piece in group])
        scores = iter(np.clip(logits, 0, HIGHEST).tolist())
        join = max if self.join == "max" else _mean
        return [join([next(scores) for _ in group]) if group else 0.0 for group in pieces]

    def _logits(self, texts: list[str]) -> list[float]:
        import torch

        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        result = np.zeros(len(texts))
        with torch.inference_mode():
            for rows in batches([len(ids) for ids in encoded], self.batch_tokens):
                batch = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
                logits = self.model(**batch.to(self.device)).logits
                result[rows] = logits[:, 0].float().cpu().numpy()
        return result.tolist()


def load_encoder(model: str | Path, **options: Any) -> tuple[Any, Any]:
    """The sequence classifier of a folder or hub id, in float32, and its fast tokenizer; `options` change its config."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        folder = resolve(model)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Or train a scorer of your own with `alloy data train-scorer` and give it as fallback."
        ) from error
    try:
        network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options)
        return network, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{model} cannot be loaded as a sequence classifier: {error}") from error


def max_tokens(model: Any, tokenizer: Any) -> int:
    """Tokens of a text that a model is shown: 512, or what it can take."""
    return min(MAX_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", MAX_TOKENS))


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of texts in batches of like length, the longest first, each with at most `batch_tokens` padded tokens."""
    result: list[list[int]] = []
    # ties by index, so that nothing depends on how texts were sorted before
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= batch_tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
