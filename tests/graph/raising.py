"""Graphs in which an op raises in the middle of a run, and what they are given.

Rows that an op compares with each other have names of their own in these graphs, so that only the op sees a difference.
"""

from __future__ import annotations

import numpy as np
from graph.virtual import random_rows

import ep_mojo as ep

RANKS = 3
CFG = ep.EPConfig(hidden_size=8, top_k=2, n_experts=6, max_tokens_per_rank=5, n_ranks=RANKS, timeout_s=60)


def whole_round(comm, module, name):
    """A round of every rank in the graph: x [Tx, H], ids [Ti, K], bias [Tb, H] -> y [Ti, H]."""
    from max.dtype import DType
    from max.graph import Graph, TensorType

    cfg, n, refs, bf16 = comm.cfg, comm.graph_ranks, comm.device_refs(), DType.bfloat16
    kinds = ("x", bf16, cfg.hidden_size), ("i", DType.int32, cfg.top_k), ("b", bf16, cfg.hidden_size)
    types = [TensorType(dtype, [f"T{kind}{r}", size], refs[r]) for kind, dtype, size in kinds for r in range(n)]
    inputs = [*types, *comm.input_types()]
    with Graph(name, input_types=inputs, custom_extensions=[ep.kernel_library()], module=module) as graph:
        given = [v.tensor for v in graph.inputs[: len(types)]]
        ranks = comm.bind(graph.inputs[len(types) :])
        handles = ep.dispatch(ranks, given[:n], given[n : 2 * n])
        graph.output(*ep.combine(ranks, [h.tokens for h in handles], handles, bias0=given[2 * n :]))
    return graph


def arguments(seed, cfg=CFG):
    rng = np.random.default_rng(seed)
    tokens = [1 + int(t) for t in rng.integers(0, cfg.max_tokens_per_rank, cfg.n_ranks)]
    xs = [random_rows(rng, (t, cfg.hidden_size)) for t in tokens]
    ids = [rng.integers(0, cfg.n_experts, (t, cfg.top_k)).astype(np.int32) for t in tokens]
    return xs, ids, [random_rows(rng, (t, cfg.hidden_size)) for t in tokens]


def bad_arguments(what, rank, cfg=CFG):
    """One row too few of "ids" (dispatch raises) or "bias" (combine raises) on one rank."""
    args = arguments(100, cfg)
    rows = args[1 if what == "ids" else 2]
    rows[rank] = rows[rank][1:]
    return [v for values in args for v in values]
