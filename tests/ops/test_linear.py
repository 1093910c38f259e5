"""The linear map in every path."""

import pytest
import torch
import torch.nn.functional as F

from alloy.ops import linear


@pytest.mark.parametrize(
    "shape", [(1, 33), (1, 1, 33), (2, 33), (4, 1, 33), (3, 2, 33), (8, 600), (19, 33), (0, 33), (33,)]
)
@pytest.mark.parametrize("outputs", [1, 7, 16, 34])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_matmul(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    """Few rows and many, odd numbers of outputs, strided weights, with the strides of a new tensor."""
    g = torch.Generator().manual_seed(outputs)
    x = torch.randn(*shape, generator=g)
    weight = torch.randn(outputs, 2 * shape[-1], generator=g)[:, : shape[-1]]
    b = torch.randn(outputs, generator=g) if bias else None
    y = linear(x, weight, b)
    want = (x.double() @ weight.double().T + (0 if b is None else b.double())).float()
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    assert y.is_contiguous()


def test_linear_under_gradients_and_autocast() -> None:
    """Training and bf16 autocast keep torch's own path."""
    x, weight = torch.randn(1, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().expand(4, 8))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
