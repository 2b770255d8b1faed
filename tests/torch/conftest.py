"""Processes that the tests of this directory share."""

from __future__ import annotations

import pytest

from tests.torch.launch import Pool


@pytest.fixture(scope="session")
def pool():
    """Four processes, for tests that leave them as they were."""
    with Pool(4) as made:
        yield made
