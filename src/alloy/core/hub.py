"""Where a model or data set called by name lies: a local path, or a download from the Hugging Face hub."""

import importlib.util
import re
from pathlib import Path

from alloy.errors import CheckpointError, DataError

# "owner/name", what the hub accepts
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def text_path(path: str) -> Path:
    """A path to text; "package:NAME" is the folder of an installed Python package, text that every machine has."""
    if not path.startswith("package:"):
        return Path(path)
    name, _, rest = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f'path "{path}": there is no such Python package here')
    return Path(next(iter(spec.submodule_search_locations))) / rest


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
