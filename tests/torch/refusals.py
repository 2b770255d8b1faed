"""What processes run in test_process_group.py: calls that are refused, and calls that are not."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
from graph import rounds

import ep_mojo as ep
from ep_mojo import layout
from ep_mojo.comm import CompiledGraph, process_group, shm
from ep_mojo.comm import windows as windows_module
from ep_mojo.dtypes import to_numpy
from tests.torch.group_calls import CFGS, Blueprint, model, outcome, rank
from tests.torch.launch import kept

CFG = CFGS[4]


def about():
    import torch.distributed as dist

    with ep.Communicator.process_group(CFG, device="cpu") as comm:
        inputs = comm.inputs()
        counters = to_numpy(inputs[-1])
        assert counters.ctypes.data == comm.memories[comm.rank].counters.ctypes.data
        tables = [to_numpy(t).tolist() for t in inputs[1:7]]
        assert tables == [t.tolist() for t in windows_module.pointer_tables(comm.memories)]
        found = {
            "rank": comm.rank,
            "graph_ranks": comm.graph_ranks,
            "fused_allowed": comm.fused_allowed,
            "lost": comm.lost,
            "memories": [m.rank for m in comm.memories],
            "own": int(counters[layout.HEAD_MY_RANK]),
            "same_group": comm.group is dist.group.WORLD,
            "inputs": len(inputs),
        }
        dist.barrier()  # nobody leaves before all have looked
        return found


def alone():
    cfg = CFG.replace(n_ranks=1)
    with ep.Communicator.process_group(cfg) as comm:
        comm.check()
        comm.reset()
        return comm.rank, comm.lost


def make_right():
    with ep.Communicator.process_group(CFG) as comm:
        return comm.rank


# Wrong on rank 1 alone: what it changes there


class Patched:
    """Attributes of modules, changed for a while."""

    def __init__(self, *changes):
        self.changes = changes

    def __enter__(self):
        self.before = [(o, name, getattr(o, name)) for o, name, _ in self.changes]
        for o, name, value in self.changes:
            setattr(o, name, value)

    def __exit__(self, *exc):
        for o, name, value in self.before:
            setattr(o, name, value)


def _raise(error):
    def call(*_, **__):
        raise error

    return call


def _full():
    return Patched((os, "posix_fallocate", _raise(OSError(errno.ENOSPC, "No space left on device"))))


def _no_fds():
    return Patched((shm.os, "open", _raise(OSError(errno.EMFILE, "Too many open files"))))


def _cannot_open():
    return Patched((shm, "open_path", _raise(PermissionError(errno.EACCES, "Permission denied"))))


def _damaged():
    real = shm.create

    def create(*args, **kwargs):
        memory = real(*args, **kwargs)
        memory.header[0] ^= 1
        return memory

    return Patched((shm, "create", create))


EVERYWHERE = {
    "hidden_size": (
        {"cfg": CFG.replace(hidden_size=24)},
        "ConfigMismatchError",
        ["rank 0 has hidden_size=16", "rank 1 has hidden_size=24"],
    ),
    "max_rows": ({"cfg": CFG.replace(max_rows=7)}, "ConfigMismatchError", ["max_rows=None", "max_rows=7"]),
    "format": (
        {"cfg": CFG.replace(hidden_size=128, dispatch_format=ep.BlockwiseFP8())},
        "ConfigMismatchError",
        ["BF16()", "BlockwiseFP8("],
    ),
    "n_ranks": ({"cfg": CFGS[2]}, "ConfigMismatchError", ["n_ranks=4", "rank 1 has n_ranks=2"]),
    "n_ranks_of_all": (
        {"cfg": CFGS[2], "on": (0, 1, 2, 3)},
        "ConfigError",
        ["n_ranks = 2", "has 4 processes", "Allowed: 4"],
    ),
    "no_config": ({"cfg": "cfg"}, "ConfigError", ["cfg = 'str'", "an EPConfig"]),
    "cuda": ({"device": "cuda:99"}, "DeviceError", ["device = 'cuda:99'", "GPU"]),
    "meta": ({"device": "meta"}, "UnsupportedError", ["device = 'meta'", '"cuda"']),
    "no_device": ({"device": "toaster"}, "DeviceError", ["device = 'toaster'", "torch.device"]),
    "too_little_memory": (
        {"patch": lambda: Patched((shm, "free_bytes", lambda: 4096))},
        "SharedMemoryError",
        ["at most 4096 bytes free", f"bytes needed = {4 * windows_module.block_bytes(CFG)}"],
    ),
    "memory_taken_meanwhile": ({"patch": _full}, "SharedMemoryError", ["rank 1: ", "No space left"]),
    "no_descriptors": ({"patch": _no_fds}, "SharedMemoryError", ["rank 1: this process has no file descriptors left"]),
    "cannot_open": ({"patch": _cannot_open}, "SharedMemoryError", ["rank 1 cannot open", "one user"]),
    "damaged_block": ({"patch": _damaged}, "CorruptHeadError", ["in the block of rank 1"]),
    "other_host": (
        {"patch": lambda: Patched((process_group, "host_id", lambda: "elsewhere"))},
        "UnsupportedError",
        ["rank 0 is on", "rank 1 on elsewhere"],
    ),
    "other_version": (
        {"patch": lambda: Patched((layout, "LAYOUT_VERSION", 99))},
        "ConfigMismatchError",
        ["rank 1 ep-mojo", "layout 99"],
    ),
    "an_error_of_another_kind": (
        {"patch": lambda: Patched((shm, "create", _raise(ZeroDivisionError("zero"))))},
        "ZeroDivisionError",
        ["zero"],
    ),
}
"""(what differs on rank 1, the error on all ranks, what it says)."""
HERE = {
    "no_group": ("text", "DTypeError", ["group = 'str'", "ProcessGroup"]),
    "not_a_member": ("outside", "ConfigError", ["not in the group"]),
    "destroyed": ("destroyed", "OrderError", ["does not know the group"]),
}


def make_wrong(name):
    how = EVERYWHERE[name][0]
    mine = how if rank() in how.get("on", (1,)) else {}
    with mine.get("patch", Patched)():
        return outcome(lambda: ep.Communicator.process_group(mine.get("cfg", CFG), device=mine.get("device")))


def refuse_here(what):
    import torch.distributed as dist

    if what == "text":
        group = "group"
    elif what == "outside":
        others = [dist.new_group([r]) for r in range(4)]
        dist.barrier()
        group = others[(rank() + 1) % 4]
    else:
        group = dist.new_group(range(4))
        dist.barrier()  # all have connected
        dist.destroy_process_group(group)
    return outcome(lambda: ep.Communicator.process_group(CFG, group))


def no_group():
    return outcome(lambda: ep.Communicator.process_group(CFG))


def other_backend():
    """A backend that moves nothing that is on the host."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return outcome(lambda: ep.Communicator.process_group(CFG))


