"""The MAX graphs behind the calls. All sizes but H are symbols, so that one compilation serves every R, E, K, T and
Tmax.

A set of graphs is compiled once a process, for all communicators. `GraphSet`s differ in what the engine fixes at
compile
time: H, format, layout, reduce mode, element types. R ranks, G groups of rows (local experts, or source ranks in layout
"rank"), K choices, S scales a row, T tokens of this rank, N rows of its output, Tm = Tmax. Sizes that no input has come
as the shape of `sizes`, an int8 tensor of size 0 in host memory. On the host float8 goes as uint8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..comm.base import Rank
from ..formats import BF16, TokenFormat
from ..graph import _or_absent, add_op, format_parameters
from ..handle import HANDLE_TENSORS, graph_dtype
from ..kernels import kernel_library

if TYPE_CHECKING:
    from max.graph import DeviceRef, Graph, Module, TensorValue, Type

    from ..comm import Communicator
    from ..config import EPConfig

FOR_COMBINE = ("row_map", "recv_weights", "recv_num_tokens")
"""What combine needs of a handle."""
KEPT = 256
"""Configs whose sets are remembered."""
STAGES = ("dispatch", "send", "receive", "combine0", "combine1", "combine2", "send_back", "receive_back")
PER_TOKEN = ("R", "Tm", "K")

Input = tuple
"""(dtype, shape), of what a graph writes (dtype, shape, "written"), of what stays on the host (dtype, shape,
"host").
"""
Body = Callable[["Rank", "list[TensorValue]"], "Sequence[TensorValue]"]


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
        """Add a graph with these inputs; `body` gets the rank and the inputs, and returns the outputs."""
        from max.graph import BufferType, Graph

        types = [self.type(*each) for each in inputs]
        ours, extensions = self._open_inputs(), [kernel_library()]
        with Graph(name, input_types=[*types, *ours], custom_extensions=extensions, module=self.module) as graph:
            values = list(graph.inputs)
            own = [v.buffer if isinstance(t, BufferType) else v.tensor for v, t in zip(values, types, strict=False)]
            graph.output(*body(self._rank(values[len(types) :]), own))
        self.graphs[name] = graph

    def type(self, dtype: str, shape: Sequence[Any], how: str = "") -> Type:
        """The MAX type of an input or output."""
        from max.dtype import DType
        from max.graph import BufferType, DeviceRef, TensorType

        made = BufferType if how == "written" else TensorType
        return made(getattr(DType, dtype), list(shape), DeviceRef.CPU() if how == "host" else self.device)

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

    dispatch (in one launch): tokens, topk_ids [T, K], weights float32 [T, K] (if `weighted`), sizes; gives the tensors
    of `HANDLE_TENSORS`. send: the same without sizes, gives nothing. receive: the tensors of `HANDLE_TENSORS`, which it
    writes.

    Args:
        fmt: The format. Tokens are bfloat16 [T, H], or with `encoded` in the format, with scales [T, S].
        encoded: Whether they are in the format already.
        weighted: Whether the router's weights travel.
        split: Whether to add the two halves.
        ids: Element type of topk_ids.
    """

    fmt: TokenFormat
    encoded: bool
    weighted: bool
    split: bool
    ids: str = "int64"

    def sizes(self, cfg: EPConfig, rows: int) -> list[int]:
        """Shape of `sizes`, for `rows` rows of output."""
        found = {
            "N": rows,
            "M": cfg.n_ranks * cfg.max_tokens_per_rank,
            "Tm": cfg.max_tokens_per_rank,
            "offsets": (cfg.n_ranks if cfg.output_layout == "rank" else cfg.n_groups) + 1,
            "G": cfg.n_ranks if cfg.output_layout == "rank" else cfg.n_groups,
        }
        return [found.get(dim, dim) for dim in self._symbols()]

    def add(self, b: Builder) -> None:
        """See `GraphSet.add`."""
        on_host = b.device.is_cpu()
        encoding = format_parameters(self.hidden, self.fmt)
        parameters = encoding | {"layout": self.layout}
        tokens = [(graph_dtype(self.fmt.token_dtype, on_host) if self.encoded else "bfloat16", ["T", self.hidden])]
        if self.encoded:
            tokens.append((self.fmt.scale_dtype, ["T", self.fmt.scales_per_token(self.hidden)]))
        given = [*tokens, (self.ids, ["T", "K"]), *([("float32", ["T", "K"])] if self.weighted else [])]
        received = self.received(on_host)

        def values(v: list[TensorValue]) -> list[TensorValue]:
            v = list(v)
            x = v.pop(0)
            scales = v.pop(0) if self.encoded else None
            ids = v.pop(0)
            weights = v.pop(0) if self.weighted else None
            optional = ((scales, "float32", 2), (weights, "float32", 2), (None, "int32", 1), (None, "float32", 1))
            scales, weights, num_tokens, factor = (_or_absent(*each, b.device) for each in optional)
            return [x, scales, ids, weights, num_tokens, factor]

        def dispatch(rank: Rank, v: list[TensorValue]) -> list[TensorValue]:
            types = [b.type(*each) for each in received]
            return add_op("dispatch", rank, "dispatch", values(v[:-1]), types, parameters, 0)

        def send(rank: Rank, v: list[TensorValue]) -> list[TensorValue]:
            add_op("dispatch_async", rank, "dispatch", values(v), [], encoding, 0)
            return []

        def receive(rank: Rank, v: list[TensorValue]) -> list[TensorValue]:
            add_op("dispatch_wait_into", rank, "dispatch", v, [], parameters, 0)
            return []

        b.add(self.name("dispatch"), [*given, ("int8", self._symbols(), "host")], dispatch)
        if not self.split:
            return
        b.add(self.name("send"), given, send)
        b.add(self.name("receive"), [(*each, "written") for each in received], receive)

    def received(self, on_host: bool = True) -> list[tuple[str, list[Any]]]:
        """(dtype, shape) of what is received, by the names of `HANDLE_TENSORS`."""
        by_rank, padded = self.layout == "rank", self.layout == "expert_padded"
        S = self.fmt.scales_per_token(self.hidden)
        scales = (["N", S] if self.fmt.scales_layout == "row" else [S, "N"]) if S else [0, 0]
        rows = ["G", "M"] if padded else ["N"]
        elements = self.fmt.token_elements(self.hidden)
        types = {
            "tokens": (graph_dtype(self.fmt.token_dtype, on_host), [*rows, elements]),
            "scales": (self.fmt.scale_dtype or "float32", scales),
            "row_offsets": ("uint32", ["offsets"]),
            "counts": ("int32", ["G"]),
            "expert_ids": ("int32", [0] if by_rank else ["G"]),
            "src_info": ("int32", ["N", 2]),
            "local_ids": ("int32", ["N", "K"] if by_rank else [0, 0]),
            "local_weights": ("float32", ["N", "K"] if by_rank else [0, 0]),
            "recv_weights": ("float32", list(PER_TOKEN)),
            "row_map": ("int32", list(PER_TOKEN)),
            "recv_num_tokens": ("int32", ["R"]),
        }
        return [types[name] for name in HANDLE_TENSORS]

    def _symbols(self) -> list[Any]:
        return ["N", "M", "Tm", "offsets", "G", 0]

    def _more(self) -> list[str]:
        name = self.fmt.key().replace("/", "_").replace(".", "_")
        return [name, self.ids, *(flag for flag in ("encoded", "weighted", "split") if getattr(self, flag))]


