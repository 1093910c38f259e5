"""Kernels run on the GPU where there is one; elsewhere Triton's interpreter runs the same source on the CPU."""

import importlib
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # read by Triton when a kernel's module is imported
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = vars(interpreter)["_patch_lang_tensor"]

    def patch_tensor_and_index(tensor: type, scope: object) -> None:
        """Triton 3.6's interpreter takes int() of arrays of one element for the bounds of loops; NumPy 2.4 refuses that."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # type: ignore[attr-defined]

    vars(interpreter)["_patch_lang_tensor"] = patch_tensor_and_index


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
