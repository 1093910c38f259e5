"""The columns of rows: one schema from a fetched page to a training document; other columns pass through unchanged.

Source: data.md section 2; the names of WARC columns are those of Common Crawl's columnar index.
"""

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from alloy.errors import DataError

# what columns of states say where nothing went wrong
FINE = frozenset(("ok", "kept", "true", "rules", "skipped", "llm", "not_asked"))
STRINGS = pa.list_(pa.string())
# column -> (type, the stage that makes it)
# fmt: off
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "id": (pa.string(), "fetch"), "url": (pa.string(), "seed"), "crawl": (pa.string(), "seed"),
    "fetch_time": (pa.string(), "seed"), "warc_filename": (pa.string(), "seed"),
    "warc_record_offset": (pa.int64(), "seed"), "warc_record_length": (pa.int64(), "seed"),
    "content_mime_type": (pa.string(), "seed"), "http_status": (pa.int32(), "fetch"),
    "fetch_status": (pa.string(), "fetch"), "fetch_error": (pa.string(), "fetch"),
    "binary_content": (pa.large_binary(), "fetch"), "content_type": (pa.string(), "fetch"),
    "encoding": (pa.string(), "render"), "encoding_source": (pa.string(), "render"), "type": (pa.string(), "render"),
    "text": (pa.large_string(), "render"), "n_math": (pa.int32(), "render"), "n_code": (pa.int32(), "render"),
    "n_tables": (pa.int32(), "render"), "math_carriers": (STRINGS, "render"), "math_lost": (pa.int32(), "render"),
    "render_status": (pa.string(), "render"), "render_error": (pa.string(), "render"),
    "cleaned_text": (pa.large_string(), "clean"), "clean_status": (pa.string(), "clean"),
    "clean_model": (pa.string(), "clean"), "clean_prompt_sha": (pa.string(), "clean"),
    "clean_math_kept": (pa.float32(), "clean"), "clean_guard": (pa.string(), "clean"),
    "lang": (pa.string(), "score"), "lang_score": (pa.float32(), "score"), "math_score": (pa.float32(), "score"),
    "finemath_score": (pa.float32(), "score"), "finemath_int_score": (pa.int32(), "score"), "band": (pa.string(), "score"),
    "score_on": (pa.string(), "score"), "score_model": (pa.string(), "score"), "dup_group": (pa.string(), "dedup"), "dup_keep": (pa.bool_(), "dedup"),
    "contaminated_with": (STRINGS, "decontaminate"), "contamination_hits": (pa.int32(), "decontaminate"),
    "n_tokens": (pa.int32(), "score"), "tokenizer": (pa.string(), "score"),
}
# fmt: on


def row_id(url: str, file: str, offset: int) -> str:
    """The id of a page or row: 128 bits of BLAKE2b, hex; the same in every rerun."""
    return hashlib.blake2b(f"{url}\0{file}\0{offset}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def schema_of(names: Sequence[str]) -> pa.Schema:
    """The schema of these columns, in this order."""
    return pa.schema([(name, COLUMNS[name][0]) for name in names])


def require_columns(have: Sequence[str], needs: Sequence[str], stage: str, file: str) -> None:
    """DataError for a missing column: its name, the stage that makes it, and the columns that are there."""
    for name in needs:
        if name not in have:
            maker = f"`alloy data {COLUMNS[name][1]}` makes it" if name in COLUMNS else "no stage makes it"
            raise DataError(f'{file} has no column "{name}", which {stage} needs; {maker}. Columns: {", ".join(have)}.')


def text_column(have: Sequence[str]) -> str:
    """The column that holds the text as it is by now."""
    return "cleaned_text" if "cleaned_text" in have else "text"


def set_columns(table: pa.Table, **columns: object) -> pa.Table:
    """The table with these columns replaced or added at the end; known ones get the type of the schema."""
    for name, values in columns.items():
        known = COLUMNS.get(name)
        column = pa.array(values, type=known[0]) if known else pa.array(values)
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table
