"""Graphs that MAX's own cache knows by other names."""

from __future__ import annotations

import uuid

import numpy as np

import ep_mojo as ep


def compile_two(comm, names):
    """y = 3 x and y = 5 x as graphs of one module, in this order; given to the communicator in the other one."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, Module, TensorType

    module, graphs = Module(), []
    for name, factor in zip(names, (3, 5), strict=True):
        types = [TensorType(DType.int32, ["n"], DeviceRef.CPU()), *comm.input_types()]
        with Graph(name, input_types=types, module=module) as graph:
            comm.bind(graph.inputs[1:])
            graph.output(graph.inputs[0].tensor * factor)
        graphs.append(graph)
    return comm.compile_all(graphs[::-1])


def test_equal_modules_with_other_names():
    """The second module comes from the cache, under the names of the first."""
    cfg = ep.EPConfig(hidden_size=8, top_k=1, n_experts=1, max_tokens_per_rank=1, n_ranks=1)
    x = np.arange(4, dtype=np.int32)
    with ep.Communicator.cpu(cfg) as comm:
        for names in (["equal_a", "equal_b"], [f"equal_{uuid.uuid4().hex}" for _ in range(2)], ["equal_b", "equal_a"]):
            five, three = compile_two(comm, names)
            assert np.array_equal(comm.execute(five, x)[0], 5 * x)
            assert np.array_equal(comm.execute(three, x)[0], 3 * x)
