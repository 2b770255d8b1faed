"""What communicators share that are one rank of a group of processes: a worker's, and that of a process group.

All ranks' windows are mapped in this process; the graphs hold this rank alone, and its peers have to run the same
stages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import layout
from ..config import EPConfig
from ..dtypes import to_numpy
from ..errors import EPError, PeerLostError, UnsupportedError
from . import shm, windows
from .arguments import check_args, chosen_ranks, make_buffers
from .base import Communicator, CompiledGraph, host_inputs
from .models import run_buffers, run_model

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.engine import InferenceSession, Model


class OneRankCommunicator(Communicator):
    """One rank of a group of processes.

    Attributes:
        rank: This process's rank.
        memories: All ranks' windows, mapped here; `memories[rank]` are its own.
    """

    graph_ranks = 1
    fused_allowed = True
    lost_remedy = "destroy() this communicator"

    def __init__(self, cfg: EPConfig, rank: int):
        """Called by the subclasses, which then set `memories`."""
        super().__init__(cfg)
        self.rank = rank
        self.memories: list[windows.RankMemory] = []
        self._inputs: list[Buffer] | None = None
        self._session: InferenceSession | None = None

    @property
    def _own(self) -> windows.RankMemory:
        return self.memories[self.rank]

    @property
    def lost(self) -> list[int]:
        """Ranks that are known to be gone."""
        return [r for r, flag in enumerate(shm.lost_flags(self._own)) if flag] if self.memories else []

    @property
    def session(self) -> InferenceSession:
        """The MAX session of this process."""
        self._live()
        if self._session is None:
            from max.engine import InferenceSession

            self._session = InferenceSession(devices=self._session_devices())
        return self._session

    def _session_devices(self) -> list[Device]:
        """What the session compiles for."""
        from max.driver import CPU

        return [CPU()]

    def inputs(self) -> list[Buffer]:
        """See `Communicator.inputs`."""
        self._live()
        if self._inputs is None:
            self._inputs = self._make_inputs()
        return self._inputs

    def _make_inputs(self) -> list[Buffer]:
        """The buffers behind `input_types`."""
        return host_inputs(self.cfg, False, self.memories, [self.rank])

    def _settle(self) -> None:
        """Wait until this rank's memory shows all that it has run."""

    def _check_may_wait(self) -> None:
        """Raise where `_settle` cannot be."""

    def _before_launch(self) -> None:
        """Look at the rank's memory, as far as that costs no waiting."""
        self._own.check_head()

    def _turn(self) -> AbstractContextManager[None]:
        """Around what is executed: it runs after all earlier launches of the device, on whatever queue they are."""
        return nullcontext()

    def _abort(self, own: windows.RankMemory, memories: Sequence[windows.RankMemory]) -> None:
        """An op raised: peers must not wait for this rank until their deadline."""
        self._settle()
        windows.abort_alone(own, memories)

    @abstractmethod
    def load(self, model: CompiledGraph) -> Model:
        """The MAX model of a compiled graph."""

    def execute(
        self,
        model: CompiledGraph,
        *args: Any,
        ranks: Iterable[int] | None = None,
        check: bool = True,
        as_buffers: bool = False,
    ) -> list[Any]:
        """Run a graph on this rank: `args` and outputs are its own. Other ranks have to run the same stages.

        Args:
            model: From `compile`.
            args: The graph's own inputs for this rank.
            ranks: Not to be given here.
            check: Whether to raise the error that this rank recorded.
            as_buffers: Return MAX buffers, not NumPy arrays.

        Raises:
            PeerLostError: The rank failed because a peer is gone.
            EPError: Whatever the arguments or the ops are to blame for, by name. After an error that an op raised, as
                after one on record, this rank and its peers fail until `reset`.
        """
        if ranks is not None and chosen_ranks(ranks, self.cfg.n_ranks) != [self.rank]:
            raise UnsupportedError(field="ranks", value=ranks, allowed=str([self.rank]), remedy="leave it out")
        with self._exclusive():
            specs = self._specs(model)
            values = check_args(specs, args, [f"args[{i}] of rank {self.rank}" for i in range(len(args))])
            own, memories = self._own, self.memories  # a destroy() meanwhile takes no memory from the ops
            if check or not as_buffers:
                self._check_may_wait()
            self._before_launch()
            loaded, buffers = self.load(model), [*make_buffers(specs, values), *self.inputs()]
            try:
                with self._turn():
                    outputs = run_model(loaded, buffers)
            except Exception:
                self._abort(own, memories)
                raise
            self._live()
            if check:
                self._raise_recorded()
            return outputs if as_buffers else [to_numpy(o) for o in outputs]

    def launch(
        self, model: CompiledGraph, buffers: Sequence[Buffer], fill: Callable[[], None], check: bool = True
    ) -> None:
        """`execute` for a caller who has seen to it that everything fits, with less to do for the host.

        Args:
            model: From `compile_calls`.
            buffers: All inputs of the graph.
            fill: Called when this launch has the communicator for itself: writes to `buffers` what it is to do.
            check: Whether to raise the error that this rank recorded, for which a GPU is waited for. Otherwise what is
                known of earlier launches is raised, before this one.

        Raises:
            PeerLostError, EPError: See `execute`.
        """
        with self._exclusive():
            own, memories = self._own, self.memories
            self._before_launch()
            fill()
            try:
                run_buffers(self.load(model), buffers)
            except Exception:
                self._abort(own, memories)
                raise
            self._live()
            if check:
                self._raise_recorded()

    def shrink(self, masks: int) -> None:
        """Let launches mask a peer that does not come, and go on without it.

        For output_layout="expert_padded" with reduce="source" and slots="rank". No launch may be under way here. All
        ranks have to do it before their first launch, or none: tables and few tokens travel otherwise then.

        Args:
            masks: Address of int32 [R] where the rank is: 1 for a peer to which nothing is sent, and of which nothing
                is awaited. Launches set them, the caller may do both on the rank's queue; kept by the caller.

        Raises:
            UnsupportedError: The config is another.
        """
        for name, allowed in (("output_layout", "expert_padded"), ("reduce", "source"), ("slots", "rank")):
            if getattr(self.cfg, name) != allowed:
                raise UnsupportedError(
                    "ranks cannot be masked in rounds of this kind",
                    field=f"cfg.{name}",
                    value=getattr(self.cfg, name),
                    allowed=repr(allowed),
                    remedy="make the communicator with a config of low-latency rounds",
                )
        self._settle()
        self._own.put_address(layout.HEAD_MASKS, masks)
        to_numpy(self.inputs()[0])[layout.SETTING_WAITS] |= layout.WAITS_SHRINK

    def execute_local(
        self, model: CompiledGraph, *args: Any, check: bool = True, as_buffers: bool = False
    ) -> list[Any]:
        """`execute`, by the name that functions in workers use."""
        return self.execute(model, *args, check=check, as_buffers=as_buffers)

    def check(self) -> None:
        """Raise this rank's recorded error; `PeerLostError` where a peer is gone that it has to do with."""
        with self._exclusive():
            self._raise_recorded()

    def _raise_recorded(self) -> None:
        self._settle()
        self._own.check_head()
        error = self._own.error()
        lost = self._lost_behind(error)
        if lost:
            # This rank may run nothing more: its peers must not wait for it until their deadline.
            for memory in self.memories:
                memory.publish_failure(self.rank)
            raise self._lost_error(lost, error)
        if error is not None:
            raise error

    def _lost_behind(self, error: EPError | None) -> Sequence[int]:
        """Ranks whose loss is to be raised in place of `error`, what this rank has on record."""
        return self.lost

    def _lost_error(self, lost: Sequence[int], error: EPError | None = None) -> PeerLostError:
        # Without its remedy: nobody is there to follow it.
        why = "" if error is None else f" ({str(error).partition(' Remedy: ')[0].rstrip('.')})"
        raised = PeerLostError(f"rank {self.rank}: {self._fate(lost)}{why}", remedy=self.lost_remedy)
        raised.rank = lost[0]  # type: ignore[attr-defined]
        return raised

    def _fate(self, lost: Sequence[int]) -> str:
        """What has become of these ranks, in words."""
        return f"the process of rank {', '.join(map(str, lost))} is gone"

    def _release(self) -> None:
        self.memories, self._inputs, self._session = [], None, None
