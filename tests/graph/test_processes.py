"""`Communicator.processes` without its ops: launching, calls, shared windows, deaths of workers and of the parent."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from ep_mojo import layout
from ep_mojo.comm import Communicator, launcher, shm, windows
from ep_mojo.comm import processes as processes_module
from ep_mojo.config import EPConfig
from ep_mojo.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    CorruptHeadError,
    DTypeError,
    EPError,
    OrderError,
    PeerLostError,
    PeerTimeoutError,
    ShapeError,
    SharedMemoryError,
    UnsupportedError,
)

CFG = EPConfig(hidden_size=16, top_k=2, n_experts=6, max_tokens_per_rank=5, n_ranks=3)


# What workers run


def about(comm, *args):
    return comm.rank, os.getpid(), args


def echo(comm, value):
    return value


def raise_on(comm, rank, error):
    if comm.rank == rank:
        raise error
    return "fine"


class Stubborn(Exception):
    """Cannot be pickled back: its constructor wants two arguments."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def raise_stubborn(comm):
    raise Stubborn(comm.rank, comm.rank)


def leave_by(comm, rank, how):
    if comm.rank == rank:
        if how == "exit":
            sys.exit(7)
        os.kill(os.getpid(), how)
    time.sleep(0.3)
    return comm.rank


def return_lambda(comm):
    return lambda: None


def write_to_peers(comm, seed):
    """Fill this rank's slice of every peer's window."""
    for m in comm.memories:
        part = m.dispatch_recv[comm.rank * 64 : (comm.rank + 1) * 64]
        part[:] = seed + 10 * comm.rank + m.rank


def read_own(comm):
    return comm.memories[comm.rank].dispatch_recv[: 64 * comm.cfg.n_ranks].reshape(-1, 64).copy()


def check_here(comm):
    comm.check()


def reset_here(comm):
    comm.reset()


def start_more(comm):
    Communicator.processes(comm.cfg)


def execute_here(comm, model, rounds):
    x = np.array([comm.rank], np.int32)
    for _ in range(rounds):
        (x,) = comm.execute_local(model, x)
    return x, int(comm.inputs()[7].to_numpy()[0])


def sleep(comm, seconds):
    time.sleep(seconds)


def report_and_spin(comm, path):
    """Say that the call has begun, then keep the interpreter busy."""
    with open(f"{path}.{comm.rank}", "w") as f:
        f.write(str(os.getpid()))
    while True:
        sum(range(1000))


# Helpers


