"""All-gather-v and reduce-scatter-v in MAX graphs, equal to the reference bit by bit: virtual ranks, and a process for
each rank, whose two launches are `ep_mojo_all_gather_v` and `ep_mojo_reduce_scatter_v`."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from graph import together
from unit.cases import make_case

import ep_mojo as ep
from ep_mojo import reference
from ep_mojo.dtypes import float32_to_bfloat16_bits
from ep_mojo.handle import HANDLE_TENSORS

SIZES = {"n_experts": 12, "max_tokens_per_rank": 7, "n_ranks": 3, "output_layout": "gathered", "timeout_s": 60}
CONFIGS = {
    "choices travel": ep.EPConfig(hidden_size=40, top_k=3, **SIZES),
    "rows alone": ep.EPConfig(hidden_size=40, top_k=0, combine_dtype="float32", output_dtype="float32", **SIZES),
    "fp8": ep.EPConfig(hidden_size=384, top_k=2, dispatch_format=ep.BlockwiseFP8(scales_layout="column"), **SIZES),
}
SEEDS = range(6)


def step(cfg, seed):
    """Inputs of all ranks, what dispatch has to give, the ranks' rows, a bias, and what combine has to give."""
    case = make_case(cfg, seed)
    case.topk_ids = [ids.astype(np.int32) for ids in case.topk_ids]
    case.num_tokens = [np.array([n], np.int32) for n in case.counts]
    handles = reference.dispatch(cfg, case.xs, case.topk_ids, case.weights, case.num_tokens)
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(cfg.rows_capacity, cfg.hidden_size)).astype(np.float32) for _ in handles]
    ys = [reference.cast_rows(cfg, y) for y in rows]
    bias = [float32_to_bfloat16_bits(rng.normal(size=x.shape).astype(np.float32)) for x in case.xs]
    return SimpleNamespace(case=case, handles=handles, ys=ys, bias=bias, out=combined(cfg, ys, handles, bias))


def combined(cfg, ys, handles, bias):
    return reference.combine(cfg, ys, handles, bias0=bias)


def arguments(cfg, s, ranks):
    """Those of `graph_of`, for some ranks."""
    c = s.case
    kinds = [c.xs, *([c.topk_ids, c.weights] if cfg.top_k else []), c.num_tokens, s.ys, s.bias]
    return [kind[r] for kind in kinds for r in ranks]


def graph_of(comm, name, module, n, split):
    """A round of n ranks; `split`: by its four halves."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    cfg, host = comm.cfg, DeviceRef.CPU()
    routes = [("int32", ["T", cfg.top_k]), ("float32", ["T", cfg.top_k])] if cfg.top_k else []
    rows = (cfg.combine_dtype, [cfg.rows_capacity, cfg.hidden_size])
    kinds = [("bfloat16", ["T", cfg.hidden_size]), *routes, ("int32", [1]), rows, ("bfloat16", ["T", cfg.hidden_size])]
    own = [
        TensorType(getattr(DType, dtype), [f"T{r}" if d == "T" else d for d in shape], host)
        for dtype, shape in kinds
        for r in range(n)
    ]
    types = [*own, *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library()], module=module) as graph:
        given = [v.tensor for v in graph.inputs[: len(own)]]
        xs, *routes, counts, ys, bias = (given[i : i + n] for i in range(0, len(given), n))
        ranks = comm.bind(graph.inputs[len(own) :])
        if split:
            handles = ep.all_gather_v_wait(ranks, ep.all_gather_v_async(ranks, xs, *routes, num_tokens=counts))
            sums = ep.reduce_scatter_v_wait(ranks, ep.reduce_scatter_v_async(ranks, ys, handles), bias0=bias)
        else:
            handles = ep.all_gather_v(ranks, xs, *routes, num_tokens=counts)
            sums = ep.reduce_scatter_v(ranks, ys, handles, bias0=bias)
        graph.output(*(getattr(h, name) for h in handles for name in HANDLE_TENSORS), *sums)
    return graph


def differences(cfg, s, ranks, outputs):
    """What some ranks' outputs differ in from the reference."""
    found, width = [], len(HANDLE_TENSORS)
    *flat, sums = [
        *(outputs[i : i + width] for i in range(0, width * len(ranks), width)),
        outputs[width * len(ranks) :],
    ]
    for rank, tensors, y in zip(ranks, flat, sums, strict=True):
        got = SimpleNamespace(**dict(zip(HANDLE_TENSORS, map(np.asarray, tensors), strict=True)))
        found += reference.handle_differences(cfg, s.handles[rank], got)
        found.append(reference.output_difference(f"rank {rank} y", s.out[rank], y))
    return [text for text in found if text]


