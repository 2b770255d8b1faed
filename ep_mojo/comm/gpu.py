"""`Communicator.one_gpu` and `Communicator.gpus`: ranks on GPUs, all driven by this process.

On one GPU ranks are virtual: they share its queue, so the graph wrappers emit all sends before all waits. On several
GPUs there is one rank on each; what one rank sends another reads while both run, and the fused ops can be used.

Two runs on the same GPUs must come to all of them in one order: a launch takes a whole GPU and waits for its peers, so
where one GPU has begun the first run and another the second, each waits for the other. One lock sees to that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import layout
from ..config import EPConfig
from ..dtypes import to_buffer
from . import windows
from .device_memory import BufferMemory, accelerators
from .one_graph import OneGraphCommunicator

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.graph import DeviceRef


_ENQUEUEING = threading.Lock()
"""Held by the communicator, of all on GPUs, that gives a run to its devices."""


def synchronize(devices: Iterable[Device]) -> None:
    """Wait until devices have done what they were given."""
    for device in devices:
        device.synchronize()


class GPUCommunicator(OneGraphCommunicator):
    """R ranks on one GPU, or on one GPU each.

    Attributes:
        devices: The device of each rank.
        places: The devices, each once.
    """

    def __init__(self, cfg: EPConfig, devices: Sequence[Device | int] | None, virtual: bool):
        """See `Communicator.one_gpu` and `Communicator.gpus`."""
        super().__init__(cfg)
        self.fused_allowed = not virtual
        self.virtual = virtual
        self.places = accelerators(devices, 1 if virtual else cfg.n_ranks)
        self.devices: list[Device] = self.places * cfg.n_ranks if virtual else self.places
        self.memories = [BufferMemory(cfg, r, d) for r, d in enumerate(self.devices)]
        self.timeline_buffers: list[Buffer] = []  # of an open `ep_mojo.timeline.Timeline`
        # Without destroy(), too, no window goes while a kernel of any rank may write it.
        self._before_windows_go = weakref.finalize(self, synchronize, self.places)

    def device_refs(self) -> list[DeviceRef]:
        """See `Communicator.device_refs`."""
        from max.graph import DeviceRef

        return [DeviceRef.GPU(d.id) for d in self.devices]

    def synchronize(self) -> None:
        """Wait until all devices have done what they were given."""
        synchronize(self.places)

    def _make_inputs(self) -> list[Buffer]:
        tables = [windows.settings_array(self.cfg, self.virtual), *windows.pointer_tables(self.memories)]
        order = np.zeros(windows.ORDER_WORDS, np.int32)
        return [
            *map(to_buffer, tables),
            *(to_buffer(order).to(d) for d in self.places),
            *(m.buffers["counters"] for m in self.memories),
        ]

    def _session_devices(self) -> list[Device]:
        from max.driver import CPU

        return [CPU(), *self.places]

    def _before_run(self) -> None:
        """The kernels look at the heads; here that would wait for the devices."""

    def _abort(self, memories: Sequence[windows.RankMemory], before: None) -> None:
        self.synchronize()
        epochs = [layout.read_epochs(m.counters) for m in memories]
        if len(set(epochs)) > 1 or epochs[0][0::2] != epochs[0][1::2]:
            for m in memories:
                m.record_abort()

    def _settle(self) -> None:
        self.synchronize()

    def _enqueueing(self) -> threading.Lock:
        return _ENQUEUEING

    def _release(self) -> None:
        super()._release()
        self._before_windows_go.detach()
