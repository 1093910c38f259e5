"""`alloy generate` and `alloy chat` on a saved tiny model: answers, resume, messages of errors."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import alloy
from alloy.cli import app
from alloy.cli.chat import NO_TEMPLATE, Conversation
from alloy.cli.chat_models import LocalModel
from alloy.cli.generate import open_answers, write_line
from alloy.engine.core import LLM
from alloy.engine.request import SamplingParams
from alloy.errors import DataError, InterruptedRun, RequestError, ResourceError
from tests.engine.conftest import build, byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random hybrid with MTP and a byte tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    alloy.save(build("mtp"), path, byte_tokenizer())
    return path


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    """Invoke the command line in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_streams_to_stdout_and_statistics_to_stderr(folder: Path) -> None:
    """The text is that of the library; one line of statistics names the drafts."""
    result = run("generate", folder, "--prompt", "ab", "--max-tokens", 20, "--temperature", 0, "--speculate", 2)
    assert result.exit_code == 0, result.output
    want = LLM(folder).generate("ab", SamplingParams(temperature=0, max_tokens=20))[0]
    assert result.stdout == want.text + "\n"
    assert "prompt 2 tokens" in result.stderr
    assert "answer 20 tokens" in result.stderr
    assert "drafts kept" in result.stderr


def test_several_answers_are_printed_under_their_numbers(folder: Path) -> None:
    """Two prompts with two answers each."""
    result = run("generate", folder, "--prompt", "a", "--prompt", "b", "-n", 2, "--max-tokens", 3, "--seed", 1)
    assert [line for line in result.stdout.splitlines() if line.startswith("== prompt")] == [
        f"== prompt {p}, answer {a}" for p in (1, 2) for a in (1, 2)
    ]


def test_a_file_is_answered_and_resumed(folder: Path, tmp_path: Path) -> None:
    """All three kinds of prompts; a torn last line is cut; a second run answers only what is missing."""
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    asked = [
        {"prompt": "x", "id": "first", "note": "other keys are left alone"},
        {"token_ids": [1, 2, 3], "params": {"max_tokens": 4, "n": 2, "logprobs": 1, "logit_bias": {"7": 1.5}}},
        {"messages": [{"role": "user", "content": "hi"}], "id": 17},
        {"prompt": "ß"},
    ]
    source.write_text("\n".join(json.dumps(a) for a in asked) + "\n\n", encoding="utf-8")
    command = ("generate", folder, "--input", source, "--output", target, "--max-tokens", 9, "--seed", 3)
    result = run(*command)
    assert result.exit_code == 0, result.output
    whole = {a["id"]: a for a in lines(target)}
    assert set(whole) == {"first", 2, 17, 4}
    assert [len(c["token_ids"]) for c in whole[2]["completions"]] == [4, 4]
    assert len(whole[2]["completions"][0]["logprobs"]) == 4
    assert whole[2]["completions"][0]["token_ids"] != whole[2]["completions"][1]["token_ids"]
    assert whole[4]["completions"][0]["finish_reason"] in ("stop", "length")

    kept = target.read_bytes().splitlines(keepends=True)[:2]
    target.write_bytes(b"".join(kept) + b'{"id": "torn", "compl')
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert "4 prompts, 2 answered already" in again.stderr
    assert target.read_bytes().startswith(b"".join(kept))
    assert {a["id"]: a for a in lines(target)} == whole
    idle = run(*command)
    assert "4 prompts, 4 answered already" in idle.stderr
    assert {a["id"]: a for a in lines(target)} == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"in.jsonl:2: is not JSON"),
        ("[1]", r"in.jsonl:2: is not a JSON object"),
        ('{"text": "a"}', r"in.jsonl:2: needs one of prompt, messages, token_ids; it has none"),
        ('{"prompt": "a", "token_ids": [1]}', r"it has prompt and token_ids"),
        ('{"prompt": 3}', r"in.jsonl:2: prompt must be a text"),
        ('{"token_ids": [1, "a"]}', r"token_ids must be a list of whole numbers"),
        ('{"messages": []}', r"messages must be a list of objects"),
        ('{"prompt": "a", "id": 1}', r"in.jsonl:2: id = 1 is that of line 1 already"),
        ('{"prompt": "a", "id": [1]}', r"id = \[1\] is neither"),
        ('{"prompt": "a", "max_tokens": 5}', r'max_tokens belongs into "params"'),
        ('{"prompt": "a", "params": {"tempo": 5}}', r"params.tempo is unknown"),
        ('{"prompt": "a", "params": {"top_p": 5}}', r"in.jsonl:2: params.top_p = 5 is outside"),
        ('{"prompt": "a", "params": {"grammar": {"text": "a"}}}', r'params.grammar must be {"kind": ..., "text": ...}'),
        (
            '{"prompt": "a", "params": {"grammar": {"kind": "xml"}}}',
            r'in.jsonl:2: params.grammar kind = "xml" is unknown',
        ),
        ('{"token_ids": [1, 999]}', r"in.jsonl:2: prompt has the token id 999"),
        ('{"prompt": ""}', r"in.jsonl:2: prompt is empty"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    """File and line number, and the output stays empty."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"prompt": "good"}}\n{line}\n')
    result = run("generate", folder, "--input", source, "--output", target)
    assert isinstance(result.exception, DataError)
    with pytest.raises(DataError, match=message):
        raise result.exception
    assert not target.exists() or target.read_bytes() == b""


def test_answers_meet_a_schema_or_an_expression(folder: Path, tmp_path: Path) -> None:
    """By flag for every prompt, and by params of a line, where the schema may stand as it is."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "maxProperties": 1}
    file, source, target = tmp_path / "schema.json", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps(schema))
    result = run("generate", folder, "--prompt", "ab", "--json-schema", file, "--max-tokens", 2)
    assert result.stdout.startswith("{")
    own = {"grammar": {"kind": "choice", "text": ["yes", "no"]}}
    closed = {"grammar": {"kind": "json_schema", "text": {"enum": [{"a": 1}]}}, "logit_bias": {"9": -100, "10": -100}}
    asked = [{"prompt": "a"}, {"prompt": "a", "params": own}, {"prompt": "a", "params": {"grammar": None}}]
    asked.append({"prompt": "a", "params": {**closed, "temperature": 0, "max_tokens": 90}})
    source.write_text("\n".join(json.dumps(a) for a in asked))
    result = run("generate", folder, "--input", source, "--output", target, "--regex", "[ab]{3}", "--max-tokens", 9)
    assert result.exit_code == 0, result.output
    texts = {a["id"]: a["text"] for a in lines(target)}
    assert re.fullmatch("[ab]{3}", texts[1])
    assert texts[2] in ("yes", "no")
    assert len(texts[3]) > 3
    assert json.loads(texts[4]) == {"a": 1}
    both = run("generate", folder, "--prompt", "a", "--regex", "a", "--json-schema", file)
    assert "exclude each other" in str(both.exception)
    missing = run("generate", folder, "--prompt", "a", "--json-schema", tmp_path / "none.json")
    assert "none.json cannot be read" in str(missing.exception)


