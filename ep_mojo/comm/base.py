"""`Communicator`: what all communicators share.

A graph takes the communicator's inputs after its own. `bind` hands them to the graph wrappers, one `Rank` for each rank
that the graph holds; `execute` adds the buffers behind them, runs, and checks the error records. Which ranks one graph
holds is the communicator's business (`graph_ranks`): all of them for virtual ranks, one where a rank is a process.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import layout
from ..config import EPConfig
from ..dtypes import to_buffer
from ..errors import ConfigError, DTypeError, OrderError, ShapeError, UnsupportedError
from . import windows
from .arguments import InputSpec, graph_specs, model_specs, place
from .exclusive import Exclusive

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.engine import Model
    from max.graph import BufferValue, DeviceRef, Graph, TensorValue, Type

    from ..choice import Choice

TABLE_NAMES = tuple(name for name, _ in windows.TABLES)


@dataclass(frozen=True)
class Rank:
    """The graph values of one rank: what the ops of a graph need of the communicator.

    Attributes:
        cfg: The config.
        index: Which of the graph's ranks this is, 0 to graph_ranks - 1.
        fused_allowed: Whether waits may spin, so that the fused ops can be used.
        device: Where the rank's tensors are.
        settings: int64 [SETTINGS_WORDS], host.
        dispatch_send_ptrs, dispatch_recv_ptrs, dispatch_count_ptrs: uint64 [R], host: every rank's windows.
        combine_send_ptrs, combine_recv_ptrs, combine_count_ptrs: uint64 [R], host.
        order: int32 [8], mutable. Every op of a device takes it, so that MAX keeps their order.
        counters: int32 [counters_words], mutable. The rank's own `atomic_counters`.
    """

    cfg: EPConfig
    index: int
    fused_allowed: bool
    device: DeviceRef
    settings: TensorValue
    dispatch_send_ptrs: TensorValue
    dispatch_recv_ptrs: TensorValue
    dispatch_count_ptrs: TensorValue
    combine_send_ptrs: TensorValue
    combine_recv_ptrs: TensorValue
    combine_count_ptrs: TensorValue
    order: BufferValue
    counters: BufferValue


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """What `Communicator.compile` returns, for `execute`.

    Attributes:
        name: The graph's name.
        specs: Types of all inputs, the communicator's included.
        model: The loaded MAX model, or None where the workers hold it.
        key: Number by which workers know it.
    """

    name: str
    specs: tuple[InputSpec, ...]
    model: Any = None
    key: int = -1


@dataclass
class _State:
    destroyed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Communicator(ABC):
    """The ranks of one expert-parallel group, and their windows. Made by one of the class methods.

    One thread at a time may use a communicator. Use it as a context manager, or call `destroy`. On GPUs `execute`
    enqueues the runs of all communicators of this process one after the other, so that all GPUs get them in one order;
    a program that runs or replays models past it must keep such an order itself.

    Attributes:
        cfg: The config.
        graph_ranks: Ranks that one graph holds.
        fused_allowed: Whether the fused ops can be used.

    `one_gpu` and `gpus` also have `devices`, the `max.driver.Device` of each rank, for buffers that stay there, and
    `synchronize()`, which waits for them without looking at the error records.
    """

    graph_ranks: int
    fused_allowed: bool
    loads_models: bool | None = True  # into this process, or into workers (False), or both

    def __init__(self, cfg: EPConfig):
        """Called by the subclasses."""
        if not isinstance(cfg, EPConfig):
            raise ConfigError.wrong_kind("cfg", cfg, allowed="an EPConfig", remedy="pass ep_mojo.EPConfig(...)")
        self.cfg = cfg
        self._state = _State()

    def __new__(cls, *args: Any, **kwargs: Any) -> Communicator:
        """Refuse `Communicator(...)` by name; Python's own error names the abstract methods."""
        if cls is Communicator:
            raise UnsupportedError(
                "a Communicator says where its ranks are, and so has no constructor",
                allowed="Communicator.cpu, processes, process_group, one_gpu, gpus or planned",
                remedy="call one of these with the config: Communicator.gpus(cfg)",
            )
        return super().__new__(cls)

    @staticmethod
    def cpu(cfg: EPConfig) -> Communicator:
        """All ranks in this process, in host memory, as virtual ranks of one graph.

        Raises:
            SharedMemoryError: There is not enough memory for the windows.
        """
        from .cpu import CPUCommunicator

        return CPUCommunicator(cfg)

    @staticmethod
    def processes(
        cfg: EPConfig, *, start_timeout_s: float = 60.0, workers_of: Communicator | None = None
    ) -> Communicator:
        """A process for each rank, started here, over POSIX shared memory. A graph holds one rank.

        Args:
            cfg: The config.
            start_timeout_s: How long all workers together may take to start; at most a day.
            workers_of: Take the workers that are still alive from this communicator, which is destroyed, and start
                none. cfg.n_ranks may not be more than there are; those left over are ended.

        Raises:
            SharedMemoryError: /dev/shm or the memory is too small for the windows, or file descriptors have run out.
            PeerTimeoutError, PeerLostError: A worker did not start.
            ConfigError: start_timeout_s is out of range, or too few workers are left in `workers_of`.
            EPError: A worker cannot import the class of `cfg` or of its formats.
        """
        from .processes import ProcessCommunicator

        return ProcessCommunicator(cfg, start_timeout_s=start_timeout_s, workers_of=workers_of)

    @staticmethod
    def process_group(cfg: EPConfig, group: Any = None, *, device: Any = None) -> Communicator:
        """This process is one rank of a `torch.distributed` group: all processes of it call this, with one config.

        A graph holds one rank, this one; `execute` takes and gives what is its own. `compile_all` and `reset` are calls
        of the whole group too; `execute`, `check` and `destroy` are not. A peer that ends, or destroys its
        communicator, is a `PeerLostError` for those that wait for more of it.

        Args:
            cfg: The config; n_ranks is the size of the group. n_sms and timeout_s may differ by rank.
            group: The group, over gloo, nccl, or both. None: the default group.
            device: None or "cpu": windows in shared memory, all processes on one host. "cuda", or a GPU: windows on it,
                mapped by torch's symmetric memory; a GPU for each rank, all on one host. There a launch may fail when
                `execute` has long returned, unless it checks.

        Raises:
            MissingDependencyError: torch is not installed.
            OrderError: torch.distributed has no process group yet.
            DTypeError: `group` is no group.
            ConfigError: Not a config, another number of ranks than the group has, or not a member of the group.
            ConfigMismatchError: Two ranks have different configs.
            UnsupportedError: A device other than those, a group without gloo and nccl, ranks on several hosts.
            DeviceError: `device` is none; two ranks have one GPU, or cannot reach each other's.
            SharedMemoryError, DeviceMemoryError: There is not enough memory, or another rank's cannot be opened.
            PeerLostError, PeerTimeoutError: A process of the group is gone, or does not come.

            All but the first three and the membership are raised on all ranks, wherever the cause is.
        """
        from .process_group import ProcessGroupCommunicator

        return ProcessGroupCommunicator(cfg, group, device=device)

    @staticmethod
    def one_gpu(cfg: EPConfig, device: Device | int = 0) -> Communicator:
        """All ranks on one GPU, as virtual ranks of one graph: for tests and development without a second GPU.

        Args:
            cfg: The config.
            device: The GPU, or its number.

        Raises:
            DeviceError: MAX sees no such GPU.
            DeviceMemoryError: There is not enough memory on it for the windows.
        """
        from .gpu import GPUCommunicator

        return GPUCommunicator(cfg, [device], virtual=True)

    @staticmethod
    def gpus(cfg: EPConfig, devices: Sequence[Device | int] | None = None) -> Communicator:
        """One rank on each of several GPUs of this node, in one process and one graph.

        Args:
            cfg: The config.
            devices: cfg.n_ranks GPUs, or their numbers; None: the first ones.

        Raises:
            ConfigError, DTypeError: Not a config, or `devices` is no list.
            DeviceError: Too few GPUs, or two that cannot reach each other's memory.
            DeviceMemoryError: There is not enough memory for the windows.
        """
        from .gpu import GPUCommunicator

        return GPUCommunicator(cfg, devices, virtual=False)

    @staticmethod
    def choose(cfg: EPConfig, tokens: int | None = None) -> Choice:
        """Whether to route tokens or to gather all of them (output_layout="gathered"), with the numbers that say so.

        `tokens` is T of each rank, None max_tokens_per_rank; out of range it is a `ConfigError`.
        """
        from ..choice import choose

        return choose(cfg, tokens)

    @staticmethod
    def planned(cfg: EPConfig, *, virtual: bool = False) -> Communicator:
        """Ranks on GPUs that are not there: to build graphs that are compiled here and run elsewhere.

        It has no memory and no session: `device_refs`, `input_types` and `bind` work, `compile` and `execute` raise
        `DeviceError`. Name the GPUs first, then compile with a session of your own:

            driver.set_virtual_device_count(R)                     # max.driver, before anything else of MAX
            driver.set_virtual_device_api("cuda")
            driver.set_virtual_device_target_arch("sm_90a")
            comm = ep.Communicator.planned(cfg)
            session = InferenceSession(devices=[CPU(), *map(Accelerator, range(R))], export_mefs="mefs")
            session.load(my_graph(comm))

        docs/gpus.md, "Compiling ahead", shows how to run what is then in the folder "mefs", where there are GPUs.

        Args:
            cfg: The config.
            virtual: All ranks on GPU 0, as with `one_gpu`; else one each, as with `gpus`.
        """
        from .planned import PlannedCommunicator

        return PlannedCommunicator(cfg, virtual)

    # Graphs

    def device_refs(self) -> list[DeviceRef]:
        """Where each of the graph's ranks has its tensors."""
        from max.graph import DeviceRef

        return [DeviceRef.CPU()] * self.graph_ranks

    @property
    def num_inputs(self) -> int:
        """How many inputs the communicator adds to a graph: 7, one for each device, and one for each rank."""
        return 1 + len(TABLE_NAMES) + len(set(self.device_refs())) + self.graph_ranks

    def input_types(self) -> list[Type]:
        """MAX types of the inputs.

        settings int64 [17] and six tables uint64 [R] on the host, order int32 [8] a device, counters int32 a rank.
        """
        from max.dtype import DType
        from max.graph import BufferType, DeviceRef, TensorType

        host, refs = DeviceRef.CPU(), self.device_refs()
        words = layout.counters_words(self.cfg)
        return [
            TensorType(DType.int64, [layout.SETTINGS_WORDS], host),
            *(TensorType(DType.uint64, [self.cfg.n_ranks], host) for _ in TABLE_NAMES),
            *(BufferType(DType.int32, [windows.ORDER_WORDS], ref) for ref in dict.fromkeys(refs)),
            *(BufferType(DType.int32, [words], ref) for ref in refs),
        ]

    def bind(self, values: Iterable[Any]) -> list[Rank]:
        """The ranks of a graph, from the graph inputs that `input_types` describes.

        Args:
            values: `graph.inputs[-comm.num_inputs:]`.

        Returns:
            `graph_ranks` ranks.

        Raises:
            ShapeError: Not `num_inputs` values, or values of other types.
        """
        values = list(values)
        expected = self.input_types()
        if len(values) != len(expected) or any(v.type != t for v, t in zip(values, expected, strict=True)):
            raise ShapeError(
                field="values",
                value=[str(v.type) for v in values],
                allowed=f"{len(expected)} graph inputs of the types of comm.input_types()",
                remedy="pass graph.inputs[-comm.num_inputs:] of a graph whose input_types end with *comm.input_types()",
            )
        n_tables = 1 + len(TABLE_NAMES)
        settings, *tables = (v.tensor for v in values[:n_tables])
        refs = self.device_refs()
        places = list(dict.fromkeys(refs))
        orders = dict(zip(places, (v.buffer for v in values[n_tables:]), strict=False))
        counters = [v.buffer for v in values[n_tables + len(places) :]]
        return [
            Rank(self.cfg, i, self.fused_allowed, ref, settings, *tables, order=orders[ref], counters=c)
            for i, (ref, c) in enumerate(zip(refs, counters, strict=True))
        ]

    @abstractmethod
    def inputs(self) -> list[Buffer]:
        """The buffers behind `input_types`, of the ranks of this process. They live as long as the communicator."""

    def compile(self, graph: Graph) -> CompiledGraph:
        """Compile a graph whose last inputs are the communicator's, for `execute`."""
        return self.compile_all([graph])[0]

    @abstractmethod
    def compile_all(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """Compile several graphs. Those built with one `module=` take hardly longer together than one of them alone.

        Args:
            graphs: Graphs with different names whose last inputs are the communicator's: all graphs of one
                `max.graph.Module`, or each in a module of its own. With `Communicator.processes` they may be meant for
                a later communicator over the same workers, `processes(..., workers_of=this)`.

        Returns:
            One `CompiledGraph` for each, in the same order.

        Raises:
            DTypeError, ShapeError: Not a graph, or not built for this communicator.
        """

    @abstractmethod
    def execute(
        self,
        model: CompiledGraph | Model,
        *args: Any,
        ranks: Iterable[int] | None = None,
        check: bool = True,
        as_buffers: bool = False,
    ) -> list[Any]:
        """Run a graph on all ranks, then check the error records.

        Args:
            model: From `compile`; `Communicator.cpu` also takes a loaded MAX model.
            args: The graph's own inputs, kind by kind over all R ranks (x of rank 0, x of rank 1, ..., ids of rank 0,
                ...), as NumPy arrays or MAX buffers on their rank's device (`comm.devices`). bfloat16 and float8 as
                uint16 and uint8 bits, or ml_dtypes.
            ranks: Run these ranks only (`Communicator.processes`); outputs of the others are None.
            check: Whether to raise the error that a rank recorded; False returns the outputs whatever happened.
            as_buffers: Return MAX buffers, not NumPy arrays: `Communicator.cpu`, `one_gpu` and `gpus`, where they stay
                on their GPU. With check=False nothing is waited for then.

        Returns:
            The outputs in the same order, as NumPy arrays; bfloat16 as uint16 bits, float8 as uint8 bits. In host
            memory they share none with the arguments, also where the graph only passes one through.

        Raises:
            ShapeError, DTypeError, DeviceError: An argument does not fit; nothing has run.
            PeerTimeoutError, CapacityError, OrderError, ...: What a rank recorded; `by_rank` holds every rank's.
            PeerTimeoutError: The process of a rank has been stopped (SIGSTOP) for longer than cfg.timeout_s, where the
                system tells (/proc). An op that runs is bounded by its own deadline only.
            ShapeError, ConfigMismatchError, ...: What an op raised. Virtual ranks that had begun no round then go on as
                if nothing had been; otherwise the round has failed on all ranks, and later calls raise until `reset`.
        """

    @abstractmethod
    def check(self) -> None:
        """Wait for the ranks' devices, then raise the error that a rank recorded.

        Of several the cause rather than its consequences, of the lowest rank; of `CapacityError`s that of the rank with
        the most rows.
        The error's `by_rank` maps every rank that recorded one to its error.
        """

    @abstractmethod
    def reset(self) -> None:
        """Make a communicator that failed work again: agree on an epoch above every rank's, drop the error records."""

    @abstractmethod
    def _release(self) -> None:
        """Give up memory and processes. Called once."""

    def destroy(self) -> None:
        """Give up windows and processes. Can be called again; everything else then raises `OrderError`."""
        if not self._state.destroyed:
            self._state.destroyed = True
            self._release()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.destroy()

    # For the subclasses

    def _live(self) -> None:
        if self._state.destroyed:
            raise OrderError(
                f"{type(self).__name__} was destroyed",
                allowed="use before destroy()",
                remedy="make a new communicator",
            )

    def _exclusive(self) -> Exclusive:
        """Guard one call, in a `with`: the communicator lives, and no other thread is inside it."""
        return Exclusive(self)

    @functools.cached_property
    def _input_specs(self) -> list[InputSpec]:
        return [InputSpec(t.dtype.name, tuple(int(d) for d in t.shape), place(t.device)) for t in self.input_types()]

    def _specs(self, model: Any) -> list[InputSpec]:
        """Specs of the graph's own inputs, after checking that the others are this communicator's."""
        if isinstance(model, CompiledGraph):
            specs = list(model.specs)
            if self.loads_models not in (None, model.model is not None):
                raise ConfigError(
                    "the graph was compiled by a communicator of another kind",
                    field="model",
                    value=model.name,
                    allowed="a graph compiled by this communicator",
                    remedy="compile it again with comm.compile(graph)",
                )
        elif self.loads_models and hasattr(model, "input_metadata") and all(ref.is_cpu() for ref in self.device_refs()):
            specs = model_specs(model)
        else:
            raise DTypeError.wrong_kind(
                "model", model, allowed="what comm.compile(graph) returned", remedy="compile the graph first"
            )
        own, ours = specs[: -self.num_inputs], specs[-self.num_inputs :]
        if len(ours) != len(self._input_specs) or not all(map(InputSpec.fits, ours, self._input_specs)):
            raise self._foreign(ours)
        return own

    def _foreign(self, ours: Sequence[InputSpec]) -> ShapeError:
        return ShapeError(
            "the graph was not built for this communicator",
            field="its last inputs",
            value=[str(s) for s in ours],
            allowed=", ".join(map(str, self._input_specs)),
            remedy="end the graph's input_types with *comm.input_types() of a communicator with the same config",
        )

    def _check_graph(self, graph: Any) -> tuple[InputSpec, ...]:
        """Specs of a graph's inputs, after checking that the last may be a communicator's; `execute` checks whose."""
        if not hasattr(graph, "inputs") or not hasattr(graph, "output_types"):
            raise DTypeError.wrong_kind("graph", graph, allowed="a max.graph.Graph", remedy="build a Graph first")
        specs = tuple(graph_specs(graph))
        ours, expected = specs[-self.num_inputs :], self._input_specs
        if [(s.dtype, len(s.dims)) for s in ours] != [(s.dtype, len(s.dims)) for s in expected]:
            raise self._foreign(ours)
        return specs


def host_inputs(
    cfg: EPConfig, virtual: bool, memories: Sequence[windows.RankMemory], own: Sequence[int]
) -> list[Buffer]:
    """The communicator's inputs: settings, tables over all `memories`, order, and the counters of the ranks `own`."""
    arrays = [windows.settings_array(cfg, virtual), *windows.pointer_tables(memories)]
    arrays.append(np.zeros(windows.ORDER_WORDS, np.int32))
    return [to_buffer(a) for a in (*arrays, *(memories[r].counters for r in own))]


def arg_labels(n: int, n_ranks: int) -> list[str]:
    """What errors call the arguments of `execute`."""
    return [f"args[{i}] (input {i // n_ranks} of rank {i % n_ranks})" for i in range(n)]
