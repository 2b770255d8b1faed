"""What communicators share whose graphs hold all ranks and run in this process: on the host, on one GPU or several."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..config import EPConfig
from ..dtypes import to_numpy
from ..errors import UnsupportedError
from . import windows
from .arguments import check_args, chosen_ranks, make_buffers
from .base import Communicator, CompiledGraph, arg_labels
from .causes import raise_first
from .models import load_graphs, run_model

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.engine import InferenceSession, Model
    from max.graph import Graph


class OneGraphCommunicator(Communicator):
    """All ranks in one graph of this process.

    Attributes:
        memories: The ranks' windows and counters.
    """

    def __init__(self, cfg: EPConfig):
        """Called by the subclasses, which then make `memories`."""
        super().__init__(cfg)
        self.graph_ranks = cfg.n_ranks
        self.memories: list[windows.RankMemory] = []
        self._inputs: list[Buffer] | None = None
        self._session: InferenceSession | None = None

    @abstractmethod
    def _make_inputs(self) -> list[Buffer]:
        """The buffers behind `input_types`."""

    @abstractmethod
    def _session_devices(self) -> list[Device]:
        """What the session compiles for."""

    @abstractmethod
    def _before_run(self) -> Any:
        """Look at the ranks' memory, as far as that costs no waiting. What it returns goes to `_abort`."""

    @abstractmethod
    def _abort(self, memories: Sequence[windows.RankMemory], before: Any) -> None:
        """An op raised: put that on record unless no rank is in the middle of a round, or a round ahead of others."""

    def _settle(self) -> None:
        """Wait until the ranks' memory shows all that has been run."""

    def _enqueueing(self) -> AbstractContextManager[object]:
        """Held while a run is given to the devices."""
        return nullcontext()

    def inputs(self) -> list[Buffer]:
        """See `Communicator.inputs`."""
        self._live()
        if (found := self._inputs) is None:
            self._inputs = found = self._make_inputs()
        return found

    @property
    def session(self) -> InferenceSession:
        """The MAX session that compiles this communicator's graphs."""
        self._live()
        if self._session is None:
            from max.engine import InferenceSession

            self._session = InferenceSession(devices=self._session_devices())
        return self._session

    def compile_all(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """See `Communicator.compile_all`. The results' `model` is a loaded MAX model."""
        with self._exclusive():
            return load_graphs(self.session, graphs, [self._check_graph(g) for g in graphs])

    def execute(
        self,
        model: CompiledGraph | Model,
        *args: Any,
        ranks: Iterable[int] | None = None,
        check: bool = True,
        as_buffers: bool = False,
    ) -> list[Any]:
        """See `Communicator.execute`. One run serves all ranks; GPUs are waited for to check or to give arrays.

        Runs of several communicators on GPUs are enqueued one after the other, whichever threads they come from.
        """
        chosen = chosen_ranks(ranks, self.cfg.n_ranks)
        if len(chosen) != self.cfg.n_ranks:
            raise UnsupportedError(
                field="ranks",
                value=chosen,
                allowed="all ranks: they share one graph",
                remedy="use Communicator.processes",
            )
        with self._exclusive():
            specs = self._specs(model)
            values = check_args(specs, args, arg_labels(len(args), self.cfg.n_ranks))
            before = self._before_run()
            loaded = model.model if isinstance(model, CompiledGraph) else model
            memories = self.memories  # first, so that a destroy() meanwhile takes no memory from the ops
            buffers = [*make_buffers(specs, values), *self.inputs()]
            try:
                with self._enqueueing():
                    outputs = run_model(loaded, buffers)
            except Exception:
                self._abort(memories, before)
                raise
            if self._state.destroyed:
                self._settle()  # destroy() may have waited before this run came, and `memories` goes with the frame
            self._live()
            if check:
                self._raise_recorded()
            return outputs if as_buffers else [to_numpy(o) for o in outputs]

    def check(self) -> None:
        """See `Communicator.check`. Waits for GPUs."""
        with self._exclusive():
            self._raise_recorded()

    def reset(self) -> None:
        """See `Communicator.reset`. Waits for GPUs."""
        with self._exclusive():
            self._settle()
            windows.restart_all(self.memories)

    def _raise_recorded(self) -> None:
        self._settle()
        windows.check_heads(self.memories)
        raise_first({m.rank: error for m in self.memories if (error := m.error()) is not None})

    def _release(self) -> None:
        try:
            self._settle()
        finally:
            self.memories = []
            self._inputs = None
            self._session = None