def test_bad_command_lines(folder: Path, tmp_path: Path) -> None:
    """Neither or both sources, a wrong draft length, not UTF-8, an output file of something else, a second writer."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for arguments in ((), ("--prompt", "a", "--input", source), ("--input", source)):
        assert isinstance(run("generate", folder, *arguments).exception, RequestError)
    assert "must be" in str(run("generate", folder, "--prompt", "a", "--speculate", "many").exception)
    assert "cannot be read" in str(run("generate", folder, "--input", source, "--output", target).exception)
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert "in.jsonl:2: is not UTF-8" in str(run("generate", folder, "--input", source, "--output", target).exception)
    source.write_text('{"prompt": "a"}\n')
    target.write_text('{"other": 1}\n')
    result = run("generate", folder, "--input", source, "--output", target)
    assert "out.jsonl:1 is not an answer" in str(result.exception)
    target.unlink()
    with (
        open_answers(target),
        pytest.raises(ResourceError, match="is being written by another process"),
        open_answers(target),
    ):
        pass


def test_a_full_disk_is_a_resource_error() -> None:
    """/dev/full refuses every write."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(ResourceError, match="could not be written"):
            write_line(descriptor, {"id": 1})
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_kill_9_loses_no_answer_and_repeats_none(folder: Path, tmp_path: Path) -> None:
    """Killed in the middle; the answers of both runs together are those of one."""
    source, target, other = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(60)))
    tail = ["--max-tokens", "60", "--seed", "5", "--max-seqs", "3"]
    command = [
        sys.executable,
        "-c",
        "from alloy.cli import main; main()",
        "generate",
        str(folder),
        "--input",
        str(source),
    ]
    process = subprocess.Popen([*command, "--output", str(target), *tail], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 20 <= target.read_bytes().count(b"\n") < 60
    assert run("generate", folder, "--input", source, "--output", target, *tail).exit_code == 0
    assert run("generate", folder, "--input", source, "--output", other, *tail).exit_code == 0
    got, want = lines(target), lines(other)
    assert len(got) == 60
    assert {a["id"]: a for a in got} == {a["id"]: a for a in want}


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (InterruptedRun("terminated", 143), 143)])
def test_interrupt_keeps_answers_and_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """Ctrl-C or SIGTERM after the second answer: exit code 130 or 143, two lines in the file."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(9)))
    real = LLM.stream

    def interrupted(self: LLM, requests: object) -> Iterator[object]:
        done = 0
        for news in real(self, requests):
            yield news
            done += news.finished
            if done == 2:
                raise error

    monkeypatch.setattr(LLM, "stream", interrupted)
    result = run("generate", folder, "--input", source, "--output", target, "--max-tokens", 5)
    assert isinstance(result.exception, InterruptedRun)
    assert result.exception.exit_code == code
    assert "2 of 9 prompts answered" in str(result.exception)
    assert len(lines(target)) == 2


def converse(llm: LLM, typed: list[object], system: str | None = None) -> tuple[Conversation, str]:
    """Type lines into a conversation; an exception in the list is raised where a line would be read."""
    out = io.StringIO()
    talk = Conversation(LocalModel(llm, SamplingParams(seed=1, max_tokens=12)), Console(file=out, width=200), system)
    script = iter([*typed, EOFError()])

    def read(_: str) -> str:
        item = next(script)
        if isinstance(item, BaseException):
            raise item
        return str(item)

    talk.run(read)
    return talk, out.getvalue()


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    """The saved model, ready to generate."""
    return LLM(folder)


def test_chat_keeps_the_conversation(llm: LLM, tmp_path: Path) -> None:
    """Two turns, the system message, saving, reset, and what is not a command."""
    saved = tmp_path / "talk.json"
    talk, text = converse(
        llm, ["/system be brief", "hi", KeyboardInterrupt(), "more", f"/save {saved}", "/nope", "/save", "/help"]
    )
    roles = [m["role"] for m in talk.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert json.loads(saved.read_text())["messages"] == talk.messages
    assert "error: /nope is not a command" in text
    assert "error: /save needs a file name" in text
    assert "/clear" in text
    talk, text = converse(llm, ["hi", "/clear", "/system", "/exit", "never read"])
    assert talk.messages == []
    assert "system: (none)" in text
    assert "never read" not in text


def test_chat_says_when_the_conversation_is_full(llm: LLM) -> None:
    """The line is refused; the conversation stays usable."""
    talk, text = converse(llm, ["x" * 200, "/clear", "hi"])
    assert "max_model_len is 160; /clear" in text
    assert len(talk.messages) == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays in the conversation."""
    real = LLM.generate

    def interrupted(self: LLM, *arguments: object, **options: object) -> Iterator[object]:
        stream = real(self, *arguments, **options)
        for _ in range(4):
            yield next(stream)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    talk, text = converse(llm, ["hi"])
    assert "[stopped]" in text
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_piped_chat_gives_one_answer(folder: Path, tmp_path: Path) -> None:
    """Only the answer on standard output; empty input is an error; without a chat template one line says so."""
    result = run("chat", folder, "--max-tokens", 7, "--temperature", 0, "--no-think", stdin="hi\n")
    assert result.exit_code == 0, result.output
    want = LLM(folder).chat(
        [{"role": "user", "content": "hi"}],
        SamplingParams(temperature=0, max_tokens=7),
        template={"enable_thinking": False},
    )
    assert result.stdout.replace("\n", "") == want[0].text.replace("\n", "")
    assert "standard input is empty" in str(run("chat", folder, stdin="").exception)
    plain = byte_tokenizer()
    plain.chat_template = None
    alloy.save(build("hybrid"), tmp_path / "plain", plain)
    result = run("chat", tmp_path / "plain", "--max-tokens", 7, "--seed", 1, stdin="hi\n")
    assert result.exit_code == 0, result.output
    assert NO_TEMPLATE in result.stderr


def test_weights_of_low_precision(folder: Path) -> None:
    """The choice and its memory are printed, the answer is the library's, a wrong name is one line."""
    options = ("--prompt", "ab", "--max-tokens", 12, "--temperature", 0, "--device", "cpu")
    result = run("generate", folder, *options, "--weights", "int8")
    assert result.exit_code == 0, result.output
    want = LLM(folder, device="cpu", weights="int8").generate("ab", SamplingParams(temperature=0, max_tokens=12))[0]
    assert result.stdout == want.text + "\n"
    assert re.search(r"weights int8: 0\.\d MiB instead of 0\.\d MiB in float32", result.stderr)
    assert (
        "weights bf16"
        in run("chat", folder, "--max-tokens", 2, "--device", "cpu", "--weights", "bf16", stdin="hi").stderr
    )
    wrong = run("generate", folder, *options, "--weights", "int4")
    assert isinstance(wrong.exception, RequestError)
    assert 'use one of "bf16", "int8"' in str(wrong.exception)
