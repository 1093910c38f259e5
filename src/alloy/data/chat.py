"""Chats: messages through the tokenizer's template into ids, with a mask of what is trained on, packed into rows.

A message is an object with `role` and `content` (text, or parts of type text), perhaps `reasoning_content` and `tool_calls`.
Only what an assistant has to write is trained on: what follows the prompt that the template gives it, up to its turn's end.
Every turn is trained in the context that the template gives it when it is generated; where a template cuts the thoughts of
earlier turns, a chat therefore becomes several samples, one for each context. Special tokens in the text of a message stay
text, as in documents.

Packed rows have Megatron's columns: `input_ids`, `loss_mask` (1: the loss of the next token counts) and `seq_start_id` (where
samples begin).

Columns: NVIDIA-NeMo/Nemotron, src/nemotron/data_prep/packing/builder.py. Differs: the mask is aligned with labels as
Megatron-Bridge's GPTSFTPackedDataset reads it (labels[t] = input_ids[t + 1]); the builder shifts it the other way.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from alloy.data.packing import pack_best_fit

# Nemotron 3's layout (hybrid-models.md 13): always a system turn; reasoning before the last user turn is cut
CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("this tokenizer's chat template has no layout for tools") }}{% endif %}
{%- set thinking = enable_thinking if enable_thinking is defined else true %}
{%- set truncate = truncate_history_thinking if truncate_history_thinking is defined else true %}
{%- set turns = messages %}
{%- set system = "" %}
{%- if messages and messages[0].role == "system" %}
{%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for turn in turns %}{% if turn.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{{- "<|im_start|>system\\n" + system + "<|im_end|>\\n" }}
{%- for turn in turns %}
{%- if turn.role not in ["user", "assistant"] %}
{{- raise_exception("unknown role " + turn.role + " in turn " + loop.index|string + "; use system (first), user or assistant") }}
{%- endif %}
{{- "<|im_start|>" + turn.role + "\\n" }}
{%- if turn.role == "assistant" %}
{%- if turn.reasoning_content and (not truncate or loop.index0 > last.user) %}
{{- "<think>\\n" + turn.reasoning_content + "\\n</think>\\n" }}
{%- else %}
{{- "<think></think>" }}
{%- endif %}
{%- endif %}
{{- turn.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" + ("<think>\\n" if thinking else "<think></think>") }}
{%- endif %}"""

PACKED = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8())), ("seq_start_id", pa.list_(pa.int32()))]
)
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# stand for special tokens that a message holds as text while the template is filled in
STAND_IN = 0x100000
STAND_INS = re.compile("([\U00100000-\U0010fffd])")

Reasoning = Literal["keep", "strip"]
Message = Mapping[str, Any]


class BadChat(Exception):  # noqa: N818  a reason, counted
    """Why a chat cannot be trained on, in a few words that are the same for all chats of that fault."""


