"""Which GPUs a communicator takes: as many as ranks, different ones, that reach one another. No GPU is needed."""

from types import SimpleNamespace

import numpy as np
import pytest

import ep_mojo as ep
from ep_mojo.comm import device_memory
from ep_mojo.errors import ConfigError, DeviceError, DTypeError, UnsupportedError

CFG = ep.EPConfig(hidden_size=8, top_k=2, n_experts=4, max_tokens_per_rank=5, n_ranks=4)


class FakeGPU:
    """A GPU of a machine where some pairs have no way to each other."""

    apart: tuple = ()

    def __init__(self, index):
        self.id = index

    def can_access(self, other):
        return (self.id, other.id) not in self.apart


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with so many GPUs; returns the calls that enable peer access."""
    driver = pytest.importorskip("max.driver")
    calls = []

    def be(count, apart=()):
        monkeypatch.setattr(FakeGPU, "apart", apart)
        monkeypatch.setattr(driver, "accelerator_count", lambda: count)
        monkeypatch.setattr(driver, "Accelerator", FakeGPU)
        monkeypatch.setattr(driver, "enable_all_peer_access", lambda: calls.append(1))
        monkeypatch.setattr(driver, "is_virtual_device_mode", lambda: False)
        return calls

    return be


def test_as_many_as_asked_for(machine):
    calls = machine(4)
    assert [d.id for d in device_memory.accelerators([2, 0, 1], 3)] == [2, 0, 1]
    assert [d.id for d in device_memory.accelerators([SimpleNamespace(id=3, is_host=False)], 1)] == [3]
    assert len(calls) == 1  # one GPU needs no peer access
    assert [d.id for d in device_memory.accelerators(None, 3)] == [0, 1, 2]
    assert [d.id for d in device_memory.accelerators(np.array([3, 1]).tolist(), 2)] == [3, 1]
    assert [d.id for d in device_memory.accelerators([np.int64(2)], 1)] == [2]


BAD = {
    "none here": (0, (), [0, 1], 2, "devices = '0'.*MAX sees none here.*doctor"),
    "too few here": (2, (), [0, 1, 2], 3, r"devices = '2'.*GPUs 0 to 1.*Communicator\.cpu"),
    "negative": (2, (), [-1, 0], 2, "devices = '-1'"),
    "too few given": (4, (), [0], 2, r"devices = \[0\].*2 different GPUs.*MAX sees 4.*one_gpu"),
    "too many given": (4, (), [0, 1, 2], 2, r"devices = \[0, 1, 2\].*2 different GPUs"),
    "one twice": (4, (), [1, 1], 2, r"devices = \[1, 1\].*2 different GPUs"),
    "the host": (4, (), [SimpleNamespace(id=0, is_host=True)], 1, "devices = .*GPUs 0 to 3"),
    "no number": (4, (), ["0"], 1, "devices = '0'.*GPUs 0 to 3"),
    "no peer access": (3, ((2, 1),), [0, 1, 2], 3, "GPU 2 cannot reach the memory of GPU 1.*NVLink or PCIe"),
}


@pytest.mark.parametrize(("count", "apart", "devices", "wanted", "text"), BAD.values(), ids=BAD)
def test_bad_machines_and_bad_choices(machine, count, apart, devices, wanted, text):
    calls = machine(count, apart)
    with pytest.raises(DeviceError, match=f"(?s){text}") as caught:
        device_memory.accelerators(devices, wanted)
    assert caught.value.field == "devices"
    assert caught.value.remedy
    assert not calls


TOO_FEW = {0: r"n_ranks = 4: needs 4 GPUs; MAX sees 0 here.*Communicator\.cpu", 2: "MAX sees 2 here.*up to 2.*one_gpu"}


@pytest.mark.parametrize("there", TOO_FEW)
def test_fewer_gpus_than_ranks(machine, there):
    machine(there)
    with pytest.raises(DeviceError, match=TOO_FEW[there] + r".*docs/gpus\.md"):
        ep.Communicator.gpus(CFG)


NO_LIST = {"a name": ("cuda", "'cuda'"), "a number": (4, "4"), "a config": (CFG, "'EPConfig'"), "a set": ({0}, "'set'")}


@pytest.mark.parametrize(("devices", "shown"), NO_LIST.values(), ids=NO_LIST)
def test_devices_are_a_list(machine, devices, shown):
    machine(4)
    with pytest.raises(DTypeError, match=rf"devices = {shown}\. Allowed: a list.*pass \[0, 1, 2, 3\]"):
        ep.Communicator.gpus(CFG, devices)


def test_what_is_no_config(machine):
    machine(4)
    for make in (ep.Communicator.gpus, ep.Communicator.one_gpu, ep.Communicator.planned):
        with pytest.raises(ConfigError, match="cfg = 'dict'.*EPConfig"):
            make({"n_ranks": 4})


def test_a_communicator_has_no_constructor():
    with pytest.raises(UnsupportedError, match=r"Communicator\.cpu, processes.*Communicator\.gpus\(cfg\)"):
        ep.Communicator(CFG)


def test_virtual_gpus_run_nothing(machine, monkeypatch):
    machine(4)
    monkeypatch.setattr("max.driver.is_virtual_device_mode", lambda: True)
    with pytest.raises(DeviceError, match=r"virtual.*Communicator\.planned.*docs/gpus\.md"):
        ep.Communicator.gpus(CFG)


def test_planned_gpus_say_how_to_compile_for_them():
    comm = ep.Communicator.planned(CFG)
    for call in (comm.inputs, comm.execute, lambda: comm.compile("graph")):
        with pytest.raises(DeviceError, match=r'only planned.*docs/gpus\.md, "Compiling ahead"'):
            call()
