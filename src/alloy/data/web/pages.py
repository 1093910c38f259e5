"""Pages of WARC and HTML files as rows."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from alloy.data.document import row_id, schema_of
from alloy.data.parts import HTML_SUFFIXES, Losses, Part
from alloy.data.web.warc import Damage, Page, is_warc, read_warc
from alloy.errors import DataError

PAGE_COLUMNS = (
    "id", "url", "crawl", "fetch_time", "warc_filename", "warc_record_offset", "warc_record_length", "content_mime_type",
    "http_status", "content_type", "binary_content", "fetch_status", "fetch_error",
)  # fmt: skip
SCHEMA = schema_of(PAGE_COLUMNS)
# of a table; large pages make short tables
TABLE_BYTES = 16 << 20
TYPES = {".ipynb": "application/json", ".xml": "application/xml", ".xhtml": "application/xhtml+xml"}


def page_tables(part: Part, rows: int, losses: Losses) -> Iterator[pa.Table]:
    """The pages of a part in order, at least one table; damage and records that are no pages go to `losses`."""
    held: list[dict[str, Any]] = []
    size = 0
    is_first = True
    for row in _html_rows(part) if part.files[0].endswith(HTML_SUFFIXES) else _warc_rows(part, losses):
        held.append(row)
        size += len(row["binary_content"])
        if len(held) == rows or size >= TABLE_BYTES:
            yield pa.Table.from_pylist(held, schema=SCHEMA)
            held, size, is_first = [], 0, False
    if held or is_first:
        yield pa.Table.from_pylist(held, schema=SCHEMA)


def _html_rows(part: Part) -> Iterator[dict[str, Any]]:
    for name in part.files:
        file = Path(name)
        kind = TYPES.get(file.suffix, "")
        body = file.read_bytes()
        if is_warc(body):
            raise DataError(f"{file} is a WARC file, not HTML; rename it to .warc, or .warc.gz if it is compressed.")
        yield {
            "id": row_id(name, "", 0),
            "url": name,
            "content_type": kind,
            "content_mime_type": kind or "text/html",
            "binary_content": body,
            "fetch_status": "ok",
        }


def _warc_rows(part: Part, losses: Losses) -> Iterator[dict[str, Any]]:
    file = part.files[0]
    skipped: Counter[str] = Counter()
    for item in read_warc(file, part.start, part.stop, skipped=skipped):
        if isinstance(item, Damage):
            losses.add(item.kind, file, item.offset, item.message)
        else:
            yield _row(item)
    losses.counts.update({f"{kind} record": number for kind, number in skipped.items()})


def _row(page: Page) -> dict[str, Any]:
    return {
        "id": page.id,
        "url": page.url,
        "crawl": page.crawl,
        "fetch_time": page.fetch_time,
        "warc_filename": page.warc_filename,
        "warc_record_offset": page.warc_record_offset,
        "warc_record_length": page.warc_record_length,
        "content_mime_type": page.content_mime_type,
        "http_status": page.http_status,
        "content_type": page.content_type,
        "binary_content": page.body,
        "fetch_status": page.status,
        "fetch_error": page.error or None,
    }