def _add_virtual(name):
    def add(module):
        comm = ep.Communicator.cpu(CONFIGS[name])
        graph = "gather_" + name.replace(" ", "_")
        return comm, {graph: graph_of(comm, graph, module, comm.cfg.n_ranks, False)}

    return add


for _name in CONFIGS:
    together.needed(_add_virtual(_name))


@pytest.mark.parametrize("name", CONFIGS)
def test_virtual_ranks(together, name):
    comm, model = together["gather_" + name.replace(" ", "_")]
    for seed in SEEDS:
        s, ranks = step(comm.cfg, seed), range(comm.cfg.n_ranks)
        outputs = comm.execute(model, *arguments(comm.cfg, s, ranks))
        assert not differences(comm.cfg, s, ranks, outputs)


def play(comm, model, cfg, seeds, delay_seed=None):
    """In each process: rounds of its rank, and what differs. With a seed ranks sleep a little before every fifth."""
    found, steps = [], {seed: step(cfg, seed) for seed in set(seeds)}
    delays = None if delay_seed is None else np.random.default_rng((delay_seed, comm.rank))
    for seed in seeds:
        if delays is not None and delays.random() < 0.2:
            time.sleep(delays.random() * 0.003)
        outputs = comm.execute(model, *arguments(cfg, steps[seed], [comm.rank]))
        found += differences(cfg, steps[seed], [comm.rank], outputs)
    return found


def test_processes():
    from max.graph import Module

    cfg, module = CONFIGS["choices travel"], Module()
    with ep.Communicator.processes(cfg) as comm:
        graphs = [graph_of(comm, f"halves_{split}", module, 1, split) for split in (False, True)]
        for op in ("ep_mojo_all_gather_v", "ep_mojo_reduce_scatter_v"):
            assert op in str(graphs[0].module.mlir_module)
        for model in comm.compile_all(graphs):
            assert not any(comm.run(play, model, cfg, list(SEEDS)))
            rounds = np.random.default_rng(1).integers(0, 12, 500).tolist()
            assert not any(comm.run(play, model, cfg, rounds, 2)), "with delays"


def test_other_layouts_are_refused():
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    cfg = CONFIGS["rows alone"].replace(output_layout="expert", top_k=1)
    x = TensorType(DType.bfloat16, ["T", cfg.hidden_size], DeviceRef.CPU())
    with ep.Communicator.cpu(cfg) as comm, Graph("other", input_types=[*[x] * 3, *comm.input_types()]) as graph:
        ranks, xs = comm.bind(graph.inputs[3:]), [v.tensor for v in graph.inputs[:3]]
        with pytest.raises(ep.ConfigError, match="output_layout"):
            ep.all_gather_v(ranks, xs)
        with pytest.raises(ep.ConfigError, match="output_layout"):
            ep.reduce_scatter_v(ranks, xs, [])
        graph.output()


def test_choices_have_to_be_given():
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    cfg = CONFIGS["choices travel"]
    x = TensorType(DType.bfloat16, ["T", cfg.hidden_size], DeviceRef.CPU())
    with ep.Communicator.cpu(cfg) as comm, Graph("none", input_types=[*[x] * 3, *comm.input_types()]) as graph:
        with pytest.raises(ep.DTypeError, match="topk_ids"):
            ep.all_gather_v(comm.bind(graph.inputs[3:]), [v.tensor for v in graph.inputs[:3]])
        graph.output()
