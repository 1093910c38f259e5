"""`LLM`: text or token ids in, answers out, many at a time; whole or as a stream.

Greedy answers are the same tokens alone, in a batch, with prompts in chunks and with MTP drafts (serving.md section 0).
The engine holds no state between calls: closing a stream cancels what is left of it and frees its cache.
"""

import heapq
import random
from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast, overload

import torch
from transformers import PreTrainedTokenizerBase

from alloy.core.device import resolve_device
from alloy.engine.codec import THINK, Codec, Message
from alloy.engine.detokenizer import Detokenizer
from alloy.engine.grammar import CompiledGrammar, compile_grammar
from alloy.engine.graphs import DecodeGraphs, new_pool, obstacle
from alloy.engine.reasoning import ThinkingBudget
from alloy.engine.request import Completion, Output, Request, SamplingParams
from alloy.engine.runner import EngineStats, Runner
from alloy.engine.sequence import Sequence
from alloy.engine.speculate import DraftLength
from alloy.errors import RequestError
from alloy.models.base import CausalLM
from alloy.models.paged import STATE_DTYPES
from alloy.models.quant import check_place, parse_weights, quantize_weights
from alloy.models.registry import load

Prompt = str | Items[int]
Params = SamplingParams | Items[SamplingParams] | None

# prompt tokens per model call
STEP_TOKENS = {"cpu": 512}
STEP_TOKENS_ACCELERATOR = 2048
# requests read ahead of the running ones, so that prompts can be computed together
LOOKAHEAD = 64


@dataclass
class _Answer:
    """What is known of a request while its samples run."""

    request: Request
    open: int


