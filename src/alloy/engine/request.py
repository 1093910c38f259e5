"""What a caller asks of the engine and what it gets back. No tensors here; the names are final.

The engine speaks token ids; text enters through the tokenizer and leaves through `detokenizer.py`.
Fields whose machinery does not exist yet are refused when set, in one sentence, never ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

from alloy.engine.grammar import Grammar
from alloy.errors import RequestError

FinishReason = Literal["stop", "length", "error"]
LogprobsOf = Literal["model", "sampled"]

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
# the smallest positive number, for bounds that leave out zero
TINY = math.ulp(0.0)

T = TypeVar("T")


def _number(default: T, low: float, high: float = math.inf, says: str = "") -> T:
    """A field with bounds, and what an error says of them: whole unless the default is a float; None only as the default."""
    says = says or (f"must be at least {low:g}" if math.isinf(high) else f"must be within {low:g}..{high:g}")
    return field(default=default, metadata={"bounds": (default, low, high, says)})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Order per token: grammar, forced tokens and bans, logit_bias, penalties, temperature, top_k, top_p, min_p, draw.
    """

    # None: until the model stops or max_model_len is full
    max_tokens: int | None = _number(None, 1)
    # end-of-sequence and stop conditions are held off until then
    min_tokens: int = _number(0, 0)
    # samples per prompt; the prompt is computed once
    n: int = _number(1, 1, 1024)

    # 0: greedy, lowest id wins ties
    temperature: float = _number(1.0, 0, 100)
    # 0: off
    top_k: int = _number(0, 0, says="must be at least 0; 0 turns it off")
    top_p: float = _number(1.0, TINY, 1, "is outside (0, 1]; 1 turns it off")
    min_p: float = _number(0.0, 0, 1)
    # presence and frequency count generated tokens, repetition those of the prompt too
    presence_penalty: float = _number(0.0, -2, 2)
    frequency_penalty: float = _number(0.0, -2, 2)
    repetition_penalty: float = _number(1.0, TINY, 100, "is outside (0, 100]; 1 turns it off")
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    # a seeded answer does not depend on the requests beside it; None: a fresh seed each time
    seed: int | None = _number(None, -(2**63), 2**64 - 1, "does not fit in 64 bits")

    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    # False: special tokens have text, too; those around thoughts and calls always have
    skip_special_tokens: bool = True
    ignore_eos: bool = False

    # number of most likely alternatives beside the chosen token; None: no logprobs
    logprobs: int | None = _number(None, 0, MAX_LOGPROBS)
    # "model": before penalties, temperature and truncation; "sampled": after them; or both
    logprobs_of: LogprobsOf | Sequence[LogprobsOf] = "model"
    prompt_logprobs: int | None = _number(None, 0, MAX_LOGPROBS)

    # tokens inside the thought, those in the prompt included; None: no limit
    thinking_budget: int | None = _number(None, 0, says="must be at least 0; None means no limit")
    # a newline within this many tokens of the budget closes the thought
    thinking_grace: int = _number(0, 0)
    # written before the end marker when the budget closes the thought
    thinking_close_text: str = ""
    # what the answer must be, once the thought has ended
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "logprobs_of"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for number in NUMBERS:
            self._check_number(number.name, *number.metadata["bounds"])
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}")
        self._check_lists()
        if self.grammar is not None and not isinstance(self.grammar, Grammar):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError(f"grammar = {self.grammar!r} is not a Grammar of a kind and a text")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the model's own logits."""
        changed = self.penalised or self.logit_bias or self.min_tokens or self.grammar is not None
        return self.greedy and not changed

    def _check_number(self, name: str, default: float | None, low: float, high: float, says: str) -> None:
        value = getattr(self, name)
        if value is default:
            return
        kind, word = (int | float, "finite") if isinstance(default, float) else (int, "whole")
        if isinstance(value, bool) or not isinstance(value, kind) or not -math.inf < value < math.inf:
            raise RequestError(f"{name} = {value!r} is not a {word} number")
        if not low <= value <= high:
            raise RequestError(f"{name} = {value} {says}")

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are allowed")
        for i, text in enumerate(self.stop):
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]  the caller's JSON
                raise RequestError(f"stop[{i}] = {text!r} is not a string of at least one character")
        for i, token in enumerate(self.stop_token_ids):
            if not _is_token(token):
                raise RequestError(f"stop_token_ids[{i}] = {token!r} is not a token id")
        for token, bias in self.logit_bias.items():
            if not _is_token(token):
                raise RequestError(f"logit_bias has the key {token!r}, which is not a token id")
            if not isinstance(bias, int | float) or not abs(bias) <= MAX_BIAS:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise RequestError(f"logit_bias[{token}] = {bias!r} is outside -{MAX_BIAS:g}..{MAX_BIAS:g}")
        if not self.logprobs_of or set(self.logprobs_of) - {"model", "sampled"}:
            raise RequestError(f'logprobs_of = {self.logprobs_of!r} is unknown; use "model", "sampled" or both')


NUMBERS = [f for f in fields(SamplingParams) if "bounds" in f.metadata]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with its parameters. `id` comes back in every Output."""

    id: str
    token_ids: Sequence[int]
    params: SamplingParams
    # lower first; equal ones in order of arrival
    priority: int = 0
    # prefixes are shared among requests of one salt
    salt: str = ""
    # prompt positions where a later request may begin, such as the end of the last user turn
    keep_at: Sequence[int] = ()
    # time.perf_counter() when the engine took it
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position; `top` lists the likeliest (id, logprob), in the first distribution asked for."""

    token: int
    model: float | None
    sampled: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Timings:
    """Seconds since the request arrived; None: not reached yet."""

    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True)
class Completion:
    """One of the n samples of a request. In a stream: text, token_ids and logprobs hold what is new, the rest is total."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    # the stop string or token id that ended it; None for the model's own end of sequence
    stop_reason: str | int | None = None
    # drafted tokens that were checked, and those that were kept
    drafted: int = 0
    accepted: int = 0
    # tokens inside the thought, when a thinking budget counts them
    reasoning_tokens: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True)
class Output:
    """The answer to one request: complete from `generate`, or one increment of its stream."""

    id: str
    # which prompt of the call this answers
    index: int
    prompt_token_ids: Sequence[int]
    completions: list[Completion]
    # the first position has None: nothing predicts it
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False
    # tokens of the prompt that were not computed again
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.completions[0].text


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
