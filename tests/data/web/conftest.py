"""Where the pages of mathematics are."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def math_pages() -> Path:
    """The folder of truth; its README tells fields and licences."""
    data = os.environ.get("ALLOY_TEST_DATA")
    if not data:
        pytest.skip("ALLOY_TEST_DATA is not set: no pages to measure")
    return Path(data) / "math-pages"