def add_order_graph(comm):
    """y = x + 1 (int32 [n]); order[0] grows by 1 a run."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType, ops

    x_type = TensorType(DType.int32, ["n"], DeviceRef.CPU())
    with Graph("add_order", input_types=[x_type, *comm.input_types()]) as graph:
        (rank,) = comm.bind(graph.inputs[-comm.num_inputs :])
        ops.buffer_store(rank.order, rank.order[...] + 1)
        graph.output(graph.inputs[0].tensor + 1)
    return graph


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    return True


def wait_gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < end, f"still running: {[p for p in pids if is_running(p)]}"
        time.sleep(0.02)


def kill(comm, rank):
    os.kill(comm.pids[rank], signal.SIGKILL)
    comm._workers[rank].process.wait(10)


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
    assert shared.run(echo, 1) == [1, 1, 1], "sys.exit in a call must not end the worker"


BAD_CALLS = {
    "lambda": (lambda c: c.run(lambda comm: None), DTypeError, "top level"),
    "not_a_function": (lambda c: c.run("about"), DTypeError, "str"),
    "per_rank": (lambda c: c.run(about, per_rank=[[1]]), ShapeError, "per_rank"),
    "ranks": (lambda c: c.run(about, ranks=[0, 3]), ConfigError, "0 to 2"),
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

    def damaged(cfg):
        fds, memories, group = real(cfg)
        memories[1].header[24 if what == "hash" else 0] ^= 1
        return fds, memories, group

    monkeypatch.setattr(shm, "create_all", damaged)
    error, match = (ConfigMismatchError, "rank 1 was made.*rank 0") if what == "hash" else (CorruptHeadError, "rank 0")
    with pytest.raises(error, match=match) as caught:
        Communicator.processes(CFG)
    assert sorted(caught.value.by_rank) == [0, 1, 2]


# Ends


def test_destroy_ends_the_workers_and_is_final():
    comm = Communicator.processes(CFG)
    pids = comm.pids
    comm.destroy()
    wait_gone(pids, 1)
    comm.destroy()
    for call in (comm.check, comm.reset, comm.inputs, lambda: comm.run(about), lambda: comm.execute(None)):
        with pytest.raises(OrderError, match="destroyed"):
            call()


def test_a_forgotten_communicator_ends_its_workers():
    comm = Communicator.processes(CFG)
    pids = comm.pids
    del comm
    gc.collect()
    wait_gone(pids)


def test_a_worker_that_does_not_leave_is_killed(comm, monkeypatch):
    monkeypatch.setattr(launcher, "LEAVE_S", 0.3)
    os.kill(comm.pids[1], signal.SIGSTOP)
    comm.destroy()
    wait_gone(comm.pids, 1)


def test_a_forked_child_leaves_the_workers_alone(comm):
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            comm._finalizer()
        os._exit(0)
    os.waitpid(pid, 0)
    assert comm.run(echo, 3) == [3, 3, 3]


def test_workers_outlive_the_thread_that_started_them():
    made = []
    thread = threading.Thread(target=lambda: made.append(Communicator.processes(CFG)))
    thread.start()
    thread.join()
    with made[0] as comm:
        time.sleep(0.2)
        assert comm.run(echo, 3) == [3, 3, 3]


def test_a_worker_that_does_not_start_in_time():
    with pytest.raises(PeerTimeoutError, match=r"ranks \[0, 1, 2\] did not start within 0.001 s"):
        Communicator.processes(CFG, start_timeout_s=0.001)


def test_a_worker_that_ends_while_starting(monkeypatch):
    monkeypatch.setattr(launcher, "BOOT", "raise SystemExit(3)")
    with pytest.raises(PeerLostError, match="rank 0.*exit code 3"):
        Communicator.processes(CFG)


def test_too_little_shared_memory_starts_nothing(monkeypatch):
    monkeypatch.setattr(shm, "free_bytes", lambda: 4096)
    monkeypatch.setattr(processes_module, "Worker", None)
    with pytest.raises(SharedMemoryError, match=f"{3 * windows.block_bytes(CFG)}"):
        Communicator.processes(CFG)


# Deaths


def test_a_worker_killed_between_calls(comm):
    kill(comm, 1)
    for call in (comm.check, comm.reset, lambda: comm.run(about), lambda: comm.compile(add_order_graph(comm))):
        with pytest.raises(PeerLostError, match="rank 1: its process.*SIGKILL.*workers_of") as caught:
            call()
        assert caught.value.rank == 1
    assert comm.lost == [1]
    errors = comm.run(check_here, ranks=[0, 2], raise_errors=False)
    assert isinstance(errors[0], PeerLostError)
    assert "rank 0: the process of rank 1 is gone" in str(errors[0])
    assert comm.run(echo, 9, ranks=[0, 2]) == [9, None, 9]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV], ids=lambda s: s.name)
def test_a_worker_killed_in_the_middle_of_a_call(comm, how):
    with pytest.raises(PeerLostError, match=f"rank 2: its process.*{how.name}") as caught:
        comm.run(leave_by, 2, how)
    assert list(caught.value.by_rank) == [2]
    assert comm.run(echo, 1, ranks=[0, 1]) == [1, 1, None]


def test_survivors_go_on_in_a_new_communicator(comm):
    kill(comm, 0)
    with pytest.raises(ConfigError, match="1 to 2"):
        Communicator.processes(CFG, workers_of=comm)
    survivors = comm.pids[1:]
    with Communicator.processes(CFG.replace(n_ranks=2), workers_of=comm) as fresh:
        assert fresh.pids == survivors
        with pytest.raises(OrderError, match="destroyed"):
            comm.check()
        assert [r for r, _, _ in fresh.run(about)] == [0, 1]
        fresh.check()
        fresh.run(check_here)
        fresh.run(write_to_peers, 0)
        assert (fresh.run(read_own)[1][0] == 1).all()
    wait_gone(survivors)


def test_workers_left_over_are_ended(comm):
    pids = comm.pids
    with Communicator.processes(CFG.replace(n_ranks=1), workers_of=comm) as fresh:
        assert fresh.pids == pids[:1]
        wait_gone(pids[1:])
        assert fresh.run(echo, 2) == [2]


def test_memory_that_does_not_fit_leaves_the_old_communicator_alone(comm, monkeypatch):
    monkeypatch.setattr(shm, "free_bytes", lambda: 0)
    with pytest.raises(SharedMemoryError):
        Communicator.processes(CFG, workers_of=comm)
    assert comm.run(echo, 4) == [4, 4, 4]


def test_ctrl_c_leaves_the_communicator_in_order(comm):
    """The first call is interrupted; its answers are dropped, reset waits for it, and the next call is right."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        comm.run(sleep, 1.5)
    assert time.monotonic() - begin < 1.4
    comm.reset()
    assert time.monotonic() - begin > 1.4
    assert comm.run(echo, 8) == [8, 8, 8]


PARENT = """
    import os, sys, time, signal, threading
    sys.path[:] = {path!r}
    import test_processes as t
    from ep_mojo.comm import Communicator
    comm = Communicator.processes(t.CFG)
    print(*comm.pids, flush=True)
    {then}
"""
SPIN = "comm.run(t.report_and_spin, {path!r})"
ENDS = {
    "kill_idle": ("time.sleep(60)", signal.SIGKILL, False),
    "kill_busy": (SPIN, signal.SIGKILL, True),
    "term_busy": (SPIN, signal.SIGTERM, True),
    "ctrl_c_busy": (SPIN, signal.SIGINT, True),
    "exit": ("pass", None, False),
    "error": ("raise SystemExit(1)", None, False),
    "hard_exit": ("os._exit(0)", None, False),
}


@pytest.mark.parametrize(("then", "sig", "busy"), ENDS.values(), ids=ENDS)
def test_workers_never_outlive_their_parent(tmp_path, then, sig, busy):
    mark = str(tmp_path / "busy")
    code = textwrap.dedent(PARENT).format(path=[os.path.dirname(__file__), *sys.path], then=then.format(path=mark))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(pids) == 3
        end = time.monotonic() + 20
        while busy and not all(os.path.exists(f"{mark}.{r}") for r in range(3)):
            assert time.monotonic() < end
            time.sleep(0.02)
        if sig is not None:
            parent.send_signal(sig)
        parent.wait(20)
        wait_gone(pids)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    if os.path.isdir("/dev/shm"):
        assert not [n for n in os.listdir("/dev/shm") if n.startswith("epmojo")]
