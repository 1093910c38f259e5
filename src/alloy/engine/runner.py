"""The model calls of the engine: prompts in pieces, and one or more tokens per running sequence.

All sequences live in one paged cache, each in its slot. A sequence runs once its cache holds all its tokens but the newest:
the last token of a prompt is the first that a step computes. With captured graphs, steps without drafts are replays.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import zip_longest
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alloy.engine.sampler import Sampler, on_host, token_logprobs
from alloy.engine.sequence import Sequence
from alloy.engine.speculate import Drafter, DraftLength, Pairs, documents_of, padded
from alloy.models.base import CausalLM
from alloy.models.draft_graphs import DraftGraphs, may_capture
from alloy.models.graphs import DecodeGraphs
from alloy.models.paged import PagedCache, PagedView


@dataclass
class EngineStats:
    """Counters of an engine since it was made, or of one call of `LLM`."""

    # of requests that began; and those that were not computed, but found
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    # per draft position: steps of a sequence that drafted it, and that kept it
    drafted_at: list[int] = field(default_factory=list[int])
    accepted_at: list[int] = field(default_factory=list[int])

    @property
    def tokens_per_s(self) -> float:
        """Rate of decode steps."""
        return self.generated_tokens / self.decode_s if self.decode_s else 0.0

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
    """Computes sequences whose slots the engine has given them.

    Args:
        model: in evaluation mode
        pool: the cache
        length: chooses how many tokens to draft; None: no drafts
        graphs: captured steps over `pool`; None: steps are computed one operation at a time

    Attributes:
        sequences: those that run, one row each
    """

    def __init__(
        self, model: CausalLM, pool: PagedCache, length: DraftLength | None, graphs: DecodeGraphs | None = None
    ) -> None:
        self.model, self.pool, self.length = model, pool, length
        self.stats = EngineStats()
        self._device = model.embed.weight.device
        self._vocab = model.config.vocab
        self._graphs = graphs
        self._draft_graphs: DraftGraphs | None = None
        if graphs is not None and length is not None and may_capture(pool):
            self._draft_graphs = DraftGraphs(model, pool, graphs.buckets, length.longest, graphs.handle)
        self.reset()

    @torch.inference_mode()
    def prefill(self, pieces: Items[tuple[Sequence, int]]) -> None:
        """Compute tokens of sequences, each from what its cache holds up to an end, in one call. One that wants the log
        probabilities of its prompt comes alone."""
        start = perf_counter()
        sequences = [sequence for sequence, _ in pieces]
        ids = [sequence.known[sequence.computed : end] for sequence, end in pieces]
        view = self.pool.view([sequence.slot for sequence in sequences])
        tokens, counts = padded(ids, self._device)
        wanted = sequences[0].scored
        logits = None if wanted is None else "all"
        # nobody reads what the last blocks make of a prompt
        only_cache = wanted is None and self._drafter is None
        documents = documents_of(tokens, counts)
        out = self.model(tokens, cache=view, documents=documents, logits=logits, only_cache=only_cache)
        if wanted is not None and out.logits is not None:
            sequence, end = pieces[0]
            following = sequence.known[sequence.computed + 1 : end + 1]
            sequence.prompt_scores += token_logprobs(following, {"model": out.logits[0].log_softmax(-1)}, wanted)
        if self._drafter is not None:
            self._follow(sequences, ids, out.last_hidden)
        for sequence, end in pieces:
            sequence.computed = end
        self.stats.prefill_s += perf_counter() - start

    def join(self, sequences: Items[Sequence]) -> None:
        """Let sequences run whose cache holds all tokens but the newest."""
        if not sequences:
            return
        if self._drafter is not None:
            for sequence in sequences:
                self._drafter.join(sequence.behind, sequence.known[-1], sequence.hidden)
                self._bare += sequence.hidden is None
                sequence.behind, sequence.hidden = (), None
        self._newest += [sequence.known[-1] for sequence in sequences]
        self._arrange([*self.sequences, *sequences])

    def remove(self, gone: Items[Sequence]) -> None:
        """Stop those sequences that run; what drafts need to go on goes with them."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence not in gone]
        if len(rows) == len(self.sequences):
            return
        for row, sequence in enumerate(self.sequences):
            if sequence in gone:
                sequence.computed = self.pool.held[sequence.slot]
                if self._drafter is not None:
                    sequence.behind, sequence.hidden = self._drafter.leave(row)
        self._newest = [self._newest[row] for row in rows]
        if self._drafter is not None:
            self._drafter.select(torch.tensor(rows, dtype=torch.int64, device=self._device))
        self._arrange([self.sequences[row] for row in rows])

    def reset(self) -> None:
        """Forget all rows, also after an error."""
        # the newest token of each row, which the cache does not hold yet
        self._newest: list[int] = []
        # rows of which nothing is known to draft from
        self._bare = 0
        self._drafter = Drafter(self.model) if self.length is not None else None
        self._arrange([])

    def draft_length(self) -> int:
        """How many tokens the next step drafts."""
        if self.length is None or self._bare or not self.sequences:
            return 0
        # the last token of a sequence needs no draft
        room = max(s.max_tokens - len(s.tokens) for s in self.sequences) - 1
        length = self.length.choose(len(self.sequences))
        # a captured step that drafts beyond an answer's end costs nothing beside the capture of a shorter one
        length = min(length, room) if self._draft_graphs is None or not room else length
        held = max(self.pool.held[s.slot] for s in self.sequences)
        while length and held + self.reach(length) > self.pool.most_tokens:
            length -= 1
        return length

    def reach(self, length: int) -> int:
        """Tokens that a step with `length` drafts may write in each row, padding included."""
        if self._drafter is None:
            return 1
        # the last draft is not shown to what drafts
        return max(1 + length, self._drafter.width) + max(0, length - 1)

    @torch.inference_mode()
    def step(self, length: int) -> None:
        """One model call for all running rows: every sequence gets a token, with `length` drafts perhaps several."""
        start = perf_counter()
        view = self._view
        assert view is not None, "a step needs rows"
        rows = len(self.sequences)
        drafter = self._drafter if length else None
        # what waits must fit into its buffers
        graphs = self._draft_graphs if drafter is not None and drafter.width <= length + 1 else None
        guesses: list[list[int]] = [[]] * rows
        if drafter is None:
            logits, hidden, chosen = self._one_token(view)
        elif graphs is not None:
            waiting = drafter.waiting()
            guesses, chosen, held = graphs.step(view.rows, waiting.tokens, waiting.hidden, waiting.counts, length)
            logits, hidden = held.logits[: rows * (1 + length)].view(rows, 1 + length, -1), held.new[:rows]
            if not self._sampler.plain:
                chosen = self._sampler.choose(logits, held.guesses[:rows])
        else:
            drafts = drafter.draft(view, length)
            with view.drafting():
                out = self.model(torch.cat([self._column(self._newest), drafts], 1), cache=view, logits="all")
            guesses = on_host(drafts)
            logits, hidden = out.logits, out.last_hidden
            assert logits is not None, "the call asked for logits"
            chosen = self._sampler.choose(logits, drafts)
        accepted = _append(self.sequences, chosen, guesses)
        if self._sampler.wants_logprobs:
            self._sampler.logprobs(logits, accepted)
        self._sampler.commit(accepted)
        # a row that got nothing has ended
        taken = [tokens or [0] for tokens in accepted]
        self._newest = [tokens[-1] for tokens in taken]
        self._is_placed = self._graphs is not None and not length and self._sampler.plain and accepted == chosen
        confirmed = [len(tokens) - 1 for tokens in taken]
        if drafter is not None:
            if graphs is not None:
                drafter.replace(Pairs(*graphs.accept(taken, length)))
                view.refresh()
            else:
                tokens, counts = padded(taken, self._device)
                width = tokens.shape[1]
                view.accept(tokens.new_full((rows,), width) if counts is None else counts)
                drafter.observe(tokens, hidden[:, :width], counts)
            for sequence, count in zip(self.sequences, confirmed, strict=True):
                sequence.drafted += length
                sequence.accepted += count
                self.stats.count_drafts(length, count)
        elif self._drafter is not None:
            self._drafter.flush(view)
            self._drafter.observe(self._column(self._newest), hidden.clone())
            self._bare = 0
        seconds = perf_counter() - start
        if self.length is not None:
            self.length.record(rows, length, seconds, confirmed)
        self.stats.steps += 1
        self.stats.decode_s += seconds
        self.stats.generated_tokens += sum(len(tokens) for tokens in accepted)

    def _one_token(self, view: PagedView) -> tuple[Tensor, Tensor, list[list[int]]]:
        """A step without drafts: logits (rows, 1, vocab), hidden (rows, 1, hidden), and the tokens chosen."""
        if self._graphs is None:
            out = self.model(self._column(self._newest), cache=view, logits="last")
            assert out.logits is not None, "the call asked for logits"
            return out.logits, out.last_hidden, self._sampler.choose(out.logits)
        step = self._graphs.step(view.rows, None if self._is_placed else self._newest)
        view.refresh()
        chosen = on_host(step.tokens) if self._sampler.plain else self._sampler.choose(step.logits)
        return step.logits, step.hidden, chosen

    def _follow(self, sequences: Items[Sequence], ids: Items[Items[int]], hidden: Tensor) -> None:
        """Let the multi-token prediction see what was computed: hidden (rows, width, hidden) of the tokens `ids`.

        It learns a hidden state with the token after it, so the last one of each row waits."""
        pairs: list[tuple[int, list[int], Tensor]] = []
        for sequence, piece, states in zip(sequences, ids, hidden, strict=True):
            own = states[: len(piece) - 1]
            if sequence.hidden is not None:
                pairs.append((sequence.slot, [*sequence.behind, *piece], torch.cat([sequence.hidden, own])))
            elif not sequence.computed and len(piece) > 1:
                pairs.append((sequence.slot, list(piece[1:]), own))
            sequence.behind, sequence.hidden = (), states[len(piece) - 1][None].clone()
        if pairs:
            slots, tokens, states = zip(*pairs, strict=True)
            following, counts = padded(tokens, self._device)
            Pairs(following, pad_sequence(list(states), batch_first=True), counts).show(
                self.model, self.pool.view(slots)
            )

    def _arrange(self, sequences: list[Sequence]) -> None:
        """The rows of the next step."""
        self.sequences = sequences
        # the buffer of the graphs holds the newest tokens
        self._is_placed = False
        self._view = self.pool.view([sequence.slot for sequence in sequences]) if sequences else None
        self._sampler = Sampler(sequences, self._vocab, self._device)

    def _column(self, tokens: Items[int]) -> Tensor:
        """Tokens as (rows, 1) int64 on the device."""
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)[:, None]


def _append(sequences: Items[Sequence], chosen: Items[Items[int]], guesses: Items[Items[int]]) -> list[list[int]]:
    """Give every sequence its tokens: the first, and a further one for each guess that the one before it confirmed.

    A sequence may replace a token (a budget that is spent) or end; both stop its run there.
    """
    accepted: list[list[int]] = []
    for sequence, tokens, expected in zip(sequences, chosen, guesses, strict=True):
        before = len(sequence.tokens)
        for token, guess in zip_longest(tokens, expected):
            if sequence.append(token) != guess or sequence.finished:
                break
        accepted.append(sequence.tokens[before:])
    return accepted
