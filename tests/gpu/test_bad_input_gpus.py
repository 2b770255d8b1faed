"""Bad input on several GPUs, a rank on each, split and fused: peers of the rank that got it learn of it in time.

A named error or the documented skip, and nothing written where nothing belongs: all windows here are longer than they
should be, and what is behind their end stays zero. After every failure `comm.reset()` brings a round that is right.
"""

import copy
import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from gpu.guards import assert_guards, longer_windows, set_word
from gpu.test_gpus import FUSED
from gpu.test_gpus import draw as draw_of
from gpu.whole_graphs import MODES, Variant, add_graph, arguments, differences, handle_of
from graph.raising import CFG as ABORTED
from graph.raising import bad_arguments, whole_round
from graph.test_aborted_runs import BAD, expect_refusal_until_reset, expect_right_round
from graph.test_bad_input import CFG, memory_digest
from graph.virtual import Round

import ep_mojo as ep
from ep_mojo import layout as offsets
from ep_mojo.dtypes import to_buffer
from ep_mojo.graph import PendingDispatch
from ep_mojo.handle import HANDLE_TENSORS, handle_types

DEADLINE_S = 2.0
AT_ONCE_S = 3 * DEADLINE_S
"""Two deadlines, and slack."""
draw = functools.partial(draw_of, FUSED)


@pytest.fixture(scope="module", autouse=True)
def _guarded():
    with longer_windows():
        yield


def fused_or_split(mode, ranks, ys, handles):
    """Combine in a mode."""
    if mode == "fused":
        return ep.combine(ranks, ys, handles)
    return ep.combine_wait(ranks, ep.combine_async(ranks, ys, handles))


def graph_of(module, name, comm, kinds, body):
    """A graph with `kinds` (element type, shape of a rank) as inputs; `body(ranks, values by kind)` gives outputs."""
    from max.dtype import DType
    from max.graph import Graph, TensorType

    refs, R = comm.device_refs(), comm.cfg.n_ranks
    own = [TensorType(getattr(DType, d), shape(r), refs[r]) for d, shape in kinds for r in range(R)]
    types = [*own, *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library()], module=module) as graph:
        values = [v.tensor for v in graph.inputs[: len(own)]]
        by_kind = [values[i * R : (i + 1) * R] for i in range(len(kinds))]
        graph.output(*body(comm.bind(graph.inputs[len(own) :]), by_kind))
    return graph


def add_combine(module, mode, comm):
    """Combine alone: rows, the handles' tensors, ids and weights of all ranks in, sums out."""
    cfg = comm.cfg
    kinds = [(cfg.combine_dtype, lambda r: [cfg.rows_capacity, cfg.hidden_size])]
    for t in handle_types(cfg):
        kinds.append((t.dtype.name, lambda r, dims=tuple(int(d) for d in t.shape): list(dims)))
    kinds += [(d, lambda r: [f"T{r}", cfg.top_k]) for d in ("int32", "float32")]

    def body(ranks, values):
        ys, *flat, ids, weights = values
        handles = [
            ep.Handle.from_flat(cfg, [*(v[r] for v in flat), ids[r]], weights=weights[r]) for r in range(len(ranks))
        ]
        return fused_or_split(mode, ranks, ys, handles)

    return graph_of(module, f"combine_{mode}", comm, kinds, body)


def add_order(module, comm, sends):
    """So many dispatches before the first wait; with none of them, one wait for nothing. Counts out."""
    cfg = comm.cfg
    kinds = [
        ("bfloat16", lambda r: [f"T{r}", cfg.hidden_size]),
        ("int32", lambda r: [f"T{r}", cfg.top_k]),
    ]

    def body(ranks, values):
        x, ids = values
        pending = [ep.dispatch_async(ranks, x, ids) for _ in range(sends)]
        pending = pending or [[PendingDispatch(i, None, None) for i in ids]]
        return [h.counts for p in pending for h in ep.dispatch_wait(ranks, p)]

    return graph_of(module, f"sends_{sends}", comm, kinds, body)


