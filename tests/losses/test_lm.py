"""The chunked head against torch's own cross entropy, and MTP labels against a loop."""

import pytest
import torch
from torch.nn import functional as F

from alloy.losses.lm import count_labels, linear_cross_entropy, mtp_labels


def example(
    rows: int = 3, seq: int = 17, hidden: int = 13, vocab: int = 29
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, seq, hidden, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, hidden, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (rows, seq), generator=generator)
    labels[torch.rand(rows, seq, generator=generator) < 0.3] = -100
    return x, weight, labels


@pytest.mark.parametrize("chunk", [None, 1, 7, 51, 1000])
def test_loss_and_gradients_are_those_of_torch(chunk: int | None) -> None:
    """Any chunk size gives the sum of F.cross_entropy and its gradients, under an outer factor too."""
    x, weight, labels = example()
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected * 0.37, (x, weight))
    loss = linear_cross_entropy(x, weight, labels, chunk)
    got = torch.autograd.grad(loss * 0.37, (x, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, wanted)


def test_nothing_to_predict_is_zero() -> None:
    """Rows whose labels are all ignored have loss and gradients 0."""
    x, weight, labels = example()
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()


def test_autocast_stays_near_fp32() -> None:
    """Under bf16 autocast the loss is within bf16's error and the weight's gradient stays fp32."""
    x, weight, labels = example()
    expected = linear_cross_entropy(x, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_frozen_head_gets_no_gradient() -> None:
    """Only what requires a gradient gets one."""
    x, weight, labels = example()
    linear_cross_entropy(x, weight.detach(), labels).backward()
    assert x.grad is not None


def test_mtp_labels_never_cross_documents() -> None:
    """Depth k asks position t for token t + k + 1 of the same document, by a plain loop over tokens."""
    # number 0 comes again after document 1: another document
    documents = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    tokens = torch.arange(18).view(2, 9) + 100
    labels = torch.full_like(tokens, -100)
    for row in range(2):
        for t in range(8):
            if documents[row, t] == documents[row, t + 1] >= 0:
                labels[row, t] = tokens[row, t + 1]
    # the second row goes on in the next one
    labels[1, 8] = 7
    for depth in (1, 2):
        got = mtp_labels(labels, documents, depth)
        assert got.shape == (2, 9 - depth)
        for row in range(2):
            for t in range(9 - depth):
                last = t + depth + 1
                inside = (
                    last < 9 and len({int(d) for d in documents[row, t : last + 1]}) == 1 and documents[row, t] >= 0
                )
                wanted = int(tokens[row, last]) if inside else 7 if row == 1 and last == 9 else -100
                assert got[row, t] == wanted
    assert count_labels(mtp_labels(labels, documents, 2)) == 1 + 7
