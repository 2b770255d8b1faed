"""`Communicator.process_group`: this process is one rank; the others are those of a `torch.distributed` group.

Nobody drives: every process makes the same calls. The group carries what is said once (who is there, compiled graphs,
the epoch of a reset); rounds use the windows alone. After each step of the construction all ranks agree that it went
well everywhere, so that an error on one is an error on all and nobody waits for a rank that has given up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__, layout
from ..config import EPConfig
from ..errors import ConfigError, ConfigMismatchError, EPError, OrderError, UnsupportedError
from . import shm, windows
from .base import CompiledGraph
from .group import ProcessGroup
from .models import compile_modules, export, load_artefact, load_compiled, load_graphs
from .one_rank import OneRankCommunicator
from .provider import MemoryProvider, host_id, provider_for
from .queues import turn_of_max
from .symmetric_memory import FailureNote
from .watch import KNOWN_PIDS, LEFT, PeerWatch

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.engine import Model
    from max.graph import DeviceRef, Graph

    from .arguments import InputSpec

OWN_CHOICE = ("n_sms", "timeout_s")
"""Fields of the config that ranks may choose for themselves."""


@dataclass(frozen=True)
class Card:
    """What a rank tells the others before anything is made.

    Attributes:
        version: Of the package and of the layout of memory.
        host: See `host_id`.
        pid: Its process.
        config: Fields and their reprs, without `OWN_CHOICE`; and the kind of device.
        group: A random number; that of rank 0 tells the communicator from others.
    """

    version: str
    host: str
    pid: int
    config: dict[str, str]
    group: int


class ProcessGroupCommunicator(OneRankCommunicator):
    """One rank of a `torch.distributed` group.

    Attributes:
        rank: This process's rank in the group.
        memories: All ranks' windows, mapped here; `memories[rank]` are its own.
        group: The `torch.distributed` group.
        compiles_once: Whether rank 0 compiles for all; otherwise each rank compiles its own graphs.
        torch_number, torch_rounds: Of `ep_mojo.torch.library`, once it has used the communicator.
    """

    torch_number = -1
    torch_rounds: Any = None
    lost_remedy = "destroy() this communicator; make a process group of the ranks that are left, and one over that"

    def __init__(self, cfg: EPConfig, group: Any = None, *, device: Any = None):
        """See `Communicator.process_group`."""
        self._watch: PeerWatch | None = None
        self._provider: MemoryProvider | None = None
        self._note: FailureNote | None = None
        self.memories = []
        own = weakref.ref(self)  # so that a communicator that is forgotten goes at once
        self._calls = ProcessGroup(group, lambda: (comm := own()) and comm._look())
        self.group, self.rank = self._calls.group, self._calls.rank
        try:
            cards = self._calls.agree(lambda: self._introduce(cfg, device), "introducing its ranks")
            check_cards(cards)
            KNOWN_PIDS[self.group] = pids = [card.pid for card in cards]
            offers = self._calls.agree(lambda: self._create(pids, cards[0].group), "making windows")
            self._calls.agree(lambda: self._attach(offers), "mapping windows")
        except BaseException:
            if self._watch is not None:
                self._watch.stop()
            raise
        finally:
            if self._provider is not None:
                self._provider.close()
        self.compiles_once = self._provider.compiles_once
        shared = self.memories if self._note is None else []
        settle = self._provider.synchronize  # no window goes while a kernel of this rank may use it
        self._finalizer = weakref.finalize(self, leave, os.getpid(), self._watch, shared, self.rank, settle)
        if shared:
            self._watch.start(shared, self.rank)

    def _introduce(self, cfg: EPConfig, device: Any) -> Card:
        if self.group in KNOWN_PIDS:
            self._watch = PeerWatch(KNOWN_PIDS[self.group], self.rank)
        super().__init__(cfg, self.rank)
        self._provider = provider_for(device, self.group)
        self._check_not_capturing("windows cannot be made")
        self._provider.check_free(cfg)
        fields = shared_fields(cfg) | {"device": "cpu" if self._provider.on_host else "cuda"}
        version = f"ep-mojo {__version__} with layout {layout.LAYOUT_VERSION}"
        return Card(version, host_id(), os.getpid(), fields, shm.new_group())

    def _create(self, pids: Sequence[int], group: int) -> Any:
        if self._watch is None:
            self._watch = PeerWatch(pids, self.rank)
        return self._provider.create(self.cfg, self.rank, group)

    def _attach(self, offers: Sequence[Any]) -> None:
        self.memories = self._provider.attach(offers)
        self._own.check_head()
        if not self._provider.on_host:
            self._note = FailureNote(self._own)

    def device_refs(self) -> list[DeviceRef]:
        """See `Communicator.device_refs`."""
        return [self._provider.device_ref()]

    def _session_devices(self) -> list[Device]:
        return self._provider.session_devices()

    def _make_inputs(self) -> list[Buffer]:
        return self._provider.inputs(self.cfg, self.memories, self.rank)

    def _check_may_wait(self) -> None:
        self._check_not_capturing("the host cannot wait for rounds")

    def _settle(self) -> None:
        self._check_may_wait()
        self._provider.synchronize()

    def _check_not_capturing(self, what: str) -> None:
        if self._provider.capturing():
            raise OrderError(f"{what} inside a capture", allowed="outside of captures", remedy="end the capture first")

    def _before_launch(self) -> None:
        if self._note is None:
            super()._before_launch()
        elif self._note.failed:
            if self._provider.capturing():
                raise OrderError(
                    "an earlier launch has failed, and a capture cannot look into it",
                    allowed="captures after rounds that went well",
                    remedy="end the capture, call check() for the error, then reset() on all ranks",
                )
            self._raise_recorded()

    def _turn(self) -> AbstractContextManager[None]:
        return super()._turn() if self._provider.on_host else turn_of_max(self._provider.device_ref().id)

    def _abort(self, own: windows.RankMemory, memories: Sequence[windows.RankMemory]) -> None:
        if self._provider.capturing():
            return  # nothing has run, so no peer waits for it
        try:
            super()._abort(own, memories)
        finally:
            if self._note is not None:
                self._note.set()

    def glance(self) -> None:
        """`check`, without a wait: what is known by now. On the host launches have raised it."""
        with self._exclusive():
            self._before_launch()

    @property
    def lost(self) -> list[int]:
        """Ranks whose process is known to be gone, or that have destroyed their communicator."""
        return sorted(self._watch.gone() | set(super().lost))

    def compile_all(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """See `Communicator.compile_all`. All ranks call this at the same time, with the same graphs.

        Rank 0 compiles and the others get what came out, within the timeout of the process group. With
        `compiles_once = False` each rank compiles its own graphs, which may differ then.

        Raises:
            ConfigMismatchError: The graphs of two ranks are not the same.
            PeerLostError, PeerTimeoutError: A peer is gone, or does not come.
            Exception: What compiling raised on rank 0, or loading on any rank, is raised on all.
        """
        return self._compile(graphs, self._check_graph)

    def compile_calls(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """`compile_all` for graphs whose inputs are not the communicator's, for `launch`: one op that gets everything
        by address. They serve every communicator on a device of the same kind.
        """
        return self._compile(graphs, lambda graph: ())

    def _compile(
        self, graphs: Sequence[Graph], specs_of: Callable[[Any], tuple[InputSpec, ...]]
    ) -> list[CompiledGraph]:
        with self._exclusive():
            graphs = list(graphs)
            specs = self._calls.together(lambda: [specs_of(g) for g in graphs], "checking graphs")
            if not self.compiles_once:
                return self._calls.together(lambda: load_graphs(self.session, graphs, specs), "compiling")
            check_same(self._calls.agree(lambda: [signature(g) for g in graphs], "comparing graphs"))
            models = self._compile_once(graphs)
            return [CompiledGraph(g.name, s, m) for g, s, m in zip(graphs, specs, models, strict=True)]

    def _compile_once(self, graphs: Sequence[Graph]) -> list[Model]:
        own: list[Any] = []

        def compile_here() -> list[tuple[bytes, list[int]]]:
            found = compile_modules(self.session, graphs)
            own.extend(compiled for compiled, _ in found)
            return [(export(compiled), members) for compiled, members in found]

        # Who waits makes its session meanwhile: that imports MAX.
        artefacts = self._calls.from_first(compile_here, lambda: self.session, "compiling")

        def load_here() -> list[Model]:
            models: dict[int, Model] = {}
            for i, (artefact, members) in enumerate(artefacts):
                names = [graphs[m].name for m in members]
                loaded = (
                    load_compiled(self.session, own[i], names) if own else load_artefact(self.session, artefact, names)
                )
                models |= zip(members, loaded, strict=True)
            return [models[i] for i in range(len(graphs))]

        return self._calls.together(load_here, "loading graphs")

    def load(self, model: CompiledGraph | Model) -> Model:
        """The MAX model of a compiled graph."""
        return model.model if isinstance(model, CompiledGraph) else model

    def reset(self) -> None:
        """See `Communicator.reset`. All ranks call this at the same time.

        Raises:
            OrderError: Inside the capture of a CUDA graph, as `check` is then.
            PeerLostError: A peer is gone: no reset brings it back.
            PeerTimeoutError: A peer did not come, within the timeout of the process group.
            CorruptHeadError: The counters of a rank are damaged; nothing is written then.
        """
        with self._exclusive():
            epochs = self._calls.agree(self._epochs, "resetting")  # from here on nobody is inside an op
            self._own.restart(max(max(four) for four in epochs))
            if self._note is not None:
                self._note.clear()
            # Before every rank has written, no round may begin: what it sends would be written over.
            self._calls.gather(None, "resetting")

    def _epochs(self) -> tuple[int, ...]:
        self._settle()
        self._own.check_head()
        return layout.read_epochs(self._own.counters)

    def _look(self) -> None:
        """Raise if there is nobody to wait for, or nobody that waits."""
        if self._watch is None:  # this is the first communicator of the group
            return
        if self.memories:
            self._live()
        if lost := self.lost:
            raise self._lost_error(lost)

    def _lost_behind(self, error: EPError | None) -> Sequence[int]:
        """A peer may go when it has done its part. It is missed by who waits for more of it."""
        record = layout.decode_record(self._own.counters)
        lost = self.lost
        if error is None or record is None:
            return []
        missed = record.kind == layout.KIND_PEER_FAILED or (record.kind == layout.KIND_TIMEOUT and record.peer in lost)
        return lost if missed else []

    def _fate(self, lost: Sequence[int]) -> str:
        flags = shm.lost_flags(self._own) if self.memories else ()
        left = [r for r in lost if len(flags) and flags[r] == LEFT]
        died = [r for r in lost if r not in left]
        words = [super()._fate(died)] if died else []
        words += [f"rank {', '.join(map(str, left))} has ended or destroyed its communicator"] if left else []
        return "; ".join(words)

    def _release(self) -> None:
        try:
            self._finalizer()
        finally:
            super()._release()


def shared_fields(cfg: EPConfig) -> dict[str, str]:
    """What all ranks must have alike of a config: its fields, without `OWN_CHOICE`, and their reprs."""
    return {f.name: repr(getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.name not in OWN_CHOICE}


def check_cards(cards: Sequence[Card]) -> None:
    """Raise, on all ranks alike, if these ranks cannot make one communicator.

    Raises:
        UnsupportedError: They are not all on one host, or not in one container.
        ConfigMismatchError: They have different configs, or versions of this package.
        ConfigError: The config is for another number of ranks.
    """
    first = cards[0]
    for rank, card in enumerate(cards):
        if card.version != first.version:
            raise ConfigMismatchError(
                f"rank 0 runs {first.version}, rank {rank} {card.version}",
                field=f"version of rank {rank}",
                value=card.version,
                allowed=first.version,
                remedy="install one version for all ranks",
            )
        if card.config != first.config:
            names = [name for name in first.config if card.config.get(name) != first.config[name]]
            ours, theirs = (", ".join(f"{n}={c.config.get(n)}" for n in names) for c in (first, card))
            raise ConfigMismatchError(
                f"rank 0 has {ours}; rank {rank} has {theirs}",
                field=f"config of rank {rank}",
                value=theirs,
                allowed=ours,
                remedy="give every rank the same EPConfig",
            )
    n_ranks = int(first.config["n_ranks"])
    if n_ranks != len(cards):
        raise ConfigError(
            f"the process group has {len(cards)} processes",
            field="n_ranks",
            value=n_ranks,
            allowed=str(len(cards)),
            remedy="pass the size of the group: torch.distributed.get_world_size(group)",
        )
    for rank, card in enumerate(cards):
        if card.host != first.host:
            raise UnsupportedError(
                f"rank 0 is on {first.host}, rank {rank} on {card.host}",
                field="hosts of the group",
                value=sorted({c.host for c in cards}),
                allowed="one host, and one namespace of processes",
                remedy="start all ranks on one machine, in one container; several nodes are not there yet",
            )


def signature(graph: Graph) -> str:
    """What tells a graph from another one: its name, and a digest of all that its module holds."""
    text = str(graph.module.mlir_module)
    return f"{graph.name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def check_same(signatures: Sequence[Sequence[str]]) -> None:
    """Raise `ConfigMismatchError` if the graphs of two ranks are not the same: what rank 0 compiles runs on all."""
    for rank, theirs in enumerate(signatures):
        if theirs != signatures[0]:
            raise ConfigMismatchError(
                f"rank 0 has other graphs than rank {rank}, and what rank 0 compiles runs on all",
                field=f"graphs of rank {rank}",
                value=list(theirs),
                allowed=", ".join(signatures[0]),
                remedy="build the same graphs in the same order, and give what differs by rank (weights, say) as an "
                "input; or set comm.compiles_once = False on all ranks",
            )


def leave(
    pid: int, watch: PeerWatch, memories: Sequence[windows.RankMemory], rank: int, settle: Callable[[], None]
) -> None:
    """Wait for what this rank runs, say goodbye to the peers and watch them no more, unless this is a forked copy of
    the process."""
    if os.getpid() != pid:
        return
    try:
        settle()
    finally:
        for memory in memories:
            if memory.rank != rank:
                shm.lost_flags(memory)[rank] = LEFT
        watch.stop()
