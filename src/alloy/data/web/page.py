"""Text of a page, with its mathematics between dollars, its code between fences and its tables as such."""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from alloy.core.recipe import Config
from alloy.data.web.code import fence
from alloy.data.web.content import Block, MainContent, kept_blocks, uses_dollars
from alloy.data.web.delimiters import DOLLARS, read_configuration, with_dollars
from alloy.data.web.formula import Formula
from alloy.data.web.layout import Layout
from alloy.data.web.macros import closed, expand_macros, read_macros, without_definitions
from alloy.data.web.markup import attributes_of, of_xhtml, split, with_less_than

_ATOM = re.compile(r"\0d?(\d+)\0")
_LINE_END = re.compile(r"(\\)(?=\n|$)")
_TAGS = re.compile(
    r"<(?:!doctype|html|head|body|title|meta|div|p|span|a|table|br|h[1-6]|ul|ol|li|b|i|em|strong|pre|img|script|math)\b",
    re.IGNORECASE,
)
_XML = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*<(?!html|!doctype html)(?:rss|feed|rdf|[\w:.-]+[\s>])",
    re.IGNORECASE | re.DOTALL,
)
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
_MARKUP = re.compile(r"<!--.*?-->|<[?!]?/?[A-Za-z][^<>]*>|<!--|<!\[CDATA\[.*?\]\]>", re.DOTALL)


