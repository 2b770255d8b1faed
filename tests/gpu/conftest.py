"""Tests that need a GPU: not part of ./task test, run by `python python/tools/gpu_check.py` where there is one."""

from pathlib import Path

import pytest
from graph import stages as stages_module

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    """Skip all of this directory where there is no GPU, before any fixture asks for one."""
    from max.driver import accelerator_count

    for item in items if accelerator_count() == 0 else []:
        if HERE in item.path.resolve().parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: MAX sees none here"))


@pytest.fixture(scope="session")
def stages():
    """Compiled stages by variant, for GPU 0."""
    return stages_module.compile_all(stages_module.all_variants(), gpu=True)
