"""`Communicator.one_gpu` and `Communicator.gpus`: ranks on GPUs, all driven by this process.

On one GPU ranks are virtual: they share its queue, so the graph wrappers emit all sends before all waits. On several
GPUs there is one rank on each; what one rank sends another reads while both run, and the fused ops can be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import layout
from ..config import EPConfig
from ..dtypes import to_buffer, to_numpy
from ..errors import UnsupportedError
from . import windows
from .arguments import check_args, chosen_ranks, make_buffers
from .base import Communicator, CompiledGraph, arg_labels, raise_first
from .device_memory import DeviceMemory, accelerators
from .models import load_graphs, run_model

if TYPE_CHECKING:
    from max.driver import Buffer, Device
    from max.engine import InferenceSession
    from max.graph import DeviceRef, Graph


class GPUCommunicator(Communicator):
    """R ranks on one GPU, or on one GPU each.

    Attributes:
        memories: The ranks' windows and counters.
        devices: The device of each rank.
    """

    def __init__(self, cfg: EPConfig, devices: Sequence[Device | int], virtual: bool):
        """See `Communicator.one_gpu` and `Communicator.gpus`."""
        super().__init__(cfg)
        if cfg.slots == "expert":
            raise UnsupportedError(
                field="slots",
                value="expert",
                allowed="'rank' on GPUs",
                remedy="use slots='rank', which sends less; slots='expert' runs with Communicator.cpu and processes",
            )
        self.graph_ranks = cfg.n_ranks
        self.fused_allowed = not virtual
        self.virtual = virtual
        found = accelerators(devices, 1 if virtual else cfg.n_ranks)
        self.devices: list[Device] = found * cfg.n_ranks if virtual else found
        self.memories = [DeviceMemory(cfg, r, d) for r, d in enumerate(self.devices)]
        self._inputs: list[Buffer] | None = None
        self._session: InferenceSession | None = None

    def device_refs(self) -> list[DeviceRef]:
        """See `Communicator.device_refs`."""
        from max.graph import DeviceRef

        return [DeviceRef.GPU(d.id) for d in self.devices]

    def inputs(self) -> list[Buffer]:
        """See `Communicator.inputs`."""
        self._live()
        if self._inputs is None:
            tables = [windows.settings_array(self.cfg, self.virtual), *windows.pointer_tables(self.memories)]
            order = np.zeros(windows.ORDER_WORDS, np.int32)
            places = {d.id: d for d in self.devices}.values()
            self._inputs = [
                *map(to_buffer, tables),
                *(to_buffer(order).to(d) for d in places),
                *(m.buffers["counters"] for m in self.memories),
            ]
        return self._inputs

    @property
    def session(self) -> InferenceSession:
        """The MAX session that compiles this communicator's graphs."""
        self._live()
        if self._session is None:
            from max.driver import CPU
            from max.engine import InferenceSession

            self._session = InferenceSession(devices=[CPU(), *{d.id: d for d in self.devices}.values()])
        return self._session

    def compile_all(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """See `Communicator.compile_all`. The results' `model` is a loaded MAX model."""
        with self._exclusive():
            return load_graphs(self.session, graphs, [self._check_graph(g) for g in graphs])

    def execute(
        self,
        model: CompiledGraph,
        *args: Any,
        ranks: Iterable[int] | None = None,
        check: bool = True,
        as_buffers: bool = False,
    ) -> list[Any]:
        """See `Communicator.execute`. One run serves all ranks; without `check` and NumPy outputs it does not wait."""
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
            try:
                outputs = run_model(model.model, [*make_buffers(specs, values), *self.inputs()])
            except Exception:
                self._record_abort()
                raise
            if check:
                self._raise_recorded()
            return outputs if as_buffers else [to_numpy(o) for o in outputs]

    def synchronize(self) -> None:
        """Wait until all devices have done what they were given."""
        for device in {d.id: d for d in self.devices}.values():
            device.synchronize()

    def check(self) -> None:
        """See `Communicator.check`. Waits for the devices."""
        with self._exclusive():
            self._raise_recorded()

    def reset(self) -> None:
        """See `Communicator.reset`. Waits for the devices."""
        with self._exclusive():
            self.synchronize()
            windows.restart_all(self.memories)

    def _record_abort(self) -> None:
        """An op raised: ranks whose ops came before it may be a round ahead of the others, or in the middle of one."""
        self.synchronize()
        epochs = [layout.read_epochs(m.counters) for m in self.memories]
        if len(set(epochs)) > 1 or epochs[0][0::2] != epochs[0][1::2]:
            for m in self.memories:
                m.record_abort()
            self.synchronize()

    def _raise_recorded(self) -> None:
        self.synchronize()
        windows.check_heads(self.memories)
        raise_first({m.rank: error for m in self.memories if (error := m.error()) is not None})

    def _release(self) -> None:
        try:
            self.synchronize()
        finally:
            self.memories = []
            self._inputs = None
            self._session = None
