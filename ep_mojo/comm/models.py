"""Compiling graphs in this process, and running what came out."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..dtypes import to_buffer, to_numpy
from ..errors import KernelBuildError, error_from_text
from .arguments import InputSpec
from .base import CompiledGraph


def compile_modules(session: Any, graphs: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Compile the modules of `graphs`: what each gave, and the indices of the graphs in it."""
    modules: list[tuple[Any, list[int]]] = []
    for i, graph in enumerate(graphs):
        for module, members in modules:
            if module.mlir_module == graph.module.mlir_module:
                members.append(i)
                break
        else:
            modules.append((graph.module, [i]))
    compiled = []
    for module, members in modules:
        order = module.top_level_graph_names()
        members.sort(key=lambda i: order.index(graphs[i].name))  # see `load_compiled`
        libraries = list(dict.fromkeys(p for i in members for p in graphs[i].kernel_libraries_paths))
        alone = len(module.top_level_graph_names()) == 1
        source = graphs[members[0]] if alone else module
        try:
            made = session.compile(source, custom_extensions=None if alone else libraries)
        except RuntimeError as error:
            raise KernelBuildError(
                f"MAX could not compile a graph; the process that compiled has printed why: {error}",
                remedy="look there for 'error:' and 'constraint failed'; a format of your own needs its struct's name, "
                "and extra_sources of kernel_library() that name its package",
            ) from error
        compiled.append((made, members))
    return compiled


def load_graphs(session: Any, graphs: Sequence[Any], specs: Sequence[tuple[InputSpec, ...]]) -> list[CompiledGraph]:
    """Compile and load graphs in this process."""
    models: dict[int, Any] = {}
    for compiled, members in compile_modules(session, graphs):
        models |= zip(members, load_compiled(session, compiled, [graphs[i].name for i in members]), strict=True)
    return [CompiledGraph(g.name, specs[i], models[i]) for i, g in enumerate(graphs)]


def load_compiled(session: Any, compiled: Any, names: Sequence[str]) -> list[Any]:
    """The models of what `session.compile` gave, in the order of the graphs' names: that of their module.

    MAX's own cache does not look at names. What it has may have been compiled for a module with equal graphs, whose
    names are others, or the same ones for other graphs; but their order is the module's.
    """
    by_name = session.init_all(compiled)
    return list(by_name.values()) if len(by_name) == len(names) else [by_name[name] for name in names]


def export(compiled: Any) -> bytes:
    """What `load_artefact` makes models of, in this process or another: compiled code, and no weights."""
    with tempfile.TemporaryDirectory(prefix="ep-mojo-") as folder:
        path = os.path.join(folder, "graphs.mef")
        compiled.export_mef(path)
        with open(path, "rb") as f:
            return f.read()


def load_artefact(session: Any, artefact: bytes, names: Sequence[str]) -> list[Any]:
    """The models of what `export` gave, in the order of the graphs' names."""
    import max.engine.api

    return load_compiled(session, max.engine.api.read(io.BytesIO(artefact)), names)


def run_buffers(model: Any, buffers: Sequence[Any]) -> list[Any]:
    """Run a model on contiguous MAX buffers of which the caller knows that they fit; errors as in `run_model`.

    `Model.execute` looks at each buffer once more, which for the 14 of a dispatch takes as long as all else that MAX
    does with them on the host, and then calls this private method; a test holds both to the same results and errors.
    """
    return _with_named_errors(model._execute_device_tensors, list(buffers))


def _with_named_errors(run: Callable[..., list[Any]], *args: Any) -> list[Any]:
    try:
        return run(*args)
    except ValueError as e:
        named = error_from_text(str(e))
        if named is None:
            raise
        raise named from e


def run_model(model: Any, buffers: Sequence[Any]) -> list[Any]:
    """`model.execute`, with the named errors that ops raise as themselves, and host outputs that share no memory with
    inputs.

    What a graph only passes through comes back from MAX as the very memory that went in. A caller who keeps the output
    and fills the input anew would change both.
    """
    outputs = _with_named_errors(model.execute, *buffers)
    given = _address_ranges(buffers)
    for i, (start, end) in enumerate(_address_ranges(outputs)):
        if start < end and ((given[:, 0] < end) & (start < given[:, 1])).any():
            # Not Buffer.copy(), which returns before it has copied.
            outputs[i] = to_buffer(to_numpy(outputs[i]).copy(), outputs[i].dtype.name)
    return outputs


def _address_ranges(buffers: Sequence[Any]) -> np.ndarray:
    """uint64 [n, 2]: first address of each buffer in host memory, and the one behind it; 0, 0 for one elsewhere."""
    ranges = [
        (b._data_ptr(), b._data_ptr() + b.num_elements * b.element_size) if b.device.is_host else (0, 0)
        for b in buffers
    ]
    return np.array(ranges, np.uint64).reshape(-1, 2)
