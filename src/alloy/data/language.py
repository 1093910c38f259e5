"""The language of a document, from its prose alone: formulas, code, addresses and tables look like no language or like English.

The default model comes with py3langid (langid.py, Lui and Baldwin, 2012: naive Bayes over byte n-grams; 140 languages). A
model file of fastText (lid.176.bin or .ftz: Joulin et al., 2016, arXiv:1607.01759) takes its place where one is given.
Both are deterministic and may be used by several threads.
"""

from pathlib import Path
from typing import Any

from alloy.core.device import require
from alloy.data.prose import prose, windows
from alloy.errors import CheckpointError

# English as MegaMath's first stage takes it
THRESHOLD = 0.65
# what is shown to the model: characters, from as many places
SAMPLE_CHARS, SAMPLE_PLACES = 1500, 3
# fewer letters are no evidence
FEWEST_LETTERS = 8
UNKNOWN = ("und", 0.0)


def sample(text: str) -> str:
    """Prose of several places of the text, whitespace collapsed, at most about `SAMPLE_CHARS` characters."""
    return " ".join(windows(" ".join(prose(text).split()), SAMPLE_PLACES, SAMPLE_CHARS))


class LanguageIdentifier:
    """Says which language a text is in.

    Args:
        model: a fastText model file; None: the model that py3langid brings
    """

    def __init__(self, model: Path | None = None) -> None:
        self._fasttext: Any = None
        self._bayes: Any = None
        if model is None:
            langid = require("py3langid.langid", extra="data", why="languages are told")
            self._bayes = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
            return
        if not model.is_file():
            raise CheckpointError(f"{model}: no such file; give a fastText model such as lid.176.bin, or none at all.")
        try:
            self._fasttext = require("fasttext", extra="lid", why=f"{model} is read").load_model(str(model))
        except ValueError as error:
            raise CheckpointError(f"{model} cannot be read as a fastText model: {error}") from error

    def identify(self, text: str) -> tuple[str, float]:
        """Language code (ISO 639, as the model has it) and probability; ("und", 0.0) where there is too little prose."""
        shown = sample(text)
        # all capitals are seldom seen in training
        shown = shown.lower() if shown.isupper() else shown
        if sum(map(str.isalpha, shown)) < FEWEST_LETTERS:
            return UNKNOWN
        if self._fasttext is None:
            return self._bayes.classify(shown)
        # a list: for one text fastText 0.9 makes an array in a way that NumPy 2 refuses
        labels, scores = self._fasttext.predict([shown])
        return labels[0][0].removeprefix("__label__"), min(1.0, float(scores[0][0]))
