"""Batched choice of the next tokens, every row with its own parameters.

Order per row: grammar, bans (min_tokens), logit_bias, penalties, temperature, top_k, top_p, min_p, draw. Temperature 0 takes the
largest logit after the penalties. A row's random number depends on its seed, sample and position alone. Verified drafts
are rows with several positions: position j is chosen as if the drafts before it had been generated.
"""

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from alloy.engine.request import TokenLogprobs
from alloy.engine.sequence import Sequence
from alloy.ops.sampling import (
    apply_bitmask,
    apply_penalties,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    greedy,
    sample,
)

# what logits are divided by is at least this, so that they stay finite
SMALLEST = 1e-30


class Sampler:
    """Chooses tokens for a fixed set of sequences; build a new one when the set changes.

    Args:
        sequences: one per row
        vocab: width of the logits
        device: where the logits live
    """

    def __init__(self, sequences: Items[Sequence], vocab: int, device: torch.device) -> None:
        self._sequences = list(sequences)
        self._device = device
        params = [s.params for s in self._sequences]
        # whether the largest logit is the answer in every row
        self.plain = all(p.plain for p in params)
        self.wants_logprobs = any(p.logprobs is not None for p in params)
        self._grammars = [(row, s.grammar) for row, s in enumerate(self._sequences) if s.grammar is not None]
        self._banned = [(row, s, sorted(s.stop_ids)) for row, s in enumerate(self._sequences) if s.params.min_tokens]
        self._biased = [
            (row, list(p.logit_bias), list(p.logit_bias.values())) for row, p in enumerate(params) if p.logit_bias
        ]
        self._drawn = [row for row, p in enumerate(params) if not p.greedy]
        drawn = [params[row] for row in self._drawn]
        self._temperature = torch.tensor([max(p.temperature, SMALLEST) for p in drawn], device=device)
        self._top_k = torch.tensor([p.top_k for p in drawn], device=device) if any(p.top_k for p in drawn) else None
        self._top_p = torch.tensor([p.top_p for p in drawn], device=device) if any(p.top_p < 1 for p in drawn) else None
        self._min_p = torch.tensor([p.min_p for p in drawn], device=device) if any(p.min_p for p in drawn) else None
        self._penalised = [row for row, p in enumerate(params) if p.penalised]
        if self._penalised:
            chosen = [params[row] for row in self._penalised]
            self._presence = torch.tensor([p.presence_penalty for p in chosen], device=device)
            self._frequency = torch.tensor([p.frequency_penalty for p in chosen], device=device)
            self._repetition = torch.tensor([max(p.repetition_penalty, SMALLEST) for p in chosen], device=device)
            # (penalised rows, vocab): which tokens the prompt holds, and how often each was generated
            self._prompt = torch.zeros(len(chosen), vocab, dtype=torch.bool, device=device)
            self._counts = torch.zeros(len(chosen), vocab, dtype=torch.int32, device=device)
            for i, row in enumerate(self._penalised):
                sequence = self._sequences[row]
                self._prompt[i, torch.tensor(sequence.prompt, device=device)] = True
                self._count(i, sequence.tokens)
        # what the last draw of each drawn row was made from, for logprobs "sampled"
        self._filtered: Tensor | None = None

    def choose(self, logits: Tensor, drafts: Tensor | None = None) -> list[list[int]]:
        """The next token at each position.

        Args:
            logits: (rows, positions, vocab) fp32
            drafts: (rows, positions - 1) int64, the tokens between them

        Returns:
            per row one token per position; -1 where the logits were not finite
        """
        if self.plain:
            return on_host(_checked(logits, greedy(logits)))
        _, positions, vocab = logits.shape
        changed = self._penalise(self._adjust(self._mask(logits, drafts)), drafts)
        tokens = greedy(changed)
        if self._drawn:
            drawn = changed[self._drawn].flatten(0, 1)
            drawn = self._truncate(apply_temperature(drawn, self._spread(self._temperature, positions)), positions)
            sequences = [self._sequences[row] for row in self._drawn]
            places = [s.uniform(len(s.tokens) + j) for s in sequences for j in range(positions)]
            uniform = torch.tensor(places, dtype=torch.float64, device=self._device)
            picked = sample(drawn.softmax(-1), uniform=uniform).view(-1, positions)
            # from a row where every token is banned nothing can be drawn
            tokens[self._drawn] = torch.where(picked < vocab, picked, tokens[self._drawn])
            self._filtered = drawn.view(-1, positions, vocab)
        return on_host(_checked(logits, tokens))

    def commit(self, accepted: Items[Items[int]]) -> None:
        """Count the tokens that each row really got."""
        for i, row in enumerate(self._penalised):
            self._count(i, accepted[row])

    def logprobs(self, logits: Tensor, accepted: Items[Items[int]]) -> None:
        """Give every sequence that asked for them the log probabilities of its accepted tokens.

        Args:
            logits: (rows, positions, vocab), what `choose` got
            accepted: per row the tokens at its first positions
        """
        for row, sequence in enumerate(self._sequences):
            params, tokens = sequence.params, accepted[row]
            if params.logprobs is None or not tokens:
                continue
            tables: dict[str, Tensor] = {}
            for name in params.logprobs_of:
                scores = logits[row, : len(tokens)]
                if name == "sampled":
                    scores = self._sampled(row, tokens, scores)
                tables[name] = scores.log_softmax(-1)
            sequence.logprobs += token_logprobs(tokens, tables, params.logprobs)

    def _sampled(self, row: int, tokens: Items[int], logits: Tensor) -> Tensor:
        """Logits of the distribution that the tokens were drawn from; all on the token where nothing was drawn."""
        if row in self._drawn and self._filtered is not None:
            return self._filtered[self._drawn.index(row), : len(tokens)]
        certain = torch.full_like(logits, -torch.inf)
        return certain.scatter(1, torch.tensor(tokens, device=logits.device)[:, None], 0.0)

    def _mask(self, logits: Tensor, drafts: Tensor | None) -> Tensor:
        """Only tokens that the rows' grammars allow."""
        if not self._grammars:
            return logits
        shape = (*logits.shape[:2], self._grammars[0][1].words)
        # all bits set: rows without a grammar may take any token
        bits = torch.full(shape, -1, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        words = bits.numpy().view("uint32")
        guesses: list[list[int]] = [[]] * len(words) if drafts is None else on_host(drafts)
        for row, grammar in self._grammars:
            grammar.masks(words[row], guesses[row])
        return apply_bitmask(logits, bits.to(self._device, non_blocking=True))

    def _adjust(self, logits: Tensor) -> Tensor:
        """No stop token before min_tokens; what logit_bias adds."""
        left = [(row, s.params.min_tokens - len(s.tokens), ids) for row, s, ids in self._banned]
        early = [(row, count, ids) for row, count, ids in left if count > 0]
        changed = logits.clone() if early or self._biased else logits
        for row, count, ids in early:
            changed[row, :count, ids] = -torch.inf
        for row, ids, values in self._biased:
            changed[row, :, ids] += torch.tensor(values, device=logits.device)
        return changed

    def _penalise(self, logits: Tensor, drafts: Tensor | None) -> Tensor:
        if not self._penalised:
            return logits
        positions = logits.shape[1]
        counts = self._counts[:, None].repeat(1, positions, 1)
        for j in range(1, positions):
            # position j follows the drafts 0 .. j - 1
            assert drafts is not None, "several positions are those of drafts"
            before = drafts[self._penalised, :j]
            counts[:, j].scatter_add_(1, before, torch.ones_like(before, dtype=counts.dtype))
        changed = logits.clone()
        changed[self._penalised] = apply_penalties(
            logits[self._penalised].flatten(0, 1),
            self._prompt.repeat_interleave(positions, 0),
            counts.flatten(0, 1),
            presence=self._spread(self._presence, positions),
            frequency=self._spread(self._frequency, positions),
            repetition=self._spread(self._repetition, positions),
        ).unflatten(0, (-1, positions))
        return changed

    def _truncate(self, logits: Tensor, positions: int) -> Tensor:
        if self._top_k is not None:
            logits = filter_top_k(logits, self._spread(self._top_k, positions))
        if self._top_p is not None:
            logits = filter_top_p(logits, self._spread(self._top_p, positions))
        if self._min_p is not None:
            logits = filter_min_p(logits, self._spread(self._min_p, positions))
        return logits

    def _count(self, i: int, tokens: Items[int]) -> None:
        ids = torch.tensor(tokens, dtype=torch.int64, device=self._device)
        self._counts[i].index_add_(0, ids, torch.ones(len(tokens), dtype=torch.int32, device=self._device))

    @staticmethod
    def _spread(values: Tensor, positions: int) -> Tensor:
        """(rows,) -> (rows * positions,)."""
        return values if positions == 1 else values.repeat_interleave(positions)


def token_logprobs(tokens: Items[int], tables: dict[str, Tensor], top: int) -> list[TokenLogprobs]:
    """Entries for tokens at successive positions.

    Args:
        tokens: one per position
        tables: log probabilities (positions, vocab) per distribution; alternatives come from the first
        top: number of alternatives
    """
    first = next(iter(tables.values()))
    ids = torch.tensor(tokens, dtype=torch.int64, device=first.device)[:, None]
    chosen: dict[str, list[float]] = {name: on_host(table.gather(1, ids)[:, 0]) for name, table in tables.items()}
    best = first.topk(min(top, first.shape[1]), dim=1)
    values: list[list[float]] = on_host(best.values)
    places: list[list[int]] = on_host(best.indices)
    unknown = [None] * len(tokens)
    model, sampled = chosen.get("model", unknown), chosen.get("sampled", unknown)
    return [
        TokenLogprobs(token, model[j], sampled[j], tuple(zip(places[j], values[j], strict=True)))
        for j, token in enumerate(tokens)
    ]


def on_host(tensor: Tensor) -> Any:
    """The values (any shape) as nested lists; torch leaves the type of `tolist` open."""
    untyped: Any = tensor
    return untyped.tolist()


def _checked(logits: Tensor, tokens: Tensor) -> Tensor:
    """-1 where logits (..., vocab) are not finite in their largest value, which is where a NaN ends up."""
    return torch.where(logits.amax(-1).isfinite(), tokens, -1)
