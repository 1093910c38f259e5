"""A stage for tests of the pipeline, in a module of its own because workers import it."""

import os
import signal
import time
from pathlib import Path
from typing import Literal

import pyarrow as pa

from alloy.data.document import set_columns
from alloy.data.pipeline import STAGES, Job, Place, Stage, StageConfig
from alloy.errors import DataError


class ShoutConfig(StageConfig):
    """Settings of it."""

    stage: Literal["shout"] = "shout"
    times: int = 1
    # the worker kills itself at this text, once if a file of this name can be made
    die_at: str = "-"
    die_once: str = ""
    refuse_at: str = "-"
    slow_s: float = 0.0


class Shout(Stage[ShoutConfig]):
    """Upper case."""

    Config = ShoutConfig
    needs = ("text",)
    statuses = ("clean_status",)
    batch_rows = 7

    def prepare(self, job: Job) -> None:
        """Count the rows of all parts."""
        lengths = job.map("lengths", Lengths())
        job.work.mkdir(exist_ok=True)
        (job.work / "total").write_text(str(sum(report["rows_in"] for report in lengths)))

    def start(self, out: Path) -> None:
        """Read what was counted."""
        self.total = int((out / "_work" / "total").read_text())

    def run(self, table: pa.Table, place: Place) -> pa.Table:
        """Shout."""
        texts = table["text"].to_pylist()
        if self.config.die_at in texts and not (self.config.die_once and Path(self.config.die_once).exists()):
            if self.config.die_once:
                Path(self.config.die_once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.config.refuse_at in texts:
            raise DataError(f"cannot shout {self.config.refuse_at}")
        time.sleep(self.config.slow_s)
        self.counts["letters"] += sum(map(len, texts))
        return set_columns(
            table,
            cleaned_text=[text.upper() * self.config.times for text in texts],
            clean_status=["empty" if not text else "ok" for text in texts],
            place=[f"{place.part}:{place.row + i} of {self.total}" for i in range(len(texts))],
        )


class Lengths:
    """Work that stores nothing."""

    def start(self) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing to give back."""

    def run(self, part, tick):
        """Rows of a part."""
        from alloy.data.parts import read_part

        return {"rows_in": sum(table.num_rows for table in read_part(part, 100))}


if "shout" not in STAGES:
    STAGES.add("shout", Shout)
