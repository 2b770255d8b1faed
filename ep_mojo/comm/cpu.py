"""`Communicator.cpu`: all ranks in one process, as virtual ranks of one graph, windows in host memory.

Virtual ranks share one pool of workers, so a wait never spins: one that finds its signal missing is an `OrderError`.
The graph wrappers emit all sends before the first wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..config import EPConfig
from ..dtypes import to_numpy
from ..errors import UnsupportedError
from . import windows
from .arguments import check_args, chosen_ranks, make_buffers
from .base import Communicator, CompiledGraph, arg_labels, host_inputs, raise_first
from .models import load_graphs, run_model

if TYPE_CHECKING:
    from max.driver import Buffer
    from max.engine import InferenceSession, Model
    from max.graph import Graph


class CPUCommunicator(Communicator):
    """R virtual ranks in this process.

    Attributes:
        memories: The ranks' windows and counters.
    """

    fused_allowed = False

    def __init__(self, cfg: EPConfig):
        """See `Communicator.cpu`."""
        super().__init__(cfg)
        self.graph_ranks = cfg.n_ranks
        self.memories = windows.allocate_all(cfg)
        self._inputs: list[Buffer] | None = None
        self._session: InferenceSession | None = None

    def inputs(self) -> list[Buffer]:
        """See `Communicator.inputs`."""
        self._live()
        if self._inputs is None:
            self._inputs = host_inputs(self.cfg, True, self.memories, range(self.cfg.n_ranks))
        return self._inputs

    @property
    def session(self) -> InferenceSession:
        """The MAX session that compiles this communicator's graphs."""
        self._live()
        if self._session is None:
            from max.driver import CPU
            from max.engine import InferenceSession

            self._session = InferenceSession(devices=[CPU()])
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
        """See `Communicator.execute`. One run serves all ranks."""
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
            windows.check_heads(self.memories)
            loaded = model.model if isinstance(model, CompiledGraph) else model
            buffers = [*make_buffers(specs, values), *self.inputs()]
            memories = self.memories  # so that a destroy() meanwhile takes no memory from the ops
            before = [m.epochs() for m in memories]
            try:
                outputs = run_model(loaded, buffers)
            except Exception:
                # Ranks whose ops came before the one that raised may be a round ahead of the others.
                if before != [m.epochs() for m in memories]:
                    for m in memories:
                        m.record_abort()
                raise
            self._live()
            if check:
                self._raise_recorded()
            return outputs if as_buffers else [to_numpy(o) for o in outputs]

    def check(self) -> None:
        """See `Communicator.check`."""
        with self._exclusive():
            windows.check_heads(self.memories)
            self._raise_recorded()

    def reset(self) -> None:
        """See `Communicator.reset`."""
        with self._exclusive():
            windows.restart_all(self.memories)

    def _raise_recorded(self) -> None:
        raise_first({m.rank: error for m in self.memories if (error := m.error()) is not None})

    def _release(self) -> None:
        self.memories = []
        self._inputs = None
        self._session = None
