"""Replays timed at the devices' own pace: their queues are held back until the host has enqueued a whole batch.

One host process launches a captured graph on R GPUs in turn, some 10 us each. A round of few tokens is over sooner, so
that GPUs that run whatever is there show how fast the host is. Here every queue begins with a kernel that does nothing
for a while (`ep_mojo_head_start`: it waits for nobody, so it ends by itself), and replays come back to back behind it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..comm.gpu import synchronize
from ..kernels import kernel_library

STEP_US = 4000
"""For how long one launch holds a queue."""
MAX_STEPS = 16
"""No batch is held for longer than so many launches."""
BATCH = 20
"""Replays that are timed behind one hold."""


def hold_name(ranks: int) -> str:
    """Name of the graph for so many devices."""
    return f"hold_r{ranks}"


def hold_graph(ranks: int, module: Any = None) -> Any:
    """The graph that holds the default queues of GPUs 0 to R - 1 for `STEP_US`.

    Inputs: int32 [1] of each GPU, which may be written, and another of each; `Hold` makes them.

    Args:
        ranks: R.
        module: Where to put the graph.
    """
    from max.dtype import DType
    from max.graph import BufferType, DeviceRef, Graph, TensorType, ops

    refs = [DeviceRef.GPU(r) for r in range(ranks)]
    types = [kind(DType.int32, [1], ref) for kind in (BufferType, TensorType) for ref in refs]
    with Graph(hold_name(ranks), input_types=types, custom_extensions=[kernel_library()], module=module) as graph:
        for i, ref in enumerate(refs):
            given = [graph.inputs[i].buffer, graph.inputs[ranks + i].tensor]
            ops.inplace_custom("ep_mojo_head_start", ref, given, parameters={"microseconds": STEP_US})
        graph.output()
    return graph


class Hold:
    """A loaded `hold_graph`, whatever it was compiled by.

    Attributes:
        devices: Whose default queues it holds.
    """

    def __init__(self, session: Any, devices: Sequence[Any]):
        """Load it.

        Args:
            session: An inference session of these devices.
            devices: GPUs 0 to R - 1.
        """
        from ..dtypes import to_buffer

        self.devices = list(devices)
        self._model = session.load(hold_graph(len(self.devices)))
        word = np.zeros(1, np.int32)
        self._args = [to_buffer(word).to(d) for _ in range(2) for d in self.devices]

    def begin(self, steps: int) -> None:
        """Hold all queues for so many times `STEP_US`, from when they come to it. Does not wait."""
        for _ in range(steps):
            self._model.execute(*self._args)


def held_times(model: Any, args: Sequence[Any], hold: Hold, replays: int) -> np.ndarray:
    """Microseconds of replays that were all enqueued before the first began, between events on each rank's queue.

    The first replay of a batch is not counted: queues do not open at quite the same moment. A batch for which the host
    took longer than the queues were held is not counted either, and the next one is held for twice as long.

    Args:
        model: The model, graph 1 captured.
        args: Its arguments.
        hold: Of all devices that it runs on.
        replays: How many to count, rounded up to whole batches of `BATCH`.

    Returns:
        float64 [R, replays]; NaN where the host was too slow for the longest hold.
    """
    from max.driver import DeviceEvent

    devices, found, steps = hold.devices, [], 1
    marks = [[DeviceEvent(d, enable_timing=True) for _ in range(BATCH + 3)] for d in devices]

    def mark(i: int) -> None:
        for d, events in zip(devices, marks, strict=True):
            d.default_queue.record_event(events[i])

    hold.begin(1)  # the driver loads a kernel when it is launched first
    while len(found) * BATCH < replays:
        synchronize(devices)
        start = time.perf_counter()
        mark(0)
        hold.begin(steps)
        mark(1)
        model.replay(1, *args)
        for i in range(2, BATCH + 2):
            mark(i)
            model.replay(1, *args)
        mark(BATCH + 2)
        host_ms = (time.perf_counter() - start) * 1e3
        synchronize(devices)
        if host_ms < min(events[0].elapsed_time(events[1]) for events in marks):
            found.append([[a.elapsed_time(b) * 1e3 for a, b in zip(e[2:], e[3:], strict=False)] for e in marks])
        elif steps >= MAX_STEPS:
            return np.full((len(devices), replays), np.nan)
        else:
            steps *= 2
    return np.concatenate(found, axis=1)
