"""Options of the long trials: `pytest -m soak --soak-count N --soak-seed S`; Triton's interpreter where there is no GPU."""

import importlib
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # before anything imports Triton, which reads it then, for its own functions too
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = vars(interpreter)["_patch_lang_tensor"]

    def patch_tensor_and_index(tensor: type, scope: object) -> None:
        """Triton 3.6's interpreter takes int() of arrays of one element for the bounds of loops; NumPy 2.4 refuses that."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # type: ignore[attr-defined]

    vars(interpreter)["_patch_lang_tensor"] = patch_tensor_and_index


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many trials a soak test makes, and from which seed; small defaults keep a plain run quick."""
    parser.addoption("--soak-count", type=int, default=2, help="trials of each soak test")
    parser.addoption("--soak-seed", type=int, default=0, help="seed of the first trial")


@pytest.fixture
def soak_count(request: pytest.FixtureRequest) -> int:
    """Trials to make."""
    return request.config.getoption("--soak-count")


@pytest.fixture
def soak_seed(request: pytest.FixtureRequest) -> int:
    """Seed of the first trial."""
    return request.config.getoption("--soak-seed")