class Sample(NamedTuple):
    """ids int32 (tokens,), mask uint8 (tokens,): 1 where the next token is trained on."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


class ChatEncoder:
    """Encodes chats of one tokenizer.

    Args:
        tokenizer: with a chat template
        reasoning: "keep" the thoughts of assistants, or "strip" them
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, reasoning: Reasoning = "keep") -> None:
        self._tokenizer = tokenizer
        self._keep = reasoning == "keep"
        self._encoder = _plain(tokenizer)
        self._letters = _plain(tokenizer)
        self._letters.encode_special_tokens = True
        special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})
        self._special = special
        self._written = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or "$^"
        )

    def encode(self, messages: object, tools: object = None) -> list[Sample]:
        """The samples of a chat, each of whose assistant turns is trained on in one of them; BadChat with the reason."""
        turns = [self._hide(turn) for turn in read_messages(messages, self._keep)]
        tools = self._hide(json.loads(tools) if isinstance(tools, str) else tools) or None
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not places:
            raise BadChat("no assistant turn")
        if places[0] == 0:
            raise BadChat("an answer without anything before it")
        # from the last turn back: a turn joins the text that begins with its own context, or begins a text of its own
        texts: list[tuple[str, list[tuple[int, int]]]] = []
        for i in reversed(places):
            done = self._render(turns[: i + 1], tools)
            span = (self._answer_start(turns[:i], tools, done), len(done.rstrip()))
            # a turn that is not the last may be followed by more than its context: a chat that ends with a question
            for text, spans in texts:
                if text.startswith(done):
                    spans.append(span)
                    break
            else:
                texts.append((done, [span]))
        return [self._sample(text, sorted(spans)) for text, spans in reversed(texts)]

    def _answer_start(self, before: list[Message], tools: object, done: str) -> int:
        """Where in `done` the prompt ends that the template writes before an answer."""
        prompts = [self._render(before, tools, add_generation_prompt=True, enable_thinking=on) for on in (True, False)]
        whole = [len(prompt) for prompt in prompts if done.startswith(prompt)]
        if whole:
            return max(whole)
        # the prompt opens a thought that this turn lacks
        return max(_common(prompt, done) for prompt in prompts)

    def _render(self, messages: list[Message], tools: object, **options: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)  # type: ignore[arg-type]  lists of mappings
        except (TemplateError, TypeError) as error:
            raise BadChat(f"the chat template refuses it: {str(error)[:80]}") from error
        assert isinstance(text, str), "not tokenized"
        return text

    def _hide(self, value: Any) -> Any:
        """The value with special tokens in its texts replaced by stand-ins."""
        if isinstance(value, str):
            if STAND_INS.search(value):
                raise BadChat("characters of plane 16, which are reserved")
            return self._written.sub(lambda found: chr(STAND_IN + self._special.index(found[0])), value)
        if isinstance(value, Mapping):
            return {key: inner if key == "role" else self._hide(inner) for key, inner in value.items()}
        return [self._hide(inner) for inner in value] if isinstance(value, list) else value

    def _sample(self, text: str, spans: list[tuple[int, int]]) -> Sample:
        """Ids of a text cut where training begins and ends, as prompt and answer are in generation."""
        ids: list[int] = []
        trained: list[bool] = []
        position = 0
        for start, stop in [*spans, (len(text), len(text))]:
            for piece, counts in ((text[position:start], False), (text[start:stop], True)):
                for number, part in enumerate(STAND_INS.split(piece)):
                    hidden = self._special[ord(part) - STAND_IN] if number % 2 else ""
                    coder = self._letters if hidden else self._encoder
                    found = coder.encode(hidden or part, add_special_tokens=False).ids
                    ids += found
                    trained += [counts] * len(found)
            position = stop
        return Sample(np.array(ids, np.int32), np.array([*trained[1:], False], np.uint8))


def read_messages(messages: object, reasoning: bool = True) -> list[dict[str, Any]]:
    """Messages in one form: `content` is text, a thought stands in `reasoning_content`; BadChat for what is none.

    Args:
        messages: a list of objects, or its JSON
        reasoning: keep thoughts
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise BadChat("messages are not JSON") from error
    if not isinstance(messages, list) or not messages:
        raise BadChat("messages are not a list, or an empty one")
    turns: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadChat("a message without a role")
        turn = {str(key): _without_null(value) for key, value in message.items() if value is not None}
        content = turn.get("content", "")
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise BadChat("content that is not text")
        if turn["role"] == "assistant":
            thought = turn.pop("reasoning", None) or turn.pop("reasoning_content", None)
            if found := THOUGHT.match(content):
                thought, content = found[1].strip("\n"), content[found.end() :]
            if thought and reasoning:
                turn["reasoning_content"] = str(thought)
            if not (content or thought or turn.get("tool_calls")):
                raise BadChat("an empty assistant turn")
        turns.append({**turn, "content": content})
    return turns


def pack_samples(samples: Sequence[Sample], seq: int) -> pa.Table:
    """Samples of at most `seq` tokens in packed rows of at most `seq`, best fit."""
    rows: dict[str, list[Any]] = {name: [] for name in PACKED.names}
    for row in pack_best_fit([len(sample.ids) for sample in samples], seq):
        parts = [samples[piece.document] for piece in row]
        rows["input_ids"].append(np.concatenate([part.ids for part in parts]))
        rows["loss_mask"].append(np.concatenate([part.mask for part in parts]))
        rows["seq_start_id"].append(np.cumsum([0] + [len(part.ids) for part in parts[:-1]], dtype=np.int32))
    return pa.table(rows, schema=PACKED)


def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _common(first: str, second: str) -> int:
    """Characters that both begin with."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _without_null(value: Any) -> Any:
    """Columns of objects have a null for every key that another row has."""
    if isinstance(value, Mapping):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value
