"""A communicator and its compiled graphs, called with torch tensors.

Tensors become MAX buffers and back by DLPack: the same memory. Of a model's outputs a caller makes tensors as it needs
them; what only combine reads stays a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import to_dlpack

from ..comm import Communicator
from ..config import EPConfig
from ..dtypes import to_numpy
from .board import Board
from .graphs import STAGES, Builder, DispatchSet, GraphSet

if TYPE_CHECKING:
    from max.driver import Buffer

BITS = {torch.float8_e4m3fn: torch.uint8}
"""What MAX takes in place of types that it does not have on the host."""
SETTING_N_SMS = 11
KEPT_SIZES = 64

_compiled: dict[tuple[GraphSet, str], dict[str, Any]] = {}
"""Compiled graphs by stage, of each set and device."""


def compile_sets(comm: Communicator, sets: Sequence[GraphSet]) -> None:
    """Compile sets of graphs for the device of a communicator, whatever its config. All its ranks call this."""
    from max.graph import Module

    builder = Builder(comm, Module())
    for each in sets:
        each.add(builder)
    models = dict(zip(builder.graphs, comm.compile_all(list(builder.graphs.values())), strict=True))
    for each in sets:
        found = {stage: models[each.name(stage)] for stage in STAGES if each.name(stage) in models}
        _compiled[each, str(builder.device)] = found


class Rounds:
    """A communicator, and the graphs that were compiled for its rounds. All ranks make them together.

    Attributes:
        cfg: The config.
        comm: The communicator.
        name: The same on all ranks, and no other rounds of the group have it.
        device: Where tensors are.
    """

    def __init__(self, comm: Communicator, board: Board, name: str, timeout_s: float):
        """See `make`; or with a communicator that is there already."""
        self.comm, self.cfg, self.name = comm, comm.cfg, name
        ref = comm.device_refs()[0]
        self.device = torch.device("cpu") if ref.is_cpu() else torch.device("cuda", ref.id)
        self._board, self._timeout_s = board, timeout_s
        self._stages: dict[tuple[GraphSet, str], Any] = {}
        self._n_sms = to_numpy(comm.inputs()[0])[SETTING_N_SMS : SETTING_N_SMS + 1]
        self._sizes: dict[tuple[int, ...], Buffer] = {}

    @classmethod
    def make(cls, group: Any, board: Board, cfg: EPConfig, sets: Sequence[GraphSet], timeout_s: float) -> Rounds:
        """Make the windows, and the graphs of `sets`.

        Raises:
            ConfigMismatchError: Ranks come with different configs; on all of them.
            PeerTimeoutError: A rank did not come.
            EPError: See `Communicator.process_group`.
        """
        given = {"config": repr(cfg), "graphs": repr(tuple(sets))}
        name = board.agree_on("making the windows of a new kind of round", given, timeout_s)
        rounds = cls(Communicator.process_group(cfg, group), board, name, timeout_s)
        rounds.prepare(sets)
        return rounds

    def prepare(self, sets: Sequence[GraphSet]) -> None:
        """Compile the graphs of `sets` that this process does not have yet. All ranks call this with the same sets.

        Raises:
            ConfigMismatchError, PeerTimeoutError, EPError: See `make`.
        """
        place = str(self.comm.device_refs()[0])
        here = [(each, place) in _compiled for each in sets]
        # Rank 0 compiles for all, so what one rank lacks is made on all.
        found = self._board.agree(f"preparing {[each.name('') for each in sets]}", here, self._timeout_s)
        lacking = [each for each, *flags in zip(sets, *found, strict=True) if not all(flags)]
        if lacking:
            compile_sets(self.comm, lacking)
        for each in sets:
            self._stages |= {(each, stage): model for stage, model in _compiled[each, place].items()}

    def has(self, graphs: GraphSet, stage: str) -> bool:
        """Whether a graph was prepared."""
        return (graphs, stage) in self._stages

    def run(self, graphs: GraphSet, stage: str, *values: Any, n_sms: int | None = None) -> list[Buffer]:
        """Run a graph.

        Args:
            graphs: The set that has it.
            stage: Its name there.
            values: Its inputs, contiguous tensors or MAX buffers.
            n_sms: The most SMs (on the host: worker threads) of a launch, 0 = all; None: what the config says.

        Returns:
            Its outputs.

        Raises:
            EPError: What this rank recorded, see `Communicator.execute`. Values are not looked at.
        """
        self._n_sms[0] = (self.cfg.n_sms or 0) if n_sms is None else n_sms
        return self.comm.launch(self._stages[graphs, stage], list(map(to_buffer, values)))

    def sizes(self, graphs: DispatchSet, rows: int) -> Buffer:
        """The input that tells a dispatch the sizes of its outputs, of which `rows` is the number of rows."""
        from max.driver import Buffer
        from max.dtype import DType

        shape = tuple(graphs.sizes(self.cfg, rows))
        if shape not in self._sizes:
            if len(self._sizes) >= KEPT_SIZES:
                self._sizes.clear()
            self._sizes[shape] = Buffer(DType.int8, shape)
        return self._sizes[shape]

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
    return Buffer.from_dlpack(_Exported(value.detach()))


class _Exported:
    """A tensor for DLPack, without what `torch.Tensor.__dlpack__` does beside: who calls orders the queues itself."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor.view(BITS[tensor.dtype]) if tensor.dtype in BITS else tensor

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()


def to_tensor(buffer: Buffer, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A MAX buffer as a tensor over the same memory.

    Args:
        buffer: The buffer.
        dtype: What its elements are, where MAX has them as bits.
    """
    tensor = torch.from_dlpack(buffer)
    return tensor if dtype is None or tensor.dtype == dtype else tensor.view(dtype)
