"""`Communicator.processes` without its ops: calls, graphs, shared windows, error records."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import threading
import time

import numpy as np
import pytest
from graph.process_calls import (
    CFG,
    about,
    add_order_graph,
    check_here,
    echo,
    execute_here,
    leave_by,
    many_arrays,
    raise_mute,
    raise_on,
    raise_stubborn,
    read_own,
    reset_here,
    return_lambda,
    start_more,
    write_to_peers,
)

from ep_mojo import layout
from ep_mojo.comm import Communicator, shm
from ep_mojo.comm.channel import MAX_PARTS
from ep_mojo.config import EPConfig
from ep_mojo.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    CorruptHeadError,
    DTypeError,
    EPError,
    PeerTimeoutError,
    ShapeError,
    UnsupportedError,
)


@pytest.fixture(scope="module")
def shared():
    """One communicator for the tests that leave it as it was."""
    with Communicator.processes(CFG) as comm:
        yield comm


@pytest.fixture(scope="module")
def compiled(shared):
    return shared.compile(add_order_graph(shared))


@pytest.fixture
def comm():
    """A communicator that a test may break."""
    with Communicator.processes(CFG) as made:
        yield made


# Calls


def test_run_calls_every_rank_in_a_process_of_its_own(shared):
    got = shared.run(about, "a", per_rank=[[0], [1], [2]])
    assert [(rank, args) for rank, _, args in got] == [(r, ("a", r)) for r in range(3)]
    pids = [pid for _, pid, _ in got]
    assert pids == shared.pids
    assert len({*pids, os.getpid()}) == 4
    assert shared.run(about, ranks=[2])[:2] == [None, None]


def test_arrays_travel_unchanged(shared):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 255, (3, 1 << 22), np.uint8),
        np.zeros((4, 0), np.float32),
        rng.standard_normal((64, 33)).T,
        np.array([True, False]),
        np.float32(np.nan) * np.ones(3, np.float32),
    ]
    for back in shared.run(echo, arrays):
        for sent, got in zip(arrays, back, strict=True):
            assert got.dtype == sent.dtype
            assert got.shape == sent.shape
            assert got.tobytes() == sent.tobytes()
            assert got.flags.writeable


def test_exceptions_come_back_as_themselves(shared):
    error = CapacityError("too many", field="max_rows", value=3, allowed="at least 4", remedy="raise it")
    with pytest.raises(CapacityError) as caught:
        shared.run(raise_on, 1, error)
    assert (str(caught.value), caught.value.field, caught.value.value) == (str(error), "max_rows", 3)
    assert list(caught.value.by_rank) == [1]
    assert "in raise_on" in "".join(caught.value.__notes__)
    with pytest.raises(ZeroDivisionError, match="zero"):
        shared.run(raise_on, 0, ZeroDivisionError("zero"))
    with pytest.raises(EPError, match="Stubborn in a worker: 0 and 0") as caught:
        shared.run(raise_stubborn)
    assert sorted(caught.value.by_rank) == [0, 1, 2]
    with pytest.raises(EPError, match="cannot be sent back"):
        shared.run(return_lambda)
    got = shared.run(raise_on, 2, ValueError("kept"), raise_errors=False)
    assert got[:2] == ["fine", "fine"]
    assert isinstance(got[2], ValueError)
    with pytest.raises(EPError, match="SystemExit"):
        shared.run(leave_by, 0, "exit")
    with pytest.raises(EPError, match="Mute in a worker.*__str__ raises RuntimeError"):
        shared.run(raise_mute)
    assert shared.run(echo, 1) == [1, 1, 1], "no exception in a call must end the worker"


def test_more_arrays_than_a_message_has_parts(shared):
    got = shared.run(many_arrays, MAX_PARTS + 1, ranks=[0])[0]
    assert [int(a[0]) for a in got] == list(range(MAX_PARTS + 1))
    assert shared.run(echo, 1) == [1, 1, 1]


def test_a_config_class_that_workers_cannot_import_is_named(monkeypatch):
    Own = type("Own", (EPConfig,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
    cfg = Own(**{f.name: getattr(CFG, f.name) for f in dataclasses.fields(CFG)})
    begin = time.monotonic()
    with pytest.raises(EPError, match="cannot be unpickled in the worker.*Own.*not in __main__"):
        Communicator.processes(cfg, start_timeout_s=60)
    assert time.monotonic() - begin < 50


BAD_CALLS = {
    "lambda": (lambda c: c.run(lambda comm: None), DTypeError, "top level"),
    "not_a_function": (lambda c: c.run("about"), DTypeError, "str"),
    "per_rank": (lambda c: c.run(about, per_rank=[[1]]), ShapeError, "per_rank"),
    "per_rank_number": (lambda c: c.run(about, per_rank=5), ShapeError, "per_rank = 5"),
    "per_rank_numbers": (lambda c: c.run(about, per_rank=[1, 2, 3]), ShapeError, "one sequence"),
    "ranks": (lambda c: c.run(about, ranks=[0, 3]), ConfigError, "0 to 2"),
    "ranks_number": (lambda c: c.run(about, ranks=5), ConfigError, "ranks = 5.*0 to 2"),
    "ranks_float": (lambda c: c.run(about, ranks=[1.0]), ConfigError, r"ranks = \[1.0\].*0 to 2"),
    "ranks_text": (lambda c: c.run(about, ranks=[0, "a"]), ConfigError, "0 to 2"),
    "inputs": (lambda c: c.inputs(), UnsupportedError, "run"),
    "reset_inside": (lambda c: c.run(reset_here), UnsupportedError, "parent"),
    "workers_inside": (lambda c: c.run(start_more), UnsupportedError, "__main__"),
    "compile": (lambda c: c.compile("graph.mef"), DTypeError, "Graph"),
    "workers_of": (lambda c: Communicator.processes(CFG, workers_of=CFG), DTypeError, "EPConfig"),
    "too_many": (lambda c: Communicator.processes(CFG.replace(n_ranks=6), workers_of=c), ConfigError, "1 to 3"),
    "start_timeout": (lambda c: Communicator.processes(CFG, start_timeout_s=0), ConfigError, "above 0"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named_and_do_no_harm(shared, call, error, match):
    with pytest.raises(error, match=match):
        call(shared)
    assert shared.run(echo, 5) == [5, 5, 5]


def test_what_cannot_be_pickled_is_not_sent(shared):
    with pytest.raises(Exception, match="pickle"):
        shared.run(echo, threading.Lock())
    assert shared.run(echo, 6) == [6, 6, 6]


def test_functions_of_modules_that_cannot_be_imported_by_name(shared, tmp_path):
    path = tmp_path / "elsewhere.py"
    path.write_text("def double(comm, x):\n    return 2 * x + comm.rank\n")
    spec = importlib.util.spec_from_file_location("no_such_module_name", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert shared.run(module.double, 10) == [20, 21, 22]


# Graphs


def test_execute_is_kind_major_over_the_ranks(shared, compiled):
    xs = [np.arange(r, dtype=np.int32) for r in range(3)]
    out = shared.execute(compiled, *xs)
    for x, y in zip(xs, out, strict=True):
        np.testing.assert_array_equal(y, x + 1)
    out = shared.execute(compiled, *xs, ranks=[2])
    assert out[:2] == [None, None]
    np.testing.assert_array_equal(out[2], xs[2] + 1)


def test_graphs_run_inside_the_workers(shared, compiled):
    before = [n for _, n in shared.run(execute_here, compiled, 0)]
    got = shared.run(execute_here, compiled, 4)
    assert [x.tolist() for x, _ in got] == [[4], [5], [6]]
    assert [n for _, n in got] == [n + 4 for n in before]


def test_bad_arguments_are_named_and_nothing_runs(shared, compiled):
    xs = [np.zeros(2, np.int32)] * 3
    before = shared.run(execute_here, compiled, 0)
    with pytest.raises(DTypeError, match=r"input 0 of rank 2.*float32"):
        shared.execute(compiled, xs[0], xs[1], np.zeros(2, np.float32))
    with pytest.raises(ShapeError, match="1 kinds for each of 3 ranks"):
        shared.execute(compiled, *xs[:2])
    with pytest.raises(UnsupportedError, match="as_buffers"):
        shared.execute(compiled, *xs, as_buffers=True)
    assert [n for _, n in shared.run(execute_here, compiled, 0)] == [n for _, n in before]


def test_a_damaged_head_is_named_before_anything_runs(comm):
    comm.memories[1].counters[layout.HEAD_MAGIC] += 1
    with pytest.raises(CorruptHeadError, match="magic"):
        comm.check()
    with pytest.raises(CorruptHeadError, match="magic"):
        comm.reset()
    errors = comm.run(check_here, raise_errors=False)
    assert [type(e) for e in errors] == [type(None), CorruptHeadError, type(None)]


# Windows


def test_windows_are_shared_by_all_ranks_and_have_no_name(shared):
    shared.run(write_to_peers, 100)
    for r, got in enumerate(shared.run(read_own)):
        assert (got == np.array([100 + 10 * source + r for source in range(3)])[:, None]).all()
        np.testing.assert_array_equal(shared.memories[r].dispatch_recv[: 3 * 64].reshape(3, 64), got)
    if os.path.isdir("/dev/shm"):
        assert not [n for n in os.listdir("/dev/shm") if n.startswith("epmojo")]
    if os.path.isdir("/proc"):
        for pid in shared.pids:
            with open(f"/proc/{pid}/maps") as f:
                mapped = [line for line in f if "/dev/shm" in line]
            assert len(mapped) >= 3
            assert all("(deleted)" in line for line in mapped)


def test_records_become_errors_until_reset(shared, compiled):
    xs = [np.zeros(1, np.int32)] * 3
    for memory, kind, peer in ((shared.memories[0], layout.KIND_PEER_FAILED, 2), (shared.memories[2], 1, 1)):
        values = {layout.REC_KIND: kind, layout.REC_STAGE: 2, layout.REC_RANK: memory.rank, layout.REC_PEER: peer}
        for index, value in (values | {layout.REC_STATE: 2}).items():
            memory.counters[index] = value
    for call in (shared.check, lambda: shared.execute(compiled, *xs)):
        with pytest.raises(PeerTimeoutError, match="rank 2, dispatch_wait.*from rank 1") as caught:
            call()
        assert sorted(caught.value.by_rank) == [0, 2]
    assert len(shared.execute(compiled, *xs, check=False)) == 3
    layout.put_u64(shared.memories[1].counters, layout.HEAD_COMBINE_SENT, 41)
    shared.reset()
    shared.check()
    shared.run(check_here)
    for m in shared.memories:
        assert layout.read_epochs(m.counters) == (41,) * 4
        assert (m.combine_count[:24].view(np.uint64) == layout.word(41, 0)).all()


@pytest.mark.parametrize("what", ["hash", "magic"])
def test_workers_refuse_blocks_of_another_config(monkeypatch, what):
    real = shm.create_all

    def damaged(cfg, fds):
        memories, group = real(cfg, fds)
        memories[1].header[24 if what == "hash" else 0] ^= 1
        return memories, group

    monkeypatch.setattr(shm, "create_all", damaged)
    error, match = (ConfigMismatchError, "rank 1 was made.*rank 0") if what == "hash" else (CorruptHeadError, "rank 0")
    with pytest.raises(error, match=match) as caught:
        Communicator.processes(CFG)
    assert sorted(caught.value.by_rank) == [0, 1, 2]
