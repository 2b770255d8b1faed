"""Ops on a communicator that they were not compiled for, where nothing but its settings tells: nothing is written.

tests/gpu runs these on a GPU too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graph import together
from graph.building import CFG, memory_digest
from graph.stages import Engine
from graph.virtual import ACTIONS, Play, random_round

import ep_mojo as ep
from ep_mojo import layout, reference
from ep_mojo.handle import HANDLE_TENSORS, handle_types

OTHER = {"rank": "expert", "expert": "rank"}
TWINS = ep.EPConfig(
    hidden_size=16, top_k=2, n_experts=8, max_tokens_per_rank=736, n_ranks=2, num_buffers=1, reduce="source"
)
"""With either slot policy a communicator has inputs of the same types."""
ONE = CFG.replace(n_ranks=1)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("slots", OTHER)
def test_ops_refuse_windows_of_the_other_slot_policy(stages, slots, action):
    """Each by itself: in a graph of its own no op before it has looked."""
    cfg = CFG.replace(reduce="source", num_buffers=1, slots=slots)
    rnd = random_round(cfg.replace(slots=OTHER[slots]), 0, reduce="source", ragged=False)
    given, allowed = (int(policy == "expert") for policy in (slots, OTHER[slots]))
    with Engine(stages, cfg) as engine:
        engine.cfg = rnd.case.cfg
        play = Play(engine, [rnd])
        play.handles[0], play.shared[0] = rnd.handles, [np.zeros((0, 0), np.uint16)] * 2
        before = memory_digest(engine.comm)
        with pytest.raises(ep.ShapeError, match=f"settings: slots = {given}; allowed: {allowed}; make graph and"):
            play.step(action, 0)
        assert memory_digest(engine.comm) == before


def graph_of(comm, name, module, kinds, body):
    """A graph with `kinds` (element type, shape) as inputs of each rank; `body(ranks, values)` gives outputs."""
    from max.dtype import DType
    from max.graph import Graph, TensorType

    refs, R = comm.device_refs(), comm.cfg.n_ranks
    own = [TensorType(getattr(DType, dtype), shape, ref) for dtype, shape in kinds for ref in refs]
    types = [*own, *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library()], module=module) as graph:
        values = [v.tensor for v in graph.inputs[: len(own)]]
        ranks = comm.bind(graph.inputs[len(own) :])
        graph.output(*body(ranks, [values[i : i + R] for i in range(0, len(values), R)]))
    return graph


@together.needed
def _add_combine(module):
    """Combine alone, compiled for RankSlots."""
    comm = ep.Communicator.cpu(TWINS)
    kinds = [("bfloat16", [TWINS.rows_capacity, TWINS.hidden_size])]
    kinds += [(t.dtype.name, [int(d) for d in t.shape]) for t in handle_types(TWINS)]
    kinds.append(("int32", ["T", TWINS.top_k]))

    def body(ranks, values):
        handles = [ep.Handle.from_flat(TWINS, [v[r] for v in values[1:]]) for r in range(TWINS.n_ranks)]
        return ep.combine(ranks, values[0], handles)

    return comm, {"combine_alone": graph_of(comm, "combine_alone", module, kinds, body)}


def test_a_graph_of_combine_alone_on_its_twin(together):
    comm, model = together["combine_alone"]
    rnd = random_round(TWINS.replace(hidden_size=8), 0, reduce="source", ragged=False)
    ids = [i.astype(np.int32) for i in rnd.case.topk_ids]
    xs = [np.zeros((i.shape[0], TWINS.hidden_size), np.uint16) for i in ids]
    handles = reference.dispatch(TWINS, xs, ids)
    args = [h.tokens for h in handles]
    args += [getattr(h, name) for name in HANDLE_TENSORS for h in handles] + ids
    assert not any(y.any() for y in comm.execute(model, *args))
    assert layout.counters_words(TWINS) == layout.counters_words(TWINS.replace(slots="expert"))
    with ep.Communicator.cpu(TWINS.replace(slots="expert")) as twin:
        before = memory_digest(twin)
        with pytest.raises(ep.ShapeError, match="settings: slots = 1; allowed: 0"):
            twin.execute(model, *args)
        assert memory_digest(twin) == before


def add_fused(module, comm=None):
    """A rank alone in its graph, where MAX sees no difference between one that is virtual and one that is not."""
    comm = comm or ep.Communicator.cpu(ONE)
    kinds = [("bfloat16", ["T", ONE.hidden_size]), ("int32", ["T", ONE.top_k])]

    def add(fused):
        def body(ranks, values):
            by_itself = [replace(rank, fused_allowed=True) for rank in ranks]
            handles = ep.dispatch(by_itself if fused == "dispatch" else ranks, *values)
            return ep.combine(by_itself if fused == "combine" else ranks, [h.tokens for h in handles], handles)

        return graph_of(comm, f"fused_{fused}_alone", module, kinds, body)

    return comm, {f"fused_{fused}_alone": add(fused) for fused in ("dispatch", "combine")}


together.needed(add_fused)


@pytest.fixture
def fused(together):
    """Communicator and graph by name."""
    return together


@pytest.mark.parametrize("half", ["dispatch", "combine"])
def test_fused_ops_refuse_virtual_ranks(fused, half):
    comm, model = fused[f"fused_{half}_alone"]
    parts = ["combine_recv", "combine_count", *(["counters", "dispatch_recv"] if half == "dispatch" else [])]
    before = memory_digest(comm, parts)
    with pytest.raises(ep.OrderError, match="fused stages need ranks that run at the same time.*use dispatch_async"):
        comm.execute(model, np.zeros((3, ONE.hidden_size), np.uint16), np.zeros((3, ONE.top_k), np.int32))
    assert memory_digest(comm, parts) == before
    comm.reset()
    comm.check()
