"""What the engine says, put together into what a client is told: parts of an answer, its log probabilities, and usage."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alloy.engine.reasoning import Thought
from alloy.engine.request import Completion, Request, TokenLogprobs
from alloy.serve.errors import ApiError
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


@dataclass(frozen=True)
class Layout:
    """How answers of one request are taken apart.

    Attributes:
        model: for its markers and token texts
        is_inside: answers begin inside a thought
        has_thoughts: thoughts are told apart at all
        is_score: only the prompt counts; the token that had to be generated is left out
        tools: arguments of ToolParser; None: no tools
    """

    model: ServedModel
    is_inside: bool = False
    has_thoughts: bool = True
    is_score: bool = False
    tools: dict[str, Any] | None = None


class Choice:
    """One sample of a request: its parts so far."""

    def __init__(self, index: int, request: Request, layout: Layout) -> None:
        self.index = index
        self.request = request
        self.thought = ""
        self.text = ""
        self.calls: list[Call] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.drafted = 0
        self.accepted = 0
        # characters of the tokens that a stream has told the scores of
        self.offset = 0
        # tokens inside the thought, its markers excluded
        self.reasoning_tokens = 0
        self._parser = ToolParser(**layout.tools) if layout.tools is not None else None
        codec = layout.model.llm.codec
        markers = codec.markers if codec is not None and layout.has_thoughts else None
        self._thought = Thought(markers, inside=layout.is_inside) if markers is not None else None
        ends = self._parser.opens if self._parser is not None else ()
        self._split = Split(layout.model.markers if layout.has_thoughts else None, layout.is_inside, ends)

    def feed(self, completion: Completion) -> Delta:
        """Take an increment."""
        if completion.finish_reason == "error":
            message = "no token could be chosen: the scores are not numbers (NaN), or all are ruled out; try other sampling values"
            raise ApiError(500, message, "model_error")
        was_answer = self._split.is_answer
        delta = Delta()
        self._place(self._split.push(completion.text), delta)
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs or []
        self.drafted, self.accepted = completion.drafted, completion.accepted
        if self.request.params.thinking_budget is not None:
            self.reasoning_tokens = completion.reasoning_tokens
        elif self._thought is not None and not was_answer:
            for token in completion.token_ids:
                self._thought.push(token)
            self.reasoning_tokens = self._thought.used
        if completion.finish_reason is not None:
            self._place(self._split.finish(), delta)
            if self._parser is not None:
                self._add(self._parser.finish(), delta)
        self.thought += delta.thought
        self.text += delta.text
        self.calls += delta.calls
        called = bool(self.calls) and completion.finish_reason == "stop"
        self.finish_reason = "tool_calls" if called else completion.finish_reason
        self.stop_reason = completion.stop_reason
        return delta

    def _place(self, parts: Sequence[tuple[str, str]], delta: Delta) -> None:
        for kind, text in parts:
            if kind == "thought":
                delta.thought += text
            else:
                self._add(self._parser.push(text) if self._parser is not None else [text], delta)

    def _add(self, pieces: Sequence[str | Call], delta: Delta) -> None:
        for piece in pieces:
            if isinstance(piece, Call):
                delta.calls.append(piece)
            else:
                delta.text += piece


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


def new_head(kind: str, id: str, model: str) -> Json:
    """What every body and chunk of one answer repeats."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def new_id(prefix: str) -> str:
    """A fresh id of the API."""
    return f"{prefix}{uuid.uuid4().hex}"


def _named(model: ServedModel, entry: TokenLogprobs) -> dict[str, float | None]:
    named: dict[str, float | None] = {}
    for token, value in (*entry.top, (entry.token, entry.model)):
        # of tokens with the same text the likeliest counts
        named.setdefault(model.decode(token), logprob(value))
    return named
