"""`Communicator.processes`: a process for each rank, over POSIX shared memory; the parent compiles and drives them.

A graph holds one rank. The parent maps all blocks too: it writes credits and epochs in `reset`, reads error records in
`check`, and speaks for a rank whose process is gone: waits on it end at once, and its peers raise `PeerLostError`.
"""

from __future__ import annotations

import inspect
import itertools
import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..config import EPConfig
from ..dtypes import to_numpy
from ..errors import (
    ConfigError,
    DTypeError,
    PeerLostError,
    PeerTimeoutError,
    ShapeError,
    UnsupportedError,
)
from . import shm, windows, worker
from .arguments import check_args, chosen_ranks
from .base import Communicator, CompiledGraph, arg_labels
from .causes import raise_first
from .launcher import Look, Patience, Worker, collect, dismiss, dismiss_at_exit, lost_error
from .models import compile_modules, export

if TYPE_CHECKING:
    from max.driver import Buffer
    from max.graph import Graph

LONGEST_START_S = 86400
_keys = itertools.count(1)


class ProcessCommunicator(Communicator):
    """R worker processes of this one.

    Attributes:
        memories: The ranks' windows and counters, mapped in this process too.
    """

    graph_ranks = 1
    fused_allowed = True
    loads_models = False

    def __init__(self, cfg: EPConfig, *, start_timeout_s: float = 60.0, workers_of: Communicator | None = None):
        """See `Communicator.processes`."""
        super().__init__(cfg)
        if worker.inside_worker:
            raise UnsupportedError(
                "a worker process cannot start workers of its own",
                remedy='if this is a script, put what it does under: if __name__ == "__main__"',
            )
        number = isinstance(start_timeout_s, (int, float)) and not isinstance(start_timeout_s, bool)
        if not number or not 0 < start_timeout_s <= LONGEST_START_S:
            raise ConfigError(
                field="start_timeout_s",
                value=start_timeout_s,
                allowed=f"a number above 0, at most {LONGEST_START_S} (a day)",
                remedy="pass seconds",
            )
        survivors = None if workers_of is None else _survivors(workers_of, cfg)
        self.memories: list[windows.RankMemory] = []
        self._workers: list[Worker] = []
        self._session: Any = None
        self._known_lost: set[int] = set()
        self._finalizer = weakref.finalize(self, dismiss_at_exit, self._workers, os.getpid())
        fds: list[int] = []
        try:
            self.memories, group = shm.create_all(cfg, fds)
            if survivors is None:
                for rank in range(cfg.n_ranks):
                    self._start(rank)
            else:
                self._take(workers_of, survivors)
            self._attach(group, fds, start_timeout_s)
        except BaseException:
            self.destroy()
            raise
        finally:
            shm.close_all(fds)

    def _start(self, rank: int) -> None:
        try:
            self._workers.append(Worker())
        except OSError as e:
            raise PeerLostError(
                f"rank {rank}: its process cannot be started ({e})",
                remedy="close files, end other processes, or allow more of them: ulimit -n, ulimit -u",
            ) from e

    def _take(self, other: ProcessCommunicator, survivors: list[Worker]) -> None:
        self._workers += survivors[: self.cfg.n_ranks]
        other._workers[:] = [w for w in other._workers if w not in self._workers]
        other.destroy()

    def _attach(self, group: int, fds: Sequence[int], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        numbers = {r: w.request("attach", self.cfg, r, group, fds=fds) for r, w in enumerate(self._workers)}
        answers = collect(self._workers, numbers, self._mark_lost, deadline)
        raise_first({rank: value for rank, (ok, value) in answers.items() if not ok})
        missing = sorted(numbers.keys() - answers.keys())
        if missing:
            raise PeerTimeoutError(
                f"the workers of ranks {missing} did not start within {timeout_s:g} s",
                field="start_timeout_s",
                value=timeout_s,
                allowed="as long as starting takes on this machine",
                remedy="raise start_timeout_s; what the workers print is on stderr",
            )

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, by rank."""
        return [w.process.pid for w in self._workers]

    @property
    def lost(self) -> list[int]:
        """Ranks whose process is known to be gone."""
        return [r for r, w in enumerate(self._workers) if not w.alive]

    def inputs(self) -> list[Buffer]:
        """Only workers have them: use `run`.

        Raises:
            UnsupportedError: Always.
        """
        self._live()
        raise UnsupportedError(
            "the inputs hold addresses of the worker processes", remedy="use comm.run(fn), and inputs() of what fn gets"
        )

    def compile_all(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """See `Communicator.compile_all`. Compiled here once, loaded by every worker."""
        with self._exclusive():
            specs = [self._check_graph(g) for g in graphs]
            models = [CompiledGraph(g.name, s, key=next(_keys)) for g, s in zip(graphs, specs, strict=True)]
            ranks = range(self.cfg.n_ranks)
            self._sweep()
            self._settle(ranks)
            look = self._look()
            for w in self._workers:
                w.request("warm", look=look)
            if self._session is None:
                from max.driver import CPU
                from max.engine import InferenceSession

                self._session = InferenceSession(devices=[CPU()])
            for compiled, members in compile_modules(self._session, graphs):
                load = "load", {models[i].key: models[i].name for i in members}, pickle.PickleBuffer(export(compiled))
                self._ask(ranks, lambda rank, load=load: load)
            return models

    def execute(
        self,
        model: CompiledGraph,
        *args: Any,
        ranks: Iterable[int] | None = None,
        check: bool = True,
        as_buffers: bool = False,
    ) -> list[Any]:
        """See `Communicator.execute`."""
        if as_buffers:
            raise UnsupportedError(field="as_buffers", value=True, allowed="False", remedy="use the NumPy arrays")
        with self._exclusive():
            chosen = self._ranks(ranks)
            specs, n_ranks = self._specs(model), self.cfg.n_ranks
            if len(args) != len(specs) * n_ranks:
                raise ShapeError(
                    "wrong number of arguments",
                    field="len(args)",
                    value=len(args),
                    allowed=f"{len(specs)} kinds for each of {n_ranks} ranks: {', '.join(map(str, specs))}",
                    remedy="pass the inputs kind by kind over all ranks; comm.inputs() is added for you",
                )
            labels = arg_labels(len(args), n_ranks)
            values = {r: check_args(specs, args[r::n_ranks], labels[r::n_ranks]) for r in chosen}
            own = {r: [to_numpy(v) for v in values[r]] for r in chosen}
            windows.check_heads([self.memories[r] for r in chosen])
            results = self._ask(chosen, lambda rank: ("execute", model, own[rank], check))
            n_outputs = len(next(iter(results.values()), []))
            return [results[r][i] if r in results else None for i in range(n_outputs) for r in range(n_ranks)]

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        per_rank: Sequence[Sequence[Any]] | None = None,
        ranks: Iterable[int] | None = None,
        raise_errors: bool = True,
    ) -> list[Any]:
        """Call `fn(rank_comm, *args, *per_rank[rank])` in the workers, at the same time.

        Args:
            fn: A function at the top level of a module, which the workers import; `rank_comm` is the worker's own
                `WorkerCommunicator`.
            args: Arguments for all ranks; anything that can be pickled.
            per_rank: More arguments for each rank, a sequence of R sequences.
            ranks: Call it on these ranks only; the others give None.
            raise_errors: False puts a rank's exception in its place of the result.

        Returns:
            What the calls returned, by rank.

        Raises:
            PeerLostError: A process died.
            PeerTimeoutError: A process has been stopped (SIGSTOP) for longer than cfg.timeout_s. A call that runs may
                take any time.
            Exception: What the calls raised, as itself, with the worker's traceback as a note and `by_rank`.
        """
        with self._exclusive():
            chosen = self._ranks(ranks)
            if not inspect.isfunction(fn) or "<" in fn.__qualname__:
                raise DTypeError(
                    field="fn",
                    value=getattr(fn, "__qualname__", type(fn).__name__),
                    allowed="a function defined at the top level of a module",
                    remedy="move it there; lambdas and inner functions cannot be sent to another process",
                )
            if per_rank is not None and not _is_nested(per_rank, self.cfg.n_ranks):
                raise ShapeError(
                    field="per_rank",
                    value=per_rank,
                    allowed=f"a sequence of {self.cfg.n_ranks} sequences",
                    remedy="pass one sequence of arguments for each rank",
                )
            ref = worker.FunctionRef(fn.__module__, fn.__qualname__, os.path.abspath(fn.__code__.co_filename))
            packed = {r: pickle.dumps((*args, *(per_rank[r] if per_rank else ())), protocol=5) for r in chosen}
            results = self._ask(
                chosen, lambda rank: ("run", ref, pickle.PickleBuffer(packed[rank])), raise_errors=raise_errors
            )
            return [results.get(r) for r in range(self.cfg.n_ranks)]

    def check(self) -> None:
        """See `Communicator.check`. A rank whose process is gone is a `PeerLostError`."""
        with self._exclusive():
            self._sweep()
            self._refuse_lost(range(self.cfg.n_ranks))
            windows.check_heads(self.memories)
            raise_first({m.rank: error for m in self.memories if (error := m.error()) is not None})

    def reset(self) -> None:
        """See `Communicator.reset`. Waits until no worker is inside a call.

        Raises:
            PeerLostError: A process is gone: no reset brings it back.
            PeerTimeoutError: A process has been stopped (SIGSTOP) for longer than cfg.timeout_s.
        """
        with self._exclusive():
            self._sweep()
            self._settle(range(self.cfg.n_ranks))
            windows.restart_all(self.memories)

    def _ranks(self, ranks: Iterable[int] | None) -> list[int]:
        chosen = chosen_ranks(ranks, self.cfg.n_ranks)
        self._sweep()
        self._refuse_lost(chosen)
        return chosen

    def _ask(
        self, ranks: Iterable[int], message: Callable[[int], tuple[Any, ...]], raise_errors: bool = True
    ) -> dict[int, Any]:
        """Send every rank its message, wait for all answers; raise the first error, or give errors as values."""
        ranks, look = list(ranks), self._look()
        self._settle(ranks)
        numbers = {r: self._workers[r].request(*message(r), look=look) for r in ranks}
        answers = collect(self._workers, numbers, self._mark_lost, look=look)
        self._live()
        if raise_errors:
            raise_first({rank: value for rank, (ok, value) in answers.items() if not ok})
        return {rank: value for rank, (_, value) in answers.items()}

    def _look(self) -> Look:
        """What to look for while waiting: a `destroy` by another thread or a signal handler, and stopped processes."""
        patience = Patience(self.cfg.timeout_s, self._workers)

        def look(waited_for: Sequence[Worker]) -> None:
            self._live()
            patience(waited_for)

        return look

    def _sweep(self) -> None:
        """Notice deaths without waiting, and drop answers that nobody wants any more."""
        for rank, w in enumerate(self._workers):
            while w.poll() is not None:
                pass
            if not w.alive:
                self._mark_lost(rank)

    def _settle(self, ranks: Sequence[int]) -> None:
        """See that these workers are alive and read: none owes an answer.

        A worker that is still writing a large answer, of a call that a Ctrl-C cut short, reads nothing meanwhile. If
        this end wrote a large request then, both would wait for ever.
        """
        self._drain(ranks)
        self._refuse_lost(ranks)

    def _drain(self, ranks: Iterable[int]) -> None:
        """Wait until these workers have answered everything; nobody wants the answers."""
        workers = self._workers
        behind = {r: workers[r].sent for r in ranks if workers[r].alive and workers[r].answered < workers[r].sent}
        if behind:
            collect(workers, behind, self._mark_lost, look=self._look())
            self._live()

    def _mark_lost(self, rank: int) -> None:
        if rank in self._known_lost:
            return
        self._known_lost.add(rank)
        for memory in self.memories:  # first all flags: whoever sees a failure then knows why
            shm.lost_flags(memory)[rank] = 1
        for memory in self.memories:
            memory.publish_failure(rank)

    def _refuse_lost(self, ranks: Iterable[int]) -> None:
        raise_first({r: lost_error(r, self._workers[r]) for r in ranks if not self._workers[r].alive})

    def _release(self) -> None:
        self._finalizer.detach()
        dismiss(self._workers)
        self.memories, self._session = [], None


def _is_nested(per_rank: Any, n_ranks: int) -> bool:
    return hasattr(per_rank, "__len__") and len(per_rank) == n_ranks and all(isinstance(a, Iterable) for a in per_rank)


def _survivors(other: Communicator, cfg: EPConfig) -> list[Worker]:
    if not isinstance(other, ProcessCommunicator):
        raise DTypeError.wrong_kind(
            "workers_of",
            other,
            allowed="a communicator made by Communicator.processes",
            remedy="leave it out to start new workers",
        )
    with other._exclusive():
        other._sweep()
        other._drain(range(other.cfg.n_ranks))
        alive = [w for w in other._workers if w.alive]
    if len(alive) < cfg.n_ranks:
        raise ConfigError(
            "too few workers are left",
            field="n_ranks",
            value=cfg.n_ranks,
            allowed=f"1 to {len(alive)}",
            remedy="pass cfg.replace(n_ranks=..., n_experts=...), or start new workers by leaving workers_of out",
        )
    return alive
