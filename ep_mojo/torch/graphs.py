"""The MAX graphs behind the calls. All sizes but H are symbols, so that one compilation serves every R, E, K, T and
Tmax.

A set of graphs is compiled once a process, for all communicators. `GraphSet`s differ in what the engine fixes at
compile time: H, format, layout, reduce mode, element types. R ranks, G groups of rows (local experts, or source ranks),
K choices, S scales a row, T tokens of this rank, N rows of its output, Tm = Tmax. No graph has outputs: all is written
to tensors of the caller, so that torch owns the memory and knows which queues use it. float8 goes as uint8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..comm.base import Rank
from ..formats import BF16, TokenFormat
from ..graph_ops import add_op, format_parameters, or_absent
from ..handle import graph_dtype
from ..kernels import kernel_library

if TYPE_CHECKING:
    from max.graph import DeviceRef, Graph, Module, TensorValue, Type

    from ..comm import Communicator
    from ..config import EPConfig

KEPT = 256
"""Configs whose sets are remembered."""
STAGES = ("dispatch", "send", "receive", "combine0", "combine1", "combine2", "send_back", "receive_back")
MEMORY = ("int32", ["W"])
"""What a handle has beside tokens and scales, in one block: see `packed_handle`."""

COUNT = ("int32", ["one"])
"""A number on the device."""

Input = tuple
"""(dtype, shape), of what a graph writes (dtype, shape, "written")."""
Body = Callable[["Rank", "list[TensorValue]"], None]


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

    def add(self, name: str, inputs: Sequence[Input], body: Body) -> None:
        """Add a graph with these inputs; `body` gets the rank and the inputs."""
        from max.graph import BufferType, Graph

        types = [self.type(*each) for each in inputs]
        ours, extensions = self._open_inputs(), [kernel_library()]
        with Graph(name, input_types=[*types, *ours], custom_extensions=extensions, module=self.module) as graph:
            values = list(graph.inputs)
            own = [v.buffer if isinstance(t, BufferType) else v.tensor for v, t in zip(values, types, strict=False)]
            body(self._rank(values[len(types) :]), own)
            graph.output()
        self.graphs[name] = graph

    def type(self, dtype: str, shape: Sequence[Any], how: str = "") -> Type:
        """The MAX type of an input or output."""
        from max.dtype import DType
        from max.graph import BufferType, TensorType

        return (BufferType if how == "written" else TensorType)(getattr(DType, dtype), list(shape), self.device)

    def _open_inputs(self) -> list[Type]:
        """The communicator's inputs, with symbols for the sizes that follow from R and E."""
        types = self.comm.input_types()
        settings, tables, order, counters = types[0], types[1:7], types[7], types[8]
        for table in tables:
            table.shape = type(table.shape)(["R"])
        counters.shape = type(counters.shape)(["words"])
        return [settings, *tables, order, counters]

    def _rank(self, values: Sequence[Any]) -> Rank:
        settings, *tables = (v.tensor for v in values[:7])
        order, counters = (v.buffer for v in values[7:])
        return Rank(self.comm.cfg, 0, True, self.device, settings, *tables, order=order, counters=counters)


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
    """dispatch, and with `split` send and receive.

    dispatch (in one launch): rows, their scales and `MEMORY`, which it writes, tokens, topk_ids [T, K], weights float32
    [T, K] (if `weighted`), num_tokens int32 [1] (if `counted`). send: the same without those three and num_tokens.
    receive: those three alone.

    Args:
        fmt: The format. Tokens are bfloat16 [T, H], or with `encoded` in the format, with scales [T, S].
        encoded: Whether they are in the format already.
        weighted: Whether the router's weights travel.
        split: Whether to add the two halves.
        ids: Element type of topk_ids.
        counted: Whether the number of tokens is on the device: rows of T from there on are padding.
    """

    fmt: TokenFormat
    encoded: bool
    weighted: bool
    split: bool
    ids: str = "int64"
    counted: bool = False

    def add(self, b: Builder) -> None:
        """See `GraphSet.add`."""
        encoding = format_parameters(self.hidden, self.fmt)
        parameters = encoding | {"layout": self.layout}
        tokens = [(graph_dtype(self.fmt.token_dtype) if self.encoded else "bfloat16", ["T", self.hidden])]
        if self.encoded:
            tokens.append((self.fmt.scale_dtype, ["T", self.fmt.scales_per_token(self.hidden)]))
        given = [*tokens, (self.ids, ["T", "K"]), *([("float32", ["T", "K"])] if self.weighted else [])]
        received = [(*each, "written") for each in self.received()]

        def values(v: list[TensorValue]) -> list[TensorValue]:
            v = list(v)
            x = v.pop(0)
            scales = v.pop(0) if self.encoded else None
            ids = v.pop(0)
            weights = v.pop(0) if self.weighted else None
            return [x, or_absent(scales, "float32", 2, b.device), ids, or_absent(weights, "float32", 2, b.device)]

        def dispatch(rank: Rank, v: list[TensorValue]) -> None:
            outputs, inputs = v[: len(received)], list(v[len(received) :])
            count = or_absent(inputs.pop() if self.counted else None, "int32", 1, b.device)
            add_op("dispatch_into", rank, "dispatch", [*outputs, *values(inputs), count], [], parameters, 0)

        def send(rank: Rank, v: list[TensorValue]) -> None:
            none = or_absent(None, "int32", 1, b.device), or_absent(None, "float32", 1, b.device)
            add_op("dispatch_async", rank, "dispatch", [*values(v), *none], [], encoding, 0)

        def receive(rank: Rank, v: list[TensorValue]) -> None:
            add_op("dispatch_wait_into", rank, "dispatch", v, [], parameters, 0)

        b.add(self.name("dispatch"), [*received, *given, *([COUNT] if self.counted else [])], dispatch)
        if self.split:
            b.add(self.name("send"), given, send)
            b.add(self.name("receive"), received, receive)

    def received(self) -> list[tuple[str, list[Any]]]:
        """(dtype, shape) of what is received."""
        S = self.fmt.scales_per_token(self.hidden)
        padded, column = self.layout == "expert_padded", self.fmt.scales_layout == "column"
        scales = (["N", S] if not column else ["GS", "M"] if padded else [S, "N"]) if S else [0, 0]
        rows = ["G", "M"] if padded else ["N"]
        tokens = graph_dtype(self.fmt.token_dtype), [*rows, self.fmt.token_elements(self.hidden)]
        return [tokens, (self.fmt.scale_dtype or "float32", scales), MEMORY]

    def _more(self) -> list[str]:
        name = self.fmt.key().replace("/", "_").replace(".", "_")
        flags = ("encoded", "weighted", "split", "counted")
        return [name, self.ids, *(flag for flag in flags if getattr(self, flag))]


