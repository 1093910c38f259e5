"""Between text and token ids: what the engine needs of a transformers tokenizer, typed.

Special tokens have no text, except the markers of thoughts and tool calls: without them the parts would run together.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from alloy.core.toml import is_list, is_table
from alloy.engine.reasoning import ThinkingMarkers
from alloy.errors import CheckpointError, RequestError

Message = Mapping[str, Any]

THINK = ("<think>", "</think>")
NO_MARKERS = f"the tokenizer has no single tokens {THINK[0]} and {THINK[1]} and its chat template does not write them"
# special tokens with text, because what stands between them has a meaning
KEPT = (*THINK, "<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>")
# special tokens that end a turn in the chat layouts that models are released with
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
# bytes behind the letters of a byte-level vocabulary: their own code points, the others one after another from 256 on
LETTERS = set(pre_tokenizers.ByteLevel.alphabet())
HIDDEN = [byte for byte in range(256) if chr(byte) not in LETTERS]
BYTES = {letter: HIDDEN[ord(letter) - 256] if ord(letter) > 255 else ord(letter) for letter in LETTERS}


class Codec:
    """A fast tokenizer, its special tokens sorted by what they mean to the engine.

    Attributes:
        skipped: ids without text
        ends: ids that end an answer
        markers: what opens and closes a thought, if the model says
        spell: UTF-8 of an id, where a text is that of its ids one after another; else None

    Args:
        tokenizer: of the model
        reasoning: what the model's generation_config.json says under that key: its markers, or nothing
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: object = None) -> None:
        # transformers types its tokenizers too loosely to check
        self._tokenizer: Any = tokenizer
        self._backend: Any = self._tokenizer.backend_tokenizer
        special = {token.content: i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        known: dict[str, int] = self._tokenizer.get_vocab()
        start, end = [self._marker(reasoning, k) for k in ("start", "end")] if is_table(reasoning) else THINK
        self.skipped = frozenset[int](i for content, i in special.items() if content not in (*KEPT, start, end))
        ends: set[int] = {special[content] for content in TURN_ENDS if content in special}
        eos: int | None = self._tokenizer.eos_token_id
        self.ends = frozenset(ends if eos is None else ends | {eos})
        self.spell = cache(self._spell) if isinstance(self._backend.decoder, decoders.ByteLevel) else None
        # compilers of grammars by width of the logits, see grammar.py
        self.grammars: dict[int, object] = {}
        self.markers: ThinkingMarkers | None = None
        encode = partial(self.encode, name="a marker", add_special_tokens=False)
        if start in known and end in known:
            single = {known[start]: start, known[end]: end}
            self.markers = ThinkingMarkers(start, end, tuple(single), self.ends, lambda i: single.get(i, ""), encode)
        elif is_table(reasoning) or start in self.chat_template or end in self.chat_template:
            self.markers = ThinkingMarkers(start, end, (), self.ends, cache(self._piece), encode)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer can lay out a conversation."""
        return bool(self._tokenizer.chat_template)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out; incomplete UTF-8 as U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def _spell(self, token: int) -> bytes:
        """What a byte-level decoder makes of an id; unknown ids have no text."""
        piece: str = self._backend.id_to_token(token) or ""
        return bytes(map(BYTES.__getitem__, piece)) if LETTERS.issuperset(piece) else piece.encode()

    def _piece(self, token: int) -> str:
        """Text of a token inside a text: some decoders take a space from the first one."""
        before = self.encode("a", "a text", add_special_tokens=False)
        return "" if token in self.skipped else self.decode([*before, token])[len(self.decode(before)) :]

    def _marker(self, named: Mapping[str, Any], key: str) -> str:
        """Text of a marker that is given as text, as ids, or as lists of ids that all mean it."""
        value: Any = named.get(key)
        ids: Any = value[0] if is_list(value) and value and is_list(value[0]) else value
        if is_list(ids) and all(isinstance(token, int) for token in ids):
            value = self.decode(ids)
        if not isinstance(value, str) or not value.strip():
            raise CheckpointError(f"generation_config.json: reasoning.{key} must be the text or the ids of a marker")
        return value.strip()

    def serialize(self, extra: str) -> tuple[str, int]:
        """The tokenizer as the JSON of the tokenizers library with `extra` as one more special token, and its id."""
        copy: Any = Tokenizer.from_str(self._backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([AddedToken(extra, special=True)])
        return copy.to_str(), copy.token_to_id(extra)

    def encode(self, text: str, name: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; `name` is what an error calls it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                "which is not text; remove it"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @property
    def chat_template(self) -> str:
        """Source of the tokenizer's chat template; empty without one, or when it has several."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else ""

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """Ids of a conversation, up to where the answer begins."""
        return self.encode(self.render_chat(messages, variables), "a message", add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Text of a conversation, up to where the answer begins unless `variables` say otherwise."""
        if not self.has_chat_template:
            raise RequestError("the model's tokenizer has no chat template; use generate with a text prompt")
        try:
            return self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], **{"add_generation_prompt": True, **variables, "tokenize": False}
            )
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
