"""Tests that need a GPU: not part of ./task test, run by `python python/tools/gpu_check.py` where there is one."""

import pytest
from graph import stages as stages_module


@pytest.fixture(scope="session")
def stages():
    """Compiled stages by variant, for GPU 0."""
    return stages_module.compile_all(stages_module.all_variants(), gpu=True)
