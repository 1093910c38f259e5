"""What stages that ask a model share: their settings, the server they may start, and what they say of the cost."""

import os
import re
import signal
import subprocess
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import pyarrow as pa
from pydantic import Field, model_validator

from alloy.core.generator import Generated, HttpGenerator, Patience, Prompt, Sampling, Spent, TextGenerator
from alloy.core.logging import get_logger
from alloy.data.chunks import Chunk, Count, counter, split
from alloy.data.clean import normalise
from alloy.data.document import row_id
from alloy.data.executors import Report
from alloy.data.pipeline import Job, Place, Stage, StageConfig
from alloy.data.prompts import load_prompt
from alloy.errors import DataError, RecipeError

log = get_logger(__name__)

ANSWERS, ADDRESS = "answers.db", "server"
_SPENT = ("answers", "cached", "retries", "prompt_tokens", "completion_tokens")


class LlmConfig(StageConfig):
    """Settings of every stage that asks a model."""

    FREE = (
        *StageConfig.FREE, "endpoint", "server", "max_in_flight", "max_retries", "timeout_s", "total_s", "backoff_s", "cache",
        "trace", "usd_in", "usd_out",
    )  # fmt: skip

    endpoint: Annotated[
        str | None, Field(description="Address of an OpenAI-compatible server; its key is in ALLOY_API_KEY.")
    ] = None
    server: Annotated[
        Literal["auto"] | None, Field(description="auto: start `alloy serve` with the checkpoint that --model names.")
    ] = None
    model: Annotated[str | None, Field(description="As the server calls it; default: the first that it lists.")] = None
    column: Annotated[
        str | None, Field(description="Column that holds the text; default: what is there of cleaned_text and text.")
    ] = None
    chunk_tokens: Annotated[int, Field(ge=1, description="Longest piece of a text asked about at once.")] = 5000
    tokenizer: Annotated[
        str | None, Field(description="Folder of the model's tokenizer; default: four characters are a token.")
    ] = None
    temperature: Annotated[float, Field(ge=0, description="Of sampling.")] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1, description="Of sampling.")] = 0.8
    top_k: Annotated[int, Field(ge=0, description="Of sampling; 0: all tokens, and not sent.")] = 20
    max_tokens: Annotated[int | None, Field(ge=1, description="Of an answer; default: fits the chunks.")] = None
    max_in_flight: Annotated[int, Field(ge=1, description="Requests under way at most, of each worker.")] = 32
    max_retries: Annotated[int, Field(ge=0, description="Of one request; then its row is marked.")] = 5
    timeout_s: Annotated[float, Field(gt=0, description="For one request.")] = 300.0
    total_s: Annotated[float, Field(gt=0, description="For one request with all its retries.")] = 1200.0
    backoff_s: Annotated[float, Field(gt=0, description="Before the first retry; doubled for each further one.")] = 1.0
    cache: Annotated[
        Path | None, Field(description="File of finished answers, which are not asked for again; default: in --out.")
    ] = None
    trace: Annotated[Path | None, Field(description="File to which requests and answers are appended.")] = None
    usd_in: Annotated[float, Field(ge=0, description="USD for a million tokens read.")] = 0.0
    usd_out: Annotated[float, Field(ge=0, description="USD for a million tokens written.")] = 0.0

    @property
    def asks(self) -> bool:
        """Whether a model is needed at all."""
        return True

    @model_validator(mode="after")
    def check_server(self) -> Self:
        if self.endpoint and self.server:
            raise ValueError(f'endpoint = "{self.endpoint}" and server = "{self.server}" exclude each other; give one')
        if self.asks and not (self.endpoint or self.server):
            raise ValueError(
                "a model is asked, but there is neither an endpoint nor a server; set endpoint to the address of an "
                "OpenAI-compatible server, or server to auto and model to a checkpoint"
            )
        if self.server and not self.model:
            raise ValueError("server = auto serves a checkpoint, but model names none; set it to a folder or hub id")
        return self

    def sampling(self, tokens: int) -> Sampling:
        """How answers are drawn; `tokens` is their limit where `max_tokens` sets none."""
        return Sampling(self.temperature, self.top_p, self.top_k, max_tokens=self.max_tokens or tokens, seed=self.seed)


ConfigT = TypeVar("ConfigT", bound=LlmConfig)


