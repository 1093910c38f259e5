"""Pages to text: quality and speed of alloy's renderers and of the peers, on the same pages.

    python benchmarks/extraction.py --expected DIR [--repeats 20] [--peer-python PATH] [--out FILE] [--only NAME ...]

DIR is a folder of truth (`alloy data eval-extract`). Each extractor runs in a process of its own, on one core: once over the
set to write its texts, which are measured as `alloy data eval-extract` does, then `repeats` times over the set for the clock
(slow peers fewer times; the JSON says how often). Start-up and imports are not counted. Ours reads and decodes the pages out
of the WARC file each time; the peers are given characters, decoded as the page's truth says. Rates are pages and bytes by
total seconds. Peers live in an environment of their own, of which PATH is the Python:

    pip install trafilatura resiliparse justext inscriptis html2text markdownify html-to-markdown

OpenWebMath's extractor needs resiliparse 0.14: `--only OpenWebMath --peer-python` another one's, with the folder text_extraction of
its checkout in PYTHONPATH.
"""

import argparse
import datetime as dt
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# bytes, Content-Type, address, characters -> text; ours take the bytes, peers the characters
Extract = Callable[[bytes, str, str, str], str]

LYNX = "lynx -dump -stdin -nolist -width=10000 -assume_charset=utf-8 -display_charset=utf-8 -localhost -force_html"
COLUMNS = ("eq", "eq_delim", "eq_macro", "eq_delim_macro", "code_exact", "prose", "boilerplate", "length")


class Page(NamedTuple):
    """A page of the set, as `Extract` takes it."""

    name: str
    body: bytes
    kind: str
    url: str
    text: str


class Extractor(NamedTuple):
    """How to make one, the package that says its version, and the most passes that the clock gets."""

    make: Callable[[], Extract]
    package: str
    most_repeats: int = 1_000


def ours(name: str) -> Callable[[], Extract]:
    """A renderer of alloy by name."""

    def make() -> Extract:
        render = importlib.import_module("alloy.data.web.renderers").find_renderer(name)
        return lambda body, kind, url, text: render(body, kind, url)

    return make


def program(command: str) -> Callable[[], Extract]:
    """A process a page, characters in and out."""

    def make() -> Extract:
        arguments = command.split()
        if shutil.which(arguments[0]) is None:
            raise ModuleNotFoundError(arguments[0])

        def run(body: bytes, kind: str, url: str, text: str) -> str:
            page = text.replace("\0", "\ufffd").encode("utf-8-sig", "replace")
            return subprocess.run(arguments, input=page, capture_output=True, timeout=60).stdout.decode(
                "utf-8", "replace"
            )

        return run

    return make


def peer(module: str, call: Callable[[Any, str], str | None]) -> Callable[[], Extract]:
    """A function of an imported module, given the characters."""

    def make() -> Extract:
        imported = importlib.import_module(module)
        return lambda body, kind, url, text: call(imported, text) or ""

    return make


def justext_text(module: Any, text: str) -> str:
    """Its good paragraphs."""
    paragraphs = module.justext(text.encode(), module.get_stoplist("English"), encoding="utf-8")
    return "\n\n".join(paragraph.text for paragraph in paragraphs if not paragraph.is_boilerplate)


def html2text_text(module: Any, text: str) -> str:
    """Without wrapping lines."""
    converter = module.HTML2Text()
    converter.body_width = 0
    return converter.handle(text)


def html_to_markdown_text(module: Any, text: str) -> str:
    """Its newer versions return the text in a record."""
    result = module.convert(text)
    return result if isinstance(result, str) else result.content


def openwebmath_text(module: Any, text: str) -> str:
    """With the likelier choice of each of its random settings (extract_from_cc/configs/randomized_all.yaml)."""
    switches = ("markdown_headings", "markdown_code", "remove_buttons", "remove_image_figures", "remove_link_clusters")
    result = module.extract_text(
        text,
        {
            **dict.fromkeys((*switches, "remove_chinese", "remove_edit_buttons", "extract_latex"), True),
            "boilerplate_config": {
                "ratio_threshold": 0.18,
                "absolute_threshold": 10,
                "end_threshold": 15,
                "enable": True,
            },
            "table_config": {"min_rows": 2, "min_cols": 3, "format": "plain"},
        },
    )
    return result[0] if result else ""


