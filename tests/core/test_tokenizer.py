"""Tokenizer folders: round trip, and a disk that is full."""

import errno
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from alloy.core.tokenizer import load_tokenizer, save_tokenizer
from alloy.errors import ResourceError


def tiny() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def test_round_trip(tmp_path: Path) -> None:
    """A folder that does not exist yet is made; nothing but the tokenizer's files stays."""
    assert load_tokenizer(tmp_path) is None
    save_tokenizer(tiny(), tmp_path / "new")
    found = load_tokenizer(tmp_path / "new")
    assert found is not None
    assert found.get_vocab() == {"a": 0, "b": 1}
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is named, the code is 3, and no half of a tokenizer stays."""

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceError, match=r"tokenizer_config\.json: the disk is full") as caught:
        save_tokenizer(tiny(), tmp_path)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())
