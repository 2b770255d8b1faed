"""The MAX graphs behind the calls: one op each, which gets everything by address (`call.py`).

So one compilation serves every R, E, K, T and Tmax, with and without weights, biases and counts. A set of graphs is
compiled once a process, for all communicators. `GraphSet`s differ in what the engine fixes at compile time: H, format,
layout, reduce mode, element types. No graph has outputs: all is written to tensors of the caller, so that torch owns
the memory and knows which queues use it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..formats import BF16, TokenFormat
from ..graph_ops import format_parameters
from ..kernels import kernel_library
from .call import WORDS

if TYPE_CHECKING:
    from max.graph import DeviceRef, Graph, Module

    from ..comm import Communicator
    from ..config import EPConfig

KEPT = 256
"""Configs whose sets are remembered."""
STAGES = ("dispatch", "send", "receive", "combine", "send_back", "receive_back")
SIDE = {stage: "dispatch" if i < 3 else "combine" for i, stage in enumerate(STAGES)}
"""Whose windows a stage uses."""


class Builder:
    """Adds graphs of one rank to a module.

    Attributes:
        comm: Any communicator of one rank on the device that the graphs are for.
        graphs: By name.
    """

    def __init__(self, comm: Communicator, module: Module):
        self.comm, self.module = comm, module
        self.graphs: dict[str, Graph] = {}

    @property
    def device(self) -> DeviceRef:
        """Where the rank's tensors are."""
        return self.comm.device_refs()[0]

    def add(self, name: str, op: str, parameters: dict[str, Any]) -> None:
        """Add a graph of the op `ep_mojo_{op}`."""
        from max.dtype import DType
        from max.graph import DeviceRef, Graph, TensorType, ops

        *_, order, _ = self.comm.input_types()
        types = [order, TensorType(DType.int64, [WORDS], DeviceRef.CPU())]
        with Graph(name, input_types=types, custom_extensions=[kernel_library()], module=self.module) as graph:
            given = [graph.inputs[0].buffer, graph.inputs[1].tensor]
            ops.inplace_custom(f"ep_mojo_{op}", self.device, given, parameters=parameters)
            graph.output()
        self.graphs[name] = graph


@dataclass(frozen=True)
class GraphSet:
    """Graphs that belong together. Equal sets are compiled once.

    Args:
        hidden: H.
        layout: The engine's output layout.
    """

    hidden: int
    layout: str

    def add(self, b: Builder) -> None:
        """Add the graphs to a module. Each is called `name(stage)`."""
        raise NotImplementedError

    def name(self, stage: str) -> str:
        """Of a graph, in a module of several sets."""
        return "_".join([stage, self.layout, str(self.hidden), *self._more()])

    def _more(self) -> list[str]:
        return []


@dataclass(frozen=True)
class DispatchSet(GraphSet):
    """dispatch, and with `split` send and receive. Their tensors (absent ones are None):

    rows, their scales, the handle's block, all of which dispatch and receive write; tokens, their scales (if
    `encoded`), topk_ids [T, K], weights float32 [T, K], num_tokens int32 [1], all of which dispatch and send read.

    Args:
        fmt: The format. Tokens are bfloat16 [T, H], or with `encoded` in the format, with scales [T, S].
        encoded: Whether they are in the format already.
        split: Whether to add the two halves.
        ids: Element type of topk_ids.
    """

    fmt: TokenFormat
    encoded: bool
    split: bool
    ids: str = "int64"

    def add(self, b: Builder) -> None:
        """See `GraphSet.add`."""
        fmt, layout = format_parameters(self.hidden, self.fmt), {"layout": self.layout}
        given = {"encoded": self.encoded, "ids": dtype_of(self.ids)}
        b.add(self.name("dispatch"), "dispatch_into", fmt | given | layout)
        if self.split:
            b.add(self.name("send"), "dispatch_from", fmt | given)
            b.add(self.name("receive"), "dispatch_wait_into", fmt | layout)

    def _more(self) -> list[str]:
        name = self.fmt.key().replace("/", "_").replace(".", "_")
        return [name, self.ids, *(flag for flag in ("encoded", "split") if getattr(self, flag))]


@dataclass(frozen=True)
class CombineSet(GraphSet):
    """combine, and with `split` send_back and receive_back. Their tensors (absent ones are None):

    y [T, H], which combine and receive_back write, rows, the handle's block, topk_ids [T, K], weights float32 [T, K]
    (with reduce "source"), two bfloat16 biases [T, H], num_tokens int32 [1]. send_back reads rows and the block,
    receive_back topk_ids and weights.

    Args:
        reduce: "expert" or "source".
        dtype: Of the rows.
        out: Of the sums.
        ids: Element type of topk_ids.
        split: Whether to add the two halves.
    """

    reduce: str
    dtype: str = "bfloat16"
    out: str = "bfloat16"
    ids: str = "int64"
    split: bool = False

    def add(self, b: Builder) -> None:
        """See `GraphSet.add`."""
        parameters = {"hidden": self.hidden, "layout": self.layout, "reduce": self.reduce, "wire": dtype_of(self.dtype)}
        received = {"sums": dtype_of(self.out), "ids": dtype_of(self.ids)}
        b.add(self.name("combine"), "combine_into", parameters | received)
        if self.split:
            b.add(self.name("send_back"), "combine_from", parameters)
            b.add(self.name("receive_back"), "combine_wait_into", parameters | received)

    def _more(self) -> list[str]:
        return [self.reduce, self.dtype, self.out, self.ids, *(["split"] if self.split else [])]


def dtype_of(name: str) -> Any:
    """MAX's element type of that name."""
    from max.dtype import DType

    return getattr(DType, name)


@functools.lru_cache(KEPT)
def normal(cfg: EPConfig) -> tuple[DispatchSet, CombineSet]:
    """Graphs of normal mode: tokens come in the format."""
    fmt = cfg.dispatch_format
    dispatch = DispatchSet(cfg.hidden_size, "rank", fmt, not isinstance(fmt, BF16), False)
    return dispatch, CombineSet(cfg.hidden_size, "rank", "expert")


@functools.lru_cache(KEPT)
def sums(cfg: EPConfig) -> tuple[CombineSet]:
    """A combine of float32 in normal mode."""
    return (CombineSet(cfg.hidden_size, "rank", "expert", "float32", "float32"),)


@functools.lru_cache(KEPT)
def low_latency(cfg: EPConfig) -> tuple[DispatchSet, CombineSet]:
    """Graphs of low-latency mode: bfloat16 tokens, quantised on the way; weights at combine."""
    dispatch = DispatchSet(cfg.hidden_size, "expert_padded", cfg.dispatch_format, False, True)
    return dispatch, CombineSet(cfg.hidden_size, "expert_padded", "source", split=True)
