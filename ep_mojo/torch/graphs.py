"""The MAX graphs behind the calls: what each takes and gives. One rank a graph; T and N are symbols.

R ranks, L local experts, K choices, S scales a row, T tokens of this rank, N rows of its output. `size` is int8 [N, 0]:
it carries nothing but N. On the host float8 goes as uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import graph as ops
from .. import into
from ..config import EPConfig
from ..formats import BF16
from ..handle import Handle, graph_dtype, handle_types
from ..kernels import kernel_library

if TYPE_CHECKING:
    from max.graph import DeviceRef, Graph, Module, TensorValue

    from ..comm import Communicator
    from ..comm.base import Rank

RECEIVED = ("tokens", "scales", "row_offsets", "counts", "src_info", "recv_weights", "row_map", "recv_num_tokens")
"""Outputs of a dispatch, as in `Handle`; row_offsets as int32. In layout "rank" local_ids (int64) and local_weights
come behind them."""
FOR_COMBINE = ("row_map", "recv_weights", "recv_num_tokens")
"""What combine needs of them."""

Input = tuple
Body = Callable[["list[Rank]", "list[TensorValue]"], "Sequence[TensorValue]"]


class Builder:
    """Adds graphs to one module, for one communicator.

    Attributes:
        graphs: By name.
    """

    def __init__(self, comm: Communicator, module: Module):
        self.comm, self.module = comm, module
        self.graphs: dict[str, Graph] = {}

    @property
    def cfg(self) -> EPConfig:
        """The communicator's config."""
        return self.comm.cfg

    @property
    def device(self) -> DeviceRef:
        """Where the rank's tensors are."""
        return self.comm.device_refs()[0]

    def add(self, name: str, inputs: Sequence[Input], body: Body) -> None:
        """Add a graph.

        Args:
            name: Its name.
            inputs: (dtype, shape) of its own inputs; (dtype, shape, True) of those that it writes.
            body: Gets the rank (a list of one) and the inputs; returns the outputs.
        """
        from max.dtype import DType
        from max.graph import BufferType, Graph, TensorType

        types = [
            (BufferType if written else TensorType)(getattr(DType, dtype), list(shape), self.device)
            for dtype, shape, *written in inputs
        ]
        all_types, extensions = [*types, *self.comm.input_types()], [kernel_library()]
        with Graph(name, input_types=all_types, custom_extensions=extensions, module=self.module) as graph:
            ranks = self.comm.bind(graph.inputs[len(types) :])
            own = [
                v.buffer if isinstance(t, BufferType) else v.tensor for v, t in zip(graph.inputs, types, strict=False)
            ]
            graph.output(*body(ranks, own))
        self.graphs[name] = graph

    def tokens(self, encoded: bool) -> list[Input]:
        """Inputs for tokens: bfloat16, or in the format with its scales."""
        cfg = self.cfg
        if not encoded:
            return [("bfloat16", ["T", cfg.hidden_size])]
        dtype = graph_dtype(cfg.dispatch_format.token_dtype, self.device.is_cpu())
        return [(dtype, ["T", cfg.hidden_size]), (cfg.dispatch_format.scale_dtype, ["T", cfg.scales_per_token])]

    def choices(self, *dtypes: str) -> list[Input]:
        """Inputs [T, K], for ids and weights."""
        return [(dtype, ["T", self.cfg.top_k]) for dtype in dtypes]

    def map(self) -> list[Input]:
        """Inputs that combine takes from a handle: `FOR_COMBINE`."""
        cfg = self.cfg
        per_token = [cfg.n_ranks, cfg.max_tokens_per_rank, cfg.top_k]
        return [("int32", per_token), ("float32", per_token), ("int32", [cfg.n_ranks])]

    def received(self, handle: Handle) -> list[TensorValue]:
        """The outputs of a dispatch: see `RECEIVED`."""
        from max.dtype import DType

        found = {name: getattr(handle, name) for name in RECEIVED}
        found["row_offsets"] = handle.row_offsets.cast(DType.int32)
        values = list(found.values())
        if self.cfg.output_layout == "rank":
            values += [handle.local_ids.cast(DType.int64), handle.local_weights]
        return values


