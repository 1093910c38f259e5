"""The model step: prompts in, one or more tokens per running sequence out.

The running rows share one cache. New sequences are computed in a cache of their own, as one right-padded batch or, when a
prompt is longer than a step may be, in chunks, and join the running rows; finished rows leave before the next step. With
captured graphs the caches are views of one paged cache, so that joining moves nothing, and steps without drafts are replays.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from alloy.engine.graphs import DecodeGraphs
from alloy.engine.request import TokenLogprobs
from alloy.engine.sampler import Sampler, on_host, token_logprobs
from alloy.engine.sequence import Sequence
from alloy.engine.speculate import Drafter, DraftLength
from alloy.models.base import CausalLM
from alloy.models.cache import Cache
from alloy.models.paged import PagedView


@dataclass
class EngineStats:
    """Counters of one call of the engine."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    # tokens that decode steps gave (the first of each sequence comes from its prompt)
    decoded_tokens: int = 0
    # per draft position: steps of a sequence that drafted it, and that kept it
    drafted_at: list[int] = field(default_factory=list[int])
    accepted_at: list[int] = field(default_factory=list[int])

    @property
    def tokens_per_s(self) -> float:
        """Rate of decode steps."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that were kept; None without drafts."""
        drafted = sum(self.drafted_at)
        return sum(self.accepted_at) / drafted if drafted else None

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Note one step of one sequence."""
        self.drafted_at += [0] * (drafted - len(self.drafted_at))
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for i in range(drafted):
            self.drafted_at[i] += 1
            self.accepted_at[i] += i < accepted


class Runner:
    """Running sequences and their cache.

    Args:
        model: in evaluation mode
        length: chooses how many tokens to draft; None: no drafts
        max_step_tokens: prompt tokens per model call, padding included
        graphs: captured steps of the model and the paged cache they work on, which this runner has to itself
        state_dtype: of recurrent states where there are no graphs
    """

    def __init__(
        self,
        model: CausalLM,
        length: DraftLength | None,
        max_step_tokens: int,
        graphs: DecodeGraphs | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.max_step_tokens = max_step_tokens
        self.sequences: list[Sequence] = []
        self.stats = EngineStats()
        self._device = model.embed.weight.device
        self._vocab = model.config.vocab
        self._cache: Cache | None = None
        self._graphs = graphs
        self._state_dtype = state_dtype
        self._length = length
        self._drafter = Drafter(model) if length is not None else None
        self._sampler = Sampler([], self._vocab, self._device)
        # the newest token of each row, which the cache does not hold yet
        self._newest: list[int] = []
        # the buffer of the graphs holds them
        self._is_placed = False

    @torch.inference_mode()
    def admit(self, sequences: Items[Sequence]) -> list[list[TokenLogprobs | None] | None]:
        """Compute the prompts of new sequences, choose their first tokens, let them join. Samples of one request share
        its prompt and must be neighbours.

        Returns:
            per sequence the log probabilities of its prompt, where they were asked for
        """
        start = perf_counter()
        for sequence in sequences:
            sequence.timings.started_s = start - sequence.request.arrival
        prompts: list[Items[int]] = []
        rows: list[int] = []
        for i, sequence in enumerate(sequences):
            if i == 0 or sequence.request is not sequences[i - 1].request:
                prompts.append(sequence.prompt)
            rows.append(len(prompts) - 1)
        wanted = sequences[0].params.prompt_logprobs
        self._leave()
        cache = self._open(prompts)
        if len(prompts) == 1:
            logits, hidden, scored = self._prefill_chunks(cache, prompts[0], wanted)
        else:
            assert all(s.params.prompt_logprobs is None for s in sequences), "prompt_logprobs run alone"
            logits, hidden = self._prefill_batch(cache, prompts)
            scored = None
        index = torch.tensor(rows, device=self._device)
        sampler = Sampler(sequences, self._vocab, self._device)
        logits = logits[index]
        accepted = _append(sequences, sampler.choose(logits))
        if sampler.wants_logprobs:
            sampler.logprobs(logits, accepted)
        self.stats.prompt_tokens += sum(len(p) for p in prompts)
        self.stats.generated_tokens += sum(len(tokens) for tokens in accepted)
        self._join(sequences, cache, rows, hidden[index])
        self.stats.prefill_s += perf_counter() - start
        return [scored] * len(sequences)

    @torch.inference_mode()
    def step(self) -> None:
        """One model call for all running rows: every sequence gets a token, with drafts perhaps several."""
        start = perf_counter()
        self._leave()
        cache = self._cache
        if cache is None:
            return
        rows, length = len(self.sequences), self._draft_length()
        if length:
            assert self._drafter is not None, "only a drafter sets a length"
            drafts = self._drafter.draft(cache, length)
            with cache.drafting():
                out = self.model(torch.cat([self._column(self._newest), drafts], 1), cache=cache, logits="all")
            guesses: list[list[int]] | None = on_host(drafts)
            logits, hidden = out.logits, out.last_hidden
            assert logits is not None, "the call asked for logits"
            chosen = self._sampler.choose(logits, drafts)
        else:
            guesses = None
            logits, hidden, chosen = self._one_token(cache)
        accepted = _append(self.sequences, chosen, guesses)
        if self._sampler.wants_logprobs:
            self._sampler.logprobs(logits, accepted)
        self._sampler.commit(accepted)
        kept = [len(tokens) for tokens in accepted]
        self._newest = [tokens[-1] if tokens else 0 for tokens in accepted]
        self._is_placed = self._graphs is not None and not length and self._sampler.plain and accepted == chosen
        if length:
            counts = torch.tensor(kept, device=self._device)
            cache.accept(counts)
            self._observe(accepted, hidden, counts)
            for sequence, count in zip(self.sequences, kept, strict=True):
                sequence.drafted += length
                sequence.accepted += max(0, count - 1)
                self.stats.count_drafts(length, max(0, count - 1))
        elif self._drafter is not None:
            self._drafter.observe(self._column(self._newest), hidden.clone())
        seconds = perf_counter() - start
        if self._length is not None:
            self._length.record(rows, length, seconds, [max(0, n - 1) for n in kept])
        self.stats.steps += 1
        self.stats.decode_s += seconds
        self.stats.decoded_tokens += sum(kept)
        self.stats.generated_tokens += sum(kept)

    def close(self) -> None:
        """Give back what is held, also by rows that an error kept from running."""
        if self._graphs is not None:
            self._graphs.pool.reset()
        self._cache, self.sequences = None, []

    def _one_token(self, cache: Cache) -> tuple[Tensor, Tensor, list[list[int]]]:
        """A step without drafts: logits (rows, 1, vocab), hidden (rows, 1, hidden), and the tokens chosen."""
        if self._graphs is None:
            out = self.model(self._column(self._newest), cache=cache, logits="last")
            assert out.logits is not None, "the call asked for logits"
            return out.logits, out.last_hidden, self._sampler.choose(out.logits)
        assert isinstance(cache, PagedView), "graphs have a paged cache"
        step = self._graphs.step(cache.rows, None if self._is_placed else self._newest)
        cache.refresh()
        chosen = on_host(step.tokens) if self._sampler.plain else self._sampler.choose(step.logits)
        return step.logits, step.hidden, chosen

    def _open(self, prompts: Items[Items[int]]) -> Cache:
        """An empty cache with a row for each prompt."""
        if self._graphs is None:
            return self.model.new_cache(len(prompts), max(len(p) for p in prompts), state_dtype=self._state_dtype)
        pool = self._graphs.pool
        return pool.view(pool.open(len(prompts)))

    def _column(self, tokens: Items[int]) -> Tensor:
        """Tokens as (rows, 1) int64 on the device."""
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)[:, None]

    def _draft_length(self) -> int:
        if self._length is None:
            return 0
        # the last token of a sequence needs no draft
        room = max(s.max_tokens - len(s.tokens) for s in self.sequences) - 1
        return min(self._length.choose(len(self.sequences)), room)

    def _observe(self, accepted: Items[Items[int]], hidden: Tensor, counts: Tensor) -> None:
        assert self._drafter is not None, "drafts were made"
        width = max(len(tokens) for tokens in accepted)
        tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in accepted], device=self._device)
        uniform = all(len(t) == width for t in accepted)
        self._drafter.observe(tokens, hidden[:, :width], None if uniform else counts)

    def _prefill_chunks(
        self, cache: Cache, prompt: Items[int], wanted: int | None
    ) -> tuple[Tensor, Tensor, list[TokenLogprobs | None] | None]:
        """One prompt in chunks. Returns logits (1, 1, vocab) and hidden (1, 1, hidden) of its last token, and scores."""
        tokens = torch.tensor(prompt, dtype=torch.int64, device=self._device)[None]
        scored: list[TokenLogprobs | None] | None = None if wanted is None else [None]
        logits = hidden = None
        for start in range(0, len(prompt), self.max_step_tokens):
            chunk = tokens[:, start : start + self.max_step_tokens]
            end = start + chunk.shape[1]
            is_last = end == len(prompt)
            kind = "all" if scored is not None else "last" if is_last else None
            out = self.model(chunk, cache=cache, logits=kind)
            logits, hidden = out.logits, out.last_hidden
            following = tokens[:, start + 1 : end + 1]
            if self._drafter is not None and following.shape[1]:
                self.model.mtp_step(following, hidden[:, : following.shape[1]], cache, logits=None)
            if scored is not None and wanted is not None and logits is not None:
                ids = list(prompt[start + 1 : end + 1])
                scored += token_logprobs(ids, {"model": logits[0, : len(ids)].log_softmax(-1)}, wanted)
        assert logits is not None, "the last chunk gives logits"
        assert hidden is not None, "a prompt has a token"
        return logits[:, -1:], hidden[:, -1:], scored

    def _prefill_batch(self, cache: Cache, prompts: Items[Items[int]]) -> tuple[Tensor, Tensor]:
        """Several prompts, right-padded. Returns logits (rows, 1, vocab) and hidden (rows, 1, hidden) of the last tokens."""
        width = max(len(p) for p in prompts)
        tokens = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=self._device)
        lengths = torch.tensor([len(p) for p in prompts], device=self._device)
        index = torch.arange(width, device=self._device)
        ragged = any(len(p) < width for p in prompts)
        out = self.model(tokens, cache=cache, documents=_padding(index, lengths) if ragged else None, logits="last")
        if self._drafter is not None and width > 1:
            documents = _padding(index[:-1], lengths - 1) if ragged else None
            self.model.mtp_step(tokens[:, 1:], out.last_hidden[:, :-1], cache, documents=documents, logits=None)
        assert out.logits is not None, "the call asked for logits"
        last = (lengths - 1)[:, None, None].expand(-1, 1, out.last_hidden.shape[2])
        return out.logits, out.last_hidden.gather(1, last)

    def _join(self, sequences: Items[Sequence], cache: Cache, rows: Items[int], hidden: Tensor) -> None:
        """Add new sequences, whose prompts are the given rows of `cache`, to the running ones."""
        alive = [i for i, s in enumerate(sequences) if not s.finished]
        cache.select([rows[i] for i in alive])
        if not alive:
            return
        joining = [sequences[i] for i in alive]
        newest = [s.tokens[-1] for s in joining]
        drafter = None
        if self._drafter is not None:
            drafter = Drafter(self.model)
            drafter.observe(self._column(newest), hidden[torch.tensor(alive, device=self._device)])
        if self._cache is None:
            self._cache, self._drafter = cache, drafter
        else:
            self._cache.join(cache)
            if self._drafter is not None and drafter is not None:
                self._drafter.join(drafter)
        self._newest += newest
        self._is_placed = False
        self.sequences += joining
        self._sampler = Sampler(self.sequences, self._vocab, self._device)

    def _leave(self) -> None:
        """Drop the rows of finished sequences."""
        alive = [i for i, s in enumerate(self.sequences) if not s.finished]
        if len(alive) == len(self.sequences):
            return
        index = torch.tensor(alive, dtype=torch.int64, device=self._device)
        self.sequences = [self.sequences[i] for i in alive]
        self._newest = [self._newest[i] for i in alive]
        self._is_placed = False
        assert self._cache is not None, "running rows have a cache"
        self._cache.select(alive)
        if not alive:
            self._cache = None
        elif self._drafter is not None:
            self._drafter.select(index)
        self._sampler = Sampler(self.sequences, self._vocab, self._device)


def _append(
    sequences: Items[Sequence], chosen: Items[Items[int]], guesses: Items[Items[int]] | None = None
) -> list[list[int]]:
    """Give every sequence its tokens: the first, and a further one for each guess that the one before it confirmed.

    A sequence may replace a token (a budget that is spent) or end; both stop its run there.
    """
    accepted: list[list[int]] = []
    for row, sequence in enumerate(sequences):
        before = len(sequence.tokens)
        for j, token in enumerate(chosen[row]):
            taken = sequence.append(token)
            if sequence.finished or guesses is None or j == len(guesses[row]) or guesses[row][j] != taken:
                break
        accepted.append(sequence.tokens[before:])
    return accepted


def _padding(index: Tensor, lengths: Tensor) -> Tensor:
    """(rows, width) int32: 0 for the first lengths[row] positions, -1 after them."""
    return (index < lengths[:, None]).to(torch.int32) - 1
