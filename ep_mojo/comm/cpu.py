"""`Communicator.cpu`: all ranks in one process, as virtual ranks of one graph, windows in host memory.

Virtual ranks share one pool of workers, so a wait never spins: one that finds its signal missing is an `OrderError`.
The graph wrappers emit all sends before the first wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config import EPConfig
from . import windows
from .base import host_inputs
from .one_graph import OneGraphCommunicator

if TYPE_CHECKING:
    from max.driver import Buffer, Device


class CPUCommunicator(OneGraphCommunicator):
    """R virtual ranks in this process."""

    fused_allowed = False

    def __init__(self, cfg: EPConfig):
        """See `Communicator.cpu`."""
        super().__init__(cfg)
        self.memories = windows.allocate_all(cfg)

    def _make_inputs(self) -> list[Buffer]:
        return host_inputs(self.cfg, True, self.memories, range(self.cfg.n_ranks))

    def _session_devices(self) -> list[Device]:
        from max.driver import CPU

        return [CPU()]

    def _before_run(self) -> list[bytes]:
        windows.check_heads(self.memories)
        return [m.epochs() for m in self.memories]

    def _abort(self, memories: Sequence[windows.RankMemory], before: list[bytes]) -> None:
        # Ranks whose ops came before the one that raised may be a round ahead of the others.
        if before != [m.epochs() for m in memories]:
            for m in memories:
                m.record_abort()
