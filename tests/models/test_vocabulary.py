"""Rows for new tokens: means by hand, old answers unchanged, and the whole way on the command line."""

import pytest
import torch

from alloy.data.tokens import load_tokenizer, train_tokenizer
from alloy.errors import CheckpointError
from alloy.models.registry import build as build_model
from alloy.models.registry import load, save
from alloy.models.vocabulary import grow_rows, grow_vocabulary
from tests.data.test_data_cli import run
from tests.models.zoo import decoder, hybrid, random_tokens


def test_means_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    grown = grow_rows(weight, {3: [0, 1, 1], 2: [0]}, 5)
    expected = [[1.0, 2.0], [3.0, 6.0], [1.0, 2.0], [7 / 3, 14 / 3], [3.0, 3.0]]
    torch.testing.assert_close(grown, torch.tensor(expected))
    assert grow_rows(weight.bfloat16(), {3: [0, 1]}, 4).dtype == torch.bfloat16
    for pieces in ({3: []}, {3: [3]}, {9: [0]}):
        with pytest.raises(CheckpointError, match="Use the tokenizer that the model was trained with"):
            grow_rows(weight, pieces, 5)


@pytest.mark.parametrize("config", [hybrid("M-*-"), decoder("llama"), decoder("llama", tie_embeddings=True)])
def test_old_tokens_are_answered_as_before(config, tmp_path) -> None:
    """Logits of the old ids are bit-equal, before and after a save; of a tied model both matrices stay one."""
    model = build_model(config).eval()
    old, tokens = model.config.vocab, random_tokens(2, 17) % model.config.vocab
    before = model(tokens).logits
    grow_vocabulary(model, {old: [3, 5], old + 1: [4]}, old + 2)
    after = model(tokens).logits
    assert after.shape[-1] == model.config.vocab == old + 2
    torch.testing.assert_close(after[..., :old], before, rtol=0, atol=0)
    torch.testing.assert_close(after[..., old + 1], before[..., 4], rtol=1e-5, atol=1e-6)
    assert (model.head.weight is model.embed.weight) == config.tie_embeddings
    save(model, tmp_path / "grown")
    again, _ = load(tmp_path / "grown", device="cpu")
    torch.testing.assert_close(again(tokens).logits, after, rtol=0, atol=0)


def test_a_checkpoint_is_extended(capsys, tmp_path) -> None:
    """The new token's row is the mean of the rows that its text had."""
    tokenizer = train_tokenizer(["some words of a text"], 290)
    model = build_model(hybrid("M-*-", vocab=len(tokenizer)))
    save(model, tmp_path / "old", tokenizer=tokenizer)
    options = [
        "data",
        "tokenizer",
        "--extend",
        tmp_path / "old",
        "--out",
        tmp_path / "new",
        "--special-tokens",
        "<tool>",
    ]
    assert run(capsys, *options)[0] == 0
    grown, _ = load(tmp_path / "new", device="cpu")
    added = load_tokenizer(tmp_path / "new").convert_tokens_to_ids("<tool>")
    pieces = tokenizer.encode("<tool>", add_special_tokens=False)
    assert added == len(tokenizer)
    torch.testing.assert_close(grown.embed.weight[added], model.embed.weight[pieces].mean(0))