class RenderOptions(Config):
    """What is kept of a page, and how large it may be."""

    main_content: Annotated[
        MainContent,
        Field(description="off: keep all; safe: drop navigation where it is sure; strict: wherever it is likely."),
    ] = "safe"
    keep_alt: Annotated[bool, Field(description="Keep the texts of images that are no formulas.")] = False
    expand_macros: Annotated[bool, Field(description="Write out macros that the page defines in one line.")] = True
    max_nodes: Annotated[int, Field(ge=1, description="Tags of a page; what stands behind them is left out.")] = (
        2_000_000
    )
    max_depth: Annotated[int, Field(ge=1, description="Blocks inside each other; deeper ones are flattened.")] = 4096
    max_cells: Annotated[int, Field(ge=1, description="Cells of a table; a larger one is not written as a table.")] = (
        200_000
    )


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text of a page and what is in it.

    Attributes:
        type: what the page was.
        carriers: how its formulas were stored, sorted.
        math_lost: formulas that were found but not understood.
        macros: TeX macros that the page defines.
    """

    text: str
    type: Literal["html", "notebook", "text", "xml"]
    n_math: int = 0
    n_code: int = 0
    n_tables: int = 0
    carriers: list[str] = field(default_factory=list[str])
    math_lost: int = 0
    macros: list[str] = field(default_factory=list[str])


DEFAULTS = RenderOptions()


def render_text(text: str, content_type: str = "", url: str = "", options: RenderOptions = DEFAULTS) -> Rendered:
    """Text of a body of any textual type: HTML, a notebook, XML, or plain text, told apart by what they hold."""
    kind = content_type.split(";")[0].strip().lower()
    start = text[:4096].lstrip("\ufeff \t\r\n")
    if start.startswith("{") and '"cells"' in text and '"nbformat"' in text:
        notebook = render_notebook(text, options)
        if notebook is not None:
            return notebook
    if kind in ("text/plain", "text/markdown", "text/x-tex", "application/x-tex", "text/csv", "application/json"):
        return Rendered(_cleaned(text), "text")
    if (
        "html" not in kind
        and ("xml" in kind or "rss" in kind or start.startswith("<?xml"))
        and "<html" not in start.lower()
        and _XML.match(start)
    ):
        return render_xml(text, options)
    if "html" in kind or _TAGS.search(text, 0, 20_000):
        return render_html(of_xhtml(text, is_xml=True) if "xhtml" in kind else text, url, options)
    return Rendered(_cleaned(text), "text")


def render_html(html: str, url: str = "", options: RenderOptions = DEFAULTS) -> Rendered:
    """Text of an HTML page. Raises nothing, whatever the page holds."""
    html = of_xhtml(html)
    parts = split(html, options.max_depth, options.max_nodes)
    tags = [tag for tag in parts[1::2] if tag[:6] == "script" and ">" in tag]
    sources = [attributes_of(tag[: tag.index(">")]).get("src", "") for tag in tags if " src=" in tag]
    has_scripts = any(tag.startswith(('script type="math/', 'script id="MathJax-Element')) for tag in tags)
    scripts = [tag[tag.index(">") + 1 :] for tag in tags if "ath" in tag or "atex" in tag or "acros" in tag]
    scripts = (
        [script for script in scripts if len(script) > 10][:200]
        if not has_scripts
        else [tag[tag.index(">") + 1 :] for tag in tags if 'type="math/' not in tag]
    )
    delimiters = read_configuration(scripts, sources)
    if uses_dollars(url):
        delimiters = replace(delimiters, inline=(*delimiters.inline, DOLLARS), is_loaded=True)
    layout = Layout(parts, with_dollars(delimiters, html), options.keep_alt, options.max_cells, has_scripts)
    layout.read()
    if layout.is_cut and (mended := with_less_than(html)) != html:
        return render_html(mended, url, options)
    if not layout.blocks and "<noscript" in html:
        return render_html(html.replace("<noscript", "<div").replace("</noscript", "</div"), url, options)
    keep = kept_blocks(layout.blocks, layout.nodes, options.main_content)
    return _written([block for block, kept in zip(layout.blocks, keep, strict=True) if kept], layout, scripts, options)


def _written(blocks: list[Block], layout: Layout, scripts: list[str], options: RenderOptions) -> Rendered:
    tex = [atom.tex for atom in layout.atoms if isinstance(atom, Formula)]
    macros = read_macros(tex, scripts) if options.expand_macros and (tex or scripts) else {}
    known = closed(macros) if macros else {}
    carriers: list[str] = []

    def shown(found: re.Match[str]) -> str:
        atom = layout.atoms[int(found[1])]
        if isinstance(atom, str):
            return atom
        tex = expand_macros(without_definitions(atom.tex), known) if macros else atom.tex
        if not tex:
            return ""
        carriers.append(atom.carrier)
        # a backslash at the end of a line is a space, and one before the dollar would escape it
        tex = _LINE_END.sub(r"\1 ", tex) if "\\\n" in tex or tex[-1] == "\\" else tex
        return Formula(tex.replace("\n", " ") if is_indented else tex, atom.display, atom.carrier).text

    is_indented = False
    parts: list[str] = []
    before: Block | None = None
    for block in blocks:
        is_indented = bool(block.prefix) or block.kind == "table"
        text = _ATOM.sub(shown, block.text) if "\0" in block.text and block.kind != "code" else block.text
        text = text if block.kind == "code" else text.strip()
        if not text:
            continue
        if block.kind == "heading":
            text = f"{'#' * block.level} {text}"
        if before is not None:
            is_tight = block.is_tight or (block.marker and before.prefix and before.kind == "text")
            parts.append("\n" if is_tight else "\n\n")
        if block.prefix:
            first = block.prefix[: len(block.prefix) - len(block.marker)] + block.marker
            text = first + text.replace("\n", "\n" + block.prefix)
        parts.append(text)
        before = block
    return Rendered(
        _cleaned("".join(parts)),
        "html",
        len(carriers),
        sum(1 for block in blocks if block.kind == "code"),
        sum(1 for block in blocks if block.kind == "table"),
        sorted(set(carriers)),
        layout.lost,
        sorted(macros),
    )


def render_notebook(text: str, options: RenderOptions = DEFAULTS) -> Rendered | None:
    """Cells of a Jupyter notebook and the texts they put out, code between fences; None: the text is no notebook."""
    try:
        book: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    cells = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(cells, list) or "nbformat" not in book:
        return None
    metadata = book.get("metadata")
    named = metadata.get("language_info", metadata.get("kernelspec")) if isinstance(metadata, dict) else None
    language = str(named.get("name", "")) if isinstance(named, dict) else ""
    parts: list[str] = []
    num_code = 0
    for cell in cells:
        if not isinstance(cell, dict):
            continue
        source = _lines(cell.get("source", cell.get("input"))).strip("\n")
        if cell.get("cell_type") != "code":
            parts.append(source.strip())
            continue
        shown = [fence(source, language)] if source.strip() else []
        outputs = cell.get("outputs")
        for output in outputs if isinstance(outputs, list) else []:
            data = output.get("data") if isinstance(output, dict) else None
            result = _lines(output.get("text") if isinstance(output, dict) else None) or _lines(
                data.get("text/plain") if isinstance(data, dict) else None
            )
            if result.strip():
                shown.append(fence(result.rstrip(), ""))
        num_code += len(shown)
        parts.extend(shown)
    return Rendered(_cleaned("\n\n".join(filter(None, parts))), "notebook", n_code=num_code)


def render_xml(text: str, options: RenderOptions = DEFAULTS) -> Rendered:
    """Text of XML and of feeds; HTML that elements hold escaped or as CDATA is rendered as such."""
    import html as entities

    parts: list[str] = []
    start = 0
    for found in _MARKUP.finditer(text):
        parts.append(_of_xml(entities.unescape(text[start : found.start()]), options))
        data = _CDATA.fullmatch(found[0])
        parts.append(_of_xml(data[1], options) if data else "")
        start = found.end()
    parts.append(_of_xml(entities.unescape(text[start:]), options))
    return Rendered(_cleaned("\n\n".join(filter(None, parts))), "xml")


def _of_xml(text: str, options: RenderOptions) -> str:
    if "<" in text and _TAGS.search(text):
        return render_html(text, "", options.model_copy(update={"main_content": "off"})).text
    return text.strip()


def _lines(value: object) -> str:
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


def _cleaned(text: str) -> str:
    """Without characters that no text file holds."""
    if "\0" in text:
        text = text.replace("\0", "")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.removeprefix("\ufeff")
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.strip("\n")
