"""A communicator and its compiled graphs, called with torch tensors.

Tensors become MAX buffers and back by DLPack: the same memory. Of a model's outputs a caller makes tensors as it needs
them; what only combine reads stays a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..comm import Communicator
from ..config import EPConfig
from ..dtypes import to_numpy
from .board import Board
from .graphs import Builder

if TYPE_CHECKING:
    from max.driver import Buffer

BITS = {torch.float8_e4m3fn: torch.uint8}
"""What MAX takes in place of types that it does not have on the host."""
SETTING_N_SMS = 11

_compiled: dict[tuple, dict[str, Any]] = {}


class Rounds:
    """The rounds of one config. Made by all ranks of the group together.

    Attributes:
        cfg: The config.
        comm: The communicator.
        name: The same on all ranks, and no other rounds of the group have it.
    """

    def __init__(self, group: Any, board: Board, cfg: EPConfig, build: Callable[[Builder], None], timeout_s: float):
        """Make the windows, and compile what `build` adds unless this process has done that for an earlier one.

        Raises:
            ConfigMismatchError: Ranks come with different configs; on all of them.
            PeerTimeoutError: A rank did not come.
            EPError: See `Communicator.process_group`.
        """
        self.cfg = cfg
        what = f"the first call of {build.__name__}"
        self.name = board.agree_on(what, {"config": repr(cfg)}, timeout_s)
        self.comm = Communicator.process_group(cfg, group)
        key = (build, cfg, str(self.comm.device_refs()[0]))
        # Together or not at all: rank 0 compiles for all.
        if all(board.agree(what, key in _compiled, timeout_s)):
            self._models = _compiled[key]
        else:
            self._models = _compiled[key] = self._compile(build)
        self._n_sms = to_numpy(self.comm.inputs()[0])[SETTING_N_SMS : SETTING_N_SMS + 1]

    def _compile(self, build: Callable[[Builder], None]) -> dict[str, Any]:
        from max.graph import Module

        builder = Builder(self.comm, Module())
        build(builder)
        return dict(zip(builder.graphs, self.comm.compile_all(list(builder.graphs.values())), strict=True))

    def run(self, name: str, *values: Any, n_sms: int = 0) -> list[Buffer]:
        """Run a graph.

        Args:
            name: Of the graph.
            values: Its inputs, contiguous tensors or MAX buffers.
            n_sms: The most SMs (on the host: worker threads) of a launch, 0 = all.

        Returns:
            Its outputs.

        Raises:
            EPError: What this rank recorded, see `Communicator.execute`.
        """
        self._n_sms[0] = n_sms
        return self.comm.execute(self._models[name], *map(to_buffer, values), as_buffers=True)

    def window(self) -> torch.Tensor:
        """This rank's receive window of dispatch, uint8, flat."""
        return torch.from_numpy(self.comm.memories[self.comm.rank].dispatch_recv)

    def reset(self) -> None:
        """Make them work again after a failure. All ranks call it."""
        self.comm.reset()

    def destroy(self) -> None:
        """Give up the windows."""
        self.comm.destroy()


def to_buffer(value: Any) -> Buffer:
    """A contiguous tensor as a MAX buffer over the same memory; a buffer as it is."""
    from max.driver import Buffer

    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.dtype in BITS:
        value = value.view(BITS[value.dtype])
    return Buffer.from_dlpack(value)


def to_tensor(buffer: Buffer, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A MAX buffer as a tensor over the same memory.

    Args:
        buffer: The buffer.
        dtype: What its elements are, where MAX has them as bits.
    """
    tensor = torch.from_dlpack(buffer)
    return tensor if dtype is None or tensor.dtype == dtype else tensor.view(dtype)
