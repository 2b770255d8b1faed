"""`Communicator.cpu` and what all communicators share: binding, checked arguments, error records, reset, destroy."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ep_mojo import layout
from ep_mojo.comm import Communicator, CompiledGraph
from ep_mojo.comm import processes as processes_module
from ep_mojo.comm import windows as w
from ep_mojo.comm.arguments import InputSpec, check_args, graph_specs
from ep_mojo.comm.models import run_buffers
from ep_mojo.comm.processes import ProcessCommunicator
from ep_mojo.config import EPConfig
from ep_mojo.dtypes import to_buffer, to_numpy
from ep_mojo.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    CorruptHeadError,
    DeviceError,
    DTypeError,
    OrderError,
    PeerLostError,
    PeerTimeoutError,
    ShapeError,
    SharedMemoryError,
    UnsupportedError,
)

BASE = {"hidden_size": 16, "top_k": 2, "n_experts": 6, "max_tokens_per_rank": 5, "n_ranks": 3}
CFG = EPConfig(**BASE)


def add_one_graph(comm: Communicator):
    """y = x + 1 (int32 [n]) and z = the bits of a bfloat16 [n, 2] for each rank; order[0] grows by 1 a run."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType, ops

    host, n = DeviceRef.CPU(), comm.graph_ranks
    xs = [TensorType(DType.int32, [f"n{i}"], host) for i in range(n)]
    zs = [TensorType(DType.bfloat16, [f"n{i}", 2], host) for i in range(n)]
    with Graph("add_one", input_types=[*xs, *zs, *comm.input_types()]) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        order = ranks[0].order
        ops.buffer_store(order, order[...] + 1)
        graph.output(*(x.tensor + 1 for x in graph.inputs[:n]), *(z.tensor for z in graph.inputs[n : 2 * n]))
    return graph


def arrays(n_ranks: int):
    xs = [np.arange(r, dtype=np.int32) for r in range(n_ranks)]
    return xs, [np.full((r, 2), 0x3F80 + r, np.uint16) for r in range(n_ranks)]


@pytest.fixture(scope="module")
def compiled():
    """A communicator and a graph for it, shared by the tests that only run it."""
    with Communicator.cpu(CFG) as comm:
        yield comm, comm.compile(add_one_graph(comm))


def fail(memory: w.RankMemory, kind: int, peer: int = -1, stage: int = layout.STAGE_DISPATCH_WAIT) -> None:
    """Write an error record as a kernel does."""
    values = {layout.REC_KIND: kind, layout.REC_STAGE: stage, layout.REC_RANK: memory.rank, layout.REC_PEER: peer}
    for index, value in (values | {layout.REC_STATE: 2}).items():
        memory.counters[index] = value


def test_bind_gives_every_rank_its_counters(compiled):
    from max.graph import Graph

    comm, _ = compiled
    with Graph("bind", input_types=comm.input_types()) as graph:
        ranks = comm.bind(graph.inputs)
        graph.output()
    assert [r.index for r in ranks] == [0, 1, 2]
    assert comm.num_inputs == len(comm.input_types()) == 11
    assert not any(r.fused_allowed for r in ranks)
    assert [list(map(int, r.counters.shape)) for r in ranks] == [[layout.counters_words(CFG)]] * 3
    with pytest.raises(ShapeError, match="input_types"):
        comm.bind(graph.inputs[1:])


@pytest.mark.parametrize("slots", ["rank", "expert"])
def test_inputs_point_at_the_windows(slots):
    cfg = CFG.replace(slots=slots)
    with Communicator.cpu(cfg) as comm:
        arrays = [b.to_numpy() for b in comm.inputs()]
        assert arrays[0].tolist() == cfg.settings(virtual=True)
        assert arrays[0][12] == 1
        for (name, part), table in zip(w.TABLES, arrays[1:7], strict=True):
            expected = [m.address(part) if part else 0 for m in comm.memories]
            assert table.tolist() == expected, name
            assert table.dtype == np.uint64
            assert all(a % 4096 == 0 for a in expected)
        for m, counters in zip(comm.memories, arrays[8:], strict=True):
            layout.check_head(counters, cfg, m.rank)
            counters[layout.HEAD_WORDS - 1] = 7
            assert m.counters[layout.HEAD_WORDS - 1] == 7, "the op must see the communicator's own memory"


