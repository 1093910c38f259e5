"""`alloy chat`: talk to a model in the terminal; with piped input, one answer on standard output."""

import contextlib
import importlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from alloy.cli.chat_models import ChatModel, LocalModel, Messages, RemoteModel, Thinking
from alloy.cli.chat_screen import Screen
from alloy.cli.generate import (
    Device,
    Dtype,
    MaxModelLen,
    MinP,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    Weights,
    draft_setting,
    weights_line,
)
from alloy.core.client import ChatServer
from alloy.errors import AlloyError, InterruptedRun, RequestError

HELP = """\
/think [N]    let the model think first, for at most N tokens
/nothink      answer at once
/system TEXT  set the system message and start over; without TEXT, show it
/clear        forget the conversation
/save FILE    write the conversation as JSON
/stats        tokens of the conversation so far
/help         this list
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""
NO_TEMPLATE = "this model has no chat template: each line is continued as plain text, and nothing is remembered"


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|URL", help="Checkpoint folder, hub id, or address of an OpenAI-compatible server."
        ),
    ],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens, thought included; default: all that fit.")
    ] = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    thinking: Annotated[bool, typer.Option("--think/--no-think", help="Let the model think first, if it can.")] = True,
    thinking_budget: Annotated[int | None, typer.Option(help="Most tokens of thought.")] = None,
    speculate: Speculate = "auto",
    max_model_len: MaxModelLen = None,
    dtype: Dtype = None,
    device: Device = "auto",
    weights: Weights = None,
    served_name: Annotated[
        str | None, typer.Option(help="With a URL: the model's name there; default: the first that is listed.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ALLOY_API_KEY", help="With a URL: bearer key.")] = None,
) -> None:
    """Talk to a model, here or behind a server; /help lists what can be typed besides messages."""
    if model.startswith(("http://", "https://")):
        here = {"--max-model-len": max_model_len, "--dtype": dtype, "--weights": weights}
        here |= {
            "--speculate": None if speculate == "auto" else speculate,
            "--device": None if device == "auto" else device,
        }
        for name, value in here.items():
            if value is not None:
                raise RequestError(f"{name} is the server's to choose: leave it out with {model}")
        body = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        # OpenAI's own servers refuse these two
        body |= {"top_k": top_k or None, "min_p": min_p or None}
        server = ChatServer(model, served_name, api_key)
        answers: ChatModel = RemoteModel(server, {name: value for name, value in body.items() if value is not None})
    else:
        if served_name is not None:
            raise RequestError(f"--served-name names a model of a server, but {model} is no http:// address")
        from alloy.engine.core import LLM
        from alloy.engine.request import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            thinking_budget=thinking_budget,
        )
        drafts = draft_setting(speculate)
        llm = LLM(model, max_model_len=max_model_len, dtype=dtype, device=device, speculate=drafts, weights=weights)
        if weights is not None:
            sys.stderr.write(weights_line(llm) + "\n")
        answers = LocalModel(llm, params)
    is_interactive = sys.stdin.isatty()
    # a terminal is wrapped between words, a file not at all
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    thoughts = None if is_interactive else Console(stderr=True, highlight=False, soft_wrap=True)
    talk = Conversation(answers, console, system, Thinking(thinking, thinking_budget), thoughts)
    if not answers.has_chat_template:
        sys.stderr.write(NO_TEMPLATE + "\n")
    if is_interactive:
        # gives `input` line editing and history, where Python has it
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        talk.run(input)
        return
    message = sys.stdin.read().rstrip("\n")
    if not message:
        raise RequestError("standard input is empty; pipe a message in, or run `alloy chat` on a terminal")
    if talk.answer(message):
        raise KeyboardInterrupt


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[list[int]]:
    """The list of the SIGINTs since, each of which raises KeyboardInterrupt too.

    Python drops that exception where it is raised inside of a destructor or a callback of a weak reference.
    """
    pressed: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    former = signal.signal(signal.SIGINT, remember)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, former)


class Conversation:
    """Messages so far, and what a line that the user typed does to them.

    Args:
        model: who answers
        console: where answers are written
        system: system message
        thinking: whether and for how long the model may think
        thoughts: where thought is written if the console is no terminal; None: to the console
    """

    def __init__(
        self,
        model: ChatModel,
        console: Console,
        system: str | None = None,
        thinking: Thinking | None = None,
        thoughts: Console | None = None,
    ) -> None:
        self.model = model
        self.console = console
        self.thoughts = thoughts
        self.thinking = thinking or Thinking()
        self.system = system
        self.messages: Messages = []
        self.clear()

    def run(self, read: Callable[[str], str]) -> None:
        """Read lines until /exit or end of input; a line that cannot be done is an error message, not the end."""
        self._note("type a message, or /help")
        while True:
            try:
                line = read("> ").strip()
                if line == "/exit":
                    return
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
                    self._note(self.model.stats_line())
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n/exit or Ctrl-D leaves")
            except InterruptedRun:
                raise
            except (AlloyError, OSError) as error:
                self._note(f"error: {error}")

    def command(self, line: str) -> None:
        """Run one slash command."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self._note(HELP)
        elif name == "/think":
            if rest and not rest.isdecimal():
                raise RequestError(f"/think {rest}: the most tokens of thought must be a whole number from 0")
            self.thinking = Thinking(True, int(rest) if rest else None)
            self._note(str(self.thinking))
        elif name == "/nothink":
            self.thinking = Thinking(False)
            self._note(str(self.thinking))
        elif name == "/clear":
            self.clear()
            self._note("the conversation is empty")
        elif name == "/system":
            if rest:
                self.system = rest
                self.clear()
            self._note(f"system: {self.system or '(none)'}")
        elif name == "/save":
            if not rest:
                raise RequestError("/save needs a file name")
            from alloy.core.runs import atomic_write

            atomic_write(Path(rest), json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n")
            self._note(f"{len(self.messages)} messages saved in {rest}")
        elif name == "/stats":
            self._note(
                f"{self.answers:,} answers, {self.prompt_tokens:,} prompt tokens, {self.answer_tokens:,} answer tokens; "
                f"{self.thinking}"
            )
        else:
            raise RequestError(f"{name} is not a command; /help lists them")

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.answers = self.prompt_tokens = self.answer_tokens = 0

    def answer(self, text: str) -> bool:
        """Answer a message and write the answer as it comes. Ctrl-C stops it, keeps what came so far, and gives True."""
        asked = [*self.messages, {"role": "user", "content": text}]
        texts = {True: "", False: ""}
        screen = Screen(self.console, self.thoughts)
        stream = self.model.stream(asked, self.thinking)
        is_stopped = False
        with remembered_interrupts() as pressed:
            try:
                for piece, is_thought in stream:
                    if pressed:
                        raise KeyboardInterrupt
                    texts[is_thought] += piece
                    screen.add(piece, is_thought)
            except KeyboardInterrupt:
                is_stopped = True
            finally:
                stream.close()
                screen.close(" [stopped]" if is_stopped else "")
        self.answers += 1
        if self.model.usage:
            self.prompt_tokens += self.model.usage.prompt_tokens
            self.answer_tokens += self.model.usage.completion_tokens
        reply: dict[str, Any] = {"role": "assistant", "content": texts[False].strip("\n")}
        if texts[True].strip():
            reply["reasoning_content"] = texts[True].strip("\n")
        if self.model.has_chat_template:
            self.messages = [*asked, reply]
        return is_stopped

    def _note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))