@dataclass(frozen=True)
class CombineSet(GraphSet):
    """combine0 and, with `biases`, combine1 and combine2; with reduce "source" and one dtype send_back and
    receive_back.

    combineN (in one launch): y [T, H], which it writes, rows, `MEMORY`, topk_ids [T, K], weights float32 [T, K] (with
    reduce "source"), N biases bfloat16 [T, H]. send_back: rows, `MEMORY`. receive_back: y, topk_ids, weights.

    Args:
        reduce: "expert" or "source".
        dtype: Of the rows.
        out: Of the sums.
        biases: Whether to add graphs with biases.
        ids: Element type of topk_ids.
        counted: Whether combineN takes num_tokens int32 [1] besides, last.
    """

    reduce: str
    dtype: str = "bfloat16"
    out: str = "bfloat16"
    biases: bool = False
    ids: str = "int64"
    counted: bool = False

    def add(self, b: Builder) -> None:
        """See `GraphSet.add`."""
        parameters = {"hidden": self.hidden, "layout": self.layout, "reduce": self.reduce}
        at_source = self.reduce == "source"
        rows = (self.dtype, [*(["G", "M"] if self.layout == "expert_padded" else ["N"]), self.hidden])
        choices = [(self.ids, ["T", "K"]), *([("float32", ["T", "K"])] if at_source else [])]
        y, bias = (self.out, ["T", self.hidden]), ("bfloat16", ["T", self.hidden])

        def combine(rank: Rank, v: list[TensorValue]) -> None:
            sent, (ids, *rest) = v[:3], v[3:]
            count = or_absent(rest.pop() if self.counted else None, "int32", 1, b.device)
            weights = or_absent(rest.pop(0) if at_source else None, "float32", 2, b.device)
            added = [or_absent(each, "bfloat16", 2, b.device) for each in [*rest, None, None][:2]]
            add_op("combine_into", rank, "combine", [*sent, ids, weights, *added, count], [], parameters, 0)

        def send(rank: Rank, v: list[TensorValue]) -> None:
            add_op("combine_async_from", rank, "combine", v, [], parameters, 0)

        def receive(rank: Rank, v: list[TensorValue]) -> None:
            add_op("combine_wait_into", rank, "combine", v, [], parameters, 0)

        for n in range(3 if self.biases else 1):
            last = [bias] * n + ([COUNT] if self.counted else [])
            b.add(self.name(f"combine{n}"), [(*y, "written"), rows, MEMORY, *choices, *last], combine)
        if at_source and self.out == self.dtype:
            b.add(self.name("send_back"), [rows, MEMORY], send)
            b.add(self.name("receive_back"), [(*y, "written"), *choices], receive)

    def _more(self) -> list[str]:
        flags = (flag for flag in ("biases", "counted") if getattr(self, flag))
        return [self.reduce, self.dtype, self.out, self.ids, *flags]


@functools.lru_cache(KEPT)
def normal(cfg: EPConfig) -> tuple[DispatchSet, CombineSet]:
    """Graphs of normal mode: tokens come in the format."""
    fmt = cfg.dispatch_format
    dispatch = DispatchSet(cfg.hidden_size, "rank", fmt, not isinstance(fmt, BF16), True, False)
    return dispatch, CombineSet(cfg.hidden_size, "rank", "expert", biases=True)


@functools.lru_cache(KEPT)
def sums(cfg: EPConfig) -> tuple[CombineSet]:
    """A combine of float32 in normal mode."""
    return (CombineSet(cfg.hidden_size, "rank", "expert", "float32", "float32"),)


@functools.lru_cache(KEPT)
def low_latency(cfg: EPConfig) -> tuple[DispatchSet, CombineSet]:
    """Graphs of low-latency mode: bfloat16 tokens, quantised on the way; weights at combine."""
    dispatch = DispatchSet(cfg.hidden_size, "expert_padded", cfg.dispatch_format, False, False, True)
    return dispatch, CombineSet(cfg.hidden_size, "expert_padded", "source")
