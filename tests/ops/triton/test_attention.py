"""Paged attention and its writes against their torch twins, in float64 where values count."""

import pytest
import torch
from torch import Tensor

from alloy.ops import attention, attn_decode, kv_append, use_backend
from alloy.ops.attention import BLOCK
from alloy.ops.documents import read_packing
from alloy.ops.triton import tuning

triton = pytest.importorskip("triton")
import alloy.ops.triton.attention as kernels  # noqa: E402


class Case:
    """Rows whose keys lie in scattered blocks; whatever belongs to nobody is NaN."""

    def __init__(
        self,
        device: torch.device,
        lengths: list[int],
        queries: int = 1,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        layers: int = 2,
        seed: int = 0,
    ) -> None:
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).to(dtype)

        rows = len(lengths)
        width = max(-(-(max(n, 0) + queries) // BLOCK) for n in lengths)
        # slots in another order than rows, one slot unused, the last entry that of padding
        order = torch.randperm(rows + 1, generator=torch.Generator().manual_seed(seed))[:rows].tolist()
        arena = torch.full(
            (layers, rows * width + 1, 2, kv_heads, BLOCK, head_dim), torch.nan, device=device, dtype=dtype
        )
        self.kv = arena[1]
        self.table = torch.zeros(rows + 2, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows + 2, dtype=torch.int32, device=device)
        free = (torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
        for row, n in enumerate(lengths):
            if n < 0:
                order[row] = -1
                continue
            for i in range(-(-(n + queries) // BLOCK)):
                block = free.pop()
                self.table[order[row], i] = block
                end = min(BLOCK, n + queries - i * BLOCK)
                self.kv[block, :, :, :end] = draw(2, kv_heads, end, head_dim)
            self.lengths[order[row]] = n
        self.slots = torch.tensor(order, dtype=torch.int32, device=device)
        # queries as a view of one projection
        self.q = draw(rows, queries, heads + kv_heads, head_dim)[:, :, :heads]

    def run(self, **options) -> Tensor:
        return attn_decode(self.q, self.kv, self.table, self.lengths, self.slots, **options)

    def want(self, **options) -> Tensor:
        with use_backend("torch"):
            return attn_decode(self.q.double(), self.kv.double(), self.table, self.lengths, self.slots, **options)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("config", tuning.CANDIDATES["attn_decode"], ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("head_dim", [16, 80])
def test_every_configuration(device: torch.device, config: tuning.Config, head_dim: int) -> None:
    """Ragged rows, one of them padding, one empty before its query; twice the same bits."""
    case = Case(device, [70, -1, 0, 129], queries=2, head_dim=head_dim)
    with use_backend("triton"), tuning.override("attn_decode", config):
        y, again = case.run(), case.run()
    assert torch.equal(y, again)
    assert not y[1].any()
    assert error(y, case.want()) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 1), (3, 3), (32, 2), (10, 2)])
@pytest.mark.parametrize(("queries", "window"), [(1, None), (8, None), (3, 5), (1, 64), (4, 100)])
def test_groups_queries_and_windows(
    device: torch.device, heads: int, kv_heads: int, queries: int, window: int | None
) -> None:
    """Tiles whose rows are padded or many, odd head widths, windows that begin inside a block."""
    case = Case(device, [3, 193, 64], queries, heads, kv_heads, head_dim=5 if heads == 5 else 32)
    with use_backend("triton"):
        y = case.run(window=window, scale=0.4)
    assert y.is_contiguous()
    assert error(y, case.want(window=window, scale=0.4)) < 1e-5


def test_append_writes_its_places_only(device: torch.device) -> None:
    """New keys and values behind each row, across blocks; nothing else changes, padding rows write nothing."""
    case = Case(device, [63, 5, -1, 128], queries=7, kv_heads=3, head_dim=12)
    g = torch.Generator(device).manual_seed(4)
    new = torch.randn(4, 7, 9, 12, generator=g, device=device)
    k, v = new[:, :, 1:4], new[:, :, 5:8]
    before = case.kv.clone()
    with use_backend("triton"):
        kv_append(case.kv, k, v, case.table, case.lengths, case.slots)
    want = before.clone()
    used = case.slots >= 0
    with use_backend("torch"):
        kv_append(want, k[used], v[used], case.table, case.lengths, case.slots[used])
    torch.testing.assert_close(case.kv, want, equal_nan=True, atol=0, rtol=0)
    assert not torch.equal(case.kv.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(32, torch.bfloat16), (64, torch.float16), (80, torch.bfloat16), (128, torch.bfloat16)]
)
@pytest.mark.parametrize("config", tuning.CANDIDATES["attn_decode"], ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_narrow_dtypes_at_length(
    device: torch.device, head_dim: int, dtype: torch.dtype, config: tuning.Config
) -> None:
    """Thousands of keys, real head counts."""
    for heads, kv_heads, queries in ((40, 8, 1), (32, 2, 8 if head_dim in (32, 128) else 4)):
        case = Case(device, [5000, 1, -1, 8191, 777], queries, heads, kv_heads, head_dim, dtype)
        with use_backend("triton"), tuning.override("attn_decode", config):
            y, again = case.run(), case.run()
        assert torch.equal(y, again)
        assert error(y, case.want()) < 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_capture_and_compile(device: torch.device) -> None:
    """A captured call follows lengths, slots and keys that change; fullgraph compilation works."""
    case = Case(device, [70, -1, 0, 129], queries=2, head_dim=64, dtype=torch.bfloat16)
    with use_backend("triton"):
        case.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case.run()
        for seed in (1, 2):
            other = Case(device, [33, 128, 60, -1], queries=2, head_dim=64, dtype=torch.bfloat16, seed=seed)
            for name in ("q", "kv", "lengths", "slots"):
                getattr(case, name).copy_(
                    getattr(other, name)[: len(getattr(case, name))] if name != "kv" else other.kv
                )
            case.table.copy_(other.table)
            y.fill_(torch.nan)
            graph.replay()
            assert error(y, other.want()) < 4e-3

        def both(q: Tensor, kv: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kv_append(kv, k, v, case.table, case.lengths, case.slots)
            return attn_decode(q, kv, case.table, case.lengths, case.slots)

        k = torch.randn(4, 2, 2, 64, device=device, dtype=torch.bfloat16)
        first, second = case.kv.clone(), case.kv.clone()
        got = torch.compile(both, fullgraph=True)(case.q, first, k, -k)
        want = both(case.q, second, k, -k)
        torch.testing.assert_close(got, want, atol=0, rtol=0)
        torch.testing.assert_close(first, second, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_chunks_behind_held_keys_need_no_mask(device: torch.device, dtype: torch.dtype) -> None:
    """A chunk of 256 behind 4,000 keys: right in every dtype; in narrow ones memory is far below that of a mask."""
    q, k, v = (torch.randn(1, n, h, 64, device=device, dtype=dtype) for n, h in ((256, 32), (4256, 2), (4256, 2)))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    want = attention(q.double(), k.double(), v.double(), lengths=torch.tensor([4000], device=device))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = attention(q, k, v, lengths=4000)
    if dtype == torch.bfloat16:
        assert torch.cuda.max_memory_allocated() - before < 16 * 2**20
    assert error(y, want) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_packed_rows_and_windows_need_no_mask(device: torch.device, packed: bool, window: int | None) -> None:
    """Documents of many lengths and padding with NaN: values and gradients of the masked float64 reference."""
    documents = torch.zeros(2, 300, dtype=torch.int32, device=device)
    if packed:
        documents[0, 1:] += 1
        documents[0, 140:] += 1
        documents[1, 256:] = -1
    documents = documents if packed else None
    given = [torch.randn(2, 300, h, 64, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2, 2)]
    slope = torch.randn(2, 8, 300, 64, device=device, dtype=torch.bfloat16)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [t.to(dtype).requires_grad_() for t in given]
        read = [t if documents is None else torch.where(documents[:, None, :, None] >= 0, t, torch.nan) for t in inputs]
        packing = None if documents is None else read_packing(documents)
        y = attention(*read, documents=documents, window=window, packing=packing)
        results.append([y, *torch.autograd.grad(y, inputs, slope.to(dtype))])
    for want, got in zip(*results, strict=True):
        assert error(got, want) < 1e-2


def test_splits_fill_the_device_and_no_more() -> None:
    """Powers of two, at least four, no more than there are shares."""
    assert kernels._splits(512, 129, 1056, 2) == 4
    assert kernels._splits(8, 129, 1056, 2) == 128
    assert kernels._splits(2, 16384, 1056, 2) == 128
    assert kernels._splits(1, 1, 1056, 2) == 1
