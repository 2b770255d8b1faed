"""When the parts of a fused round happen on GPUs: each warp's times, written where a communicator asks for them.

    with Timeline(comm) as timeline:             # graphs need not be compiled or captured again
        ... fused rounds, replayed or not ...
        for rank, times in enumerate(timeline.times()):
            times[:, :, MARKS["header seen"]]    # microseconds since the rank's dispatch began, [CTAs, warps]

The marks are those of kernels/ep_mojo/gpu/timeline.mojo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import layout
from .comm.gpu import GPUCommunicator
from .errors import OrderError, UnsupportedError

if TYPE_CHECKING:
    from max.driver import Buffer

    from .comm import Communicator

CTAS = 256
WARPS = 8
N_MARKS = 32
MARKS = {
    "begun": 0,
    "opened": 1,
    "table sent": 2,
    "ids read": 3,
    "message ready": 4,
    "tables have left": 5,
    "messages arrived": 6,
    "header seen": 7,
    "rows counted": 8,
    "all counted": 9,
    "rows mapped": 10,
    "map seen": 11,
    "signal seen": 12,
    "message loaded": 13,
    "rows written": 14,
    "ended": 15,
    "combine begun": 16,
    "combine opened": 17,
    "combine sum ready": 18,
    "combine sums arrived": 19,
    "combine signals seen": 20,
    "combine token written": 21,
    "combine ended": 22,
}
"""Name -> number. In this order each warp comes by those of its role, some of them many times: the last time counts."""


class Timeline:
    """Times of the fused launches of a communicator on GPUs, until `close`, one at a time for a communicator.

    It costs a store a mark. Rounds that are under way when it begins or ends are waited for.
    """

    def __init__(self, comm: Communicator):
        """Begin.

        Raises:
            UnsupportedError: The ranks are not on GPUs, or slots="expert", whose kernels have no marks.
            OrderError: Another one is open.
        """
        if not isinstance(comm, GPUCommunicator) or comm.cfg.slots != "rank":
            raise UnsupportedError(
                field="comm",
                value=f'{type(comm).__name__} with slots="{comm.cfg.slots}"',
                allowed='Communicator.gpus or one_gpu with slots="rank"',
                remedy="time others by the host's clock: ep-mojo bench",
            )
        if comm.timeline_buffers:
            raise OrderError(
                field="comm",
                value="a communicator with a Timeline",
                allowed="one at a time",
                remedy="close the other one",
            )
        from max.driver import Buffer
        from max.dtype import DType

        self._comm = comm
        size = CTAS * WARPS * N_MARKS
        self._buffers: list[Buffer] = [Buffer.zeros([size], DType.int64, d) for d in comm.devices]
        comm.timeline_buffers = self._buffers  # kernels write there as long as the heads say so
        self._write([b._data_ptr() for b in self._buffers])

    def _write(self, addresses: list[int]) -> None:
        comm = self._comm
        with comm._exclusive():  # no launch may move an epoch meanwhile
            comm.synchronize()
            for memory, address in zip(comm.memories, addresses, strict=True):
                memory.put_address(layout.HEAD_TIMELINE, address)

    def times(self) -> list[np.ndarray]:
        """Wait for the devices, and read the last round's times.

        Returns:
            For each rank float64 [CTAS, WARPS, N_MARKS]: microseconds since the first CTA of its last dispatch began,
            NaN where a warp has not come by a mark since.
        """
        from max.driver import CPU

        self._comm.synchronize()
        return [since_begun(b.to(CPU()).to_numpy().copy()) for b in self._buffers]

    def close(self) -> None:
        """End: nothing is written from now on."""
        if self._buffers:
            if self._comm.memories:  # otherwise the communicator is gone, and no kernel runs
                self._write([0] * len(self._buffers))
            self._buffers = self._comm.timeline_buffers = []

    def __enter__(self) -> Timeline:
        """Itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """`close`."""
        self.close()


def since_begun(clock: np.ndarray) -> np.ndarray:
    """Microseconds since the first CTA of the last dispatch began, float64 [CTAS, WARPS, N_MARKS].

    Args:
        clock: int64 [CTAS * WARPS * N_MARKS]: nanoseconds by the GPU's clock, 0 where a mark was never
            passed. Split rounds do not say when they begin, so they have no times.
    """
    times = clock.reshape(CTAS, WARPS, N_MARKS)
    begun = times[:, :, MARKS["begun"]]
    latest = begun.max()
    # CTAs of one launch begin within a fraction of a round; those that this launch lacks are from before.
    first = begun[begun > latest - 1_000_000].min() if latest else np.iinfo(np.int64).max
    return np.where((times == 0) | (times < first), np.nan, (times - first) / 1e3)


def summary(rounds: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Medians over rounds and ranks of the first, the median and the last warp's time at each mark.

    Args:
        rounds: From `Timeline.times`, of any number of rounds and ranks.

    Returns:
        Mark -> {"first", "median", "last": µs, "warps": how many came by}; marks that none came by are left out.
    """
    found = {}
    for name, number in MARKS.items():
        each = [t[np.isfinite(t)] for t in (r[:, :, number] for r in rounds)]
        each = [t for t in each if t.size]
        if each:
            found[name] = {
                "first": float(np.median([t.min() for t in each])),
                "median": float(np.median([np.median(t) for t in each])),
                "last": float(np.median([t.max() for t in each])),
                "warps": float(np.median([t.size for t in each])),
            }
    return found
