"""`alloy chat`: talk to a model in the terminal; with piped input, one answer on standard output."""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from alloy.cli.generate import (
    Device,
    Dtype,
    MaxModelLen,
    MinP,
    Model,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    Weights,
    draft_setting,
    stats_line,
    weights_line,
)
from alloy.errors import AlloyError, RequestError

if TYPE_CHECKING:
    from alloy.engine.core import LLM
    from alloy.engine.request import SamplingParams

OPEN, CLOSE = "<think>", "</think>"
HELP = """\
/system TEXT  set the system message and start over; without TEXT, show it
/reset        forget the conversation
/save FILE    write the conversation as JSON
/help         this list
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""
NO_TEMPLATE = "this model has no chat template: each line is continued as plain text, and nothing is remembered"


def chat(
    model: Model,
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
) -> None:
    """Talk to a model; /help lists what can be typed besides messages."""
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
    llm = LLM(
        model,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        speculate=draft_setting(speculate),
        weights=weights,
    )
    if weights is not None:
        sys.stderr.write(weights_line(llm) + "\n")
    talk = Conversation(
        llm, params, Console(highlight=False, soft_wrap=True), system, {} if thinking else {"enable_thinking": False}
    )
    if not llm.has_chat_template:
        sys.stderr.write(NO_TEMPLATE + "\n")
    if sys.stdin.isatty():
        # gives `input` line editing and history, where Python has it
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        talk.run(input)
        return
    message = sys.stdin.read().rstrip("\n")
    if not message:
        raise RequestError("standard input is empty; pipe a message in, or run `alloy chat` on a terminal")
    talk.answer(message)


class Conversation:
    """Messages so far, and what a line that the user typed does to them.

    Args:
        llm: the engine
        params: of every answer; max_tokens shrinks when the model's length is nearly full
        console: where answers are written
        system: system message
        template: variables of the chat template
    """

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams",
        console: Console,
        system: str | None = None,
        template: dict[str, Any] | None = None,
    ) -> None:
        self.llm = llm
        self.params = params
        self.console = console
        self.template = template or {}
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

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
                    self._note(stats_line(self.llm.stats))
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n/exit or Ctrl-D leaves")
            except (AlloyError, OSError) as error:
                self._note(f"error: {error}")

    def command(self, line: str) -> None:
        """Run one slash command."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self._note(HELP)
        elif name == "/reset":
            self.reset()
            self._note("the conversation is empty")
        elif name == "/system":
            if rest:
                self.system = rest
                self.reset()
            self._note(f"system: {self.system or '(none)'}")
        elif name == "/save":
            if not rest:
                raise RequestError("/save needs a file name")
            from alloy.core.runs import atomic_write

            atomic_write(Path(rest), json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n")
            self._note(f"{len(self.messages)} messages saved in {rest}")
        else:
            raise RequestError(f"{name} is not a command; /help lists them")

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> None:
        """Answer a message and write the answer as it comes; Ctrl-C keeps what was written so far."""
        if not self.llm.has_chat_template:
            self._write(self.llm.encode(text), is_thought=False)
            return
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.llm.encode_chat(asked, self.template)
        thought, said = self._write(ids, is_thought=self._ends_inside_thought(ids))
        reply: dict[str, Any] = {"role": "assistant", "content": said.strip("\n")}
        if thought.strip():
            reply["reasoning_content"] = thought.strip("\n")
        self.messages = [*asked, reply]

    def _write(self, ids: Sequence[int], is_thought: bool) -> tuple[str, str]:
        """Stream an answer to the console: (thought, answer)."""
        room = self.llm.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(ids):,} tokens and max_model_len is {self.llm.max_model_len:,}; /reset"
            )
        params = replace(self.params, max_tokens=min(self.params.max_tokens or room, room))
        texts = {True: "", False: ""}
        stream = self.llm.generate([ids], params, stream=True)
        try:
            for news in stream:
                for piece in _pieces(news.completions[0].text):
                    if piece in (OPEN, CLOSE):
                        is_thought = piece == OPEN
                        self.console.print()
                        continue
                    texts[is_thought] += piece
                    self.console.print(Text(piece, style="dim" if is_thought else ""), end="")
        except KeyboardInterrupt:
            self.console.print(Text(" [stopped]", style="dim"), end="")
        finally:
            stream.close()
        self.console.print()
        return texts[True], texts[False]

    def _ends_inside_thought(self, ids: Sequence[int]) -> bool:
        markers = self.llm.codec.markers if self.llm.codec else None
        if markers is None:
            return False
        last = next((i for i in reversed(ids) if i in (markers.start, markers.end)), markers.end)
        return last == markers.start

    def _note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))


def _pieces(text: str) -> Iterable[str]:
    """Text cut at the markers of a thought, which stand alone."""
    while text:
        at = min((i for i in (text.find(OPEN), text.find(CLOSE)) if i >= 0), default=len(text))
        if at:
            yield text[:at]
        marker = OPEN if text.startswith(OPEN, at) else CLOSE if text.startswith(CLOSE, at) else ""
        if marker:
            yield marker
        text = text[at + len(marker) :]
