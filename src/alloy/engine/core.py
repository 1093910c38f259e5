"""`LLM`: text or token ids in, answers out, many at a time; whole or as a stream.

Greedy answers are the same tokens alone, in a batch, with prompts in chunks and with MTP drafts (serving.md section 0).
The engine holds no state between calls: closing a stream cancels what is left of it and frees its cache.
"""

import random
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast, overload

import torch
from transformers import PreTrainedTokenizerBase

from alloy.core.device import resolve_device
from alloy.engine.codec import NO_MARKERS, Codec, Message
from alloy.engine.detokenizer import Detokenizer
from alloy.engine.engine import Engine
from alloy.engine.grammar import CompiledGrammar, compile_grammar
from alloy.engine.pool import PoolPlan, plan_pool
from alloy.engine.reasoning import ThinkingBudget
from alloy.engine.request import Completion, Output, Request, SamplingParams
from alloy.engine.runner import EngineStats
from alloy.engine.sequence import Sequence
from alloy.engine.speculate import MOST_DRAFTS, DraftLength
from alloy.errors import RequestError
from alloy.models.base import CausalLM
from alloy.models.configs import DecoderConfig
from alloy.models.graphs import DecodeGraphs, buckets_for, obstacle
from alloy.models.paged import STATE_DTYPES, PagedCache
from alloy.models.quant import check_place, parse_weights, quantize_weights
from alloy.models.registry import load

Prompt = str | Items[int]
Params = SamplingParams | Items[SamplingParams] | None

# prompt tokens per model call
STEP_TOKENS = {"cpu": 512}
STEP_TOKENS_ACCELERATOR = 2048
# between two states that are kept on the way through a prompt
CHECKPOINT_TOKENS = 1024
# answers of a warm-up: a step behind each prompt, and one of several rows
WARM_UP_TOKENS = 4
# requests read ahead of the running ones, so that prompts can be computed together
LOOKAHEAD = 64


