"""Graphs in the making, for tests of what they are given; and whether anything was written."""

import hashlib

import numpy as np

import ep_mojo as ep

CFG = ep.EPConfig(hidden_size=8, top_k=2, n_experts=4, max_tokens_per_rank=5, n_ranks=2)
ROWS = CFG.rows_capacity
IDS, WEIGHTS = ("int32", ["T", 2]), ("float32", ["T", 2])
"""Element types and shapes of choices and weights."""


def x(dtype="bfloat16", shape=("T", 8)):
    return dtype, list(shape)


class Building:
    """A graph in the making, with inputs of any type."""

    def __init__(self, cfg, comm=None, module=None):
        self.cfg, self.comm, self.module = cfg, comm or ep.Communicator.cpu(cfg), module

    def values(self, *types):
        """Two graph inputs (one a rank) of every (dtype, shape), by type; a third entry is another device."""
        from max.dtype import DType
        from max.graph import Graph, TensorType

        refs = self.comm.device_refs()
        own = [TensorType(getattr(DType, d), s, *(at or [ref])) for d, s, *at in types for ref in refs]
        types, library = [*own, *self.comm.input_types()], [ep.kernel_library()]
        self.graph = Graph("bad", input_types=types, custom_extensions=library, module=self.module)
        given = [v.tensor for v in self.graph.inputs[: len(own)]]
        self.ranks = self.comm.bind(self.graph.inputs[len(own) :])
        return [given[i : i + 2] for i in range(0, len(own), 2)]


def memory_digest(comm, parts=("counters", "dispatch_count", "combine_count", "dispatch_recv", "combine_recv")):
    """A hash of all windows and counters."""
    sha = hashlib.sha256()
    for memory in comm.memories:
        for part in parts:
            on_device = part != "counters" and hasattr(memory, "window")
            array = memory.window(part) if on_device else getattr(memory, part)
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
