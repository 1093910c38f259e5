"""Where a model or data set called by name lies: a local path, or a download from the Hugging Face hub; its tokenizer."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# "owner/name", what the hub accepts
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name: str | Path) -> Path:
    """Folder or file behind `name`: an existing path, or else a snapshot of the hub repository of that id."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = str(name)
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f'"{text}": no such path, and not a hub id (owner/name). Check the spelling.')

    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]  untyped parameters
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(text))
    except GatedRepoError as error:
        raise CheckpointError(f'"{text}" needs its licence accepted on the hub, then `hf auth login`.') from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f'"{text}": no such path here, and no such repository on the hub.') from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f'"{text}": no such path here, and the hub cannot be reached ({type(error).__name__}). '
            "Download it where there is a network (`hf download`), and give the folder."
        ) from error


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a folder that has a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    try:
        # the library leaves the type of its result open
        return PreTrainedTokenizerFast.from_pretrained(folder)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    # the tokenizers library knows no narrower class for a file it cannot read
    except Exception as error:
        raise CheckpointError(
            f"{folder}: tokenizer.json or tokenizer_config.json is damaged ({error}). Save or download the tokenizer again"
        ) from error
