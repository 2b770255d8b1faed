"""What the processes of the tests of `Communicator.process_group` run. Rank n is the rank in the group of all."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import numpy as np
import pytest
from graph import raising, rounds

import ep_mojo as ep
from ep_mojo.comm import provider, shm
from ep_mojo.comm.group import ProcessGroup
from ep_mojo.comm.planned import PlannedCommunicator
from ep_mojo.errors import ConfigError, OrderError
from tests.torch.launch import kept

CFGS = {n: rounds.CFG.replace(n_ranks=n) for n in (2, 3, 4)}
"""By number of ranks."""
BY_EXPERT = ep.EPConfig(
    hidden_size=16, top_k=3, n_experts=12, max_tokens_per_rank=6, n_ranks=2, slots="expert", timeout_s=60
)
"""One buffer: a rank is at most one stage ahead of another."""
KEYS = {**CFGS, "expert": BY_EXPERT, "aborted": CFGS[3]}
"""Configs of the communicators that are kept."""


def groups():
    """Groups of the first 2, 3 and 4 processes."""
    import torch.distributed as dist

    if "groups" not in kept:
        kept["groups"] = {n: dist.new_group(range(n)) for n in (2, 3)} | {4: dist.group.WORLD}
    return kept["groups"]


def rank():
    import torch.distributed as dist

    return dist.get_rank()


def open_comm(key, cfg, **how):
    """Make a communicator over the first cfg.n_ranks processes, and keep it."""
    group = groups()[cfg.n_ranks]
    if rank() < cfg.n_ranks:
        kept[key] = ep.Communicator.process_group(cfg, group, **how)


def close_comm(key):
    if key in kept:
        kept.pop(key).destroy()


class Blueprint(PlannedCommunicator):
    """One rank on the host that is only planned: to build graphs of communicators that this process is not in."""

    def __init__(self, cfg):
        super().__init__(cfg, virtual=False)
        self.graph_ranks = 1

    def device_refs(self):
        from max.graph import DeviceRef

        return [DeviceRef.CPU()]


def build():
    """Communicators for `KEYS`; the graphs of all, compiled together by that of all processes."""
    from max.graph import Module

    module, graphs = Module(), {}
    for n in (3, 4):
        for stage in rounds.STAGES:
            graphs[n, stage] = rounds._graph(Blueprint(CFGS[n]), stage, module, f"{stage}_{n}")
    for key, cfg in KEYS.items():
        open_comm(key, cfg)
        make = raising.whole_round if key == "aborted" else whole_round
        graphs[key, "round"] = make(Blueprint(cfg), module, f"round_{key}")
    kept["models"] = dict(zip(graphs, kept[4].compile_all(list(graphs.values())), strict=True))


def whole_round(comm, module, name):
    return rounds._graph(comm, "round", module, name)


# Rounds


def play(key, n_rounds, seed, split, delays):
    """Rounds of one communicator, fused or in four graphs with as many in flight as there may be."""
    comm = kept.get(key)
    if comm is None:
        return None
    steps = rounds.make_steps(comm.cfg, 12, seed=seed)[comm.rank]
    delays = (seed, comm.rank, *delays)
    if split:
        schedule = rounds.make_schedule(n_rounds, comm.cfg.num_buffers, seed=seed)
        models = {stage: model(comm, stage) for stage in rounds.STAGES}
        return rounds.play_split(comm, models, schedule, delays, steps)
    return rounds.play_fused(comm, model(comm, "round"), n_rounds, delays, steps)


def model(comm, stage):
    return kept["models"]["expert" if comm.cfg.slots == "expert" else comm.cfg.n_ranks, stage]


def play_sizes(key, sizes):
    """One round for each entry of `sizes`, T by rank. Returns differences."""
    comm = kept.get(key)
    if comm is None:
        return None
    steps = rounds.make_steps(comm.cfg, len(sizes), seed=7, sizes=sizes)[comm.rank]
    return rounds.play_fused(comm, model(comm, "round"), len(sizes), (0, comm.rank, 0.0, 0.0), steps)[0]


def as_buffers(key):
    """A round whose arguments and results are MAX buffers."""
    from ep_mojo.dtypes import to_buffer, to_numpy

    comm = kept[key]
    step = rounds.make_steps(comm.cfg, 1, seed=1)[comm.rank][0]
    given = [to_buffer(v, "bfloat16" if v.dtype == np.uint16 else None) for v in step.inputs]
    out = comm.execute(model(comm, "round"), *given, as_buffers=True)
    assert all(hasattr(o, "device") for o in out)
    *flat, y = map(to_numpy, out)
    return rounds.compare(comm.cfg, step, flat, y)


def leave_after_rounds(n_rounds, seed, by_expert):
    """Rounds of a communicator that each rank gives up as soon as it has done its part, whatever the others do."""
    base = BY_EXPERT if by_expert else CFGS[3]
    group = groups()[base.n_ranks]
    if rank() >= base.n_ranks:
        return []
    rng = np.random.default_rng([seed, rank()])
    found = []
    for i in range(n_rounds):
        with ep.Communicator.process_group(base, group) as comm:
            steps = rounds.make_steps(base, 3, seed=seed + i)[comm.rank]
            for step in steps:
                *flat, y = comm.execute(model(comm, "round"), *step.inputs)
                found += rounds.compare(base, step, flat, y)
                time.sleep(rng.random() * 0.002)
    return found


# Failures


def outcome(call):
    """(name of the error or None, its text, seconds)."""
    begin = time.monotonic()
    try:
        call()
    except Exception as e:
        return type(e).__name__, str(e), time.monotonic() - begin
    return None, "", time.monotonic() - begin


def one_round(key, seed=0):
    comm = kept[key]
    step = rounds.make_steps(comm.cfg, 1, seed=seed)[comm.rank][0]
    *flat, y = comm.execute(model(comm, "round"), *step.inputs)
    assert not rounds.compare(comm.cfg, step, flat, y)


def try_calls(key, names):
    """The outcome of each call by name: "round", "reset", "check", "compile", "destroy"."""
    comm = kept.get(key)
    if comm is None:
        return None
    calls = {
        "round": lambda: one_round(key),
        "reset": comm.reset,
        "check": comm.check,
        "compile": lambda: comm.compile_all([]),
        "make": lambda: ep.Communicator.process_group(comm.cfg, comm.group),
        "destroy": comm.destroy,
    }
    return [outcome(calls[name]) for name in names]


def rounds_until_killed(key, victim):
    """Rounds without end; `victim` kills itself in the middle. The outcome on the others."""
    comm = kept.get(key)
    if comm is None:
        return None
    if comm.rank == victim:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    step = rounds.make_steps(comm.cfg, 1, seed=3)[comm.rank][0]

    def play():
        while True:
            comm.execute(model(comm, "round"), *step.inputs)

    return outcome(play)


def killed_between(key, victim):
    """`victim` dispatches and dies before it combines."""
    comm = kept.get(key)
    if comm is None:
        return None
    step = rounds.make_steps(comm.cfg, 1, seed=3)[comm.rank][0]
    handle = _first_half(comm, step)
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(lambda: _second_half(comm, step, handle))


def _first_half(comm, step):
    comm.execute(model(comm, "send"), *step.inputs)
    return comm.execute(model(comm, "receive"), step.ids, step.weights)


def _second_half(comm, step, handle):
    comm.execute(model(comm, "send_back"), *handle, step.weights)
    (y,) = comm.execute(model(comm, "receive_back"), *handle, step.weights)
    assert not rounds.compare(comm.cfg, step, handle, y)


def end_after_a_round(key, leaver):
    """`leaver` ends its process when it has done its part, a while before the others receive what it sent."""
    comm = kept.get(key)
    if comm is None:
        return None
    step = rounds.make_steps(comm.cfg, 1, seed=3)[comm.rank][0]
    handle = _first_half(comm, step)
    comm.execute(model(comm, "send_back"), *handle, step.weights)
    if comm.rank != leaver:
        time.sleep(2.5)
        lost = comm.lost
    (y,) = comm.execute(model(comm, "receive_back"), *handle, step.weights)
    assert not rounds.compare(comm.cfg, step, handle, y)
    if comm.rank == leaver:
        os._exit(0)
    comm.check()
    return lost, outcome(lambda: one_round(key))


def raise_in_an_op(what, bad_rank):
    """A round whose op raises on one rank. The outcome, then what follows until and after a reset."""
    comm = kept.get("aborted")
    if comm is None:
        return None
    graph, r = kept["models"]["aborted", "round"], comm.rank
    xs, ids, bias = raising.arguments(5, comm.cfg)
    given = raising.bad_arguments(what, bad_rank, comm.cfg)[r :: comm.cfg.n_ranks]
    first = outcome(lambda: comm.execute(graph, *given))
    again = outcome(lambda: comm.execute(graph, xs[r], ids[r], bias[r]))
    comm.reset()
    (y,) = comm.execute(graph, xs[r], ids[r], bias[r])
    handles = ep.reference.dispatch(comm.cfg, xs, ids)
    want = ep.reference.combine(comm.cfg, [h.tokens for h in handles], handles, bias0=bias)
    return first, again, np.array_equal(y, want[r])


def too_many_tokens(key, bad_rank):
    comm = kept[key]
    step = rounds.make_steps(comm.cfg, 1, seed=0)[comm.rank][0]
    rows = comm.cfg.max_tokens_per_rank + 1
    given = step.inputs
    if comm.rank == bad_rank:
        given = (
            np.zeros((rows, comm.cfg.hidden_size), np.uint16),
            np.zeros((rows, comm.cfg.top_k), np.int32),
            np.ones((rows, comm.cfg.top_k), np.float32),
        )
    return outcome(lambda: comm.execute(model(comm, "round"), *given))


def survivors_start_again(key, left):
    """A group of the ranks `left`, a communicator over it, and a round."""
    import torch.distributed as dist

    kept[key].destroy()
    group = dist.new_group(left, use_local_synchronization=True)
    kept["fresh"] = ep.Communicator.process_group(CFGS[len(left)], group)
    one_round("fresh", seed=8)
    return kept["fresh"].rank


def reset_in_vain(key, victim):
    """`victim` dies while the others wait for it to reset."""
    comm = kept.get(key)
    if comm is None:
        return None
    if comm.rank == victim:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(comm.reset)


# What is left behind


def resources():
    """Descriptors, mappings of shared memory, and threads of this process."""
    gc.collect()
    with open("/proc/self/maps") as f:
        maps = sum("/dev/shm" in line for line in f)
    return len(os.listdir("/proc/self/fd")), maps, threading.active_count()


def cycles(n, how):
    """Make and give up a communicator `n` times. Resources before and after."""
    group = groups()[2]
    if rank() >= 2:
        return None
    for i in range(n + 3):
        if i == 3:  # torch and gloo have made what they keep
            before = resources()
        comm = ep.Communicator.process_group(CFGS[2], group)
        comm.inputs()
        if how == "destroy":
            comm.destroy()
        del comm
    return before, resources()


def exchange(proc_fd=None):
    """Write into every peer's windows and read what they wrote; names that blocks have meanwhile and afterwards."""
    import torch.distributed as dist

    if proc_fd is not None:
        provider.PROC_FD = proc_fd
    with ep.Communicator.process_group(CFGS[4]) as comm:
        for m in comm.memories:
            m.dispatch_recv[comm.rank * 64 : (comm.rank + 1) * 64] = 10 * comm.rank + m.rank
        dist.barrier()
        got = comm.memories[comm.rank].dispatch_recv[: 64 * 4].reshape(4, 64).copy()
        names = [name for name in os.listdir(shm.SHM_DIR) if name.startswith("epmojo")]
    provider.PROC_FD = "/proc/self/fd"
    return got, names


def over_the_store() -> None:
    """What groups that only move what is on GPUs do on the host: values, errors, one's value for all; and whoever gives
    up leaves nothing behind that a later call would take for an answer."""
    group = ProcessGroup(None, lambda: None)
    group._on_host = False
    for i in range(20):
        assert group.gather((group.rank, i), "testing") == [(r, i) for r in range(group.size)]
    with pytest.raises(ConfigError, match="rank 1"):
        group.agree(lambda: fail_on(group.rank, 1), "testing")
    assert group.from_first(lambda: "made", lambda: None, "testing") == "made"
    if group.rank == 0:
        began = time.monotonic()

        def look() -> None:
            if time.monotonic() > began + 0.2:
                raise OrderError("enough")

        group._look = look
        with pytest.raises(OrderError, match="enough"):
            group.gather("early", "testing")
        group._look = lambda: None
    else:
        time.sleep(0.6)
    for i in range(5):
        assert group.gather((group.rank, i), "testing") == [(r, i) for r in range(group.size)]


def fail_on(rank: int, which: int) -> None:
    if rank == which:
        raise ConfigError(f"on rank {rank}", field="x", value=1, allowed="2", remedy="none")
