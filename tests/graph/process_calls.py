"""Functions that worker processes run in the tests, and how the tests look at processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import numpy as np

from ep_mojo.comm import Communicator
from ep_mojo.config import EPConfig

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


class Mute(Exception):
    """Cannot say what it is."""

    def __str__(self):
        raise RuntimeError("no words")


def raise_mute(comm):
    raise Mute


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


def many_arrays(comm, n):
    return [np.full(1, i) for i in range(n)]


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


def late_zeros(comm, seconds, n_bytes):
    """An answer of that size, after a while."""
    time.sleep(seconds)
    return np.zeros(n_bytes, np.uint8)


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
