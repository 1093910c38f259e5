"""`alloy serve` as a process: what it refuses before it loads a model, the table it prints, and how it stops."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import alloy
from alloy.cli import app
from alloy.cli.serve import _load
from alloy.errors import RecipeError, ResourceError
from alloy.serve.guard import Keys
from alloy.serve.listen import open_socket
from alloy.serve.settings import read_settings
from tests.engine.conftest import build, byte_tokenizer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(alloy.__file__).parents[1])}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serve.max_que=3"], 'Did you mean "serve.max_queue"?'),
        (["serve.max_queue=-1"], "greater than or equal to 0"),
        (["serve.replicas=0"], "greater than or equal to 1"),
        (["engine.max_seqs=0"], "greater than or equal to 1"),
        (["engine.state_dtype=int3"], "float32"),
        (["serve.default={warmth=1}"], "temperature"),
        (["serve.tool_format=cobol"], "hermes"),
        (["nonsense"], "dotted.key=value"),
        (["serve.api_key_file=/nowhere"], "cannot be read"),
        (["--api-key", ""], "--api-key is empty"),
        (["--host", "0.0.0.0"], "no API key is set"),
        (["--host", "nowhere.invalid", "--api-key", "k"], "no address of this machine"),
    ],
)
def test_bad_settings_are_one_sentence_before_anything_is_loaded(arguments: list[str], word: str) -> None:
    """The model's folder does not even exist."""
    result = CliRunner().invoke(app, ["serve", "no-such-model", *arguments])
    assert isinstance(result.exception, RecipeError), result.exception
    assert result.exception.exit_code == 2
    assert word in str(result.exception)


def test_a_port_in_use_is_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "no-such-model", "--port", str(port)])
    assert isinstance(result.exception, RecipeError)
    assert f"port {port} on 127.0.0.1 is in use" in str(result.exception)


def test_replicas_without_ray_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["serve", "no-such-model", "serve.replicas=2"])
    assert isinstance(result.exception, ResourceError), result.exception
    assert result.exception.exit_code == 3
    said = 'serve.replicas = 2 works with ray, which is not installed: pip install "alloy-lm[scale]"'
    assert str(result.exception) == said


def test_settings_are_read_with_their_types() -> None:
    settings = read_settings(["engine.speculate=auto", "engine.cuda_graphs=false", 'serve.cors=["http://a"]'])
    assert settings.engine.chosen == {"speculate": "auto", "graphs": False}
    assert settings.serve.cors == ["http://a"]


