"""Host graphs of several test files, compiled together: one compilation takes MAX a quarter of a minute, however small.

A file notes what it needs when it is imported, so that `pytest FILE` compiles that file's graphs alone; the fixture
`together` (conftest.py) gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ep_mojo as ep
from ep_mojo.comm import CompiledGraph
from ep_mojo.comm.arguments import graph_specs

Add = Callable[[Any], tuple[ep.Communicator, dict[str, Any]]]
_NOTED: list[Add] = []


def needed(add: Add) -> Add:
    """Note a function that adds graphs to a module and gives their communicator, and the graphs by unique name."""
    _NOTED.append(add)
    return add


def compile_all() -> dict[str, tuple[ep.Communicator, CompiledGraph]]:
    """Communicator and compiled graph by name, of all files that have been imported."""
    from max.driver import CPU
    from max.engine import InferenceSession
    from max.graph import Module

    module = Module()
    found = [(comm, *item) for comm, graphs in [add(module) for add in _NOTED] for item in graphs.items()]
    models = InferenceSession(devices=[CPU()]).load_all(module, custom_extensions=[ep.kernel_library()])
    if len(found) == 1:  # MAX's own cache may give it the name of an equal graph
        models = {found[0][1]: next(iter(models.values()))}
    return {name: (comm, CompiledGraph(name, tuple(graph_specs(graph)), models[name])) for comm, name, graph in found}
