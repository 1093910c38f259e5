"""What a caller asks of the engine and what it gets back. No tensors here; the names are final.

The engine speaks token ids; text enters through the tokenizer and leaves through `detokenizer.py`.
Fields whose machinery does not exist yet are refused when set, in one sentence, never ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from alloy.engine.grammar import Grammar
from alloy.errors import RequestError

FinishReason = Literal["stop", "length", "error"]
LogprobsOf = Literal["model", "sampled"]

MAX_SAMPLES = 1024
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
SEED_RANGE = range(-(2**63), 2**64)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Order per token: grammar, forced tokens and bans, logit_bias, penalties, temperature, top_k, top_p, min_p, draw.
    """

    # None: until the model stops or max_model_len is full
    max_tokens: int | None = None
    # end-of-sequence and stop conditions are held off until then
    min_tokens: int = 0
    # samples per prompt; the prompt is computed once
    n: int = 1

    # 0: greedy, lowest id wins ties
    temperature: float = 1.0
    # 0: off
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    # presence and frequency count generated tokens, repetition those of the prompt too
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    # a seeded answer does not depend on the requests beside it; None: a fresh seed each time
    seed: int | None = None

    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    # False: special tokens have text, too; those around thoughts and calls always have
    skip_special_tokens: bool = True
    ignore_eos: bool = False

    # number of most likely alternatives beside the chosen token; None: no logprobs
    logprobs: int | None = None
    # "model": before penalties, temperature and truncation; "sampled": after them; or both
    logprobs_of: LogprobsOf | Sequence[LogprobsOf] = "model"
    prompt_logprobs: int | None = None

    # tokens inside the thought, those in the prompt included; None: no limit
    thinking_budget: int | None = None
    # a newline within this many tokens of the budget closes the thought
    thinking_grace: int = 0
    # written before the end marker when the budget closes the thought
    thinking_close_text: str = ""
    # what the answer must be, once the thought has ended
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        of = (self.logprobs_of,) if isinstance(self.logprobs_of, str) else tuple(self.logprobs_of)
        object.__setattr__(self, "logprobs_of", of)
        self._check_numbers()
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

    def _check_numbers(self) -> None:
        optional = ("max_tokens", "seed", "logprobs", "prompt_logprobs", "thinking_budget")
        for name in (*optional, "min_tokens", "n", "top_k", "thinking_grace"):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise RequestError(f"{name} = {value!r} is not a whole number")
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RequestError(f"{name} = {value!r} is not a finite number")
        _within("max_tokens", self.max_tokens, 1, math.inf)
        _within("min_tokens", self.min_tokens, 0, math.inf)
        _within("n", self.n, 1, MAX_SAMPLES)
        _within("temperature", self.temperature, 0, 100)
        _within("top_k", self.top_k, 0, math.inf, "0 turns it off")
        _within("min_p", self.min_p, 0, 1)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _within("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _within("thinking_budget", self.thinking_budget, 0, math.inf, "None means no limit")
        _within("thinking_grace", self.thinking_grace, 0, math.inf)
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p = {self.top_p} is outside (0, 1]; 1 turns it off")
        if not 0 < self.repetition_penalty <= 100:
            raise RequestError(f"repetition_penalty = {self.repetition_penalty} is outside (0, 100]; 1 turns it off")
        if self.seed is not None and self.seed not in SEED_RANGE:
            raise RequestError(f"seed = {self.seed} does not fit in 64 bits")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}")

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are allowed")
        for i, text in enumerate(self.stop):
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]  the caller's JSON
                raise RequestError(f"stop[{i}] = {text!r} is not a string of at least one character")
        for i, token in enumerate(self.stop_token_ids):
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise RequestError(f"stop_token_ids[{i}] = {token!r} is not a token id")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise RequestError(f"logit_bias has the key {token!r}, which is not a token id")
            if not isinstance(bias, int | float) or not abs(bias) <= MAX_BIAS:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise RequestError(f"logit_bias[{token}] = {bias!r} is outside -{MAX_BIAS:g}..{MAX_BIAS:g}")
        if not self.logprobs_of or set(self.logprobs_of) - {"model", "sampled"}:
            raise RequestError(f'logprobs_of = {self.logprobs_of!r} is unknown; use "model", "sampled" or both')


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


def _within(name: str, value: float | None, low: float, high: float, hint: str = "") -> None:
    if value is None or low <= value <= high:
        return
    bounds = f"at least {low:g}" if math.isinf(high) else f"within {low:g}..{high:g}"
    raise RequestError(f"{name} = {value} must be {bounds}" + (f"; {hint}" if hint else ""))