@pytest.fixture(scope="module")
def gpus():
    """Communicators and graphs for as many GPUs as there are, up to four: one module, one compilation."""
    from max.driver import accelerator_count
    from max.graph import Module

    R = min(4, accelerator_count())
    if R < 2:
        pytest.skip("needs two GPUs")
    module, comms, graphs = Module(), {}, {}
    for mode in MODES:
        variant = Variant("bf16", "expert", "expert", mode)
        cfg = variant.config(R, timeout_s=DEADLINE_S)
        comms[mode] = ep.Communicator.gpus(cfg)
        comms[f"narrow_{mode}"] = ep.Communicator.gpus(cfg.replace(max_rows=64))
        graphs[mode] = add_graph(module, variant, comms[mode])
        graphs[f"narrow_{mode}"] = add_graph(module, variant, comms[f"narrow_{mode}"], f"narrow_{mode}")
        graphs[f"combine_{mode}"] = add_combine(module, mode, comms[mode])
    for sends in (0, 3):
        graphs[f"sends_{sends}"] = add_order(module, comms["split"], sends)
    aborted = ABORTED.replace(n_ranks=R, n_experts=2 * R, timeout_s=DEADLINE_S)
    comms["aborted"] = ep.Communicator.gpus(aborted)
    graphs["aborted"] = whole_round(comms["aborted"], module, "aborted")
    models = dict(zip(graphs, comms["fused"].compile_all(list(graphs.values())), strict=True))
    yield SimpleNamespace(R=R, comms=comms, models=models)
    for comm in comms.values():
        comm.destroy()


@pytest.fixture(params=MODES)
def gpu_round(request, gpus):
    """One communicator and its whole round; afterwards it works, and nothing lies behind its windows."""
    mode = request.param
    comm = gpus.comms[mode]
    yield SimpleNamespace(mode=mode, comm=comm, cfg=comm.cfg, model=gpus.models[mode], R=gpus.R)
    expect_right(comm, gpus.models[mode], 5)


def expect_right(comm, model, seed, routing="mixed"):
    rnd = draw(comm.cfg, seed, routing)
    for _ in range(3):
        assert not differences(comm.cfg, rnd, comm.execute(model, *arguments(rnd)))
    assert_guards(comm)


def expect_refusal(comm, model, args, error, text, ranks=None):
    """The error in time, on record until reset, zero rows until then; ranks but `ranks` may name a peer."""
    start = time.monotonic()
    with pytest.raises(error, match=f"(?s){text}") as caught:
        comm.execute(model, *args)
    assert time.monotonic() - start < AT_ONCE_S
    assert "Remedy: " in str(caught.value)
    by_rank = dict(caught.value.by_rank)
    for r in ranks or []:
        assert isinstance(by_rank.pop(r), error)
    if ranks is not None:
        assert all(isinstance(e, (error, ep.PeerTimeoutError)) for e in by_rank.values()), by_rank
    assert_guards(comm)
    with pytest.raises(error, match=f"(?s){text}"):  # sticky
        comm.execute(model, *args)
    return comm.execute(model, *args, check=False)


def test_buffers_on_the_wrong_device(gpu_round):
    comm, R = gpu_round.comm, gpu_round.R
    args = arguments(draw(gpu_round.cfg, 1, ragged=False))
    epochs = [m.epochs() for m in comm.memories]
    on_host = to_buffer(args[0], "bfloat16")
    for wrong, name in ((on_host, "host"), (on_host.to(comm.devices[1]), "gpu:1")):
        with pytest.raises(ep.DeviceError, match=rf"input 0 of rank 0.*'{name}'.*Allowed: gpu:0"):
            comm.execute(gpu_round.model, wrong, *args[1:])
    with pytest.raises(ep.DeviceError, match=rf"input 2 of rank {R - 1}.*'gpu:0'.*Allowed: gpu:{R - 1}"):
        weights = to_buffer(args[3 * R - 1]).to(comm.devices[0])
        comm.execute(gpu_round.model, *args[: 3 * R - 1], weights, *args[3 * R :])
    assert [m.epochs() for m in comm.memories] == epochs


def test_gpus_that_are_not_there():
    from max.driver import accelerator_count

    n = accelerator_count()
    cfg = CFG.replace(n_ranks=2)
    for devices in ([0, n], [n, 0], [-1, 0]):
        with pytest.raises(ep.DeviceError, match=f"GPUs 0 to {n - 1}"):
            ep.Communicator.gpus(cfg, devices)
    with pytest.raises(ep.DeviceError, match=f"GPUs 0 to {n - 1}"):
        ep.Communicator.one_gpu(cfg, n)
    if n < 8:
        with pytest.raises(ep.DeviceError, match=f"n_ranks = 8: needs 8 GPUs; MAX sees {n} here"):
            ep.Communicator.gpus(CFG.replace(n_ranks=8, n_experts=8))


