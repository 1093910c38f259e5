"""The scheduler: which sequences wait, are read, run, and what a round computes. serving.md sections 2 and 4.

A round admits what there is room for, computes pieces of prompts up to `max_step_tokens`, and gives every running sequence a
token. Where blocks run out, what only the prefix cache holds goes first, then the youngest sequence: it leaves what it has
to the prefix cache and waits again with its tokens as its prompt.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from alloy.engine.prefix import Kind, Match, PrefixCache, Snapshot
from alloy.engine.request import Output, Request
from alloy.engine.runner import EngineStats, Runner
from alloy.engine.sequence import Sequence
from alloy.engine.speculate import MOST_PENDING, DraftLength
from alloy.models.base import CausalLM
from alloy.models.graphs import DecodeGraphs
from alloy.models.paged import PagedCache, blocks_of
from alloy.ops.attention import BLOCK

# a request that was put back so often is not put back again while others can be
MOST_PREEMPTIONS = 3
# a state that saves others fewer tokens is worth neither its slot nor the stop
LEAST_BRANCH = 16


@dataclass(frozen=True)
class Gauges:
    """What an engine holds. Blocks and slots are free, cached (nobody but the prefix cache holds them), or in use."""

    running: int
    waiting: int
    blocks: int
    blocks_free: int
    blocks_cached: int
    slots: int
    slots_free: int
    slots_cached: int


class Engine:
    """Runs requests over one paged cache. Not for several threads at once.

    Args:
        model: in evaluation mode
        pool: the cache, which the engine has to itself
        sequences: makes the samples of a request, given the order of its arrival; refuses what cannot run
        max_seqs: sequences that run at once
        max_step_tokens: prompt tokens of a round, padding included
        length: chooses how many tokens to draft; None: no drafts
        graphs: captured steps over `pool`
        prefix_cache: keep what sequences leave, for others to begin with
        checkpoint_every: tokens between snapshots on the way through a long prompt
    """

    def __init__(
        self,
        model: CausalLM,
        pool: PagedCache,
        sequences: Callable[[Request, int], list[Sequence]],
        max_seqs: int,
        max_step_tokens: int,
        length: DraftLength | None = None,
        graphs: DecodeGraphs | None = None,
        prefix_cache: bool = True,
        checkpoint_every: int = 1024,
    ) -> None:
        self.pool, self.graphs, self.max_seqs, self.max_step_tokens = pool, graphs, max_seqs, max_step_tokens
        self.checkpoint_every = checkpoint_every
        self._make = sequences
        self._runner = Runner(model, pool, length, graphs)
        self._pools = [pool] if pool.mtp is None or length is None else [pool, pool.mtp]
        self._recurrent = bool(pool.states.layers)
        lag = 0 if length is None else MOST_PENDING + 1 + length.longest
        # stays empty unless sequences leave what they have
        self._cache, self._keeps = PrefixCache(pool, self._recurrent, lag), prefix_cache
        # where slots abound, snapshots leave the first ones alone: rows whose slots follow each other are read in place
        self._most_snapshots = pool.slots - max_seqs if pool.slots >= 2 * max_seqs else pool.slots
        # in their order
        self._waiting: list[Sequence] = []
        # whose prompts are being computed, oldest first
        self._reading: list[Sequence] = []
        # samples of each request that waits for its reader
        self._paused: dict[str, list[Sequence]] = {}
        self._order = 0
        # samples of each request that have not ended
        self._open: dict[int, int] = {}

    @property
    def stats(self) -> EngineStats:
        """Counters; assign new ones to start again."""
        return self._runner.stats

    @stats.setter
    def stats(self, stats: EngineStats) -> None:
        self._runner.stats = stats

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs; what is paused does neither."""
        return bool(self._waiting or self._reading or self._runner.sequences)

    def gauges(self) -> Gauges:
        """What is held now."""
        pool, live = self.pool, self._live()
        # what is neither free nor a sequence's is held by the prefix cache alone
        used = {block for s in live for block in pool.owned(s.slot)}
        cached = pool.blocks - pool.blocks_free - len(used) if pool.kv else 0
        blocks = pool.blocks, pool.blocks_free, cached
        slots = pool.slots, pool.slots_free, pool.slots - pool.slots_free - len(live)
        return Gauges(len(live), len(self._waiting), *blocks, *slots)

    def add(self, request: Request) -> None:
        """Take a request in."""
        made = self._make(request, self._order)
        self._open[self._order] = len(made)
        for sequence in made:
            self._wait(sequence)
        self._order += 1

    def cancel(self, request_id: str) -> None:
        """Stop the samples of a request wherever they are; unknown ids are passed over."""
        for sequence in self._withdraw(request_id):
            self._open.pop(sequence.order, None)

    def pause(self, request_id: str) -> None:
        """Let the samples of a request hold nothing and compute nothing until `resume`; their answers stay the same."""
        if found := self._withdraw(request_id):
            self._paused[request_id] = found

    def resume(self, request_id: str) -> None:
        """Let the samples of a paused request wait for their turn again; other ids are passed over."""
        for sequence in self._paused.pop(request_id, ()):
            self._wait(sequence)

    def step(self) -> list[Output]:
        """One round: what is new of every sequence that ran."""
        self._admit()
        self._read()
        ran = list(self._runner.sequences)
        if ran:
            self._decode()
        if ended := [s for s in self._runner.sequences if s.finished]:
            self._leave(ended)
        return [self._news(s) for s in ran if s.has_news]

    def forget(self) -> None:
        """Drop all that finished sequences left, such as after the weights changed."""
        self._cache.clear()

    def close(self) -> None:
        """Cancel everything and give back what is held, also after an error."""
        self._waiting, self._reading, self._paused, self._open = [], [], {}, {}
        self._runner.reset()
        self.forget()
        self.pool.reset()

    def _live(self) -> list[Sequence]:
        return [*self._reading, *self._runner.sequences]

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_turn)

    def _admit(self) -> None:
        """Give waiting sequences a slot and what is known of their prompts, as long as there is room."""
        while self._waiting and len(self._live()) < self.max_seqs:
            sequence = self._waiting[0]
            # a sample of a prompt that is being computed waits for it
            if any(s.request is sequence.request for s in self._reading) or not self._place(sequence):
                return
            del self._waiting[0]

    def _place(self, sequence: Sequence) -> bool:
        """Slot and first blocks for a sequence; False: there is no room now."""
        target, salt = len(sequence.known) - 1, sequence.request.salt
        # log probabilities of a prompt need its logits
        known = sequence.known if sequence.scored is None else ()
        match = self._cache.match(known, target, salt)
        piece = min(target - match.length, self.max_step_tokens)
        # the block behind a hit is a copy, and everyone that runs may need one soon
        wanted = blocks_of(match.length + piece) - match.length // BLOCK + 1 + len(self._runner.sequences)
        alone = not self._live()
        if not self._room([min(wanted, self.pool.blocks) if alone else wanted] * len(self._pools)):
            return False
        # making room may have taken a part of it
        match = self._cache.match(known, target, salt)
        slot = self.pool.open(1)[0]
        sequence.slot, sequence.computed = slot, match.length
        sequence.behind, sequence.hidden = self._cache.begin(slot, match)
        sequence.stops = self._stops(sequence, match, target)
        if sequence.scored is not None:
            sequence.prompt_scores = [None]
        if sequence.cached is None:
            sequence.start(match.length)
            self.stats.cached_tokens += match.length
            self.stats.prompt_tokens += 0 if sequence.index else len(sequence.prompt)
        self._reading.append(sequence)
        return True

    def _stops(self, sequence: Sequence, match: Match, target: int) -> list[tuple[int, Kind]]:
        """Where the computation of a prompt stops for snapshots: its end, where it parts from what is known, where the
        request asked for it, and now and then."""
        kinds: dict[int, Kind] = {}
        if self._keeps and self._recurrent:
            kinds |= dict.fromkeys(range(self.checkpoint_every, target, self.checkpoint_every), "way")
            if match.shared - match.length >= LEAST_BRANCH:
                kinds[match.shared] = "branch"
            kinds |= dict.fromkeys(sequence.request.keep_at, "asked")
        kinds[target] = "prompt"
        return sorted((at, kind) for at, kind in kinds.items() if match.length < at <= target)

    def _read(self) -> None:
        """Compute pieces of prompts, oldest first, in one call; sequences whose prompt is done run."""
        group: list[tuple[Sequence, int]] = []
        widest = 0
        for sequence in list(self._reading):
            if sequence.slot < 0 or sequence.computed == len(sequence.known) - 1:
                continue
            stop, room = sequence.stops[0][0], self.max_step_tokens // (len(group) + 1)
            end = min(stop, sequence.computed + max(1, room))
            if end < stop and end // BLOCK * BLOCK > sequence.computed:
                end = end // BLOCK * BLOCK
            # with what drafts have not seen; padded rows grow like the widest
            width = max(widest, end - sequence.computed + len(sequence.behind))
            is_alone = sequence.scored is not None
            if group and (is_alone or not self._fits([*(s for s, _ in group), sequence], width)):
                break
            if not group and not self._secure([sequence], end - sequence.computed):
                break
            if sequence.slot < 0:
                # it was the youngest
                continue
            group, widest = [*group, (sequence, end)], width
            if is_alone:
                break
        if group:
            self._runner.prefill(group)
        for sequence, end in group:
            if end == sequence.stops[0][0]:
                self._keep(sequence, sequence.stops.pop(0)[1])
        done = [s for s in self._reading if s.computed == len(s.known) - 1]
        for sequence in done:
            self._reading.remove(sequence)
            self._runner.join([*self._fork(sequence), sequence])

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Further samples of a request, as far as there is room, which begin where its prompt ends."""
        made: list[Sequence] = []
        while self._waiting and self._waiting[0].request is sequence.request and not sequence.tokens:
            other = self._waiting[0]
            full = len(self._live()) + 1 + len(made) >= self.max_seqs
            if full or other.tokens or not self._room([1] * len(self._pools)):
                break
            del self._waiting[0]
            other.slot, other.computed = self.pool.fork(sequence.slot, 1)[0], sequence.computed
            other.behind, other.hidden = sequence.behind, sequence.hidden
            other.start(sequence.computed)
            made.append(other)
        return made

    def _decode(self) -> None:
        """A token for each running sequence; the youngest make room if there is none."""
        length = self._runner.draft_length()
        if not self._secure(self._runner.sequences, self._runner.reach(length)):
            # the last one left has room for what it keeps
            length = 0
        if self._runner.sequences:
            self._runner.step(length)

    def _secure(self, sequences: list[Sequence], tokens: int) -> bool:
        """Blocks for `tokens` more of each; sequences younger than the rest are put back for it. False: not possible."""
        while True:
            if not sequences or self._room(self._missing(sequences, tokens), slot=False):
                return True
            victim = self._victim()
            if victim is None:
                return False
            self._leave([victim])
            victim.preemptions += 1
            self.stats.preemptions += 1
            self._wait(victim)
            sequences = [s for s in sequences if s is not victim]

    def _missing(self, sequences: list[Sequence], tokens: int) -> list[int]:
        """Blocks that `tokens` more of each sequence take, of each pool."""
        needed = {s.slot: self.pool.held[s.slot] + tokens for s in sequences}
        return [pool.blocks_missing(needed) for pool in self._pools]

    def _fits(self, sequences: list[Sequence], tokens: int) -> bool:
        """Whether one call may compute `tokens` of each of several sequences: rows are padded, in the cache too."""
        longest = max(self.pool.held[s.slot] for s in sequences) + tokens
        if tokens * len(sequences) > self.max_step_tokens or longest > self.pool.max_tokens:
            return False
        return self._room(self._missing(sequences, tokens), slot=False)

    def _victim(self) -> Sequence | None:
        """The youngest sequence, unless it is the only one; those put back often only where no other is left."""
        live = self._live()
        if len(live) < 2:
            return None
        spared = [s for s in live if s.preemptions < MOST_PREEMPTIONS] or live
        return max(spared, key=_turn)

    def _room(self, blocks: list[int], slot: bool = True) -> bool:
        """Whether so many `blocks` of each pool are free, and a slot, after the prefix cache gave back what it can."""
        while slot and not self.pool.slots_free and self._cache.evict_slot():
            pass
        self._cache.evict_blocks(blocks)
        has_blocks = all(pool.blocks_free >= wanted for pool, wanted in zip(self._pools, blocks, strict=True))
        return has_blocks and (not slot or self.pool.slots_free > 0)

    def _keep(self, sequence: Sequence, kind: Kind) -> None:
        """Enter what a sequence has computed into the prefix cache, its states too if there is a slot for them."""
        cache = self._cache
        if not self._keeps or not sequence.computed:
            return
        # a slot first: what goes for it may take the nodes above it along
        is_spare = cache.snapshots < self._most_snapshots and self.pool.slots_free
        has_slot = self._recurrent and (is_spare or cache.evict_slot())
        node = cache.insert(
            sequence.known[: sequence.computed], sequence.slot, sequence.request.salt, sequence.hidden is not None
        )
        if not has_slot or node.snapshot is not None:
            return
        slot = self.pool.open_apart()
        self.pool.copy_states(sequence.slot, slot)
        cache.keep(node, Snapshot(slot, kind, sequence.behind, sequence.hidden))

    def _leave(self, sequences: list[Sequence]) -> None:
        """Let sequences neither read nor run any more; what they have goes to the prefix cache or, after an error, to all."""
        self._reading = [s for s in self._reading if s not in sequences]
        self._runner.remove(sequences)
        for sequence in sequences:
            if sequence.finish_reason != "error":
                self._keep(sequence, "answer")
            self.pool.close([sequence.slot])
            sequence.slot = -1

    def _withdraw(self, request_id: str) -> list[Sequence]:
        """Take the samples of a request out of wherever they are; they leave what they computed."""
        live = [s for s in self._live() if s.request.id == request_id]
        waiting = [s for s in self._waiting if s.request.id == request_id]
        self._waiting = [s for s in self._waiting if s not in waiting]
        self._leave(live)
        return [*live, *waiting, *self._paused.pop(request_id, ())]

    def _news(self, sequence: Sequence) -> Output:
        request, order = sequence.request, sequence.order
        finished = False
        if sequence.finished:
            self._open[order] -= 1
            if finished := not self._open[order]:
                del self._open[order]
        scores = None
        if sequence.index == 0 and sequence.params.prompt_logprobs is not None and sequence.prompt_scores:
            scores, sequence.prompt_scores = sequence.prompt_scores, []
        return Output(request.id, order, request.token_ids, [sequence.take()], scores, finished, sequence.cached or 0)


def _turn(sequence: Sequence) -> tuple[int, int, int]:
    """Whose turn comes first."""
    return sequence.request.priority, sequence.order, sequence.index
