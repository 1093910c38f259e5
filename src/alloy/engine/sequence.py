"""One sample being generated: its tokens, its text, where it lies in the cache, and the rules that end it."""

from collections import deque
from time import perf_counter

from torch import Tensor

from alloy.engine.detokenizer import Detokenizer
from alloy.engine.grammar import CompiledGrammar
from alloy.engine.prefix import Kind
from alloy.engine.random import uniforms
from alloy.engine.reasoning import ThinkingBudget
from alloy.engine.request import Completion, FinishReason, Request, Timings, TokenLogprobs

UNIFORM_BLOCK = 64


class Sequence:
    """One of the n samples of a request.

    Args:
        request: what the caller asked.
        order: position of the request in the call.
        index: which of the n samples.
        seed: 64-bit key of the sample's random numbers.
        max_tokens: tokens it may generate, the room in the model's length included.
        eos_ids: the model's own ends of sequence.
        detokenizer: None without a tokenizer; the text stays empty then.
        thinking: counter of the thought, when a budget is set.
        grammar: what the answer must be.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        index: int,
        seed: int,
        max_tokens: int,
        eos_ids: frozenset[int],
        detokenizer: Detokenizer | None = None,
        thinking: ThinkingBudget | None = None,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        self.request = request
        self.params = request.params
        self.order = order
        self.index = index
        self.prompt = request.token_ids
        self.tokens: list[int] = []
        # prompt and generated tokens
        self.known = list(request.token_ids)
        # where it lies in the cache, and how many tokens the cache holds of it
        self.slot = -1
        self.computed = 0
        # tokens that drafts have not seen yet, without the newest, and the hidden states before all of them
        self.behind: tuple[int, ...] = ()
        self.hidden: Tensor | None = None
        # positions at which the prompt's computation stops for a snapshot, and of what kind
        self.stops: list[tuple[int, Kind]] = []
        self.preemptions = 0
        # tokens of its prompt that were found computed; None: it has not begun
        self.cached: int | None = None
        self.prompt_scores: list[TokenLogprobs | None] = [None]
        self.max_tokens = max_tokens
        self.eos_ids = frozenset[int]() if request.params.ignore_eos else eos_ids
        self.stop_ids = self.eos_ids | frozenset(request.params.stop_token_ids)
        self.grammar = None if grammar is None else grammar.start(self.prompt, self.stop_ids)
        self.forced: deque[int] = deque()
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.drafted = 0
        self.accepted = 0
        self.timings = Timings()
        self.logprobs: list[TokenLogprobs] = []
        self._seed = seed
        self._uniforms: tuple[int, list[float]] = (-1, [])
        self._detokenizer = detokenizer
        self._thinking = thinking
        self._text = ""
        self._taken = 0
        if thinking is not None:
            self.forced.extend(thinking.start(self.prompt))

    def start(self, cached: int) -> None:
        """It has a slot; `cached` tokens of its prompt are computed already."""
        self.cached = cached
        self.timings.started_s = perf_counter() - self.request.arrival

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """Whether `take` would return anything new."""
        return self.finished or bool(self._text) or (self._detokenizer is None and self._taken < len(self.tokens))

    @property
    def scored(self) -> int | None:
        """Alternatives wanted with the log probabilities of the prompt, while it is computed; None: none are."""
        return None if self.tokens else self.params.prompt_logprobs

    def uniform(self, position: int) -> float:
        """The random number in (0, 1) of the generated token at `position`: a function of seed, sample and position."""
        block, offset = divmod(position, UNIFORM_BLOCK)
        if self._uniforms[0] != block:
            self._uniforms = (block, uniforms(self._seed, self.index, block * UNIFORM_BLOCK, UNIFORM_BLOCK))
        return self._uniforms[1][offset]

    def append(self, sampled: int) -> int:
        """Take the next token, the forced one if there is one, and apply every rule that may end the sample.

        Args:
            sampled: what the sampler chose; -1 says that the logits were not finite.

        Returns:
            the token that was appended, or `sampled` where none could be
        """
        is_forced = bool(self.forced)
        if is_forced:
            token = self.forced.popleft()
        elif sampled < 0:
            self._finish("error")
            return sampled
        else:
            token = sampled
        if self._thinking is not None:
            self.forced.extend(self._thinking.observe(token, is_forced))
        is_end = token in self.stop_ids and len(self.tokens) >= self.params.min_tokens
        if self.grammar is not None and not is_end and not self.grammar.advance(token):
            # every token that the grammar allows was banned or had no finite logit
            self._finish("stop" if self.grammar.may_stop else "error")
            return sampled
        self.tokens.append(token)
        self.known.append(token)
        if self.timings.first_token_s is None:
            self.timings.first_token_s = perf_counter() - self.request.arrival
        if is_end:
            if self._detokenizer is not None and self.params.include_stop_str_in_output:
                self._text += self._detokenizer.push(token, may_stop=False)
            self._finish("stop", None if token in self.eos_ids else token)
            return token
        if self._detokenizer is not None:
            self._text += self._detokenizer.push(token, len(self.tokens) >= self.params.min_tokens)
            if self._detokenizer.stopped_by is not None:
                self._finish("stop", self._detokenizer.stopped_by)
                return token
        if self.grammar is not None and self.grammar.done:
            self._finish("stop")
        elif len(self.tokens) >= self.max_tokens:
            self._finish("length")
        return token

    def take(self) -> Completion:
        """What is new since the last call."""
        text, self._text = self._text, ""
        new, self._taken = self.tokens[self._taken :], len(self.tokens)
        logprobs, self.logprobs = self.logprobs, []
        return Completion(
            index=self.index,
            text=text,
            token_ids=new,
            logprobs=logprobs if self.params.logprobs is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            drafted=self.drafted,
            accepted=self.accepted,
            reasoning_tokens=self._thinking.thought.used if self._thinking is not None else 0,
            timings=self.timings,
        )

    def _finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        if self._detokenizer is not None and reason != "error":
            self._text += self._detokenizer.finish()
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.timings.finished_s = perf_counter() - self.request.arrival
