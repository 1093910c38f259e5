"""Long trials: a chain of three stages killed with SIGKILL at random moments ends with the bytes of a run that nobody touched."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.soak

# kills of one trial, at most
KILLS = 3
NUM_PAGES = 150


def write_warc(path: Path, pages: int, seed: int) -> list[str]:
    """Small pages with formulas, one gzip member each; their URLs."""
    r = random.Random(seed)
    urls = []
    with path.open("wb") as file:
        for i in range(pages):
            words = " ".join(
                r.choice(["alpha", "beta", "sum", "proof", "limit"]) + str(r.randint(0, 99)) for _ in range(120)
            )
            body = f"<html><body><h1>Page {i}</h1><p>{words}</p><p>\\(x_{{{i}}}^2 = {r.randint(1, 999)}\\)</p></body></html>"
            http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            urls.append(f"https://kill.example/{i}")
            head = (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {urls[-1]}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
                f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{i:012d}>\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
            ).encode()
            file.write(gzip.compress(head + http + b"\r\n\r\n", mtime=0))
    return urls


def write_recipe(folder: Path) -> Path:
    """Render, clean by rules, deduplicate; parts so small that there are several."""
    path = folder / "chain.toml"
    path.write_text(
        f"""command = "data run"
[executor]
workers = 2
[[stages]]
stage = "render"
input = "{folder}/warc/*.warc.gz"
[[stages]]
stage = "clean"
[[stages]]
stage = "dedup"
"""
    )
    return path


def command(recipe: Path, run: Path) -> list[str]:
    """What a user types again after an interruption."""
    return [
        sys.executable,
        "-m",
        "alloy",
        "data",
        "run",
        str(recipe),
        "--run-dir",
        str(run),
        "--resume",
        "auto",
        "--quiet",
    ]


def results(run: Path) -> dict[str, bytes]:
    """Every row that any stage wrote, and the data set."""
    files = [*run.glob("0*/part-*"), *run.glob("dataset/**/*.parquet")]
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(files)}


def test_killed_chains_end_as_if_nobody_had_killed_them(soak_count: int, soak_seed: int, tmp_path: Path) -> None:
    """Half as many trials as asked for (100 of 200), each with up to three kills."""
    (tmp_path / "warc").mkdir()
    urls = [url for k in range(3) for url in write_warc(tmp_path / "warc" / f"{k}.warc.gz", NUM_PAGES, seed=k)]
    recipe = write_recipe(tmp_path)
    start = time.monotonic()
    subprocess.run(command(recipe, tmp_path / "whole"), check=True)
    duration = time.monotonic() - start
    expected = results(tmp_path / "whole")
    rendered = pq.read_table(tmp_path / "whole" / "01-render")
    assert rendered["url"].to_pylist() == urls
    assert set(rendered["render_status"].to_pylist()) == {"ok"}
    r = random.Random(soak_seed)
    killed_at: list[str] = []
    for trial in range(max(1, soak_count // 2)):
        run = tmp_path / f"trial{trial}"
        for _ in range(r.randint(1, KILLS)):
            process = subprocess.Popen(command(recipe, run), start_new_session=True)
            try:
                process.wait(r.uniform(0.3, duration))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done = [len(list(run.glob(f"0{stage}-*/_done/*"))) for stage in (1, 2, 3)]
                killed_at.append(":".join(map(str, done)))
                continue
            assert process.returncode == 0, (trial, killed_at[-3:])
            break
        subprocess.run(command(recipe, run), check=True)
        assert results(run) == expected, (trial, killed_at[-3:])
        manifest = json.loads((run / "03-dedup" / "_manifest.json").read_text())
        assert manifest["rows_in"] == len(urls)
        assert not list(run.rglob(".*.tmp"))
    # a trial that is never killed in the middle shows nothing
    assert killed_at
