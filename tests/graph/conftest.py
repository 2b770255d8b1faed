"""Compiled graphs that several test files share."""

import pytest
from graph import stages as stages_module
from graph import together as together_module
from graph.ahead import Ahead

AHEAD = Ahead()


@pytest.hookimpl(tryfirst=True)  # before -k takes some away: their files have been imported
def pytest_collection_modifyitems(items):
    AHEAD.order(items)


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        AHEAD.start(session.items)


def pytest_sessionfinish(session):
    AHEAD.stop()


@pytest.fixture(scope="session")
def stages():
    """Compiled stages by variant."""
    AHEAD.wait("stages")
    return stages_module.compile_all(stages_module.all_variants())


@pytest.fixture(scope="session")
def together():
    """(communicator, compiled graph) by name: see together.py."""
    AHEAD.wait("together")
    found = together_module.compile_all()
    yield found
    for comm in {id(comm): comm for comm, _ in found.values()}.values():
        comm.destroy()
