"""Which GPUs a communicator takes: as many as ranks, different ones, that reach one another. No GPU is needed."""

from types import SimpleNamespace

import pytest

from ep_mojo.comm import device_memory
from ep_mojo.errors import DeviceError


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
        return calls

    return be


def test_as_many_as_asked_for(machine):
    calls = machine(4)
    assert [d.id for d in device_memory.accelerators([2, 0, 1], 3)] == [2, 0, 1]
    assert [d.id for d in device_memory.accelerators([SimpleNamespace(id=3, is_host=False)], 1)] == [3]
    assert len(calls) == 1  # one GPU needs no peer access


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
