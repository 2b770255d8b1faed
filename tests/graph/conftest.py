"""Compiled graphs that several test files share."""

import pytest
from graph import stages as stages_module


@pytest.fixture(scope="session")
def stages():
    """Compiled stages by variant."""
    return stages_module.compile_all(stages_module.all_variants())
