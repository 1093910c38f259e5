"""Pages to text, with mathematics, code and tables kept."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from alloy.core.guard import CallError, Guard
from alloy.data.document import set_columns
from alloy.data.pipeline import Place, Stage, StageConfig
from alloy.data.web.page import RenderOptions

MADE = (
    "encoding", "encoding_source", "type", "text", "n_math", "n_code", "n_tables", "math_carriers", "math_lost",
    "render_status", "render_error",
)  # fmt: skip
NOTHING: dict[str, Any] = {"text": "", "n_math": 0, "n_code": 0, "n_tables": 0, "math_carriers": [], "math_lost": 0}


class RenderConfig(StageConfig, RenderOptions):
    """Settings of `alloy data render`."""

    stage: Literal["render"] = "render"
    renderer: Annotated[
        Literal["dom", "lynx", "dom+lynx"],
        Field(description="dom; lynx as in the CC-Math paper; dom+lynx: formulas from the DOM, the rest by lynx."),
    ] = "dom"
    timeout_s: Annotated[float, Field(gt=0, description="Of a page.")] = 5.0
    memory_mib: Annotated[int, Field(ge=256, description="Of the process that renders.")] = 2048
    keep_html: Annotated[bool, Field(description="Keep the page beside its text.")] = False


class Render(Stage[RenderConfig]):
    """Pages (WARC, HTML files, or rows with binary_content) to text with mathematics as LaTeX, code and tables kept."""

    Config = RenderConfig
    needs = ("binary_content",)
    statuses = ("render_status",)
    # a page may have 20 MiB
    batch_rows = 64
    reads_pages = True

    def start(self, out: Path) -> None:
        """Start the process that pages are rendered in."""
        config = self.config
        # lynx has a time limit of its own, 20 s as in the paper
        seconds = config.timeout_s if config.renderer == "dom" else config.timeout_s + 20.0
        self._guard = Guard("alloy.data.stages.render:render_page", seconds, config.memory_mib << 20)

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """One text a page; a page that cannot be rendered has a status that says why."""
        columns = {name: _strings(table, name) for name in ("content_type", "url", "fetch_status")}
        made = [
            self._render(body.as_py(), *row)
            for body, *row in zip(table["binary_content"], *columns.values(), strict=True)
        ]
        result = set_columns(table, **{name: [row.get(name) for row in made] for name in MADE})
        return result if self.config.keep_html else result.drop_columns("binary_content")

    def close(self) -> None:
        """End the process."""
        self._guard.close()

    def _render(self, body: bytes | None, content_type: str, url: str, fetched: str) -> dict[str, Any]:
        if fetched in ("too_large", "decode_error"):
            return {**NOTHING, "render_status": fetched, "render_error": "the page was not read whole"}
        if not body:
            return {**NOTHING, "render_status": "empty", "render_error": "no content"}
        try:
            row = self._guard(body, content_type, url, self.config)
        except CallError as error:
            status = "parse_error" if error.kind == "error" else error.kind
            return {**NOTHING, "render_status": status, "render_error": str(error)}
        return {"render_status": "ok" if row["text"] else "empty", "render_error": None, **row}


def render_page(body: bytes, content_type: str, url: str, config: RenderConfig) -> dict[str, Any]:
    """The columns that come of one page."""
    from alloy.data.web.decode import decode
    from alloy.data.web.page import render_text

    decoded = decode(body, content_type)
    if config.renderer != "dom":
        from alloy.data.web.renderers import find_renderer

        text = find_renderer(config.renderer)(body, content_type, url)
        known = {"type": "html", "encoding": decoded.encoding, "encoding_source": decoded.source}
        return {**NOTHING, **known, "text": text}
    page = render_text(decoded.text, content_type, url, config)
    return {
        "type": page.type,
        "encoding": decoded.encoding,
        "encoding_source": decoded.source,
        "text": page.text,
        "n_math": page.n_math,
        "n_code": page.n_code,
        "n_tables": page.n_tables,
        "math_carriers": page.carriers,
        "math_lost": page.math_lost,
    }


def _strings(table: pa.Table, name: str) -> list[str]:
    if name not in table.column_names:
        return [""] * table.num_rows
    return [value or "" for value in table[name].to_pylist()]
