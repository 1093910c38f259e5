"""Packing and padding: what a document sees and gives does not depend on its neighbours."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alloy.errors import RequestError
from alloy.models.base import Layout
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM
from tests.models.zoo import CONFIGS, VOCAB, build, hybrid, random_tokens

LENGTHS = (7, 1, 11, 3)
SEQ = 25


def pack(tokens: list[Tensor], front: int = 0) -> tuple[Tensor, Tensor]:
    """Documents one after another in one row of SEQ, `front` padding before them; ids need not grow."""
    row, documents = torch.full((SEQ,), 5), torch.full((SEQ,), -1, dtype=torch.int32)
    start = front
    for i, document in enumerate(tokens):
        row[start : start + len(document)] = document
        # a number that comes again, but not next to itself
        documents[start : start + len(document)] = i % 2
        start += len(document)
    return row, documents


def labels(documents: Tensor, tokens: Tensor, shift: int) -> Tensor:
    """Targets `shift` tokens later in the same document, else -100."""
    later = torch.full_like(tokens, -100)
    for row, numbers in enumerate(documents.tolist()):
        for t in range(len(numbers) - shift):
            if len(set(numbers[t : t + shift + 1])) == 1 and numbers[t] >= 0:
                later[row, t] = tokens[row, t + shift]
    return later


def loss(model: nn.Module, tokens: Tensor, documents: Tensor | None, has_mtp: bool) -> Tensor:
    """Summed cross entropy, MTP depths and router balance (times documents) included."""
    out = model(tokens, documents=documents, return_mtp=has_mtp)
    ids = torch.zeros_like(tokens) if documents is None else documents
    total = F.cross_entropy(out.logits.flatten(0, 1), labels(ids, tokens, 1).flatten(), reduction="sum")
    for k, logits in enumerate(out.mtp_logits or [], start=1):
        target = labels(ids, tokens, k + 1)[:, : logits.shape[1]]
        total = total + F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    return total


@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate(name: str, front: int) -> None:
    """Logits, loss and gradients of packed rows equal those of the documents alone."""
    model = build(name)
    has_mtp = isinstance(model.config, HybridConfig) and model.config.mtp_depths > 0
    alone = [random_tokens(1, n, seed=n)[0] for n in LENGTHS]
    rows = [pack(alone, front), pack(alone[::-1])]
    tokens, documents = (torch.stack(t) for t in zip(*rows, strict=True))
    with torch.no_grad():
        packed = model(tokens, documents=documents).logits
        start = front
        for document in alone:
            single = model(document[None]).logits[0]
            torch.testing.assert_close(packed[0, start : start + len(document)], single, atol=1e-4, rtol=0)
            start += len(document)

    value = loss(model, tokens, documents, has_mtp)
    value.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    separate = 2 * sum(loss(model, d[None], None, has_mtp) for d in alone if len(d) > 1)
    separate.backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(value, separate, atol=1e-3, rtol=1e-5)
    assert len(grads) == len(expected)
    # rounding in sums that cancel (decay rates) is relative to the whole gradient, not to the small rest
    whole = torch.cat([g.flatten() for g in expected]).norm()
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6 * whole


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    """Rows padded left, right and on both sides equal single rows: logits, stream, "last" and indices."""
    model, tokens = build(name), random_tokens(4, 9, seed=3)
    spans = (slice(0, 9), slice(4, 9), slice(0, 6), slice(2, 8))
    documents = torch.full((4, 9), -1)
    # what lies under padding is never looked at
    rows = torch.full((4, 9), -1)
    for row, span in enumerate(spans):
        documents[row, span] = row
        rows[row, span] = tokens[row, span]
    out = model(rows, documents=documents, return_hidden=True)
    last = model(rows, documents=documents, logits="last").logits
    chosen = model(rows, documents=documents, logits=torch.tensor([8, 9 + 5, 18])).logits
    assert model(rows, documents=documents, logits=None).logits is None
    for row, span in enumerate(spans):
        single = model(tokens[row : row + 1, span], return_hidden=True)
        torch.testing.assert_close(out.logits[row, span], single.logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(last[row, 0], single.logits[0, -1], atol=1e-4, rtol=0)
        for ours, theirs in zip(out.hidden, single.hidden, strict=True):
            torch.testing.assert_close(ours[row, span], theirs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(chosen, out.logits.flatten(0, 1)[[8, 14, 18]], atol=1e-4, rtol=0)


@torch.no_grad()
def test_mtp_of_padded_rows() -> None:
    """Padding on the left shifts multi-token prediction with its row."""
    model, tokens = build("latent_mtp"), random_tokens(1, 9)
    single = model(tokens, return_mtp=True)
    rows = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1)
    documents = torch.tensor([[-1] * 3 + [4] * 9])
    padded = model(rows, documents=documents, return_mtp=True)
    for k in (0, 1):
        assert padded.mtp_logits[k].shape == (1, 12 - k - 1, VOCAB)
        torch.testing.assert_close(padded.mtp_logits[k][:, 3:], single.mtp_logits[k], atol=1e-4, rtol=0)


@torch.no_grad()
def test_mtp_depths_asked_for() -> None:
    """True gives two depths where one repeats, else those stored; an int gives that many or is refused."""
    tokens = random_tokens(1, 5)
    repeated, stored = build("latent_mtp"), build("mamba_mtp")
    assert len(repeated(tokens, return_mtp=True).mtp_logits) == 2
    assert [t.shape[1] for t in repeated(tokens, return_mtp=7).mtp_logits] == [4, 3, 2, 1, 0, 0, 0]
    assert len(stored(tokens, return_mtp=True).mtp_logits) == 2
    assert len(stored(tokens, return_mtp=1).mtp_hidden) == 1
    assert stored(tokens, return_mtp=1, logits=None).mtp_logits is None
    with pytest.raises(RequestError, match="2 MTP depths are stored"):
        stored(tokens, return_mtp=3)
    with pytest.raises(RequestError, match="no MTP layers"):
        build("dense")(tokens, return_mtp=True)


def test_layout_of_rows() -> None:
    """Rolled tokens, positions and boundaries of a hand-made batch."""
    tokens = torch.arange(1, 13).view(2, 6)
    documents = torch.tensor([[-1, -1, 3, 3, 9, -1], [2, 2, 2, 5, 5, 5]])
    layout = Layout(tokens, documents)
    assert layout.tokens.tolist() == [[3, 4, 5, 0, 0, 0], [7, 8, 9, 10, 11, 12]]
    assert layout.positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 0, 1, 2]]
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 6, 9]
    assert layout.lengths.tolist() == [3, 6]
    assert layout.restore(layout.tokens)[0, 2:5].tolist() == [3, 4, 5]
    assert torch.equal(layout.roll(tokens)[0, :3], torch.tensor([3, 4, 5]))
    ahead = layout.ahead(1)
    assert ahead.tokens.tolist() == [[4, 0, 0, 0, 0], [8, 9, 0, 11, 12]]
    assert ahead.valid.tolist() == [[True] + [False] * 4, [True, True, False, True, True]]
    assert Layout(tokens).cu_seqlens.tolist() == [0, 6, 12]
    assert Layout(tokens, torch.ones_like(tokens)).documents is None


def test_bad_calls_are_refused() -> None:
    """Padding inside a row, wrong shapes, unknown ids, positions beyond an unscaled RoPE model's range."""
    model, tokens = build("dense"), random_tokens(1, 5)
    with pytest.raises(RequestError, match="between real tokens"):
        model(tokens, documents=torch.tensor([[0, -1, 0, 0, 0]]))
    with pytest.raises(RequestError, match=r"documents has shape \(1, 4\)"):
        model(tokens, documents=torch.zeros(1, 4))
    with pytest.raises(RequestError, match="outside the vocabulary of 61"):
        model(tokens + 61)
    with pytest.raises(RequestError, match="token id -5 is"):
        model(torch.tensor([[1, -5, 3]]))
    with pytest.raises(RequestError, match="seq >= 1"):
        model(tokens[:, :0])
    qwen = build("qwen3")
    with pytest.raises(RequestError, match="position 128 is beyond max_positions = 128"):
        qwen(random_tokens(1, 129))
    qwen(random_tokens(1, 129), documents=torch.tensor([[0] * 65 + [1] * 64]))
    build("llama")(random_tokens(1, 129))


@torch.no_grad()
def test_long_hybrid_warns() -> None:
    """A hybrid has no position embedding: beyond max_positions it warns and runs."""
    model = HybridLM(hybrid("M*", max_positions=8)).eval()
    with pytest.warns(UserWarning, match="max_positions = 8"):
        model(random_tokens(1, 9))


@torch.no_grad()
def test_given_positions_are_used() -> None:
    """RoPE sees only differences: shifted positions change nothing, stretched ones do."""
    model, tokens = build("llama"), random_tokens(2, 9)
    index = torch.arange(9).expand(2, 9)
    plain = model(tokens).logits
    torch.testing.assert_close(model(tokens, positions=index + 20).logits, plain, atol=1e-3, rtol=1e-3)
    assert (model(tokens, positions=index * 3).logits - plain).abs().max() > 1e-2
