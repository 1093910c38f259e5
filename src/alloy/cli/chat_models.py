"""Who answers in `alloy chat`: a model in this process, or one behind an OpenAI-compatible server."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from alloy.cli.generate import stats_line
from alloy.core.client import ChatServer, Usage
from alloy.engine.reasoning import Thought
from alloy.errors import RequestError

if TYPE_CHECKING:
    from alloy.engine.core import LLM
    from alloy.engine.request import SamplingParams

MARKERS = ("<think>", "</think>")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Thinking:
    """Whether the model may think first, and for how many tokens at most."""

    enabled: bool = True
    budget: int | None = None

    def __str__(self) -> str:
        if not self.enabled:
            return "no thought"
        return "thought without a limit" if self.budget is None else f"at most {self.budget:,} tokens of thought"


class ChatModel(Protocol):
    """Answers conversations, one at a time."""

    has_chat_template: bool
    # of the last answer; None where it was stopped before the count came
    usage: Usage | None

    def stream(self, messages: Messages, thinking: Thinking) -> Generator[tuple[str, bool]]:
        """Pieces of the answer, each with whether it is thought."""
        ...

    def stats_line(self) -> str:
        """What the last answer took."""
        ...


class LocalModel:
    """A model in this process; without a chat template the last message is continued as plain text."""

    def __init__(self, llm: "LLM", params: "SamplingParams") -> None:
        self.llm = llm
        self.params = params
        self.has_chat_template = llm.has_chat_template
        self.usage: Usage | None = None

    def stream(self, messages: Messages, thinking: Thinking) -> Generator[tuple[str, bool]]:
        """As `ChatModel.stream`; max_tokens shrinks when the model's length is nearly full."""
        self.usage = None
        if self.has_chat_template:
            ids = self.llm.encode_chat(messages, {} if thinking.enabled else {"enable_thinking": False})
        else:
            ids = self.llm.encode(messages[-1]["content"])
        room = self.llm.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(ids):,} tokens and max_model_len is {self.llm.max_model_len:,}; /clear"
            )
        budget = thinking.budget if thinking.enabled else None
        longest = min(self.params.max_tokens or room, room)
        params = replace(self.params, max_tokens=longest, thinking_budget=budget)
        markers = self.llm.codec.markers if self.llm.codec else None
        is_thought = self.has_chat_template and markers is not None and Thought(markers, ids).inside
        split = ThoughtSplitter(is_thought, (markers.start, markers.end) if markers is not None else MARKERS)
        stream = self.llm.generate([ids], params, stream=True)
        try:
            for news in stream:
                yield from split.feed(news.completions[0].text)
            yield from split.end()
        finally:
            stream.close()
            self.usage = Usage(len(ids), self.llm.stats.generated_tokens)

    def stats_line(self) -> str:
        """Prompt, answer and drafts."""
        return stats_line(self.llm.stats)


class RemoteModel:
    """A model behind a server, whose reasoning fields are thought."""

    has_chat_template = True

    def __init__(self, server: ChatServer, body: dict[str, Any]) -> None:
        self.server = server
        self.body = body
        self.usage: Usage | None = None
        self._first_s: float | None = None
        self._whole_s = 0.0

    def stream(self, messages: Messages, thinking: Thinking) -> Generator[tuple[str, bool]]:
        """As `ChatModel.stream`; a server that has no reasoning fields leaves the markers in its text."""
        self.usage, self._first_s = None, None
        body = dict(self.body)
        if not thinking.enabled:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        elif thinking.budget is not None:
            body["thinking_token_budget"] = thinking.budget
        split: ThoughtSplitter | None = ThoughtSplitter(False)
        start = time.monotonic()
        stream = self.server.stream(messages, body)
        try:
            for delta in stream:
                self.usage = delta.usage or self.usage
                if delta.thought:
                    split = None
                    yield delta.thought, True
                if delta.text:
                    yield from split.feed(delta.text) if split else ((delta.text, False),)
                if self._first_s is None and (delta.thought or delta.text):
                    self._first_s = time.monotonic() - start
            yield from split.end() if split else ()
        finally:
            stream.close()
            self._whole_s = time.monotonic() - start

    def stats_line(self) -> str:
        """Tokens as the server counts them, times as this side sees them."""
        usage, first_s = self.usage, self._first_s or self._whole_s
        if usage is None:
            return f"stopped after {self._whole_s:.2f} s"
        rest_s = self._whole_s - first_s
        rate = f", {(usage.completion_tokens - 1) / rest_s:,.1f} tokens/s" if rest_s > 0 else ""
        cached = f", {usage.cached_tokens:,} of them cached" if usage.cached_tokens else ""
        thought = f", {usage.reasoning_tokens:,} of them thought" if usage.reasoning_tokens else ""
        return (
            f"prompt {usage.prompt_tokens:,} tokens{cached}; first token after {first_s:.2f} s; "
            f"answer {usage.completion_tokens:,} tokens{thought}{rate}"
        )


class ThoughtSplitter:
    """Takes the markers out of streamed text and says what stood between them, wherever the text was cut.

    Args:
        is_thought: whether the text begins inside a thought
        markers: what opens and closes one
    """

    def __init__(self, is_thought: bool, markers: tuple[str, str] = MARKERS) -> None:
        self._is_thought = is_thought
        self._markers = markers
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces that are known; what may become a marker is held back."""
        text = self._held + text
        while True:
            # the other marker changes nothing where it stands, and is no text either
            found = [(text.find(marker), marker) for marker in self._markers if marker in text]
            if not found:
                break
            at, marker = min(found)
            if at:
                yield text[:at], self._is_thought
            self._is_thought = marker == self._markers[0]
            text = text[at + len(marker) :]
        longest = min(len(text), max(map(len, self._markers)) - 1)
        keep = next(
            n for n in range(longest, -1, -1) if any(m.startswith(text[len(text) - n :]) for m in self._markers)
        )
        self._held = text[len(text) - keep :]
        if len(text) > keep:
            yield text[: len(text) - keep], self._is_thought

    def end(self) -> Iterator[tuple[str, bool]]:
        """What was held back and became no marker."""
        if self._held:
            yield self._held, self._is_thought
            self._held = ""