class LLM:
    """A model ready to generate.

    Args:
        model: a folder or hub id (see `alloy.load`), or a model
        tokenizer: of a model given as an object; None: prompts must be token ids and answers have no text
        max_model_len: longest prompt plus answer; default: the config's max_positions
        dtype, device: as in `alloy.load`, for a path
        max_seqs: sequences that run at once
        speculate: drafts of the model's MTP layers per step; "auto" measures the best number; 0: none
        weights: of a model given as a path, on a CPU: "bf16" or "int8" keeps its matrices in that precision; None: as loaded
        max_step_tokens: prompt tokens per model call; default: 512 on a CPU, else 2048
        graphs: replay decode steps as CUDA graphs where the device and the model's kernels allow it
        state_dtype: of recurrent states: float32, bfloat16, float16, or float16-sr, which rounds stochastically and needs
            graphs
    """

    def __init__(
        self,
        model: str | Path | CausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_model_len: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str = "auto",
        max_seqs: int = 16,
        speculate: int | Literal["auto"] = "auto",
        weights: str | None = None,
        max_step_tokens: int | None = None,
        graphs: bool = True,
        state_dtype: str = "float32",
    ) -> None:
        kind = None if weights is None else parse_weights(weights)
        if isinstance(model, CausalLM):
            if kind is not None:
                raise RequestError(
                    f'weights = "{kind}" would change the model that was given; give its folder, or call '
                    "alloy.models.quant.quantize_weights on it first"
                )
            self.model = model
        else:
            if kind is not None:
                check_place(kind, resolve_device(device))
            self.model, found = load(model, dtype=dtype, device=device)
            tokenizer = tokenizer or found
            if kind is not None:
                quantize_weights(self.model, kind)
        self.tokenizer = tokenizer
        config = self.model.config
        if tokenizer is not None and len(tokenizer) > config.vocab:
            raise RequestError(
                f"the tokenizer has {len(tokenizer)} tokens but the model's embedding only {config.vocab}"
            )
        self.max_model_len = max_model_len if max_model_len is not None else config.max_positions
        place = self.model.embed.weight.device.type
        if max_step_tokens is None:
            max_step_tokens = STEP_TOKENS.get(place, STEP_TOKENS_ACCELERATOR)
        self.max_step_tokens = max_step_tokens
        self.max_seqs = max_seqs
        for name in ("max_model_len", "max_seqs", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)} must be at least 1")
        self.speculate: int | Literal["auto"] = speculate
        if speculate == "auto":
            self.speculate = "auto" if self.model.has_mtp else 0
        elif not isinstance(speculate, int) or speculate < 0:  # pyright: ignore[reportUnnecessaryIsInstance]  users err
            raise RequestError(f'speculate = {speculate} must be "auto" or a number of tokens from 0')
        elif speculate and not self.model.has_mtp:
            raise RequestError(f"speculate = {speculate}, but the model has no MTP layers to draft with; use 0")
        # captured at the first call; None: steps run one operation at a time
        self.graphs: DecodeGraphs | None = None
        why = obstacle(self.model) if graphs else "graphs = False"
        self._may_capture = why is None
        if state_dtype not in STATE_DTYPES:
            raise RequestError(f'state_dtype = "{state_dtype}" is not known; use one of {", ".join(STATE_DTYPES)}')
        if state_dtype == "float16-sr" and why is not None:
            raise RequestError(f'state_dtype = "float16-sr" works in captured steps alone: {why}; use another')
        self.state_dtype = state_dtype
        self._is_graph_taken = False
        # what was measured stays from call to call
        self._draft_length = DraftLength(self.speculate) if self.speculate else None
        # counters of the latest call
        self.stats = EngineStats()
        self.codec = None if tokenizer is None else Codec(tokenizer)
        self._eos_ids = frozenset(config.eos_ids) | (self.codec.ends if self.codec else frozenset[int]())

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self.codec is not None and self.codec.has_chat_template

    @overload
    def generate(
        self, prompts: Prompt | Items[Prompt], params: Params = None, stream: Literal[False] = False
    ) -> list[Output]: ...

    @overload
    def generate(self, prompts: Prompt | Items[Prompt], params: Params, stream: Literal[True]) -> Generator[Output]: ...

    @overload
    def generate(
        self, prompts: Prompt | Items[Prompt], params: Params = None, *, stream: Literal[True]
    ) -> Generator[Output]: ...

    def generate(
        self, prompts: Prompt | Items[Prompt], params: Params = None, stream: bool = False
    ) -> list[Output] | Generator[Output]:
        """Continue prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either
            params: for all prompts, or one each
            stream: return an iterator of increments instead; closing it cancels the rest

        Returns:
            one Output per prompt, in order; or increments as they come
        """
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [cast(Prompt, prompts)]
        listed = cast(Items[Prompt], prompts)
        chosen = _per_prompt(params, len(listed))
        ids = [
            self.encode(p, f"prompt {i}" if len(listed) > 1 else "prompt") if isinstance(p, str) else p
            for i, p in enumerate(listed)
        ]
        return self._answer(
            [Request(id=str(i), token_ids=t, params=p) for i, (t, p) in enumerate(zip(ids, chosen, strict=True))],
            stream,
        )

    @overload
    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        params: Params = None,
        *,
        stream: Literal[False] = False,
        thinking_budget: int | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[Output]: ...

    @overload
    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        params: Params = None,
        *,
        stream: Literal[True],
        thinking_budget: int | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Generator[Output]: ...

    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        params: Params = None,
        *,
        stream: bool = False,
        thinking_budget: int | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[Output] | Generator[Output]:
        """Answer one conversation or several, laid out by the tokenizer's chat template.

        Args:
            messages: dicts with "role" and "content", or a list of such conversations
            params: for all conversations, or one each
            stream: as in `generate`
            thinking_budget: shorthand for the field of `params`
            template: variables for the template, such as {"enable_thinking": False}
        """
        talks = cast(Items[Items[Message]], [messages] if messages and isinstance(messages[0], Mapping) else messages)
        chosen = _per_prompt(params, len(talks))
        if thinking_budget is not None:
            chosen = [replace(p, thinking_budget=thinking_budget) for p in chosen]
        ids = [self.encode_chat(talk, template) for talk in talks]
        return self._answer(
            [Request(id=str(i), token_ids=t, params=p) for i, (t, p) in enumerate(zip(ids, chosen, strict=True))],
            stream,
        )

    def encode(self, text: str, name: str = "prompt") -> list[int]:
        """Token ids of a prompt; `name` is what an error calls it."""
        return self._need_codec("a text prompt").encode(text, name)

    def encode_chat(self, messages: Items[Message], template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        return self._need_codec("chat").encode_chat(messages, template or {})

    def check(self, request: Request, name: str = "prompt") -> None:
        """Refuse a request that cannot be run on this model; `name` is what the error calls its prompt."""
        params, tokens = request.params, request.token_ids
        vocab = self.model.config.vocab
        if len(tokens) == 0:
            raise RequestError(f"{name} is empty; a model needs at least one token to continue")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab:
            raise RequestError(f"{name} has the token id {low if low < 0 else high}, outside the vocabulary of {vocab}")
        room = self.max_model_len - len(tokens)
        if params.max_tokens is not None and room < params.max_tokens:
            raise RequestError(
                f"{name} has {len(tokens):,} tokens and max_tokens is {params.max_tokens:,}; "
                f"together they exceed max_model_len = {self.max_model_len:,}"
            )
        if room < 1:
            raise RequestError(
                f"{name} has {len(tokens):,} tokens, which leaves no room for an answer within "
                f"max_model_len = {self.max_model_len:,}"
            )
        for field, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= vocab:
                    raise RequestError(f"{field} names token {token}, outside the vocabulary of {vocab}")
        if params.stop and self.codec is None:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        self._thinking(params)
        self._grammar(params)

    def stream(self, requests: Iterable[Request]) -> Generator[Output]:
        """Increments of the answers to `requests`, which are read only as room comes free.

        One increment is one sample's news. Of the waiting requests the lowest `priority` goes first. A request that
        cannot be run raises when it is read; closing the iterator cancels everything.
        """
        # a second stream beside the first has no graphs
        graphs = None if self._is_graph_taken else self._capture()
        runner = Runner(self.model, self._draft_length, self.max_step_tokens, graphs, STATE_DTYPES[self.state_dtype])
        self.stats = runner.stats
        source = enumerate(requests)
        waiting: list[tuple[int, int, list[Sequence]]] = []
        answers: dict[int, _Answer] = {}
        was_training = self.model.training
        self.model.eval()
        self._is_graph_taken |= graphs is not None
        try:
            while True:
                for order, request in islice(source, max(0, LOOKAHEAD + self.max_seqs - len(waiting))):
                    sequences = self._sequences(request, order)
                    answers[order] = _Answer(request, len(sequences))
                    heapq.heappush(waiting, (request.priority, order, sequences))
                running = sum(not s.finished for s in runner.sequences)
                if not waiting and not running:
                    return
                admitted = self._next(waiting, self.max_seqs - running)
                if admitted:
                    scored = runner.admit(admitted)
                    for sequence, scores in zip(admitted, scored, strict=True):
                        first = self._news(sequence, answers)
                        first.prompt_logprobs = scores if sequence.index == 0 else None
                        yield first
                else:
                    runner.step()
                    for sequence in runner.sequences:
                        if sequence.has_news:
                            yield self._news(sequence, answers)
        finally:
            runner.close()
            if graphs is not None:
                self._is_graph_taken = False
            self.model.train(was_training)

    def _capture(self) -> DecodeGraphs | None:
        if self.graphs is not None and not self.graphs.refresh():
            # their memory is free before that of new ones is taken
            self.graphs = None
            self._may_capture = obstacle(self.model) is None
        if self.graphs is None and self._may_capture:
            was_training = self.model.training
            self.model.eval()
            self.graphs = DecodeGraphs(
                self.model, new_pool(self.model, self.max_seqs, self.max_model_len, self.state_dtype)
            )
            self.model.train(was_training)
        return self.graphs

    def _answer(self, requests: list[Request], stream: bool) -> list[Output] | Generator[Output]:
        # a bad request is refused before any work, and before a stream is handed out
        for i, request in enumerate(requests):
            self.check(request, f"prompt {i}" if len(requests) > 1 else "prompt")
        if stream:
            return self.stream(requests)
        outputs = [
            Output(r.id, i, r.token_ids, [_empty(r.params, k) for k in range(r.params.n)])
            for i, r in enumerate(requests)
        ]
        for news in self.stream(requests):
            gather(outputs[news.index], news)
        return outputs

    def _next(self, waiting: list[tuple[int, int, list[Sequence]]], free: int) -> list[Sequence]:
        """Take the sequences whose prompts are computed next, all in one call unless a single prompt needs several."""
        group: list[Sequence] = []
        prompts = longest = 0
        while waiting and len(group) < free:
            _, _, sequences = waiting[0]
            length = len(sequences[0].prompt)
            alone = length > self.max_step_tokens or sequences[0].params.prompt_logprobs is not None
            if group and (alone or (prompts + 1) * max(longest, length) > self.max_step_tokens):
                break
            prompts, longest = prompts + 1, max(longest, length)
            taken = sequences[: free - len(group)]
            group += taken
            del sequences[: len(taken)]
            if not sequences:
                heapq.heappop(waiting)
            if alone:
                break
        return group

    def _news(self, sequence: Sequence, answers: dict[int, _Answer]) -> Output:
        answer = answers[sequence.order]
        completion = sequence.take()
        answer.open -= completion.finish_reason is not None
        if not answer.open:
            del answers[sequence.order]
        request = answer.request
        return Output(request.id, sequence.order, request.token_ids, [completion], finished=not answer.open)

    def _sequences(self, request: Request, order: int) -> list[Sequence]:
        """The n samples of a request."""
        self.check(request)
        params = request.params
        room = self.max_model_len - len(request.token_ids)
        request = replace(request, arrival=perf_counter())
        seed = params.seed if params.seed is not None else random.SystemRandom().getrandbits(64)
        return [
            Sequence(
                request,
                order,
                index,
                seed,
                params.max_tokens or room,
                self._eos_ids,
                self._detokenizer(params),
                self._thinking(params),
                self._grammar(params),
            )
            for index in range(params.n)
        ]

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        codec = self.codec
        if codec is None:
            return None
        return Detokenizer(codec.decode, codec.skipped, params.stop, params.include_stop_str_in_output)

    def _grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        if params.grammar is None:
            return None
        return compile_grammar(params.grammar, self._need_codec("a grammar"), self.model.config.vocab)

    def _thinking(self, params: SamplingParams) -> ThinkingBudget | None:
        if params.thinking_budget is None:
            return None
        codec = self.codec
        if codec is None or codec.markers is None:
            raise RequestError(
                f"thinking_budget = {params.thinking_budget}, but the tokenizer has no single tokens {THINK[0]} and "
                f"{THINK[1]}; leave it out"
            )
        text = params.thinking_close_text
        close = codec.encode(text, "thinking_close_text", add_special_tokens=False) if text else []
        return ThinkingBudget(
            params.thinking_budget,
            params.thinking_grace,
            [*close, codec.markers.end],
            codec.markers,
            lambda token: "\n" in codec.decode([token]),
        )

    def _need_codec(self, what: str) -> Codec:
        if self.codec is None:
            raise RequestError(f"{what} needs a tokenizer, and this model has none; pass one, or token ids")
        return self.codec


def gather(whole: Output, news: Output) -> None:
    """Add an increment of a stream to the answer so far."""
    whole.finished = news.finished
    if news.prompt_logprobs is not None:
        whole.prompt_logprobs = news.prompt_logprobs
    for new in news.completions:
        old = whole.completions[new.index]
        logprobs = None if old.logprobs is None else old.logprobs + (new.logprobs or [])
        whole.completions[new.index] = replace(
            new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs
        )


def _empty(params: SamplingParams, index: int) -> Completion:
    return Completion(index, logprobs=None if params.logprobs is None else [])


def _per_prompt(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"params has {len(params)} entries for {count} prompts; give one, or one per prompt")
    return list(params)
