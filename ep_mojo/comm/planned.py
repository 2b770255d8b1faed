"""`Communicator.planned`: GPUs that are not there. Graphs for them can be built and compiled, not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import EPConfig
from ..errors import DeviceError
from .base import Communicator

if TYPE_CHECKING:
    from max.graph import DeviceRef

COMPILING_AHEAD = 'docs/gpus.md, "Compiling ahead"'
"""Where it is written how."""


class PlannedCommunicator(Communicator):
    """R ranks on one GPU, or on one GPU each, without memory."""

    def __init__(self, cfg: EPConfig, virtual: bool):
        """See `Communicator.planned`."""
        super().__init__(cfg)
        self.graph_ranks = cfg.n_ranks
        self.virtual = virtual
        self.fused_allowed = not virtual

    def device_refs(self) -> list[DeviceRef]:
        """See `Communicator.device_refs`."""
        from max.graph import DeviceRef

        return [DeviceRef.GPU(0 if self.virtual else r) for r in range(self.cfg.n_ranks)]

    def _refuse(self) -> NoReturn:
        raise DeviceError(
            "these GPUs are only planned",
            field="devices",
            value="none",
            allowed="GPUs of this machine",
            remedy="compile with a session of your own for virtual devices, run with Communicator.gpus or one_gpu: "
            + COMPILING_AHEAD,
        )

    def inputs(self) -> NoReturn:
        """There are none."""
        self._refuse()

    def compile_all(self, graphs: Sequence[Any]) -> NoReturn:
        """Not here: compile with a session of your own, and export what it gives. See docs/gpus.md."""
        self._refuse()

    def execute(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        self._refuse()

    def check(self) -> None:
        """Nothing has run, so nothing has failed."""

    def reset(self) -> None:
        """Nothing to do."""

    def _release(self) -> None:
        """Nothing to give up."""
