"""Rows whose pages somebody wants taken down."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pydantic import Field

from alloy.data.pipeline import Place, Stage, StageConfig
from alloy.errors import DataError


class RemoveConfig(StageConfig):
    """Settings of `alloy data remove`."""

    stage: Literal["remove"] = "remove"
    urls: Annotated[Path, Field(description="One a line: a URL, a host, or the beginning of URLs and a *; # comments.")]


class Remove(Stage[RemoveConfig]):
    """Rows without those whose URL is listed (takedowns, robots, opt-outs)."""

    Config = RemoveConfig
    needs = ("url",)
    batch_rows = 4096

    def reads(self) -> list[Path]:
        """The list."""
        file = self.config.urls
        if not file.is_file():
            raise DataError(f"--urls {file}: there is no such file; give one with a URL or host a line.")
        return [file]

    def start(self, out: Path) -> None:
        """Read the list."""
        file = self.config.urls
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        listed = [line for line in lines if line and not line.startswith("#")]
        self.prefixes = tuple(_plain(line[:-1], is_prefix=True) for line in listed if line.endswith("*"))
        whole = [line for line in listed if not line.endswith("*")]
        self.urls = {_plain(line) for line in whole if "/" in line}
        self.hosts = {line.lower() for line in whole if "/" not in line}

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """Rows that stay."""
        keep = [not self.is_listed(url or "") for url in table["url"].to_pylist()]
        self.counts["removed"] += keep.count(False)
        return table.filter(pa.array(keep, pa.bool_()))

    def is_listed(self, url: str) -> bool:
        """Whether a URL is on the list, by itself, by its host or one above it, or by its beginning."""
        plain = _plain(url)
        if plain in self.urls or plain.startswith(self.prefixes):
            return True
        labels = plain.split("/", 1)[0].split(":")[0].split(".")
        return any(".".join(labels[i:]) in self.hosts for i in range(len(labels)))


def _plain(url: str, is_prefix: bool = False) -> str:
    """Without scheme, user, fragment and, but for prefixes, a last slash; host in lower case: what counts as the same page."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
    except ValueError:
        return url
    query = f"?{parts.query}" if parts.query else ""
    path = parts.path if is_prefix else parts.path.rstrip("/")
    return parts.netloc.rpartition("@")[2].lower() + path + query