def test_gpus_that_cannot_reach_each_other(gpus, monkeypatch):
    from max import driver

    class Apart:
        """A GPU without a way to any other."""

        def __init__(self, index):
            self.id = index

        def can_access(self, other):
            return False

    monkeypatch.setattr(driver, "Accelerator", Apart)
    with pytest.raises(ep.DeviceError, match="GPU 0 cannot reach the memory of GPU 1.*NVLink or PCIe"):
        ep.Communicator.gpus(CFG)


def test_a_graph_for_other_gpus(gpu_round):
    R = gpu_round.R
    args = arguments(draw(gpu_round.cfg, 1))
    with ep.Communicator.gpus(gpu_round.cfg, range(R)[::-1]) as other:
        with pytest.raises(ep.ShapeError, match="its last inputs = .*not built for this communicator"):
            other.execute(gpu_round.model, *args)
    with ep.Communicator.cpu(gpu_round.cfg) as other:
        with pytest.raises((ep.ShapeError, ep.ConfigError), match="communicator"):
            other.execute(gpu_round.model, *args)


def test_a_graph_of_another_config(gpu_round):
    """The first op sees sizes that differ: nothing runs, and no peer waits."""
    args = arguments(draw(gpu_round.cfg, 1))
    with ep.Communicator.gpus(gpu_round.cfg.replace(top_k=3)) as other:
        before = memory_digest(other)
        with pytest.raises(ep.ShapeError, match="same config"):
            other.execute(gpu_round.model, *args)
        assert memory_digest(other) == before
        other.check()


def test_one_rank_with_another_config(gpu_round):
    """Its kernels do nothing; its peers end at their deadline."""
    comm = gpu_round.comm
    memory = comm.memories[1]
    args = arguments(draw(gpu_round.cfg, 1, ragged=False))
    kept = set_word(memory, offsets.HEAD_CONFIG_HASH, 12345)
    others = memory_digest(SimpleNamespace(memories=[memory]), ["counters"])
    start = time.monotonic()
    with pytest.raises(ep.ConfigMismatchError, match=r"(?s)config_hash = .*Remedy: "):
        comm.execute(gpu_round.model, *args)
    assert time.monotonic() - start < AT_ONCE_S
    assert memory_digest(SimpleNamespace(memories=[memory]), ["counters"]) == others
    with pytest.raises(ep.ConfigMismatchError):
        comm.reset()
    set_word(memory, offsets.HEAD_CONFIG_HASH, kept)
    with pytest.raises(ep.PeerTimeoutError, match="from rank 1 within 2 s"):
        comm.check()
    comm.reset()


@pytest.mark.parametrize("mode", MODES)
def test_more_rows_than_max_rows(gpus, mode):
    """All choices of all tokens name one expert: too many for 64 rows."""
    comm, model = gpus.comms[f"narrow_{mode}"], gpus.models[f"narrow_{mode}"]
    rnd = draw(gpus.comms[mode].cfg, 1, "one", ragged=False)
    last = gpus.R - 1
    needed = int(rnd.handles[last].row_offsets[-1])
    args = arguments(Round(rnd.case, "expert", ys=[np.zeros((64, comm.cfg.hidden_size), np.uint16)] * gpus.R))
    stage = "dispatch" if mode == "fused" else "dispatch_wait"
    text = rf"max_rows = 64: rank {last}, {stage}: {needed} rows arrived.*at least {needed}.*reset"
    outputs = expect_refusal(comm, model, args, ep.CapacityError, text, [last])
    handle = handle_of(outputs, last)
    assert not handle.counts.any()
    assert (handle.row_map == -1).all()
    comm.reset()
    expect_right(comm, model, 4, "none")


COUNTS = {"over": 14, "below": -1, "huge": 2**31 - 1}


@pytest.mark.parametrize("value", COUNTS.values(), ids=COUNTS)
def test_num_tokens_out_of_range(gpu_round, value):
    args = arguments(draw(gpu_round.cfg, 1, ragged=False))
    args[3 * gpu_round.R + 1] = np.array([value], np.int32)
    text = rf"num_tokens = {value}: rank 1, dispatch.*0 to 13"
    outputs = expect_refusal(gpu_round.comm, gpu_round.model, args, ep.ShapeError, text, [1])
    assert not any(handle_of(outputs, r).counts.any() for r in range(gpu_round.R))
    gpu_round.comm.reset()


