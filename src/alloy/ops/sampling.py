"""From logits to tokens: masks, penalties, temperature, truncation, draws, and acceptance of drafted tokens.

Order of use: logit bias, penalties, temperature, top_k, top_p, min_p, draw. Settings are per row: a number, or a tensor
(batch,). All functions are pure.

Papers: nucleus sampling (Holtzman et al., 2020) arXiv:1904.09751; min-p (Nguyen et al., 2024) arXiv:2407.01082;
speculative sampling (Leviathan et al., 2023), algorithm 1. arXiv:2211.17192
"""

import torch
from torch import Tensor

Setting = float | int | Tensor


def apply_bitmask(logits: Tensor, bits: Tensor) -> Tensor:
    """Keep the tokens whose bit is set; others -inf.

    Args:
        logits: (..., vocab)
        bits: int32 (..., words), token i at bit i % 32 of word i // 32; words * 32 >= vocab

    Returns:
        (..., vocab)
    """
    places = torch.ones(32, dtype=torch.int32, device=bits.device) << torch.arange(32, device=bits.device)
    banned = (bits[..., None] & places == 0).flatten(-2)
    return logits.masked_fill(banned[..., : logits.shape[-1]], -torch.inf)


def apply_penalties(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    *,
    presence: Setting = 0.0,
    frequency: Setting = 0.0,
    repetition: Setting = 1.0,
) -> Tensor:
    """Lower the logits of tokens that occurred. Repetition looks at prompt and output, the other two at the output.

    Args:
        logits: (batch, vocab)
        prompt_mask: bool (batch, vocab), tokens that occur in the prompt
        output_counts: int (batch, vocab), how often each token was generated
        presence: subtracted from tokens that were generated
        frequency: subtracted once for each time a token was generated
        repetition: positive logits are divided by it, negative ones multiplied

    Returns:
        (batch, vocab)
    """
    generated = output_counts > 0
    factor = torch.where(prompt_mask | generated, _column(repetition, logits), 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - _column(frequency, logits) * output_counts - _column(presence, logits) * generated


def apply_temperature(logits: Tensor, temperature: Setting) -> Tensor:
    """logits (batch, vocab) / temperature; rows with temperature 0 (greedy) are left as they are."""
    temperature = _column(temperature, logits)
    return logits / torch.where(temperature == 0, 1.0, temperature)


def filter_top_k(logits: Tensor, top_k: Setting) -> Tensor:
    """Keep the `top_k` largest of each row of (batch, vocab), ties with the last of them too; others -inf. <= 0: keep all."""
    top_k = _column(top_k, logits).long()
    vocab = logits.shape[-1]
    width = int(torch.where(top_k <= 0, 1, top_k).max().clamp(max=vocab))
    best = logits.topk(width, dim=-1).values
    last = best.gather(-1, (top_k.clamp(1, width) - 1).expand(logits.shape[0], 1))
    return logits.masked_fill((logits < last) & (top_k > 0), -torch.inf)


def filter_top_p(logits: Tensor, top_p: Setting) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p` (at least one), of (batch, vocab); others -inf."""
    order = logits.sort(dim=-1, descending=True, stable=True)
    probs = order.values.softmax(-1)
    # a token goes when those before it reach top_p already
    dropped = (probs.cumsum(-1) - probs) >= _column(top_p, logits)
    dropped[:, 0] = False
    dropped &= _column(top_p, logits) < 1
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order.indices, dropped), -torch.inf)


def filter_min_p(logits: Tensor, min_p: Setting) -> Tensor:
    """Keep tokens of (batch, vocab) with at least `min_p` times the probability of the likeliest; others -inf."""
    floor = logits.amax(-1, keepdim=True) + torch.log(_column(min_p, logits))
    return logits.masked_fill(logits < floor, -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """The token of the largest logit, the lowest id among equals: (..., vocab) -> int64 (...)."""
    # torch promises the first of several largest
    return logits.argmax(-1)


def sample(probs: Tensor, *, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        probs: (batch, vocab), non-negative; a row need not sum to 1
        generator: where uniform numbers come from when `uniform` is None
        uniform: (batch,) in [0, 1), so that a row's draw depends on nothing but its own number

    Returns:
        int64 (batch,); never a token of probability 0
    """
    if uniform is None:
        uniform = torch.rand(probs.shape[0], dtype=torch.float64, generator=generator, device=probs.device)
    total = probs.double().cumsum(-1)
    wanted = uniform.double()[:, None] * total[:, -1:]
    drawn = torch.searchsorted(total, wanted, right=True)[:, 0]
    # rounding may place the number past the last token that has probability
    last = torch.searchsorted(total, total[:, -1:].contiguous())[:, 0]
    return torch.minimum(drawn, last)


def accept_greedy(drafts: Tensor, targets: Tensor) -> Tensor:
    """How many drafts agree with the model before the first that does not.

    Args:
        drafts: int64 (batch, tokens)
        targets: int64 (batch, tokens or tokens + 1), the model's own choice at each drafted place

    Returns:
        int64 (batch,), 0 .. tokens; the token that follows the accepted ones is targets[b, count]
    """
    return (drafts == targets[:, : drafts.shape[1]]).long().cumprod(1).sum(1)


def speculative_accept(
    drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniform: Tensor, next_uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling: accepted drafts and the token after them are distributed as plain samples of the target.

    Args:
        drafts: int64 (batch, tokens)
        draft_probs: (batch, tokens, vocab), what the drafts were drawn from (one-hot for greedy drafts)
        target_probs: (batch, tokens + 1, vocab)
        uniform: (batch, tokens) in [0, 1), one for each acceptance
        next_uniform: (batch,) in [0, 1), for the token after the accepted ones

    Returns:
        counts int64 (batch,), 0 .. tokens, and the next token int64 (batch,)
    """
    batch, tokens = drafts.shape
    p = target_probs[:, :tokens].gather(2, drafts[..., None])[..., 0]
    q = draft_probs.gather(2, drafts[..., None])[..., 0]
    counts = (uniform * q < p).long().cumprod(1).sum(1)
    row = torch.arange(batch, device=drafts.device)
    target = target_probs[row, counts]
    # past the last draft there is nothing to subtract
    drafted = torch.cat([draft_probs, torch.zeros_like(draft_probs[:, :1])], dim=1)[row, counts]
    left = (target - drafted).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, target)
    return counts, sample(left, uniform=next_uniform)


def _column(value: Setting, like: Tensor) -> Tensor:
    """A setting as (batch or 1, 1), to be broadcast over the vocabulary."""
    if isinstance(value, Tensor):
        return value.to(like.device).view(-1, 1)
    return torch.full((1, 1), value, dtype=like.dtype, device=like.device)