def as_handle(cfg: EPConfig, rows: TensorValue, values: Sequence[TensorValue], topk_ids: TensorValue) -> Handle:
    """A handle with what combine reads: `FOR_COMBINE`, and the rank's own choices. Its other fields stand for nothing.

    Args:
        cfg: The config.
        rows: The expert rows: combine compares their shape with that of the tokens.
        values: `FOR_COMBINE`.
        topk_ids: [T, K], or any value on the device where nothing is received.
    """
    found = dict(zip(FOR_COMBINE, values, strict=True))
    unread = ("scales", "row_offsets", "counts", "expert_ids", "src_info", "local_ids", "local_weights")
    return Handle(cfg=cfg, tokens=rows, topk_ids=topk_ids, **dict.fromkeys(unread, found["row_map"]), **found)


def normal(b: Builder) -> None:
    """Layout "rank": "dispatch", and "combine0" to "combine2", by the number of biases.

    dispatch: tokens, topk_ids int64 [T, K], weights float32 [T, K], size. combine: rows [N, H], `FOR_COMBINE`,
    topk_ids, biases bfloat16 [T, H]. A format that quantises takes tokens that are quantised already.
    """
    encoded = not isinstance(b.cfg.dispatch_format, BF16)
    tokens = b.tokens(encoded)

    def dispatch(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        *given, ids, weights, size = v
        scales = [given[1]] if encoded else None
        (h,) = ops.dispatch(ranks, [given[0]], [ids], [weights], x_scales=scales, rows=size.shape[0])
        return b.received(h)

    def combine(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        y, *rest = v
        biases = [[bias] for bias in rest[4:]] + [None, None]
        h = as_handle(b.cfg, y, rest[:3], rest[3])
        return ops.combine(ranks, [y], [h], bias0=biases[0], bias1=biases[1])

    b.add("dispatch", [*tokens, *b.choices("int64", "float32"), ("int8", ["N", 0])], dispatch)
    for n in range(3):
        biases = [("bfloat16", ["T", b.cfg.hidden_size])] * n
        rows = (b.cfg.combine_dtype, ["N", b.cfg.hidden_size])
        b.add(f"combine{n}", [rows, *b.map(), *b.choices("int64"), *biases], combine)


def sums(b: Builder) -> None:
    """Layout "rank": "combine0" alone, as in `normal`."""
    rows = (b.cfg.combine_dtype, ["N", b.cfg.hidden_size])

    def combine(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        return ops.combine(ranks, [v[0]], [as_handle(b.cfg, v[0], v[1:4], v[4])])

    b.add("combine0", [rows, *b.map(), *b.choices("int64")], combine)


def low_latency(b: Builder) -> None:
    """Layout "expert_padded", reduce "source": "dispatch" and "combine" in one launch, and each in two halves.

    dispatch, send: x bfloat16, topk_ids int64 [T, K]. receive: writes its inputs, `received_types`. combine: rows
    [L, R*Tmax, H], `FOR_COMBINE`, topk_ids, weights float32 [T, K]. combine_send: the same up to `FOR_COMBINE`;
    combine_receive: y [T, H], which it writes, topk_ids, weights.
    """
    cfg, choices = b.cfg, b.choices("int64", "float32")
    rows = ("bfloat16", [cfg.n_local_experts, cfg.n_ranks * cfg.max_tokens_per_rank, cfg.hidden_size])

    def dispatch(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        (h,) = ops.dispatch(ranks, [v[0]], [v[1]])
        return b.received(h)

    def send(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        ops.dispatch_async(ranks, [v[0]], [v[1]])
        return []

    def receive(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        into.dispatch_wait_into(ranks, [v])
        return []

    def combine(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        h = as_handle(cfg, v[0], v[1:4], v[4])
        return ops.combine(ranks, [v[0]], [h], weights=[v[5]])

    def combine_send(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        ops.combine_async(ranks, [v[0]], [as_handle(cfg, v[0], v[1:4], v[1])])
        return []

    def combine_receive(ranks: list[Rank], v: list[TensorValue]) -> list[TensorValue]:
        into.combine_wait_into(ranks, [v[0]], [v[1]], [v[2]])
        return []

    x = ("bfloat16", ["T", cfg.hidden_size])
    b.add("dispatch", [x, *b.choices("int64")], dispatch)
    b.add("send", [x, *b.choices("int64")], send)
    b.add("receive", [(dtype, shape, True) for dtype, shape in received_types(cfg, b.device)], receive)
    b.add("combine", [rows, *b.map(), *choices], combine)
    b.add("combine_send", [rows, *b.map()], combine_send)
    b.add("combine_receive", [(*x, True), *choices], combine_receive)


def received_types(cfg: EPConfig, device: DeviceRef) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of all tensors of a handle of layout "expert_padded", in the order of `HANDLE_TENSORS`."""
    return [(t.dtype.name, [int(d) for d in t.shape]) for t in handle_types(cfg, device)]
