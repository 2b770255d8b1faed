"""When `Communicator.gpus` waits for its devices, and when it keeps other communicators waiting. No GPU is needed."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from ep_mojo.comm import Communicator, CompiledGraph
from ep_mojo.comm import gpu as gpu_module
from ep_mojo.config import EPConfig
from ep_mojo.errors import OrderError

CFG = EPConfig(hidden_size=16, top_k=2, n_experts=6, max_tokens_per_rank=5, n_ranks=2)


class Device:
    """A GPU that is busy from a run until somebody waits for it."""

    def __init__(self, index):
        self.id, self.busy = index, False

    def synchronize(self):
        self.busy = False


class Windows:
    """A rank's memory; notes whether a device was busy when it went."""

    machine: Machine

    def __init__(self, cfg, rank, device):
        weakref.finalize(self, self.machine.gone, rank)


class Machine:
    """Two GPUs, and what became of the memory on them."""

    def __init__(self):
        self.devices = [Device(0), Device(1)]
        self.went: list[tuple[int, bool]] = []

    def gone(self, rank):
        self.went.append((rank, any(d.busy for d in self.devices)))

    @property
    def all_went_idle(self):
        return sorted(self.went) == [(0, False), (1, False)]


class Model:
    """A graph without inputs and outputs of its own: it does something, then gives all devices work."""

    def __init__(self, machine, meanwhile=lambda: None):
        self.machine, self.meanwhile = machine, meanwhile

    def execute(self, *buffers):
        self.meanwhile()
        for device in self.machine.devices:
            device.busy = True
        return []


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with two GPUs."""
    pytest.importorskip("max.driver")
    made = Machine()
    monkeypatch.setattr(Windows, "machine", made, raising=False)
    monkeypatch.setattr(gpu_module, "accelerators", lambda devices, count: made.devices)
    monkeypatch.setattr(gpu_module, "BufferMemory", Windows)
    monkeypatch.setattr(gpu_module.GPUCommunicator, "_make_inputs", lambda self: [])
    return made


def run(comm, machine, meanwhile=lambda: None):
    """One run that nobody waits for."""
    graph = CompiledGraph("graph", tuple(comm._input_specs), Model(machine, meanwhile))
    return comm.execute(graph, check=False, as_buffers=True)


def test_windows_of_a_communicator_that_is_dropped(machine):
    """A run that nobody has waited for may still write them."""
    comm = Communicator.gpus(CFG)
    run(comm, machine)
    assert all(d.busy for d in machine.devices)
    del comm
    gc.collect()
    assert machine.all_went_idle


def test_destroy_waits_once(machine):
    comm = Communicator.gpus(CFG)
    run(comm, machine)
    comm.destroy()
    assert machine.all_went_idle
    machine.devices[0].busy = True  # with another communicator's work
    del comm
    gc.collect()
    assert machine.devices[0].busy


def test_destroy_right_before_a_run_is_enqueued(machine):
    """It has nothing to wait for; the windows live until the run is done, and then it is refused."""
    comm = Communicator.gpus(CFG)

    def meanwhile():
        comm.destroy()
        gc.collect()
        assert not machine.went

    with pytest.raises(OrderError, match="destroyed"):
        run(comm, machine, meanwhile)
    gc.collect()
    assert machine.all_went_idle


def test_destroy_right_after_the_addresses_were_taken(machine, monkeypatch):
    """The run that has them keeps what they point to."""
    comm = Communicator.gpus(CFG)

    def inputs_then_destroy(self):
        self.destroy()
        return []

    monkeypatch.setattr(gpu_module.GPUCommunicator, "inputs", inputs_then_destroy)
    held = []
    with pytest.raises(OrderError, match="destroyed"):
        run(comm, machine, lambda: held.append(not machine.went))
    assert held == [True]
    gc.collect()
    assert machine.all_went_idle


def test_runs_of_two_communicators_are_enqueued_one_after_the_other(machine):
    """However they meet, all devices get them in one order."""
    comms = [Communicator.gpus(CFG) for _ in range(2)]
    inside, most = [], []
    together = threading.Barrier(2)

    def enqueue():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    def use(comm):
        together.wait()
        for _ in range(5):
            run(comm, machine, enqueue)

    threads = [threading.Thread(target=use, args=[comm]) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 10


def test_a_run_that_raises_lets_others_go_on(machine, monkeypatch):
    comms = [Communicator.gpus(CFG) for _ in range(2)]
    monkeypatch.setattr(gpu_module.GPUCommunicator, "_abort", lambda self, memories, before: None)

    def fail():
        raise ValueError("no such op")

    with pytest.raises(ValueError, match="no such op"):
        run(comms[0], machine, fail)
    finished = threading.Thread(target=run, args=[comms[1], machine])
    finished.start()
    finished.join(10)
    assert not finished.is_alive()
    assert "take turns" in _refusal(comms[0])


def _refusal(comm):
    with comm._exclusive(), pytest.raises(OrderError) as caught:
        comm.check()
    return str(caught.value)