EXTRACTORS = {
    "alloy dom": Extractor(ours("dom"), "alloy-lm"),
    "alloy dom+lynx": Extractor(ours("dom+lynx"), "alloy-lm", 3),
    "alloy lynx": Extractor(ours("lynx"), "alloy-lm", 3),
    "lynx": Extractor(program(LYNX), "", 3),
    "resiliparse all text + alt": Extractor(
        peer(
            "resiliparse.extract.html2text",
            lambda m, t: m.extract_plain_text(t, preserve_formatting=True, main_content=False, alt_texts=True),
        ),
        "resiliparse",
    ),
    "resiliparse main content": Extractor(
        peer(
            "resiliparse.extract.html2text",
            lambda m, t: m.extract_plain_text(t, preserve_formatting=True, main_content=True, alt_texts=True),
        ),
        "resiliparse",
    ),
    "OpenWebMath": Extractor(peer("text_extract.extract", openwebmath_text), "resiliparse", 2),
    "trafilatura txt": Extractor(peer("trafilatura", lambda m, t: m.extract(t, output_format="txt")), "trafilatura", 2),
    "trafilatura markdown, recall": Extractor(
        peer("trafilatura", lambda m, t: m.extract(t, output_format="markdown", favor_recall=True)), "trafilatura", 2
    ),
    "jusText": Extractor(peer("justext", justext_text), "justext", 2),
    "inscriptis + alt": Extractor(
        peer("inscriptis", lambda m, t: m.get_text(t, m.model.config.ParserConfig(display_images=True))),
        "inscriptis",
        5,
    ),
    "html2text": Extractor(peer("html2text", html2text_text), "html2text", 3),
    "markdownify": Extractor(peer("markdownify", lambda m, t: m.markdownify(t)), "markdownify", 2),
    "html-to-markdown": Extractor(peer("html_to_markdown", html_to_markdown_text), "html-to-markdown"),
    "pandoc": Extractor(program("pandoc -f html -t markdown --wrap=none"), "", 1),
}