# Graphs and arguments


def bad_arguments():
    comm = kept[4]
    graph = model(comm, "round")
    x, ids, weights = rounds.make_steps(comm.cfg, 1, seed=0, sizes=[[2] * 4])[comm.rank][0].inputs
    epochs = [m.epochs() for m in comm.memories]
    found = [
        outcome(call)
        for call in (
            lambda: comm.execute(graph, x.astype(np.float32), ids, weights),
            lambda: comm.execute(graph, x, ids),
            lambda: comm.execute(graph, x, ids, weights, ranks=[(comm.rank + 1) % 4]),
            lambda: comm.execute("round", x, ids, weights),
            comm.check,
        )
    ]
    assert [m.epochs() for m in comm.memories] == epochs
    return found


def add_graph(by, name="add"):
    """y = x + `by`, int32 [n]."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    comm = Blueprint(CFG)
    types = [TensorType(DType.int32, ["n"], DeviceRef.CPU()), *comm.input_types()]
    with Graph(name, input_types=types) as graph:
        comm.bind(graph.inputs[1:])
        graph.output(graph.inputs[0].tensor + by)
    return graph


def bad_graphs():
    comm = kept[4]
    return [
        outcome(call)
        for call in (
            lambda: comm.compile("graph" if comm.rank == 1 else add_graph(1)),
            lambda: comm.compile(add_graph(comm.rank)),
            lambda: comm.compile_all([add_graph(1)] * (1 + (comm.rank == 2))),
            lambda: comm.compile_all([]),
        )
    ]


def compile_error():
    comm = kept[4]

    def fail(*_):
        assert comm.rank == 0, "only rank 0 compiles"
        raise ep.KernelBuildError("no compiler today")

    with Patched((process_group, "compile_modules", fail)):
        return outcome(lambda: comm.compile(add_graph(1)))


def compile_alone(bad_rank):
    """Each rank compiles its own, which differ; compiling itself is what `compile` in a worker does."""
    comm = kept[4]

    def load(session, graphs, specs):
        if comm.rank == bad_rank:
            raise ep.KernelBuildError(f"no compiler on rank {comm.rank}")
        return [CompiledGraph(g.name, s, (comm.rank, g.name)) for g, s in zip(graphs, specs, strict=True)]

    with Patched((process_group, "load_graphs", load), (comm, "compiles_once", False)):
        found = []
        error, text, _ = outcome(lambda: found.extend(comm.compile_all([add_graph(1, f"add_on_{comm.rank}")])))
    return [graph.model for graph in found], error, text


# Ends


def ends():
    comm = ep.Communicator.process_group(CFG)
    found = []

    def elsewhere():
        found.append(outcome(comm.check))

    with comm._exclusive():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    comm.destroy()
    comm.destroy()
    calls = (comm.check, comm.reset, comm.inputs, lambda: comm.execute(None), lambda: comm.compile_all([]))
    found += [outcome(call) for call in calls]
    found.append(outcome(comm.destroy))
    return [name for name, _, _ in found]
