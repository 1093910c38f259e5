"""Long trials of `alloy serve` as a process over loopback: clients that vanish, and four times what it can answer."""

import asyncio
import json
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import pytest

import alloy
from tests.cli.test_serve import running
from tests.engine.conftest import build, byte_tokenizer
from tests.serve.test_process import engine_of

# of one soak count, 200 in a full run: 10,000 clients, a minute
CLIENTS, SECONDS = 50, 0.3
AT_ONCE = 32
OVERLOAD = 4
# what the memory of a process moves by without any trend
NOISE_MIB = 8
SMALL = ("engine.max_seqs=4", "engine.memory=0.01")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random hybrid with drafts."""
    path = tmp_path_factory.mktemp("soak") / "tiny"
    alloy.save(build("mtp"), path, byte_tokenizer())
    return path


def body_of(draw: random.Random) -> dict:
    """A request of its own length, whole or streamed."""
    prompt = [draw.randrange(256) for _ in range(draw.randrange(5, 60))]
    tokens = draw.randrange(5, 60)
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": draw.random() < 0.5}


def message(body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def vanish(port: int, draw: random.Random) -> str:
    """Go away at some moment: in the middle of the request, at once after it, or after some of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    whole = message(body_of(draw))
    moment = draw.choice(["asking", "waiting", "reading", "reading"])
    if moment == "asking":
        whole = whole[: draw.randrange(len(whole))]
    writer.write(whole)
    await writer.drain()
    if moment == "reading":
        for _ in range(draw.randrange(1, 9)):
            await reader.read(draw.randrange(1, 400))
    elif draw.random() < 0.5:
        await asyncio.sleep(draw.random() / 100)
    writer.transport.abort()
    return moment


async def in_turns(count: int, call: Callable) -> list:
    """`count` calls, so many at once."""
    left = iter(range(count))

    async def work() -> list:
        return [await call() for _ in left]

    return [found for part in await asyncio.gather(*(work() for _ in range(AT_ONCE))) for found in part]


async def ask(port: int, body: dict) -> str:
    """One whole exchange: "200", "503", or what was wrong with it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(message(body))
        async with asyncio.timeout(60):
            answer = (await reader.read()).decode()
    finally:
        writer.transport.abort()
    head, _, rest = answer.partition("\r\n\r\n")
    status = head[9:12]
    if status == "503" and "retry-after:" in head.lower() and "server_overloaded" in rest:
        return status
    ended = "data: [DONE]" in rest if body["stream"] else rest.endswith("}")
    is_whole = ended and '"finish_reason":"length"' in rest
    return status if status == "200" and is_whole else f"{head.partition(chr(13))[0]} {rest[:200]}"


def gauges(url: str) -> dict[str, float]:
    """The newest value of each gauge, without labels."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return {m[1]: float(m[2]) for m in re.finditer(r"^alloy:(\w+)\{model_name=\"tiny\"\} (\S+)$", text, re.MULTILINE)}


def wait_until_idle(url: str) -> dict[str, float]:
    """Nothing runs or waits; every block and slot is free or cached."""
    end = time.monotonic() + 30
    while True:
        now = gauges(url)
        is_idle = not now["num_requests_running"] and not now["num_requests_waiting"]
        if is_idle and all(now[f"{p}_free"] + now[f"{p}_cached"] == now[f"{p}_total"] for p in ("blocks", "slots")):
            return now
        assert time.monotonic() < end, now
        time.sleep(0.1)


def check_health(url: str, want: object) -> None:
    assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    assert answer(url) == want


def answer(url: str) -> object:
    """A greedy answer, the same at any time."""
    body = {"prompt": "the same", "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
    return response.json()["choices"][0]["token_ids"]


def rss_mib(process: subprocess.Popen[str]) -> float:
    """Memory that a server and its engine hold."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in (process.pid, engine_of(process.pid))]
    return sum(int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) for text in texts) / 1024


@pytest.mark.soak
def test_vanished_clients_leave_nothing_behind(folder: Path, soak_count: int, soak_seed: int) -> None:
    """They go in the middle of asking, waiting and reading; every block and slot comes back."""
    draw, count = random.Random(soak_seed), CLIENTS * soak_count
    with running(folder, *SMALL) as (process, url, lines):
        port = int(url.rpartition(":")[2])
        want, before = answer(url), rss_mib(process)
        start = time.monotonic()
        moments = Counter(asyncio.run(in_turns(count, lambda: vanish(port, draw))))
        took = time.monotonic() - start
        end = wait_until_idle(url)
        check_health(url, want)
        after = rss_mib(process)
    print(  # noqa: T201
        f"{count} clients vanished in {took:.0f} s ({dict(moments)}): blocks {end['blocks_free']:.0f} free + "
        f"{end['blocks_cached']:.0f} cached of {end['blocks_total']:.0f}, slots {end['slots_free']:.0f} free + "
        f"{end['slots_cached']:.0f} cached of {end['slots_total']:.0f}; RSS {before:.0f} -> {after:.0f} MiB"
    )
    assert sum(moments.values()) == count
    assert not [line for line in lines if "Traceback" in line or " failed" in line]


@pytest.mark.soak
def test_overload_is_refused_and_leaves_no_trace(folder: Path, soak_count: int, soak_seed: int) -> None:
    """Four times the requests that it can answer: answers or clean refusals, memory that stays, and health behind it."""
    draw, seconds = random.Random(soak_seed), max(1, SECONDS * soak_count)
    with running(folder, *SMALL, "serve.max_queue=4") as (process, url, lines):
        port = int(url.rpartition(":")[2])
        want = answer(url)
        # what it can answer: as many at once as it takes without refusing, which also fills its cache
        start, tried = time.monotonic(), 100 + round(4 * seconds)
        limit = asyncio.Semaphore(4)

        async def one() -> str:
            async with limit:
                return await ask(port, body_of(draw))

        assert set(asyncio.run(in_turns(tried, one))) == {"200"}
        # in a short trial enough that what waits and runs does not hide it
        rate = max(tried / (time.monotonic() - start), 16 / seconds)
        memory: list[float] = []

        async def flood() -> list[str]:
            asked: list[asyncio.Task[str]] = []
            begin = time.monotonic()
            while (now := time.monotonic() - begin) < seconds:
                while len(asked) < now * OVERLOAD * rate:
                    asked.append(asyncio.create_task(ask(port, body_of(draw))))
                memory.append(rss_mib(process))
                await asyncio.sleep(0.01)
            return await asyncio.gather(*asked)

        start = time.monotonic()
        answers = Counter(asyncio.run(flood()))
        took = time.monotonic() - start
        wait_until_idle(url)
        check_health(url, want)
    third = len(memory) // 3
    middle, last = median(memory[third : 2 * third]), median(memory[2 * third :])
    print(  # noqa: T201
        f"{sum(answers.values())} requests in {took:.0f} s at {OVERLOAD} x {rate:.1f}/s: {dict(answers)}; "
        f"RSS {memory[0]:.1f} MiB, median of the middle third {middle:.1f}, of the last {last:.1f}, highest {max(memory):.1f}"
    )
    assert set(answers) <= {"200", "503"}, answers
    assert answers["200"] >= rate * seconds / 4
    assert answers["503"]
    assert last < middle + NOISE_MIB
    assert not [line for line in lines if "Traceback" in line or " failed" in line]
