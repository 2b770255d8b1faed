"""`Communicator.processes`: ends and deaths of workers, and of their parent. Nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
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
    kill,
    late_zeros,
    leave_by,
    read_own,
    sleep,
    wait_gone,
    write_to_peers,
)

from ep_mojo.comm import Communicator, launcher, shm, windows
from ep_mojo.comm import processes as processes_module
from ep_mojo.errors import (
    ConfigError,
    OrderError,
    PeerLostError,
    PeerTimeoutError,
    SharedMemoryError,
)


@pytest.fixture
def comm():
    """A communicator that a test may break."""
    with Communicator.processes(CFG) as made:
        yield made


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


def test_ctrl_c_while_a_large_request_is_sent_loses_no_rank(comm):
    """Worker 1 is stopped, so that its request stays half sent; once it goes on, the rest of it follows."""
    os.kill(comm.pids[1], signal.SIGSTOP)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with time_limit(20), pytest.raises(KeyboardInterrupt):
        comm.run(echo, np.zeros(LARGE, np.uint8))
    os.kill(comm.pids[1], signal.SIGCONT)
    with time_limit(20):
        comm.reset()
        assert comm.run(echo, 5) == [5, 5, 5]
    assert comm.lost == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="sees a stopped process by /proc")
@pytest.mark.parametrize("n_bytes", [1, 8 << 20], ids=["small_request", "large_request"])
def test_a_stopped_worker_is_named_and_goes_on_where_it_stopped(n_bytes):
    with Communicator.processes(CFG.replace(timeout_s=0.5)) as comm, time_limit(60):
        os.kill(comm.pids[1], signal.SIGSTOP)
        for call in (lambda: comm.run(echo, np.zeros(n_bytes, np.uint8)), comm.reset):
            with pytest.raises(PeerTimeoutError, match=f"rank 1: .*stopped.*kill -CONT {comm.pids[1]}.*comm.reset"):
                call()
        os.kill(comm.pids[1], signal.SIGCONT)
        comm.reset()
        assert comm.run(echo, 5) == [5, 5, 5]
        assert comm.run(sleep, 1.0) == [None] * 3, "a call that runs may take any time"


def test_destroy_by_another_thread_ends_a_call(comm):
    timer = threading.Timer(0.5, comm.destroy)
    timer.start()
    with time_limit(30), pytest.raises(OrderError, match="destroyed"):
        comm.run(sleep, 30)
    timer.join()


def test_destroy_by_a_signal_handler_ends_a_call(comm):
    before = signal.signal(signal.SIGUSR1, lambda *_: comm.destroy())
    try:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with time_limit(30), pytest.raises(OrderError, match="destroyed"):
            comm.run(sleep, 30)
    finally:
        signal.signal(signal.SIGUSR1, before)


LARGE = 8 << 20
"""More bytes than a socket takes before the other end reads."""


@contextlib.contextmanager
def time_limit(seconds):
    """Make a deadlock an error."""

    def late(*_):
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_large_answer_that_nobody_wants_blocks_no_large_request(comm):
    """Workers still write the answer of an interrupted call when the next request comes."""
    model = comm.compile(add_order_graph(comm))
    big = np.arange(LARGE // 4, dtype=np.int32)

    def expect_sum():
        for y in comm.execute(model, *[big] * 3):
            np.testing.assert_array_equal(y, big + 1)

    for call in (
        expect_sum,
        lambda: [np.testing.assert_array_equal(x, big) for x in comm.run(echo, big)],
        lambda: comm.compile_all([add_order_graph(comm)]),
        comm.reset,
    ):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            comm.run(late_zeros, 0.6, LARGE)
        time.sleep(0.8)
        with time_limit(60):
            call()
    assert comm.lost == []


FORKS = """
    import os, sys, time, signal
    sys.path[:] = {path!r}
    from graph import process_calls as t
    from ep_mojo.comm import Communicator
    comm = Communicator.processes(t.CFG)
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, *comm.pids, flush=True)
    if {destroy}:
        begin = time.monotonic()
        comm.destroy()
        print(time.monotonic() - begin, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("destroy", [False, True], ids=["killed", "destroyed"])
def test_workers_end_while_a_forked_child_has_copies_of_the_sockets(destroy):
    code = textwrap.dedent(FORKS).format(path=sys.path, destroy=destroy)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child, *pids = map(int, parent.stdout.readline().split())
    try:
        if destroy:
            assert float(parent.stdout.readline()) < launcher.LEAVE_S / 2
        wait_gone(pids)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.wait(20)
        parent.stdout.close()


PARENT = """
    import os, sys, time, signal, threading
    sys.path[:] = {path!r}
    from graph import process_calls as t
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
    code = textwrap.dedent(PARENT).format(path=sys.path, then=then.format(path=mark))
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
