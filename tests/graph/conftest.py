"""Compiled graphs that several test files share."""

import pytest
from graph import stages as stages_module
from graph import together as together_module


@pytest.fixture(scope="session")
def stages():
    """Compiled stages by variant."""
    return stages_module.compile_all(stages_module.all_variants())


@pytest.fixture(scope="session")
def together():
    """(communicator, compiled graph) by name: see together.py."""
    found = together_module.compile_all()
    yield found
    for comm in {id(comm): comm for comm, _ in found.values()}.values():
        comm.destroy()
