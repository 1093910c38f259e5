"""Attention against a loop over queries in float64."""

import math

import pytest
import torch
from torch import Tensor

from alloy.ops import attention, use_backend
from alloy.ops.cpu import attention as cpu_attention

BACKENDS = ("torch", "cpu")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries, the last one short, also on the short sequences of these tests."""
    monkeypatch.setattr(cpu_attention, "_ROWS", 4)
    monkeypatch.setattr(cpu_attention, "_LEAST", 3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def direct(q: Tensor, k: Tensor, v: Tensor, seen: list[list[list[int]]], scale: float | None = None) -> Tensor:
    """One query at a time over the keys that `seen[row][query]` lists; none: zero."""
    batch, heads, seq, head_dim = q.shape
    share = heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(seq):
                keys = seen[b][t]
                if not keys:
                    rows.append(torch.zeros_like(q[b, h, t]))
                    continue
                weights = (k[b, h // share, keys] @ q[b, h, t] * scale).softmax(0)
                rows.append(weights @ v[b, h // share, keys])
    return torch.stack(rows).view(q.shape)


def check(
    inputs: tuple[Tensor, Tensor, Tensor],
    seen: list[list[list[int]]],
    poisoned: tuple[Tensor, ...] | None = None,
    **options,
) -> None:
    """Values and gradients."""
    y = attention(*(inputs if poisoned is None else poisoned), **options)
    want = direct(*inputs, seen, options.get("scale"))
    torch.testing.assert_close(y, want)
    g = draw(*y.shape, seed=5).detach()
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (4, 4)])
@pytest.mark.parametrize(
    ("seq", "scale", "window"), [(11, None, None), (1, 0.3, None), (9, None, 4), (5, None, 7), (23, None, None)]
)
def test_causal_attention(
    heads: int, kv_heads: int, seq: int, scale: float | None, window: int | None, backend: str
) -> None:
    """Grouped keys, a scale of the caller's, a window that counts the query itself."""
    inputs = draw(2, heads, seq, 5), draw(2, kv_heads, seq, 5, seed=1), draw(2, kv_heads, seq, 5, seed=2)
    low = seq if window is None else window
    seen = [[list(range(max(0, t - low + 1), t + 1)) for t in range(seq)]] * 2
    with use_backend(backend):
        check(inputs, seen, scale=scale, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(backend: str) -> None:
    """A number may come back; padding holds NaN, is not read and gives zero; a row may be padding only."""
    numbers = [[3, 3, 3, 1, 3, 3, -1], [0, 1, 1, 1, 1, 2, 2], [-1] * 7]
    seen = []
    for row in numbers:
        start = 0
        keys = []
        for t, number in enumerate(row):
            if t and number != row[t - 1]:
                start = t
            keys.append(list(range(start, t + 1)) if number >= 0 else [])
        seen.append(keys)
    documents = torch.tensor(numbers, dtype=torch.int32)
    inputs = draw(3, 4, 7, 5), draw(3, 2, 7, 5, seed=1), draw(3, 2, 7, 5, seed=2)
    poisoned = tuple(torch.where((documents >= 0)[:, None, :, None], t, math.nan) for t in inputs)
    with use_backend(backend):
        check(inputs, seen, poisoned, documents=documents)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[6, 6], [0, 0], [2, 6]])
@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("window", [None, 2])
def test_cached_keys(lengths: list[int], seq: int, window: int | None, backend: str) -> None:
    """Query i of row b sees the keys up to lengths[b] + i; rows may hold different numbers of keys."""
    total = max(lengths) + seq
    inputs = draw(2, 4, seq, 5), draw(2, 2, total, 5, seed=1), draw(2, 2, total, 5, seed=2)
    low = total if window is None else window
    seen = [[list(range(max(0, n + t - low + 1), n + t + 1)) for t in range(seq)] for n in lengths]
    with use_backend(backend):
        check(inputs, seen, lengths=torch.tensor(lengths), window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("held", "seq"), [(0, 3), (6, 1), (6, 3)])
@pytest.mark.parametrize("window", [None, 2])
def test_a_number_of_held_keys_is_the_same_for_all_rows(held: int, seq: int, window: int | None, backend: str) -> None:
    """The same values as with a tensor; keys that are not held ones and the queries' own are refused."""
    q, k, v = draw(2, 4, seq, 5), draw(2, 2, held + seq, 5, seed=1), draw(2, 2, held + seq, 5, seed=2)
    with use_backend(backend):
        want = attention(q, k, v, lengths=torch.full((2,), held), window=window)
        torch.testing.assert_close(attention(q, k, v, lengths=held, window=window), want)
    with pytest.raises(ValueError, match=f"{held + seq} keys for 9 held ones and {seq} queries"):
        attention(q, k, v, lengths=9)


def test_cached_padding_gives_zero() -> None:
    """With a cache, documents only mark padding queries."""
    q, k, v = draw(2, 2, 3, 4), draw(2, 2, 5, 4, seed=1), draw(2, 2, 5, 4, seed=2)
    y = attention(q, k, v, lengths=torch.tensor([2, 2]), documents=torch.tensor([[0, 0, 0], [0, -1, -1]]))
    want = attention(q, k, v, lengths=torch.tensor([2, 2]))
    torch.testing.assert_close(y[0], want[0])
    torch.testing.assert_close(y[1, :, 0], want[1, :, 0])
    assert not y[1, :, 1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_dtypes_and_gradcheck(backend: str) -> None:
    """bf16 stays bf16 and close; finite differences agree with packing and a window at once."""
    q, k, v = draw(2, 4, 11, 5), draw(2, 2, 11, 5, seed=1), draw(2, 2, 11, 5, seed=2)
    documents = torch.tensor([[0] * 5 + [1] * 6, [0] * 9 + [-1] * 2])
    with use_backend(backend):
        narrow = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.double(), attention(q, k, v), atol=5e-2, rtol=5e-2)

        def f(*t: Tensor) -> Tensor:
            return attention(*t, documents=documents, window=3)

        assert torch.autograd.gradcheck(f, (q, k, v), fast_mode=True)


def test_refusals() -> None:
    """Head counts that do not divide; keys without a cache that are not as many as the queries."""
    with pytest.raises(ValueError, match="heads = 3 is not a multiple of kv_heads = 2"):
        attention(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))
    with pytest.raises(ValueError, match="5 keys for 2 queries"):
        attention(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
