"""A transformers fast tokenizer from a folder and into one, for data and models alike."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from alloy.core.runs import atomic_write
from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILE = "tokenizer.json"


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast | None":
    """The fast tokenizer of a folder; None when there is no tokenizer.json."""
    file = folder / FILE
    if not file.is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        # the library's own annotations are partial
        return PreTrainedTokenizerFast.from_pretrained(folder)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is cut short or no tokenizer ({type(error).__name__}: {error}). Download or save it again."
        ) from error


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the tokenizer's files, each replaced in one step; tokenizer.json last: without it there is no tokenizer."""
    # beside the system's temporary files: on a full disk the library would fail without a file name
    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)  # pyright: ignore[reportUnknownMemberType]  partial annotations
        for file in sorted(Path(temporary).iterdir(), key=lambda file: (file.name == FILE, file.name)):
            atomic_write(folder / file.name, file.read_bytes())