def pages(folder: Path) -> Iterator[Page]:
    """Name, bytes, Content-Type, address and characters of each page; needs the standard library alone."""
    for line in (folder / "expected.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        body = (folder / "pages" / row["page"]).read_bytes()
        text = body.decode(row.get("encoding") or "utf-8", "replace")
        yield Page(row["page"], body, row.get("content_type", "text/html"), row.get("url", ""), text)


def from_warc(folder: Path) -> Iterator[Page]:
    """The same out of the archive, without decoding."""
    warc = importlib.import_module("fastwarc.warc")
    with (folder / "pages.warc.gz").open("rb") as stream:
        for record in warc.ArchiveIterator(stream, record_types=warc.WarcRecordType.response, parse_http=True):
            kind = record.http_headers.get("Content-Type", "") if record.http_headers else ""
            yield Page("", record.reader.read(), kind, record.headers["WARC-Target-URI"], "")


def drive(name: str, folder: Path, outputs: Path, repeats: int) -> dict[str, Any]:
    """Run one extractor in this process: its texts into `outputs`, its times and memory as the result."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    extractor = EXTRACTORS[name]
    try:
        extract = extractor.make()
    except ModuleNotFoundError as error:
        return {"name": name, "status": f"not installed: {error}"}
    page_list = list(pages(folder))
    failures: dict[str, str] = {}
    for page in page_list:
        try:
            text = extract(*page[1:])
        # what a peer raises on a page is a result of the measurement
        except Exception as error:
            text, failures[page.name] = "", f"{type(error).__name__}: {error}"[:200]
        (outputs / f"{page.name}.txt").write_text(text, "utf-8", "replace")
    if len(failures) == len(page_list):
        return {"name": name, "status": f"failed on every page: {failures[page_list[0].name]}"}
    warc = name.startswith("alloy") and (folder / "pages.warc.gz").exists()
    repeats = min(repeats, extractor.most_repeats)
    times: list[list[float]] = []
    wall, processor = time.perf_counter(), cpu_seconds()
    for _ in range(repeats):
        source = from_warc(folder) if warc else iter(page_list)
        spans: list[float] = []
        last = time.perf_counter()
        for page in source:
            if page.name not in failures:
                extract(*page[1:])
            now = time.perf_counter()
            spans.append(now - last)
            last = now
        times.append(spans)
    wall, processor = time.perf_counter() - wall, cpu_seconds() - processor
    # of each page the middle of its passes, so that another process does not make a page slow
    typical = sorted(statistics.median(spans) for spans in zip(*times, strict=True))
    count, size = repeats * len(page_list), repeats * sum(len(page.body) for page in page_list)
    try:
        version = importlib.metadata.version(extractor.package) if extractor.package else ""
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {
        "name": name,
        "status": "ok",
        "version": version,
        "repeats": repeats,
        "reads_warc": warc,
        "failures": failures,
        "wall_s": wall,
        "cpu_s": processor,
        "pages_per_s": count / wall,
        "pages_per_cpu_s": count / processor,
        "mb_per_s": size / wall / 1e6,
        "p50_ms": 1e3 * statistics.median(typical),
        "p95_ms": 1e3 * typical[min(len(typical) - 1, int(0.95 * len(typical)))],
        "slowest_ms": 1e3 * typical[-1],
        "peak_mb": peak_mb(),
    }


def cpu_seconds() -> float:
    """Of this process and those it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_mb() -> float:
    """Of this process or, if it is more, of a program it ran; without what was before it in the process's place."""
    status = Path("/proc/self/status").read_text()
    own = int(status.partition("VmHWM:")[2].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def measure(name: str, folder: Path, repeats: int, python: str) -> dict[str, Any]:
    """One extractor in a process of its own, and the quality of its texts."""
    from alloy.data.web.extraction import evaluate_outputs

    with tempfile.TemporaryDirectory() as outputs:
        command = [python, __file__, "--drive", name, "--expected", str(folder), "--outputs", outputs]
        done = subprocess.run([*command, "--repeats", str(repeats)], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"name": name, "status": f"failed: {last}"}
        result = json.loads(done.stdout.splitlines()[-1])
        if result["status"] == "ok":
            evaluation = evaluate_outputs(folder, outputs)
            result |= {"quality": evaluation.summary(), "by_carrier": evaluation.rows("carrier")}
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["extractor", *COLUMNS, "pages/s", "pages/CPU s", "MB/s", "p50 ms", "p95 ms", "slowest ms", "peak MB"]
    lines = [heads, ["---"] * len(heads)]
    for result in results:
        name = f"{result['name']} {result.get('version', '')}".strip()
        if result["status"] != "ok":
            lines.append([name, result["status"], *[""] * (len(heads) - 2)])
            continue
        quality = [result["quality"][column] for column in COLUMNS]
        cells = ["" if value is None else f"{value:.2f}" if value < 3 else f"{value:.1f}" for value in quality]
        keys = ("pages_per_s", "pages_per_cpu_s", "mb_per_s", "p50_ms", "p95_ms", "slowest_ms", "peak_mb")
        lines.append(
            [name, *cells, *(f"{result[key]:.3g}" if result[key] < 100 else f"{result[key]:.0f}" for key in keys)]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor_name() -> str:
    """As Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return found[0].partition(":")[2].strip() if found else platform.processor()


def main() -> None:
    """Measure and print; with --drive, be the one that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expected", type=Path, required=True, help="folder of truth")
    parser.add_argument("--repeats", type=int, default=20, help="passes over the set")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has the peers")
    parser.add_argument("--only", nargs="*", choices=list(EXTRACTORS), metavar="NAME", help="these extractors")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--drive", choices=list(EXTRACTORS), help=argparse.SUPPRESS)
    parser.add_argument("--outputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        sys.stdout.write(json.dumps(drive(options.drive, options.expected, options.outputs, options.repeats)) + "\n")
        return
    results: list[dict[str, Any]] = []
    for name in options.only or EXTRACTORS:
        python = sys.executable if name.startswith("alloy") else options.peer_python
        results.append(measure(name, options.expected, options.repeats, python))
        sys.stderr.write(f"{name}: {results[-1]['status']}\n")
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "lynx": subprocess.run(["lynx", "-version"], capture_output=True, text=True).stdout.split("\n")[0]
        if shutil.which("lynx")
        else None,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "repeats": options.repeats,
    }
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
