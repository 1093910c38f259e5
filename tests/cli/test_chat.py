"""`alloy chat` on a terminal and behind a pipe, with a server of known answers; thoughts and Markdown as they stream."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown
from typer.testing import CliRunner, Result

from alloy.cli import app
from alloy.cli.chat import Conversation
from alloy.cli.chat_models import ChatModel, ThoughtSplitter
from alloy.cli.chat_screen import Screen, whole_blocks
from alloy.core.client import ServerError
from alloy.errors import InterruptedRun, RequestError
from tests.bench.stub import Script, StubServer

ROOT = Path(__file__).parents[2]
ANSWER = ["The answer", " is **forty", "-two**", ".\n\n```py", "\nx = 1", "\n```\n\nD", "one"]


class Terminal:
    """A program on a terminal of 30 lines and 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm-256color", "COLUMNS": "80"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alloy", *arguments],
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Ctrl-C reaches the program only from the terminal that controls it
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, limit_s: float = 60) -> str:
        """What came up to and with `text`, which is taken out of what was seen."""
        deadline = time.monotonic() + limit_s
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.master, text.encode())


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """A program that is gone at the end."""
    started = Terminal(*arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        os.close(started.master)


def plain(text: str) -> str:
    """Text without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """Thought dimmed, Markdown drawn, Ctrl-C stops the answer and not the program, commands reach the server."""
    saved = tmp_path / "talk.json"
    endless = Script(pieces=[f" w{i}\n" for i in range(10_000)], gap_s=0.02)
    scripts = [Script(pieces=ANSWER, thoughts=["let me", " see"]), endless, Script(pieces=["ok"]), Script(fault="busy")]
    with StubServer(lambda n, body: scripts[n]) as server, terminal("chat", server.url, "--seed", "3") as screen:
        screen.wait_for("type a message, or /help")
        screen.wait_for("> ")
        screen.type("what?\n")
        shown = screen.wait_for("answer 9 tokens, 2")
        assert "\x1b[2mlet me see\x1b[0m" in shown
        assert "\x1b[1mforty-two\x1b[0m" in shown
        assert "**" not in shown
        assert "Done" in plain(shown)
        assert "prompt 8 tokens, 3 of them cached" in plain(shown)
        screen.wait_for("> ")
        screen.type("go on\n")
        screen.wait_for("w7")
        screen.type("\x03")
        screen.wait_for("[stopped]")
        screen.wait_for("stopped after")
        screen.wait_for("> ")
        deadline = time.monotonic() + 20
        while server.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.running == 0
        screen.type("\x03")
        screen.wait_for("/exit or Ctrl-D leaves")
        screen.type("/think 5\n")
        screen.wait_for("at most 5 tokens of thought")
        screen.type("short\n")
        screen.wait_for("answer 1 tokens")
        screen.type("again\n")
        screen.wait_for("error: the server answered 503: too busy")
        screen.type("/stats\n")
        # "go on" was stopped before the server counted
        screen.wait_for("3 answers, ")
        screen.type(f"/save {saved}\n")
        screen.wait_for("6 messages saved")
        screen.type("/exit\n")
        assert screen.process.wait(30) == 0
    messages = json.loads(saved.read_text())["messages"]
    assert messages[1] == {"role": "assistant", "content": "".join(ANSWER), "reasoning_content": "let me see"}
    assert messages[3]["content"].startswith(" w0\n w1\n")
    assert server.requests[2]["messages"] == messages[:5]
    assert [body.get("thinking_token_budget") for body in server.requests] == [None, None, 5, 5]
    assert all(body["seed"] == 3 and "top_k" not in body for body in server.requests)


def test_sigterm_ends_a_conversation() -> None:
    """It is not one of the errors that a conversation survives."""
    with StubServer() as server, terminal("chat", server.url) as screen:
        screen.wait_for("> ")
        # Python's readline can miss one that comes between its prompt and its first wait for a key
        for _ in range(20):
            screen.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                screen.process.wait(2)
                break
        assert screen.process.returncode == 143


def chat(server: StubServer | str, *options: object, message: str = "hi\n") -> Result:
    """`alloy chat` with a piped message."""
    url = server if isinstance(server, str) else server.url
    return CliRunner().invoke(app, ["chat", url, *map(str, options)], input=message)


def test_a_piped_message_gives_the_answer_alone() -> None:
    """Thought goes to standard error; Markdown stays as it is; options become fields of the request."""
    with StubServer(lambda n, body: Script(pieces=ANSWER, thoughts=["hm"])) as server:
        options = ["--no-think", "--system", "be brief", "--served-name", "other", "--api-key", "k", "--top-k", 4]
        result = chat(server, *options, message="two\nlines\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(ANSWER) + "\n"
    assert result.stderr == "hm\n"
    (body,) = server.requests
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two\nlines"}]
    assert (body["model"], body["top_k"], body["chat_template_kwargs"]) == ("other", 4, {"enable_thinking": False})
    assert server.keys == {"bearer k"}


def test_markers_in_the_text_of_a_server_are_thought() -> None:
    """A server without reasoning fields leaves them there, cut anywhere; one with them means what it says."""
    with StubServer(lambda n, body: Script(pieces=["<th", "ink>hm</", "think>", "yes <", "b>"])) as server:
        result = chat(server)
    assert (result.stdout, result.stderr) == ("yes <b>\n", "hm\n")
    with StubServer(lambda n, body: Script(pieces=["a <think> tag"], thoughts=["hm"])) as server:
        assert chat(server).stdout == "a <think> tag\n"


def test_a_conversation_survives_a_broken_stream() -> None:
    """The failed question is forgotten, so that it can be asked again."""
    with StubServer(lambda n, body: Script(fault="cut" if n == 0 else None, pieces=["a", "b", "c"])) as server:
        first = chat(server)
        assert isinstance(first.exception, ServerError)
        assert "was lost" in str(first.exception)
        assert chat(server).stdout == "abc\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "int8"], "--weights is the server's to choose"),
        (["--speculate", 2], "--speculate is the server's to choose"),
        (["--device", "cpu"], "--device is the server's to choose"),
    ],
)
def test_options_of_a_model_mean_nothing_to_a_server(options: list[object], message: str) -> None:
    """One sentence, before anything is asked."""
    result = chat("http://127.0.0.1:1", *options)
    assert isinstance(result.exception, RequestError)
    assert message in str(result.exception)


def test_a_server_that_is_not_there_and_a_name_without_one() -> None:
    """Each in one sentence."""
    with StubServer() as server:
        url = server.url
    assert f"no server answers at {url}/v1" in str(chat(url).exception)
    assert "--served-name names a model of a server" in str(chat("folder", "--served-name", "x").exception)


def test_commands_that_cannot_be() -> None:
    """/think takes a number."""
    with pytest.raises(RequestError, match="/think -1: the most tokens of thought must be a whole number from 0"):
        Conversation(None, Console(file=io.StringIO())).command("/think -1")  # type: ignore[arg-type]


def test_interruptions_of_programs_are_not_errors_of_a_conversation() -> None:
    """SIGTERM while a line is read ends the loop."""

    def read(_: str) -> str:
        raise InterruptedRun("terminated", 143)

    with pytest.raises(InterruptedRun):
        Conversation(None, Console(file=io.StringIO())).run(read)  # type: ignore[arg-type]


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<", "</thin", "think>", "a", "b c", "\n"]))


@given(PIECES, st.booleans(), st.lists(st.integers(0, 60)))
def test_markers_are_found_wherever_text_is_cut(pieces: list[str], inside: bool, cuts: list[int]) -> None:
    """Streamed in any pieces, thought and answer are those of the whole text, cut at markers by a regular expression."""
    text = "".join(pieces)
    want = {True: "", False: ""}
    state = inside
    for part in re.split(r"(</?think>)", text):
        if part in ("<think>", "</think>"):
            state = part == "<think>"
        else:
            want[state] += part
    split, got = ThoughtSplitter(inside), {True: "", False: ""}
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    news = [text[a:b] for a, b in pairwise(places)]
    for piece, is_thought in [p for part in news for p in split.feed(part)] + list(split.end()):
        got[is_thought] += piece
    assert got == want


LINES = [
    "# Head",
    "words *and*",
    "more",
    "",
    "",
    "- item",
    "  - inner",
    "1. one",
    "2. two",
    "```py",
    "```",
    "~~~",
    "x = 1",
    "    code",
]


def rendered(*texts: str) -> list[str]:
    """Lines that rich draws for Markdown texts one after the other, without empty ones."""
    console = Console(file=io.StringIO(), width=40, force_terminal=True)
    for text in texts:
        console.print(Markdown(text))
    return [line for line in console.file.getvalue().splitlines() if plain(line).strip()]  # type: ignore[attr-defined]


@given(st.lists(st.sampled_from([*LINES, "> quote", "| a | b |", "|---|---|"]), max_size=14))
@example(["1. one", "", "1. one"])
def test_whole_blocks_look_the_same_alone(lines: list[str]) -> None:
    """What is printed for good, then the rest, is what the whole text would have been."""
    text = "\n".join(lines)
    cut = whole_blocks(text)
    if text[:cut].strip() and text[cut:].strip():
        assert rendered(text[:cut], text[cut:]) == rendered(text)
    assert all(whole_blocks(text[:n]) <= cut for n in range(len(text)))


def test_a_long_answer_is_written_once() -> None:
    """200 paragraphs on a terminal of 10 lines: each once in what stays, though the last block is drawn many times."""
    console = Console(file=io.StringIO(), width=60, height=10, force_terminal=True)
    screen = Screen(console)
    for i in range(200):
        screen.add(f"paragraph number{i}.\n\n", False)
    screen.close()
    text = plain(console.file.getvalue())  # type: ignore[attr-defined]
    assert [f"number{i}." in text for i in range(200)] == [True] * 200


class Interrupting:
    """Ctrl-C arrives while Python cleans this up."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_destructor_stops_the_answer() -> None:
    """Python drops a KeyboardInterrupt that is raised there."""

    class Model(ChatModel):
        usage = None
        has_chat_template = True

        def stream(self, messages: object, thinking: object) -> Generator[tuple[str, bool]]:
            yield "one ", False
            thing = [Interrupting()]
            thing.clear()
            for _ in range(100):
                yield "more ", False

        def stats_line(self) -> str:
            return ""

    console = Console(file=io.StringIO())
    talk = Conversation(Model(), console)
    assert talk.answer("hello")
    assert talk.messages[-1]["content"].split() == ["one"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