class LLM:
    """A model ready to generate.

    Args:
        model: a folder or hub id (see `alloy.load`), or a model
        tokenizer: of a model given as an object; None: prompts must be token ids and answers have no text
        max_model_len: longest prompt plus answer; default: the config's max_positions, or what fits into memory
        dtype, device: as in `alloy.load`, for a path
        max_seqs: sequences that run at once
        speculate: drafts of the model's MTP layers per step; "auto" measures the best number; 0: none
        weights: of a model given as a path, on a CPU: "bf16" or "int8" keeps its matrices in that precision; None: as loaded
        max_step_tokens: prompt tokens per model call; default: 512 on a CPU, else 2048
        graphs: replay decode steps as CUDA graphs where the device and the model's kernels allow it
        state_dtype: of recurrent states: float32, bfloat16, float16, or float16-sr, which rounds stochastically and needs
            graphs
        prefix_cache: keep what answers leave in the cache, for prompts that begin the same
        checkpoint_every: prompt tokens between two of the states that are kept on the way; default: 1024, or max_step_tokens
            where that is more, so that no model call is shorter for them
        memory: GiB for keys, values and states; default: 0.8 of what is free, on a CPU at most a quarter of the machine's or
            container's and 4
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
        prefix_cache: bool = True,
        checkpoint_every: int | None = None,
        memory: float | None = None,
    ) -> None:
        kind = None if weights is None else parse_weights(weights)
        if not isinstance(model, CausalLM):
            if kind is not None:
                check_place(kind, resolve_device(device))
            model, found = load(model, dtype=dtype, device=device)
            tokenizer = tokenizer or found
            if kind is not None:
                quantize_weights(model, kind)
        elif kind is not None:
            raise RequestError(
                f'weights = "{kind}" would change the model that was given; give its folder, or call '
                "alloy.models.quant.quantize_weights on it first"
            )
        self.model = model
        self.tokenizer = tokenizer
        config = self.model.config
        if tokenizer is not None and len(tokenizer) > config.vocab:
            raise RequestError(
                f"the tokenizer has {len(tokenizer)} tokens but the model's embedding only {config.vocab}"
            )
        self.max_model_len = config.max_positions if max_model_len is None else max_model_len
        usual = STEP_TOKENS.get(self.model.embed.weight.device.type, STEP_TOKENS_ACCELERATOR)
        self.max_step_tokens = usual if max_step_tokens is None else max_step_tokens
        self.max_seqs, self.state_dtype, self.memory = max_seqs, state_dtype, memory
        self.prefix_cache = prefix_cache
        self.checkpoint_every = (
            max(CHECKPOINT_TOKENS, self.max_step_tokens) if checkpoint_every is None else checkpoint_every
        )
        for name in ("max_model_len", "max_seqs", "max_step_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)} must be at least 1")
        self.speculate: int | Literal["auto"] = speculate if self.model.has_mtp or speculate != "auto" else 0
        if speculate != "auto" and (not isinstance(speculate, int) or speculate < 0):  # pyright: ignore[reportUnnecessaryIsInstance]  users err
            raise RequestError(f'speculate = {speculate} must be "auto" or a number of tokens from 0')
        if speculate != "auto" and speculate > MOST_DRAFTS:
            raise RequestError(f"speculate = {speculate} is more than {MOST_DRAFTS} drafts a step; lower it")
        if self.speculate and not self.model.has_mtp:
            raise RequestError(f"speculate = {speculate}, but the model has no MTP layers to draft with; use 0")
        # captured at the first call; None: steps run one operation at a time
        self.graphs: DecodeGraphs | None = None
        why = obstacle(self.model) if graphs else "graphs = False"
        self._may_capture = why is None
        if state_dtype not in STATE_DTYPES:
            raise RequestError(f'state_dtype = "{state_dtype}" is not known; use one of {", ".join(STATE_DTYPES)}')
        if state_dtype == "float16-sr" and why is not None:
            raise RequestError(f'state_dtype = "float16-sr" works in captured steps alone: {why}; use another')
        is_bounded = isinstance(config, DecoderConfig) and config.rope.scaling == "none"
        if is_bounded and self.max_model_len > config.max_positions:
            raise RequestError(
                f"max_model_len = {max_model_len} is beyond max_positions = {config.max_positions} of this {config.kind} "
                "model, whose rotary embedding has no scaling; lower it"
            )
        if max_model_len is None:
            self.max_model_len = self._plan(self.max_model_len, shorten=True).max_tokens
        self._engine: Engine | None = None
        self._weights: list[tuple[int, int | None]] = []
        # increments that one stream computed for another
        self._inboxes: dict[int, deque[Output]] = {}
        self._streams = 0
        # what was measured stays from call to call
        self._draft_length = DraftLength(self.speculate) if self.speculate else None
        # counters of the latest call
        self.stats = EngineStats()
        self.codec = None if tokenizer is None else Codec(tokenizer, self.model.generation.get("reasoning"))
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
        is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed = cast(Items[Prompt], [prompts] if is_one else prompts)
        chosen = _per_prompt(params, len(listed))
        ids = [self.encode(p, _name(i, len(listed))) if isinstance(p, str) else p for i, p in enumerate(listed)]
        return self._answer(ids, chosen, stream)

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
        return self._answer(ids, chosen, stream)

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

    def engine(self) -> Engine:
        """The engine of this model, the same one until the weights lie elsewhere. What is known of prefixes goes when the
        weights change."""
        if self._engine is not None and self._engine.busy:
            return self._engine
        graphs = self._capture()
        weights = _versions(self.model)
        if self._engine is None or graphs is not self._engine.graphs:
            pool = graphs.pool if graphs is not None else self._new_pool()
            self._engine = Engine(
                self.model,
                pool,
                self._sequences,
                self.max_seqs,
                self.max_step_tokens,
                self._draft_length,
                graphs,
                self.prefix_cache,
                self.checkpoint_every,
            )
        elif weights != self._weights:
            self._engine.forget()
        self._weights = weights
        return self._engine

    def warm_up(self) -> None:
        """Answer prompts of several pieces, and forget them: an accelerator's kernels are compiled now and not while the first
        requests wait. Nothing where there is nothing to compile."""
        if self.model.embed.weight.device.type == "cpu":
            return
        # whole pieces and a part of one, of odd length: kernels differ by what divides the numbers they are given
        length = min(self.max_model_len - WARM_UP_TOKENS, 5 * self.max_step_tokens // 2 + 2)
        if length < 1:
            return
        params = SamplingParams(temperature=0, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        # one prompt, then two beside each other
        for count in (1, 2):
            self.generate([[token] * length for token in range(count)], params)
            self.engine().forget()
        self.stats = EngineStats()

    def stream(self, requests: Iterable[Request]) -> Generator[Output]:
        """Increments of the answers to `requests`, which are read only as room comes free.

        One increment is one sample's news. Of the waiting requests the lowest `priority` goes first. A request that
        cannot be run raises when it is read; closing the iterator cancels everything. Streams may run side by side.
        """
        engine = self.engine()
        if not engine.busy:
            engine.stats = EngineStats()
        self.stats = engine.stats
        number, self._streams = self._streams, self._streams + 1
        inbox = self._inboxes[number] = deque[Output]()
        source = enumerate(requests)
        mine: dict[str, tuple[int, Request]] = {}
        was_training = self.model.training
        try:
            while True:
                for order, request in islice(source, max(0, LOOKAHEAD + self.max_seqs - len(mine))):
                    # ids of other streams may be the same
                    own = f"{number}/{order}"
                    engine.add(replace(request, id=own))
                    mine[own] = order, request
                if not mine:
                    return
                if not inbox:
                    self._round(engine)
                while inbox:
                    news = inbox.popleft()
                    order, request = mine[news.id]
                    if news.finished:
                        del mine[news.id]
                    yield replace(news, id=request.id, index=order)
        finally:
            for own in mine:
                engine.cancel(own)
            del self._inboxes[number]
            if was_training:
                self.model.train()

    def _round(self, engine: Engine) -> None:
        """One round for all streams."""
        if self.model.training:
            self.model.eval()
        try:
            found = engine.step()
        except BaseException:
            engine.close()
            raise
        for news in found:
            inbox = self._inboxes.get(int(news.id.partition("/")[0]))
            if inbox is not None:
                inbox.append(news)

    def _plan(self, max_tokens: int, shorten: bool = False) -> PoolPlan:
        return plan_pool(
            self.model, self.max_seqs, max_tokens, self.state_dtype, self.memory, self.prefix_cache, shorten
        )

    def _new_pool(self) -> PagedCache:
        plan = self._plan(self.max_model_len)
        return self.model.new_paged_cache(plan.slots, plan.blocks, plan.max_tokens, state_dtype=self.state_dtype)

    def _capture(self) -> DecodeGraphs | None:
        if self.graphs is not None and not self.graphs.refresh():
            # their memory is free before that of new ones is taken
            self.graphs = None
            self._may_capture = obstacle(self.model) is None
        if self.graphs is None and self._may_capture:
            was_training = self.model.training
            self.model.eval()
            self.graphs = DecodeGraphs(self.model, self._new_pool(), buckets_for(self.max_seqs))
            self.model.train(was_training)
        return self.graphs

    def _answer(
        self, prompts: Items[Items[int]], params: Items[SamplingParams], stream: bool
    ) -> list[Output] | Generator[Output]:
        pairs = zip(prompts, params, strict=True)
        requests = [Request(id=str(i), token_ids=t, params=p) for i, (t, p) in enumerate(pairs)]
        # a bad request is refused before any work, and before a stream is handed out
        for i, request in enumerate(requests):
            self.check(request, _name(i, len(requests)))
        if stream:
            return self.stream(requests)
        outputs = [
            Output(r.id, i, r.token_ids, list(map(Completion, range(r.params.n)))) for i, r in enumerate(requests)
        ]
        for news in self.stream(requests):
            gather(outputs[news.index], news)
        return outputs

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
        if self.codec is None:
            return None
        skipped = self.codec.skipped if params.skip_special_tokens else ()
        return Detokenizer(self.codec.decode, skipped, params.stop, params.include_stop_str_in_output, self.codec.spell)

    def _grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        if params.grammar is None:
            return None
        return compile_grammar(params.grammar, self._need_codec("a grammar"), self.model.config.vocab)

    def _thinking(self, params: SamplingParams) -> ThinkingBudget | None:
        if params.thinking_budget is None:
            return None
        codec = self.codec
        if codec is None or codec.markers is None:
            raise RequestError(f"thinking_budget = {params.thinking_budget}, but {NO_MARKERS}; leave it out")
        text = params.thinking_close_text
        ids = codec.encode(text, "thinking_close_text", add_special_tokens=False) if text else []
        return ThinkingBudget(
            params.thinking_budget, params.thinking_grace, ids, codec.markers, lambda i: "\n" in codec.decode([i])
        )

    def _need_codec(self, what: str) -> Codec:
        if self.codec is None:
            raise RequestError(f"{what} needs a tokenizer, and this model has none; pass one, or token ids")
        return self.codec


def gather(whole: Output, news: Output) -> None:
    """Add an increment of a stream to the answer so far."""
    whole.finished, whole.cached_tokens = news.finished, news.cached_tokens
    if news.prompt_logprobs is not None:
        whole.prompt_logprobs = news.prompt_logprobs
    for new in news.completions:
        old = whole.completions[new.index]
        logprobs = None if new.logprobs is None else [*(old.logprobs or ()), *new.logprobs]
        whole.completions[new.index] = replace(
            new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs
        )


def _versions(model: CausalLM) -> list[tuple[int, int | None]]:
    """Differs when weights may have changed."""
    tensors = (*model.parameters(), *model.buffers())
    return [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


def _name(index: int, count: int) -> str:
    """What an error calls a prompt."""
    return f"prompt {index}" if count > 1 else "prompt"


def _per_prompt(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"params has {len(params)} entries for {count} prompts; give one, or one per prompt")
    return list(params)
