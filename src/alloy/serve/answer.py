"""What the engine says, put together into what a client is told: parts of an answer, its log probabilities, and usage."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alloy.engine.request import Completion, Output, TokenLogprobs
from alloy.serve.driver import Ticket
from alloy.serve.errors import SERVER, ApiError
from alloy.serve.model import ServedModel, logprob
from alloy.serve.protocol import Json
from alloy.serve.reasoning import Split
from alloy.serve.tools import Call, ToolParser


@dataclass
class Delta:
    """What one increment adds to one choice."""

    thought: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list[Call])

    @property
    def is_empty(self) -> bool:
        """Whether nothing became certain."""
        return not (self.thought or self.text or self.calls)


@dataclass(frozen=True)
class Layout:
    """How answers of one request are taken apart.

    Attributes:
        model: for its markers and token texts
        is_inside: answers begin inside a thought
        has_thoughts: thoughts are told apart at all
        tools: arguments of ToolParser; None: no tools
    """

    model: ServedModel
    is_inside: bool = False
    has_thoughts: bool = True
    tools: dict[str, Any] | None = None


class Choice:
    """One sample: its parts so far."""

    def __init__(self, index: int, layout: Layout) -> None:
        self.index = index
        self.thought = ""
        self.text = ""
        self.calls: list[Call] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.drafted = 0
        self.accepted = 0
        self._reasoning_tokens = 0
        self._model = layout.model
        self._has_thoughts = layout.has_thoughts
        self._parser = ToolParser(**layout.tools) if layout.tools is not None else None
        markers = layout.model.markers if layout.has_thoughts else None
        ends = self._parser.opens if self._parser is not None else ()
        self._split = Split(markers, layout.is_inside, ends)

    def feed(self, completion: Completion) -> Delta:
        """Take an increment."""
        if completion.finish_reason == "error":
            message = "no token could be chosen: the scores are not numbers (NaN), or all are ruled out; try other sampling values"
            raise ApiError(500, message, "model_error", kind=SERVER)
        was_inside = self._split.is_inside
        delta = Delta()
        self._place(self._split.push(completion.text), delta)
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs or []
        self.drafted, self.accepted = completion.drafted, completion.accepted
        self._count(completion, was_inside)
        if completion.finish_reason is not None:
            self._place(self._split.finish(), delta)
            if self._parser is not None:
                self._add(self._parser.finish(), delta)
            self.stop_reason = completion.stop_reason
            called = bool(self.calls) and completion.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else completion.finish_reason
        return delta

    @property
    def reasoning_tokens(self) -> int:
        """Tokens inside the thought, its markers excluded."""
        return self._reasoning_tokens

    def _place(self, parts: Sequence[tuple[str, str]], delta: Delta) -> None:
        for kind, text in parts:
            if kind == "thought":
                delta.thought += text
                self.thought += text
            elif self._parser is not None:
                self._add(self._parser.push(text), delta)
            else:
                delta.text += text
                self.text += text

    def _add(self, pieces: Sequence[str | Call], delta: Delta) -> None:
        for piece in pieces:
            if isinstance(piece, Call):
                delta.calls.append(piece)
                self.calls.append(piece)
            else:
                delta.text += piece
                self.text += piece

    def _count(self, completion: Completion, was_inside: bool) -> None:
        """Thought tokens: the engine's count where it keeps one, else those before the end marker."""
        if completion.reasoning_tokens:
            self._reasoning_tokens = completion.reasoning_tokens
            return
        markers = self._model.llm.codec.markers if self._model.llm.codec else None
        ids = completion.token_ids
        if not self._has_thoughts:
            return
        if not was_inside and not self._split.is_inside and not (markers and markers.start in ids):
            return
        start = ids.index(markers.start) + 1 if markers and markers.start in ids else 0
        end = ids.index(markers.end) if markers and markers.end in ids else len(ids)
        self._reasoning_tokens += max(0, end - start)


@dataclass
class Head:
    """What every body of one answer repeats."""

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, object: str, choices: list[Json]) -> Json:
        """The frame of a body or chunk."""
        return {"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices}


class Tally:
    """Token counts over all choices of a ticket."""

    def __init__(self, ticket: Ticket) -> None:
        self.prompt_tokens = ticket.prompt_tokens
        self.choices: dict[tuple[str, int], Choice] = {}
        self._cached: dict[str, int] = {}

    def note(self, output: Output) -> None:
        """Take what an output says of its prompt."""
        self._cached[output.id] = max(output.cached_tokens, self._cached.get(output.id, 0))

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(self._cached.values())

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""
        return sum(len(c.token_ids) for c in self.choices.values())

    @property
    def reasoning_tokens(self) -> int:
        """Of them inside thoughts."""
        return sum(c.reasoning_tokens for c in self.choices.values())

    @property
    def usage(self) -> Json:
        """The `usage` object of chat and completions."""
        drafted = sum(c.drafted for c in self.choices.values())
        accepted = sum(c.accepted for c in self.choices.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
                "audio_tokens": 0,
            },
        }


def chat_logprobs(model: ServedModel, entries: Sequence[TokenLogprobs], top: int) -> Json:
    """`logprobs` of a chat choice."""

    def one(token: int, value: float | None) -> Json:
        text = model.decode(token)
        # half a character has no text to give bytes of
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob(value), "bytes": data}

    content = [
        {**one(e.token, e.model), "top_logprobs": [one(token, value) for token, value in e.top[:top]]} for e in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(model: ServedModel, entries: Sequence[TokenLogprobs | None], ids: Sequence[int], offset: int) -> Json:
    """`logprobs` of a completion choice; the first token of a prompt has none."""
    tokens = [model.decode(token) for token in ids]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if e is None else logprob(e.model) for e in entries],
        "top_logprobs": [None if e is None else _named(model, e) for e in entries],
        "text_offset": offsets,
    }


def new_id(prefix: str) -> str:
    """A fresh id of the API."""
    return f"{prefix}{uuid.uuid4().hex}"


def _named(model: ServedModel, entry: TokenLogprobs) -> dict[str, float | None]:
    named: dict[str, float | None] = {}
    for token, value in (*entry.top, (entry.token, entry.model)):
        # of tokens with the same text the likeliest counts
        named.setdefault(model.decode(token), logprob(value))
    return named
