"""Processes and compiled graphs that the tests of this directory share."""

from __future__ import annotations

import pytest

from tests.torch import buffers, group_calls
from tests.torch.launch import Pool


@pytest.fixture(scope="session")
def pool():
    """Four processes, for tests that leave them as they were."""
    with Pool(4) as made:
        yield made


@pytest.fixture(scope="session")
def built(pool):
    """The same processes with communicators over 2, 3 and 4 of them, and their graphs: see `group_calls.build`."""
    pool.run(group_calls.build, timeout_s=240)
    return pool


@pytest.fixture(scope="session")
def ready(pool):
    """The same processes, with groups of 2 and 4 of them, and all graphs that the tests of `ep_mojo.torch` use."""
    pool.run(buffers.prepare, timeout_s=600)
    return pool