def test_more_tokens_than_tmax(gpu_round):
    args, R = arguments(draw(gpu_round.cfg, 1, ragged=False)), gpu_round.R
    for kind in range(3):
        args[kind * R + 1] = np.concatenate([args[kind * R + 1]] * 2)
    args[3 * R + 1] = np.array([26], np.int32)
    text = "rows of x = 26: rank 1, dispatch.*max_tokens_per_rank"
    outputs = expect_refusal(gpu_round.comm, gpu_round.model, args, ep.ShapeError, text, [1])
    assert not outputs[-R + 1].any()
    gpu_round.comm.reset()


HANDLES = {
    "row": ("row_map", (0, 0, 0), lambda rows: rows, "row_map = {rows}: rank 0.*0 to {last}"),
    "row-huge": ("row_map", (1, -1, -1), lambda rows: 2**31 - 1, "row_map = 2147483647: rank 0.*0 to {last}"),
    "tokens": ("recv_num_tokens", 1, lambda rows: 14, "recv_num_tokens = 14: rank 0.*0 to 13"),
    "tokens-negative": ("recv_num_tokens", 0, lambda rows: -1, "recv_num_tokens = -1: rank 0"),
}


@pytest.mark.parametrize(("field", "at", "value", "text"), HANDLES.values(), ids=HANDLES)
def test_a_handle_of_nothing(gpus, gpu_round, field, at, value, text):
    """One rank's handle names what is not there; its peers, which wait for its sums, are told."""
    comm, cfg, model = gpu_round.comm, gpu_round.cfg, gpus.models[f"combine_{gpu_round.mode}"]
    rnd = draw(cfg, 2, "uniform", ragged=False)

    def given(handles):
        flat = [getattr(h, name) for name in HANDLE_TENSORS for h in handles]
        return [*rnd.ys, *flat, *rnd.case.topk_ids, *rnd.case.weights]

    rows = cfg.rows_capacity
    bad = copy.copy(rnd.handles[0])
    setattr(bad, field, getattr(bad, field).copy())
    getattr(bad, field)[at] = value(rows)
    pattern = text.format(rows=rows, last=rows - 1) + ".*handle of the dispatch"
    outputs = expect_refusal(comm, model, given([bad, *rnd.handles[1:]]), ep.ShapeError, pattern, [0])
    assert not any(y.any() for y in outputs)
    comm.reset()
    for want, y in zip(rnd.outputs, comm.execute(model, *given(rnd.handles)), strict=True):
        np.testing.assert_array_equal(y, want)


ORDERS = {
    "too-many-sends": (3, r"rank \d, dispatch_async: more than num_buffers = 2.*num_buffers"),
    "nothing-sent": (0, r"rank \d, dispatch_wait: nothing was sent.*_async first"),
}


@pytest.mark.parametrize(("sends", "text"), ORDERS.values(), ids=ORDERS)
def test_wrong_order(gpus, sends, text):
    comm, model = gpus.comms["split"], gpus.models[f"sends_{sends}"]
    rnd = draw(comm.cfg, 3, ragged=False)
    args = [*rnd.case.xs, *rnd.case.topk_ids]
    outputs = expect_refusal(comm, model, args, ep.OrderError, text, [])  # who is first fails the others
    assert not any(c.any() for c in outputs)
    comm.reset()
    expect_right(comm, gpus.models["split"], 5)


@pytest.mark.parametrize("what", BAD)
def test_an_op_that_raises_in_the_middle_of_a_run(gpus, what):
    """Kernels of peers that are under way end at their deadline, and all ranks refuse until reset."""
    comm, model = gpus.comms["aborted"], gpus.models["aborted"]
    expect_right_round(comm, model, 7)
    start = time.monotonic()
    with pytest.raises(ep.ShapeError, match=BAD[what]):
        comm.execute(model, *bad_arguments(what, 1, comm.cfg))
    assert time.monotonic() - start < AT_ONCE_S
    if len({m.epochs() for m in comm.memories}) > 1:  # else no rank had begun when it was noticed: nothing has happened
        expect_refusal_until_reset(comm, model)
    expect_right_round(comm, model, 8)
    assert_guards(comm)


def test_after_destroy(gpu_round):
    comm = ep.Communicator.gpus(gpu_round.cfg)
    args = arguments(draw(gpu_round.cfg, 1))
    comm.destroy()
    for attempt in (lambda: comm.execute(gpu_round.model, *args), comm.check, comm.reset, comm.inputs):
        with pytest.raises(ep.OrderError, match=r"destroyed.*make a new communicator"):
            attempt()
    comm.destroy()
