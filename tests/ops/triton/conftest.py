"""Kernels run on the GPU where there is one; elsewhere Triton's interpreter (see tests/conftest.py) runs them on the CPU."""

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One reason for all where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if "tests/ops/triton" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs triton"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