def test_windows_do_not_overlap():
    m = w.allocate(CFG, 0)
    parts = [m.header, *(getattr(m, name) for name in w.PARTS)]
    for i, part in enumerate(parts):
        part.view(np.uint8)[:] = i + 1
    assert [set(p.view(np.uint8).tolist()) for p in parts] == [{i + 1} for i in range(len(parts))]
    sizes = w.part_bytes(CFG)
    assert [p.nbytes for p in parts[1:]] == [sizes[n] for n in w.PARTS]


def test_execute_returns_bits_of_every_rank(compiled):
    comm, model = compiled
    xs, zs = arrays(3)
    out = comm.execute(model, *xs, *zs)
    for r in range(3):
        np.testing.assert_array_equal(out[r], xs[r] + 1)
        np.testing.assert_array_equal(out[3 + r], zs[r])
        assert out[3 + r].dtype == np.uint16
    before = comm.inputs()[7].to_numpy()[0]
    out = comm.execute(model.model, *xs, *zs, as_buffers=True)
    assert [tuple(o.shape) for o in out] == [(0,), (1,), (2,), (0, 2), (1, 2), (2, 2)]
    assert comm.inputs()[7].to_numpy()[0] == before + 1, "order must be changed in place"


def test_buffers_run_as_by_the_public_method(compiled):
    """`run_buffers` calls a private method of MAX in place of `Model.execute`: with buffers both do the same."""
    comm, model = compiled
    xs, zs = arrays(3)
    buffers = [*(to_buffer(x, "int32") for x in xs), *(to_buffer(z, "bfloat16") for z in zs), *comm.inputs()]
    order = comm.inputs()[7].to_numpy()
    before = order[0]
    want, got = model.model.execute(*buffers), run_buffers(model.model, buffers)
    assert order[0] == before + 2, "both have run the graph"
    for one, other in zip(want, got, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    wrong = [to_buffer(np.zeros((2, 3), np.int32), "int32"), *buffers[1:]]
    errors = []
    for run in (lambda: model.model.execute(*wrong), lambda: run_buffers(model.model, wrong)):
        with pytest.raises(Exception, match=r".") as raised:
            run()
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("as_buffers", [False, True])
def test_outputs_share_no_memory_with_arguments(compiled, as_buffers):
    """The graph passes z through: what came back must stay as it is when the caller fills z anew."""
    comm, model = compiled
    xs, zs = arrays(3)
    before = [z.copy() for z in zs]
    out = comm.execute(model, *xs, *zs, as_buffers=as_buffers)
    for z in zs:
        z[...] = 0
    for got, expected in zip(map(to_numpy, out[3:]), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_execute_takes_ml_dtypes(compiled):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    comm, model = compiled
    xs, zs = arrays(3)
    out = comm.execute(model, *xs, *(z.view(ml_dtypes.bfloat16) for z in zs))
    np.testing.assert_array_equal(out[5], zs[2])


BAD_ARGS = {
    "missing": (lambda a: a[:-1], ShapeError, "len"),
    "dtype": (lambda a: [a[0].astype(np.int64), *a[1:]], DTypeError, r"args\[0\] \(input 0 of rank 0\).*int64"),
    "bits": (lambda a: [*a[:5], a[5].view(np.int16)], DTypeError, r"input 1 of rank 2.*uint16 bit patterns"),
    "ndim": (lambda a: [*a[:5], a[5].reshape(-1)], ShapeError, "input 1 of rank 2"),
    "size": (lambda a: [*a[:5], np.zeros((2, 3), np.uint16)], ShapeError, "axis 1 has 3"),
    "symbol": (lambda a: [*a[:5], np.zeros((3, 2), np.uint16)], ShapeError, r"n2 = 2 by args\[2\]"),
    "list": (lambda a: [[], *a[1:]], DTypeError, "list"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD_ARGS.values(), ids=BAD_ARGS)
def test_bad_arguments_are_named_and_nothing_runs(compiled, change, error, match):
    comm, model = compiled
    xs, zs = arrays(3)
    before = comm.inputs()[7].to_numpy()[0]
    with pytest.raises(error, match=match):
        comm.execute(model, *change([*xs, *zs]))
    assert comm.inputs()[7].to_numpy()[0] == before


def test_device_arguments_are_refused():
    class Device:
        label, id = "gpu", 0

    class OnDevice:
        device, dtype, shape, is_contiguous, _data_ptr = Device(), np.dtype(np.int32), (1,), True, None

    with pytest.raises(DeviceError, match="host"):
        check_args([InputSpec("int32", (1,))], [OnDevice()], ["x"])


def test_a_graph_of_another_communicator_is_refused(compiled):
    _, model = compiled
    with Communicator.cpu(CFG.replace(n_ranks=2)) as other:
        with pytest.raises(ShapeError, match="not built for this communicator"):
            other.execute(model, *arrays(2)[0])
        with pytest.raises(DTypeError, match="compile"):
            other.execute(CompiledGraph, np.zeros(1))
        with pytest.raises(DTypeError, match="Graph"):
            other.compile("model.mef")


def test_a_graph_without_the_communicators_inputs_is_refused_before_it_compiles(compiled):
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    comm, _ = compiled
    with Graph("forgot", input_types=[TensorType(DType.int32, [3], DeviceRef.CPU())]) as graph:
        graph.output(graph.inputs[0])
    with pytest.raises(ShapeError, match="comm.input_types"):
        comm.compile(graph)


class Sketch(ProcessCommunicator):
    """A communicator without workers: what is checked before any is asked."""

    def __init__(self, cfg):
        Communicator.__init__(self, cfg)

    def _sweep(self):
        pass

    def _refuse_lost(self, ranks):
        pass


def test_graphs_of_another_kind_of_communicator_are_refused():
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    cfg = CFG.replace(n_ranks=1)
    with Communicator.cpu(cfg) as comm:
        with Graph("one", input_types=[TensorType(DType.int32, [2], DeviceRef.CPU()), *comm.input_types()]) as graph:
            graph.output(graph.inputs[0])
        here, theirs = comm.compile(graph), CompiledGraph("one", tuple(graph_specs(graph)), key=7)
        with pytest.raises(ConfigError, match="model = 'one'.*another kind.*comm.compile"):
            comm.execute(theirs, np.zeros(2, np.int32))
        with pytest.raises(ConfigError, match="model = 'one'.*another kind.*comm.compile"):
            Sketch(cfg).execute(here, np.zeros(2, np.int32))
        with pytest.raises(DTypeError, match="comm.compile"):
            Sketch(cfg).execute(here.model, np.zeros(2, np.int32))


@pytest.mark.parametrize("order", ["<", ">", "="])
def test_arrays_of_either_byte_order_are_taken(order):
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    (value,) = check_args([InputSpec("int32", (2, 3))], [array.astype(array.dtype.newbyteorder(order))], ["x"])
    assert value.dtype.isnative
    np.testing.assert_array_equal(value, array)


@pytest.mark.parametrize("ranks", [5, [1.0], [0, "a"], [True], [[0]], [-1], [3], None.__class__, "01"], ids=str)
def test_bad_ranks_are_named(compiled, ranks):
    comm, model = compiled
    with pytest.raises(ConfigError, match="ranks = .*integers, 0 to 2"):
        comm.execute(model, ranks=ranks)
    with pytest.raises(ConfigError, match="ranks = .*integers, 0 to 2"):
        Sketch(CFG).run(len, ranks=ranks)


@pytest.mark.parametrize("per_rank", [5, [1, 2, 3], [[1], [2]], {}, None.__class__], ids=str)
def test_bad_arguments_for_each_rank_are_named(per_rank):
    with pytest.raises(ShapeError, match="per_rank = .*a sequence of 3 sequences"):
        Sketch(CFG).run(add_one_graph, per_rank=per_rank)


def test_some_ranks_only_is_unsupported(compiled):
    comm, model = compiled
    with pytest.raises(UnsupportedError, match="processes"):
        comm.execute(model, ranks=[0, 1])


def test_check_names_the_cause_not_its_consequences(compiled):
    comm, model = compiled
    xs, zs = arrays(3)
    fail(comm.memories[0], layout.KIND_PEER_FAILED, peer=1)
    fail(comm.memories[1], layout.KIND_TIMEOUT, peer=2)
    with pytest.raises(PeerTimeoutError, match="rank 1, dispatch_wait.*from rank 2") as caught:
        comm.execute(model, *xs, *zs)
    assert sorted(caught.value.by_rank) == [0, 1]
    fail(comm.memories[2], layout.KIND_CAPACITY)
    with pytest.raises(CapacityError, match="rank 2"):
        comm.check()
    fail(comm.memories[0], layout.KIND_CAPACITY)
    for rank, rows in ((0, 40), (2, 50)):
        comm.memories[rank].counters[layout.REC_VALUE] = rows
    with pytest.raises(CapacityError, match="rank 2.*at least 50") as caught:  # not rank 0's: 40 would not do
        comm.check()
    assert caught.value.rows == 50
    assert len(comm.execute(model, *xs, *zs, check=False)) == 6
    comm.reset()
    comm.check()


@pytest.mark.parametrize("slots", ["rank", "expert"])
def test_reset_agrees_on_one_epoch(slots):
    cfg = CFG.replace(slots=slots)
    with Communicator.cpu(cfg) as comm:
        big = (1 << 35) + 3
        layout.put_u64(comm.memories[0].counters, layout.HEAD_DISPATCH_SENT, 9)
        layout.put_u64(comm.memories[2].counters, layout.HEAD_COMBINE_WAITED, big)
        fail(comm.memories[1], layout.KIND_TIMEOUT, peer=0)
        for m in comm.memories:
            m.dispatch_count[8 * 3 :] = 0x5A
        comm.reset()
        for m in comm.memories:
            assert layout.read_epochs(m.counters) == (big,) * 4
            assert m.error() is None
            layout.check_head(m.counters, cfg, m.rank)
            if slots == "rank":
                for window in (m.dispatch_count, m.combine_count):
                    assert (window[:24].view(np.uint64) == layout.word(big, 0)).all()
            assert (m.dispatch_count[24:] == 0x5A).all(), "only credits are rewritten"


@pytest.mark.parametrize("slots", ["rank", "expert"])
def test_failure_published_for_a_peer_touches_only_its_words(slots):
    cfg = CFG.replace(slots=slots)
    m = w.allocate(cfg, 0)
    m.publish_failure(2)
    failed = (1 << 64) - 1
    dispatch, combine = m.dispatch_count.view(np.uint64), m.combine_count.view(np.uint64)
    if slots == "rank":  # headers [B][R] from byte 128 on
        expected = [16 + 2, 16 + 5]
        assert np.flatnonzero(dispatch).tolist() == np.flatnonzero(combine).tolist() == expected
    else:  # [L][R] and [E]
        assert np.flatnonzero(dispatch).tolist() == [2, 5]
        assert np.flatnonzero(combine).tolist() == [4, 5]
    assert {int(x) for x in (*dispatch, *combine)} == {0, failed}


@pytest.mark.parametrize("slots", ["rank", "expert"])
def test_a_rank_that_aborts_is_behind_no_peer_and_restart_undoes_it(slots):
    cfg = CFG.replace(slots=slots)
    memories = [w.allocate(cfg, rank) for rank in range(3)]
    for index, epoch in zip(layout.EPOCH_FIELDS, (7, 6, 5, 5), strict=True):
        layout.put_u64(memories[1].counters, index, epoch)
    fail(memories[2], layout.KIND_TIMEOUT, peer=1)
    w.abort_alone(memories[1], memories)
    last = 7 + 1 + cfg.num_buffers  # a peer waits for the next round, or for a buffer's credit of one B later
    assert layout.read_epochs(memories[1].counters) == (last,) * 4
    for m in memories:
        words = np.concatenate([m.dispatch_count.view(np.uint64), m.combine_count.view(np.uint64)])
        assert {int(x) for x in words} == {0, layout.word(last, layout.FAILED)}
    with pytest.raises(OrderError, match=r"rank 1: an op .*in the middle of a run.*comm\.reset\(\)"):
        raise memories[1].error()
    assert memories[0].error() is None, "a peer that waits for nothing has not failed"
    memories[2].record_abort()
    assert isinstance(memories[2].error(), PeerTimeoutError), "the first failure is the one reported"
    assert w.restart_all(memories) == last
    assert [m.error() for m in memories] == [None] * 3
    assert {layout.read_epochs(m.counters) for m in memories} == {(last,) * 4}


class Raises:
    """A model whose op raises, after some ranks have counted an epoch."""

    def __init__(self, comm, begun):
        self.comm, self.begun = comm, begun

    def execute(self, *buffers):
        for rank in self.begun:
            layout.put_u64(self.comm.memories[rank].counters, layout.HEAD_DISPATCH_SENT, 1)
        raise ValueError("traces ... ep_mojo.ShapeError: x: bytes = 1; allowed: 2\nmore")


@pytest.mark.parametrize("begun", [[], [0], [0, 1, 2]], ids=str)
def test_an_op_that_raises_goes_on_record_where_a_round_has_begun(compiled, begun):
    _, model = compiled
    args = [a for kind in arrays(3) for a in kind]
    with Communicator.cpu(CFG) as comm:
        broken = CompiledGraph("broken", model.specs, Raises(comm, begun))
        with pytest.raises(ShapeError, match="x: bytes = 1; allowed: 2$"):
            comm.execute(broken, *args)
        if begun:
            for call in (comm.check, lambda: comm.execute(model, *args)):
                with pytest.raises(OrderError, match="in the middle of a run") as caught:
                    call()
                assert sorted(caught.value.by_rank) == [0, 1, 2]
            comm.reset()
        comm.execute(model, *args)
        assert {layout.read_epochs(m.counters) for m in comm.memories} == {(int(bool(begun)),) * 4}


def test_a_damaged_head_is_named_before_anything_runs(compiled):
    _, model = compiled
    with Communicator.cpu(CFG) as comm:
        counters = comm.memories[1].counters
        good = counters.copy()
        counters[layout.HEAD_MAGIC] = 0
        for call in (comm.check, comm.reset, lambda: comm.execute(model, *arrays(3)[0], *arrays(3)[1])):
            with pytest.raises(CorruptHeadError, match="magic"):
                call()
        counters[:] = good
        counters[layout.HEAD_CONFIG_HASH] ^= 1
        with pytest.raises(ConfigMismatchError, match="rank 1"):
            comm.check()


def test_destroy_is_final_and_can_be_repeated():
    comm = Communicator.cpu(CFG)
    with comm as same:
        assert same is comm
        comm.check()
    comm.destroy()
    for call in (comm.inputs, comm.check, comm.reset, lambda: comm.compile(None), lambda: comm.execute(None)):
        with pytest.raises(OrderError, match="destroyed"):
            call()


def test_two_threads_at_once_are_refused(compiled):
    comm, _ = compiled
    caught = []

    def use():
        try:
            comm.check()
        except OrderError as e:
            caught.append(str(e))

    with comm._exclusive():
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert "thread" in caught[0]


def test_bad_configs_and_too_much_memory():
    with pytest.raises(ConfigError, match="EPConfig"):
        Communicator.cpu(BASE)
    huge = EPConfig(hidden_size=65536, top_k=32, n_experts=8, max_tokens_per_rank=524287, n_ranks=8, num_buffers=8)
    with pytest.raises(SharedMemoryError, match="max_tokens_per_rank"):
        Communicator.cpu(huge)


@pytest.mark.parametrize("value", [0, -1, True, "5", None, float("nan"), float("inf"), 1e300])
def test_bad_start_timeouts_start_nothing(monkeypatch, value):
    monkeypatch.setattr(processes_module, "Worker", None)
    with pytest.raises(ConfigError, match="start_timeout_s = .*above 0, at most 86400"):
        Communicator.processes(CFG, start_timeout_s=value)


def test_a_worker_that_cannot_be_started_is_named(monkeypatch):
    def fail():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(processes_module, "Worker", fail)
    with pytest.raises(PeerLostError, match=r"rank 0: its process cannot be started .*Too many.*ulimit -n"):
        Communicator.processes(CFG)


def test_too_little_memory_maps_nothing(monkeypatch):
    need = 3 * w.block_bytes(CFG)
    monkeypatch.setattr(w, "available_bytes", lambda: need)
    Communicator.cpu(CFG).destroy()
    monkeypatch.setattr(w, "available_bytes", lambda: None)
    Communicator.cpu(CFG).destroy()
    monkeypatch.setattr(w, "available_bytes", lambda: need - 1)
    monkeypatch.setattr(w, "allocate", None)
    with pytest.raises(SharedMemoryError, match=rf"bytes needed = {need}: .*3 ranks.*at most {need - 1} bytes free"):
        Communicator.cpu(CFG)


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        (("int32", (3,)), True),
        (("int32", (4,)), False),
        (("int64", (3,)), False),
        (("int32", (3, 1)), False),
        (("int32", (3,), "gpu:0"), False),
        (("int32", ("R",)), True),
        (("int32", (None,)), True),
        (("int32", ("R", "S")), False),
    ],
    ids=str,
)
def test_a_graph_may_leave_sizes_open(given, fits):
    """Whether a graph's input takes a communicator's int32 [3]."""
    assert InputSpec(*given).fits(InputSpec("int32", (3,))) is fits
