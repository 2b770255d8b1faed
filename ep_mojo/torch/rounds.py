"""A communicator and its compiled graphs, called with torch tensors. Graphs write to tensors of the caller."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..comm import Communicator
from ..comm.board import Board
from ..config import EPConfig
from ..errors import EPError
from .call import Call
from .graphs import SIDE, STAGES, Builder, GraphSet
from .streams import check_not_capturing, queue_for

TooMany = Callable[[EPConfig, int, int], EPError]
"""Makes the error of a rank, the second argument, that had more than Tmax tokens: as many as the third says."""

_compiled: dict[tuple[GraphSet, str], dict[str, Any]] = {}
"""Compiled graphs by stage, of each set and device."""


def compile_sets(comm: Communicator, sets: Sequence[GraphSet]) -> None:
    """Compile sets of graphs for the device of a communicator, whatever its config. All its ranks call this."""
    from max._mlir_context import ensure_default_mlir_context
    from max.graph import Module

    with ensure_default_mlir_context():  # backward passes on GPUs have threads of their own, where MAX has none
        builder = Builder(comm, Module())
        for each in sets:
            each.add(builder)
        models = dict(zip(builder.graphs, comm.compile_calls(list(builder.graphs.values())), strict=True))
    for each in sets:
        found = {stage: models[each.name(stage)] for stage in STAGES if each.name(stage) in models}
        _compiled[each, str(builder.device)] = found


def place_of(comm: Communicator) -> torch.device:
    """Where the tensors of a communicator of one rank are."""
    ref = comm.device_refs()[0]
    return torch.device("cpu") if ref.is_cpu() else torch.device("cuda", ref.id)


def check_may_make(device: torch.device) -> None:
    """Raise `OrderError` inside the capture of a CUDA graph, where nothing can be made together with other ranks."""
    check_not_capturing(device, "windows and graphs cannot be made", "make one such round before")


class Rounds:
    """A communicator, and the graphs that were compiled for its rounds. All ranks make them together.

    Attributes:
        cfg: The config.
        comm: The communicator.
        name: The same on all ranks, and no other rounds of the group have it.
        too_many: The error of a rank that had more than Tmax tokens; see `Session.announcing`.
        device: Where tensors are.
    """

    def __init__(self, comm: Communicator, board: Board, name: str, timeout_s: float):
        """See `make`; or with a communicator that is there already."""
        self.comm, self.cfg, self.name = comm, comm.cfg, name
        self.device = place_of(comm)
        self._board, self._timeout_s = board, timeout_s
        self._queue = queue_for(self.device)
        self.too_many: TooMany | None = None
        self._resets, self._turns = 0, 0
        self._stages: dict[tuple[GraphSet, str], Any] = {}
        self._calls = self._blocks()

    @classmethod
    def make(
        cls, group: Any, board: Board, device: torch.device, cfg: EPConfig, sets: Sequence[GraphSet], timeout_s: float
    ) -> Rounds:
        """Make the windows, on `device`, and the graphs of `sets`.

        Raises:
            ConfigMismatchError: Ranks come with different configs; on all of them.
            OrderError: Inside the capture of a CUDA graph.
            PeerTimeoutError: A rank did not come.
            EPError: See `Communicator.process_group`.
        """
        check_may_make(device)
        given = {"config": repr(cfg), "graphs": repr(tuple(sets))}
        name = board.agree_on("making the windows of a new kind of round", given, timeout_s)
        rounds = cls(Communicator.process_group(cfg, group, device=device), board, name, timeout_s)
        rounds.prepare(sets)
        return rounds

    def prepare(self, sets: Sequence[GraphSet]) -> None:
        """Compile the graphs of `sets` that this process does not have yet. All ranks call this with the same sets.

        Raises:
            ConfigMismatchError, OrderError, PeerTimeoutError, EPError: See `make`.
        """
        check_may_make(self.device)
        place, sets = str(self.comm.device_refs()[0]), list(dict.fromkeys(sets))  # a module holds a name once
        here = [(each, place) in _compiled for each in sets]
        # Rank 0 compiles for all, so what one rank lacks is made on all.
        found = self._board.agree(f"preparing {[each.name('') for each in sets]}", here, self._timeout_s)
        lacking = [each for each, *flags in zip(sets, *found, strict=True) if not all(flags)]
        if lacking:
            compile_sets(self.comm, lacking)
        for each in sets:
            self._stages |= {(each, stage): model for stage, model in _compiled[each, place].items()}

    def _blocks(self) -> dict[str, Call]:
        return {side: Call(self.comm, side) for side in set(SIDE.values())}

    def shrink(self, masks: torch.Tensor) -> None:
        """From now on leave out the ranks that `masks` names, see `Communicator.shrink`; it must outlive all rounds."""
        self.comm.shrink(masks.data_ptr())
        self._calls = self._blocks()  # the settings say so

    def has(self, graphs: GraphSet, stage: str) -> bool:
        """Whether a graph was prepared."""
        return (graphs, stage) in self._stages

    def run(self, graphs: GraphSet, stage: str, *tensors: torch.Tensor | None, n_sms: int | None = None) -> None:
        """Run a graph. On the host it is done on return; the current queue of a GPU has it then.

        Args:
            graphs: The set that has it.
            stage: Its name there.
            tensors: What it reads and writes, as the set says, contiguous, of the device; None, or left out at the end:
                absent. Their sizes are looked at, and nothing else.
            n_sms: The most SMs (on the host: worker threads) of a launch, 0 = all; None: what the config says.

        Raises:
            EPError: What this rank recorded, see `Communicator.execute`; with a GPU, in earlier launches. Values are
                not looked at.
        """
        call, model = self._calls[SIDE[stage]], self._stages[graphs, stage]
        most = (self.cfg.n_sms or 0) if n_sms is None else n_sms
        with self._queue.launching() as queue:
            fill = functools.partial(call.fill, most, queue, tensors)
            self.comm.launch(model, call.buffers, fill, check=self.device.type == "cpu")

    def glance(self) -> None:
        """Raise what is known to have failed in this rank's rounds; waits for nothing."""
        self.comm.glance()

    def exchange(self, what: str, value: Any) -> list[Any]:
        """`Board.exchange` beside rounds: all ranks behind the same ones; after a reset turns begin anew."""
        name, turn = f"{self.name}/exchange/{self._resets}", self._turns
        self._turns += 1
        return self._board.exchange(name, turn, what, value, self.cfg.timeout_s)

    def check(self) -> None:
        """Raise what this rank recorded, once its queue is empty."""
        if self.device.type != "cpu":
            self.comm.check()

    def window(self) -> torch.Tensor:
        """This rank's receive window of dispatch, uint8, flat."""
        own = self.comm.memories[self.comm.rank]
        return torch.from_numpy(own.dispatch_recv) if self.device.type == "cpu" else own.part("dispatch_recv")

    def reset(self) -> None:
        """Make them work again after a failure. All ranks call it."""
        self.comm.reset()
        self._resets, self._turns = self._resets + 1, 0

    def destroy(self) -> None:
        """Give up the windows."""
        self.comm.destroy()
