"""Options of the long trials: `pytest -m soak --soak-count N --soak-seed S`."""

import pytest


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