def test_tokens_do_not_wait_for_acknowledgements() -> None:
    """Accepted connections send at once: with Nagle's algorithm a token on a kept connection comes 40 ms late."""
    with open_socket("127.0.0.1", 0, False, False) as bound:
        bound.listen()
        with socket.create_connection(bound.getsockname()[:2]), bound.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_keys_are_read_again(tmp_path: Path) -> None:
    """A file that cannot be used leaves the old keys."""
    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n")
    keys = Keys(["fixed"], file)
    for key in ("fixed", "one", "two"):
        keys.check(f"Bearer {key}")
    file.write_text("three\n")
    keys.reload()
    keys.check("Bearer three")
    with pytest.raises(Exception, match="API key is wrong"):
        keys.check("Bearer one")
    file.write_text("\n")
    with pytest.raises(RecipeError, match="has no keys"):
        keys.reload()
    keys.check("Bearer three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random hybrid."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    alloy.save(build("mtp"), path, byte_tokenizer())
    return path


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The command in a process of its own: (process, url, lines of its log so far)."""
    command = [sys.executable, "-m", "alloy", "serve", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    lines: list[str] = []
    found = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if "http://" in line:
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert found.wait(120)
        match = re.search(r"http://\S+", "\n".join(lines))
        assert match, lines
        url = match[0]
        end = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"{url}/ready", trust_env=False)
                break
            except httpx.ConnectError:
                assert time.monotonic() < end
        yield process, url, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(10)


def stream(url: str, tokens: int, out: list[str]) -> threading.Thread:
    """Read a stream in a thread; its lines go to `out`."""

    def work() -> None:
        body = {"prompt": "ab", "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 1}
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
                out.extend(line for line in response.iter_lines() if line)
        except httpx.TransportError:
            out.append("broken")

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_for(out: list[str]) -> None:
    end = time.monotonic() + 30
    while not out:
        assert time.monotonic() < end
        time.sleep(0.005)


def begun(url: str, tokens: int) -> tuple[list[str], threading.Thread]:
    """As `stream`, once it has its first line: its lines so far, and the thread."""
    out: list[str] = []
    thread = stream(url, tokens, out)
    wait_for(out)
    return out, thread


@pytest.mark.slow
def test_sigterm_lets_running_answers_finish(folder: Path) -> None:
    """The table names what was loaded; under SIGTERM all streams end as they should, one that waited too; the code is 0."""
    with running(folder, "engine.max_seqs=2") as (process, url, lines):
        assert httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"] == "tiny"
        outs: list[list[str]] = [[] for _ in range(3)]
        threads = [stream(url, 150, out) for out in outs]
        end = time.monotonic() + 30
        while 'num_requests_waiting{model_name="tiny"} 1' not in httpx.get(f"{url}/metrics", trust_env=False).text:
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(30) == 0
    for out in outs:
        assert out[-1] == "data: [DONE]"
        assert json.loads(out[-2][6:])["choices"][0]["finish_reason"] == "length"
    log = "\n".join(lines)
    for word in (
        "parameters",
        "weights",
        "keys and values",
        "states",
        "fit at once",
        "backends",
        "finishing 3 answers",
    ):
        assert word in log


@pytest.mark.slow
def test_shutdown_at_once_ends_streams_with_an_error(folder: Path) -> None:
    with running(folder, "serve.shutdown_s=0") as (process, url, _):
        out, thread = begun(url, 158)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(30) == 0
    assert out[-1] in ("data: [DONE]",)
    assert any("server_shutdown" in line or '"finish_reason":"length"' in line for line in out[-3:])


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(folder: Path) -> None:
    with running(folder, "serve.shutdown_s=600", "serve.request_timeout_s=600") as (process, url, _):
        connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        body = b'{"prompt": "a", "n": 64, "max_tokens": 150, "ignore_eos": true}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        end = time.monotonic() + 30
        while 'num_requests_running{model_name="tiny"} 0' in (
            text := httpx.get(f"{url}/metrics", trust_env=False).text
        ) or ("num_requests_running{" not in text):
            assert time.monotonic() < end
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert time.monotonic() - start < 20
        connection.close()


def test_what_does_not_fit_is_code_3(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "alloy", "serve", str(folder), "--port", "0", "engine.memory=0.00001"],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert result.stderr.startswith("error: ")


def test_weights_of_low_precision_show_their_cost(folder: Path) -> None:
    """The start-up table compares perplexities; the served model has the weights."""
    llm, rows = _load(str(folder), {"weights": "int8", "max_model_len": 64})
    assert llm.model.weights == "int8"
    found = re.fullmatch(r"([\d.]+), ([\d.]+) in float32 \(([\d,]+) tokens of pydoc_data\.topics\)", rows["perplexity"])
    assert found is not None
    low, full, tokens = (float(text.replace(",", "")) for text in found.groups())
    assert low != full
    assert low == pytest.approx(full, rel=0.1)
    assert tokens >= 4096


def test_a_truncated_model_file_is_code_4(folder: Path, tmp_path: Path) -> None:
    """One sentence that names the file, and no traceback."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = broken / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    result = subprocess.run(
        [sys.executable, "-m", "alloy", "serve", str(broken), "--port", "0"],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 4, result.stderr
    assert result.stderr.startswith("error: ")
    assert "model.safetensors" in result.stderr
    assert "truncated" in result.stderr
    assert "Traceback" not in result.stderr
