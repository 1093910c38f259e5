"""`alloy data fetch`: pointers into archives -> raw pages."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from alloy.data.document import row_id, set_columns
from alloy.data.pipeline import Place, Stage, StageConfig
from alloy.data.web.fetch import Fetched, Pointer, Server, fetch_pages, open_files
from alloy.data.web.http_body import Limits

# what a page adds to its row; "id" is of the page then
_OF_PAGE = ("fetch_time", "content_mime_type", "http_status", "content_type", "crawl")


class FetchConfig(StageConfig):
    """Where pages are fetched, and how politely."""

    stage: Literal["fetch"] = "fetch"
    base: Annotated[
        str,
        Field(description="Folder or URL that the names of archives start from: http(s), s3 and other fsspec ones."),
    ] = "https://data.commoncrawl.org/"
    connections: Annotated[int, Field(ge=1, le=64, description="Requests at a time, of each worker.")] = 4
    retries: Annotated[int, Field(ge=0, description="After a failure that may pass.")] = 6
    timeout_s: Annotated[float, Field(gt=0, description="Of a connection, and between the pieces of an answer.")] = 60.0
    body_mib: Annotated[int, Field(ge=1, description="Larger pages are marked too_large.")] = 20


class Fetch(Stage[FetchConfig]):
    """The pages that rows point at; rows whose page cannot be had say why in fetch_status."""

    Config = FetchConfig
    needs = ("url", "warc_filename", "warc_record_offset", "warc_record_length")
    statuses = ("fetch_status",)
    batch_rows = 1024

    def start(self, out: Path) -> None:
        """Open the connections."""
        config = self.config
        self.files = open_files(config.base, config.connections, config.retries, config.timeout_s, config.seed)

    def close(self) -> None:
        """Close them."""
        if isinstance(self.files, Server):
            self.files.close()

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """The rows with their pages."""
        places = [table[name].to_pylist() for name in self.needs]
        known = [n for n, pointer in enumerate(zip(*places, strict=True)) if None not in pointer[1:]]
        pointers = [Pointer(places[0][n] or "", *(column[n] for column in places[1:])) for n in known]
        limits = Limits(body_bytes=self.config.body_mib << 20)
        fetched = fetch_pages(pointers, self.files, self.config.connections, limits)
        rows = dict(zip(known, fetched, strict=True))
        none = Fetched(None, "not_in_index", "the row has no pointer into an archive")
        return _with_pages(table, [rows.get(n, none) for n in range(table.num_rows)])


def _with_pages(table: pa.Table, fetched: list[Fetched]) -> pa.Table:
    def column(name: str) -> list[Any]:
        before = table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
        values = [getattr(one.page, name) if one.page else None for one in fetched]
        return [value or old for value, old in zip(values, before, strict=True)]

    pages = [one.page for one in fetched]
    ids = [row_id(p.url, p.warc_filename, p.warc_record_offset) if p else None for p in pages]
    return set_columns(
        table,
        id=[new or old for new, old in zip(ids, table["id"].to_pylist(), strict=True)],
        **{name: column(name) for name in _OF_PAGE},
        binary_content=[page.body if page else None for page in pages],
        fetch_status=[one.status for one in fetched],
        fetch_error=[one.error or None for one in fetched],
    )
