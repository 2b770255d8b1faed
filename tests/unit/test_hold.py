"""Times of replays behind queues that are held back, on devices that are only imagined."""

from types import SimpleNamespace

import numpy as np
import pytest

from ep_mojo.programs import gpu_round, hold

REPLAY_MS, HOLD_MS = 0.05, hold.STEP_US / 1e3


class Machine:
    """Devices with a queue each, whose work takes no time of the host's; the host's clock moves by its launches."""

    def __init__(self, monkeypatch, launch_ms, ranks=2):
        self.host_ms, self.launch_ms, self.steps = 0.0, launch_ms, []
        self.free_at = [0.0] * ranks  # of each queue
        self.devices = [SimpleNamespace(id=r, default_queue=None, synchronize=self.settle) for r in range(ranks)]
        for r, d in enumerate(self.devices):
            d.default_queue = SimpleNamespace(record_event=lambda e, r=r: e.record(self.free(r)))
        monkeypatch.setattr("max.driver.DeviceEvent", Event)
        monkeypatch.setattr("time.perf_counter", lambda: self.host_ms / 1e3)

    def free(self, r):
        return max(self.free_at[r], self.host_ms)

    def settle(self):
        self.host_ms = max(self.host_ms, *self.free_at)

    def enqueue(self, ms):
        for r in range(len(self.devices)):
            self.host_ms += self.launch_ms
            self.free_at[r] = self.free(r) + ms

    def hold(self):
        found = hold.Hold.__new__(hold.Hold)
        found.devices = self.devices
        found.begin = lambda steps: self.steps.append(steps) or [self.enqueue(HOLD_MS) for _ in range(steps)]
        return found

    def model(self):
        run = lambda *_: self.enqueue(REPLAY_MS)  # noqa: E731
        return SimpleNamespace(execute=run, replay=run, capture=lambda *_: None)


class Event:
    def __init__(self, device, enable_timing):
        assert enable_timing

    def record(self, at):
        self.at = at

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture(autouse=True)
def max_driver():
    pytest.importorskip("max.driver")


@pytest.mark.parametrize(("launch_ms", "steps"), [(0.001, [1, 1, 1, 1]), (0.15, [1, 1, 2, 2, 2])])
def test_the_devices_time_whatever_the_host_needs(monkeypatch, launch_ms, steps):
    machine = Machine(monkeypatch, launch_ms)
    found = gpu_round.replay_times(machine.model(), [], machine.hold(), replays=50)
    assert found["median_us"] == pytest.approx(50)
    assert found["p99_us"] == pytest.approx(50)
    assert found["host_paced_us"] == pytest.approx(max(50, 2e3 * launch_ms))
    assert machine.steps == steps
    assert {*found} == {"median_us", "p99_us", "host_paced_us", "wall_us", "eager_us"}


def test_a_host_that_never_gets_ahead(monkeypatch):
    machine = Machine(monkeypatch, launch_ms=50)
    found = gpu_round.replay_times(machine.model(), [], machine.hold(), replays=5)
    assert np.isnan([found["median_us"], found["p99_us"]]).all()
    assert found["host_paced_us"] == pytest.approx(1e5)
    assert max(machine.steps) == hold.MAX_STEPS