class LlmStage(Stage[ConfigT]):
    """A stage with a model: `ask` answers prompts in order and books what they cost."""

    batch_rows = 1024
    # the columns whose text is taken, the first that is there
    columns: ClassVar[tuple[str, ...]] = ("cleaned_text", "text")

    def __init__(self, config: ConfigT, generator: TextGenerator | None = None) -> None:
        """With a `generator`, such as one that holds a model in this process, no server is talked to."""
        super().__init__(config)
        self.generator = generator
        self.count: Count = counter(None)

    @property
    def model(self) -> str | None:
        """Its name; None where none is asked."""
        return self.generator.model if self.generator else None

    def prepare(self, job: Job) -> None:
        """Start the server, where there is to be one."""
        if not (self.config.asks and self.config.server):
            return
        if job.executor.kind in ("ray", "array"):
            raise RecipeError(
                f"server = auto does not work with executor.kind = {job.executor.kind}, whose workers are on other "
                "machines; start `alloy serve` yourself and set endpoint."
            )
        assert self.config.model, "checked with the settings"
        self._stop, address = start_server(self.config.model)
        # a run that fails ends it, too
        weakref.finalize(self, self._stop)
        job.work.mkdir(parents=True, exist_ok=True)
        (job.work / ADDRESS).write_text(address)

    def start(self, out: Path) -> None:
        """Meet the model."""
        config = self.config
        self.count = counter(config.tokenizer)
        if not config.asks or self.generator is not None:
            return
        address = (out / "_work" / ADDRESS).read_text() if config.server else config.endpoint
        assert address, "checked with the settings"
        patience = Patience(
            config.max_in_flight, config.max_retries, config.timeout_s, config.total_s, config.backoff_s
        )
        cache = config.cache or out / "_work" / ANSWERS
        model = None if config.server else config.model
        self.generator = HttpGenerator(address, model, patience, cache, config.trace)

    def ask(self, prompts: Sequence[Prompt]) -> list[Generated]:
        """Answers in order."""
        if not prompts:
            return []
        assert self.generator is not None, "start has met it"
        before, failures = _figures(self.generator.spent), Counter(self.generator.spent.failures)
        answers = self.generator.generate(prompts)
        after = _figures(self.generator.spent)
        self.counts.update({f"llm_{name}": after[name] - before[name] for name in _SPENT})
        lost = self.generator.spent.failures - failures
        self.counts.update({f"llm_failed={kind}": number for kind, number in lost.items()})
        return answers

    def texts(self, table: pa.Table) -> list[str]:
        """The text of each row."""
        named = (self.config.column,) if self.config.column else self.columns
        column = next((name for name in named if name in table.column_names), None)
        if column is None:
            raise DataError(
                f"{self.config.stage}: there is no column {' or '.join(named)}; set column to the one that holds the text: "
                f"{', '.join(table.column_names)}."
            )
        return [text or "" for text in table[column].to_pylist()]

    def chunks(self, texts: Sequence[str]) -> tuple[list[Chunk], list[int], list[int]]:
        """Chunks of all texts, the text that each is of, and its number there."""
        found = [(chunk, i, n) for i, text in enumerate(texts) for n, chunk in enumerate(self.split(text))]
        return [chunk for chunk, _, _ in found], [i for _, i, _ in found], [n for _, _, n in found]

    def split(self, text: str, max_tokens: int | None = None) -> list[Chunk]:
        """The chunks of a text."""
        return split(normalise(text), max_tokens or self.config.chunk_tokens, self.count)

    def made_of(self, table: pa.Table, rows: Sequence[dict[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
        """New rows with the columns of those that they came from (`row` of each), but for bodies and former texts."""
        gone = {"binary_content", "cleaned_text", self.config.column, *types}
        places = pa.array([row["row"] for row in rows], pa.int64())
        kept = {name: table[name].take(places) for name in table.column_names if name not in gone}
        return pa.table(kept | {name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})

    def finish(self, job: Job, reports: Sequence[Report]) -> dict[str, Any]:
        """End the server; the cost."""
        if self.config.server and self.config.asks:
            self._stop()
        return {"cost": cost(reports, self.config.usd_in, self.config.usd_out)} if self.config.asks else {}


def cost(reports: Sequence[Report], usd_in: float, usd_out: float) -> dict[str, Any]:
    """What answers have cost, from the counts of the parts: tokens, their rate per second of a worker, pages, USD."""
    counts = Counter[str]()
    for report in reports:
        counts.update(report.get("counts", {}))
    figures = {name: counts[f"llm_{name}"] for name in _SPENT}
    spent = Spent(prompt_tokens=figures["prompt_tokens"], completion_tokens=figures["completion_tokens"])
    seconds = sum(report.get("wall_s", 0.0) for report in reports)
    rows = sum(report.get("rows_in", 0) for report in reports)
    tokens = spent.prompt_tokens + spent.completion_tokens
    return {
        **figures,
        "failed": sum(number for name, number in counts.items() if name.startswith("llm_failed=")),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else 0.0,
        "pages_per_s": round(rows / seconds, 3) if seconds else 0.0,
        **({"usd": round(spent.price(usd_in, usd_out), 4)} if usd_in or usd_out else {}),
    }


def start_server(checkpoint: str, *arguments: str) -> tuple[Callable[[], None], str]:
    """`alloy serve CHECKPOINT` as a process beside this one, at a free port; (what ends it, its address)."""
    command = [sys.executable, "-m", "alloy", "serve", checkpoint, "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_end_with_parent
    )
    assert process.stderr is not None
    stop = partial(_end, process)
    said: list[str] = []
    for line in process.stderr:
        said.append(line.strip())
        if found := re.search(r"http://\S+:\d+", line):
            # what it says later must not fill the pipe
            Thread(target=deque, args=(process.stderr, 0), daemon=True).start()
            return stop, found[0]
    stop()
    raise RecipeError(f"`alloy serve {checkpoint}` ended before it served: {said[-1] if said else 'it said nothing'}")


def row_ids(table: pa.Table, place: Place) -> list[str]:
    """Ids of the rows, or where they have none, such as are made of their places."""
    if "id" in table.column_names:
        return [str(value) for value in table["id"].to_pylist()]
    return [row_id("", f"part-{place.part}", place.row + i) for i in range(table.num_rows)]


def check_prompt(name: str) -> str:
    """For validators: `name`, if there is such a prompt."""
    try:
        load_prompt(name)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return name


def _figures(spent: Spent) -> dict[str, int]:
    return {name: getattr(spent, name) for name in _SPENT}


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """In the child, before it is `alloy`: end when the parent is gone, however it went (Linux)."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