@dataclass(frozen=True)
class CombineSet(GraphSet):
    """combine0 and, with `biases`, combine1 and combine2; with reduce "source" and one dtype send_back and
    receive_back.

    combineN (in one launch): rows, `FOR_COMBINE`, topk_ids [T, K], weights float32 [T, K] (with reduce "source"), N
    biases bfloat16 [T, H]; gives [T, H]. send_back: rows, `FOR_COMBINE`, gives nothing. receive_back: y [T, H], which
    it writes, topk_ids, weights.

    Args:
        reduce: "expert" or "source".
        dtype: Of the rows.
        out: Of the sums.
        biases: Whether to add graphs with biases.
        ids: Element type of topk_ids.
    """

    reduce: str
    dtype: str = "bfloat16"
    out: str = "bfloat16"
    biases: bool = False
    ids: str = "int64"

    def add(self, b: Builder) -> None:
        """See `GraphSet.add`."""
        parameters = {"hidden": self.hidden, "layout": self.layout, "reduce": self.reduce}
        at_source = self.reduce == "source"
        rows = (self.dtype, [*(["G", "M"] if self.layout == "expert_padded" else ["N"]), self.hidden])
        per_token = ("int32", PER_TOKEN), ("float32", PER_TOKEN), ("int32", ["R"])
        choices = [(self.ids, ["T", "K"]), *([("float32", ["T", "K"])] if at_source else [])]
        y, bias = (self.out, ["T", self.hidden]), ("bfloat16", ["T", self.hidden])
        no_shared = b.type(self.dtype, [0, 0])

        def combine(rank: Rank, v: list[TensorValue]) -> list[TensorValue]:
            sent, (ids, *rest) = v[:4], v[4:]
            weights = _or_absent(rest.pop(0) if at_source else None, "float32", 2, b.device)
            none = _or_absent(None, "int32", 1, b.device)
            added = [_or_absent(each, "bfloat16", 2, b.device) for each in [*rest, None, None][:2]]
            values = [*sent, ids, weights, none, *added]
            return add_op("combine", rank, "combine", values, [b.type(*y), no_shared], parameters, 0)[:1]

        def send(rank: Rank, v: list[TensorValue]) -> list[TensorValue]:
            add_op("combine_async", rank, "combine", v, [no_shared], parameters, 0)
            return []

        def receive(rank: Rank, v: list[TensorValue]) -> list[TensorValue]:
            add_op("combine_wait_into", rank, "combine", v, [], parameters, 0)
            return []

        for n in range(3 if self.biases else 1):
            b.add(self.name(f"combine{n}"), [rows, *per_token, *choices, *[bias] * n], combine)
        if at_source and self.out == self.dtype:
            b.add(self.name("send_back"), [rows, *per_token], send)
            b.add(self.name("receive_back"), [(*y, "written"), *choices], receive)

    def _more(self) -> list[str]:
        return [self.reduce, self.dtype, self.out, self.ids, *(["biases"] if self.biases else [])]


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
