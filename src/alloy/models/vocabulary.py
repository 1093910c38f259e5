"""More rows for tokens that a tokenizer has gained: each begins as the mean of the rows of the tokens its text had before."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alloy.errors import CheckpointError
from alloy.models.base import CausalLM


def grow_rows(weight: Tensor, pieces: Mapping[int, Sequence[int]], rows: int) -> Tensor:
    """An embedding or head matrix with rows for new tokens.

    Args:
        weight: (old rows, hidden)
        pieces: new id -> the ids whose mean it begins as; ids of new tokens are those of the old vocabulary's end on
        rows: of the result; rows without pieces begin as the mean of all

    Returns:
        (rows, hidden), the old rows unchanged unless `pieces` names them
    """
    old = weight.detach()
    grown = old.new_empty(max(rows, len(old)), old.shape[1])
    grown[: len(old)] = old
    grown[len(old) :] = old.float().mean(0).to(old.dtype)
    for token, parts in pieces.items():
        if not 0 <= token < len(grown) or not parts or max(parts) >= len(old):
            raise CheckpointError(
                f"token {token} begins as the mean of {list(parts)}, but the matrix has {len(old)} rows, {len(grown)} with new "
                "ones. Use the tokenizer that the model was trained with"
            )
        grown[token] = old[list(parts)].float().mean(0).to(old.dtype)
    return grown


@torch.no_grad()
def grow_vocabulary(model: CausalLM, pieces: Mapping[int, Sequence[int]], vocab: int) -> CausalLM:
    """Give a model rows for the tokens that `data.vocabulary.extend_tokenizer` added; embedding and head alike.

    Args:
        model: changed in place, its config too
        pieces: new id -> the ids that its text had before
        vocab: tokens of the grown tokenizer; a model with as many rows keeps its size
    """
    tied = model.head.weight is model.embed.weight
    rows = max(vocab, model.config.vocab)
    model.embed.weight = nn.Parameter(grow_rows(model.embed.weight, pieces, rows))
    model.head.weight = model.embed.weight if tied else nn.Parameter(grow_rows(model.head.weight, pieces, rows))
    model.embed.num_embeddings = model.head.out_features = rows
    model.config = model.config.model_copy(update={"vocab": rows})
    return model
