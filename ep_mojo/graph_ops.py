"""How calls of `graph.py` and `gather.py` become ops: their inputs and outputs, and what waits for the second half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import EPConfig
from .formats import BF16, BlockwiseFP8, CustomFormat, TokenFormat
from .graph_checks import check_dispatch, check_lists, check_wait
from .handle import HANDLE_TENSORS, Handle, handle_types

if TYPE_CHECKING:
    from max.graph import DeviceRef, TensorType, TensorValue

    from .comm.base import Rank

Values = Sequence["TensorValue"]

NOT_GATHERED = {"expert_ids": ("int32", 1), "recv_weights": ("float32", 3), "row_map": ("int32", 3)}
"""Tensors of a handle that have size 0 with layout "gathered": (dtype, rank)."""


@dataclass(frozen=True)
class PendingDispatch:
    """A dispatch whose tokens have been sent: for `dispatch_wait` on the same ranks.

    Attributes:
        topk_ids, weights, num_tokens: As given to `dispatch_async`.
    """

    topk_ids: TensorValue
    weights: TensorValue | None
    num_tokens: TensorValue | None


@dataclass(frozen=True)
class PendingCombine:
    """A combine whose rows have been sent: for `combine_wait` on the same ranks.

    Attributes:
        handle: The handle that it was made with.
        reduce: "expert" or "source".
        shared: The shared expert's rows [T, H], or of size 0.
    """

    handle: Handle
    reduce: str
    shared: TensorValue


def add_op(
    name: str, rank: Rank, side: str, values: list, types: list[TensorType], parameters: dict, budget: int
) -> list[TensorValue]:
    """Add the op `ep_mojo_{name}` of a rank, with what all of them take: order, counters, settings, tables.

    `side` chooses between the dispatch and the combine tables; budget 0 is the config's.
    """
    from max.graph import ops

    tables = [getattr(rank, f"{side}_{table}_ptrs") for table in ("send", "recv", "count")]
    return ops.inplace_custom(
        f"ep_mojo_{name}",
        rank.device,
        [rank.order, rank.counters, rank.settings, *tables, *values],
        out_types=types,
        parameters=parameters | {"slots": rank.cfg.slots, "n_sms": budget},
    )


def add_dispatch(rank: Rank, values: list, p: PendingDispatch, budget: int) -> Handle:
    """Add the op of a whole dispatch; with layout "gathered" that is `all_gather_v`, without what has size 0 there."""
    name, parameters, absent = "dispatch", format_of(rank.cfg) | {"layout": rank.cfg.output_layout}, {}
    if rank.cfg.output_layout == "gathered":
        name, parameters, absent = "all_gather_v", format_of(rank.cfg), NOT_GATHERED
    types = dict(zip(HANDLE_TENSORS, handle_types(rank.cfg, rank.device), strict=True))
    made = {n: t for n, t in types.items() if n not in absent}
    outputs = add_op(name, rank, "dispatch", values, list(made.values()), parameters, budget)
    fields = dict(zip(made, outputs, strict=True))
    fields |= {n: or_absent(None, *how, rank.device) for n, how in absent.items()}
    return handle_from(rank.cfg, [fields[n] for n in HANDLE_TENSORS], p)


def add_combine(rank: Rank, y: TensorValue, h: Handle, mode: str, values: list, budget: int) -> TensorValue:
    """Add the op of a whole combine, `values` being those of `wait_values`; with layout "gathered" `reduce_scatter_v`,
    which takes no row map and no weights. Returns the sums."""
    if rank.cfg.output_layout == "gathered":
        ids, _, count, *biases = values
        given = [y, h.recv_num_tokens, ids, count, *biases]
        parameters = {"hidden": rank.cfg.hidden_size, "reduce": mode}
        return add_op("reduce_scatter_v", rank, "combine", given, [sums_type(h)], parameters, budget)[0]
    given, types = [*rows_to_send(y, h), *values], [sums_type(h), shared_type(h)]
    return add_op("combine", rank, "combine", given, types, reduce_parameters(rank.cfg, mode), budget)[0]


def format_of(cfg: EPConfig) -> dict[str, Any]:
    """`format_parameters` of a config."""
    return format_parameters(cfg.hidden_size, cfg.dispatch_format)


def format_parameters(hidden_size: int, fmt: TokenFormat) -> dict[str, Any]:
    """Parameters of the ops of dispatch that name the format."""
    names = {BF16: "bf16", BlockwiseFP8: "blockwise_fp8"}
    return {
        "hidden": hidden_size,
        "format": fmt.struct if isinstance(fmt, CustomFormat) else names[type(fmt)],
        "scale": getattr(fmt, "scale", "float32"),
        "by_column": fmt.scales_layout == "column",
    }


def reduce_parameters(cfg: EPConfig, mode: str) -> dict[str, Any]:
    """Parameters of the ops of combine."""
    return {"hidden": cfg.hidden_size, "layout": cfg.output_layout, "reduce": mode}


def handle_from(cfg: EPConfig, outputs: list[TensorValue], p: PendingDispatch) -> Handle:
    """The handle from the outputs of an op that gives all of `HANDLE_TENSORS`."""
    fields = dict(zip(HANDLE_TENSORS, outputs, strict=True))
    return Handle(cfg=cfg, topk_ids=p.topk_ids, weights=p.weights, num_tokens=p.num_tokens, **fields)


def or_absent(value: TensorValue | None, dtype: str, rank: int, device: DeviceRef) -> TensorValue:
    """An optional input; where it was not given, a tensor of size 0."""
    from max.driver import Buffer
    from max.dtype import DType
    from max.graph import ops

    if value is not None:
        return value
    # Of its own dtype: MAX would compile a graph of its own to fold a cast of a constant.
    return ops.constant(Buffer.zeros([0] * rank, getattr(DType, dtype)), device=device)


def rows_to_send(y: TensorValue, h: Handle) -> list[TensorValue]:
    """What combine_async takes: rows, and what the handle says of them."""
    where = h.src_info if h.cfg.slots == "expert" else h.row_map  # ExpertSlots needs nothing else
    return [y, where, h.recv_weights, h.recv_num_tokens]


def shared_type(h: Handle) -> TensorType:
    """Type of the shared expert's rows [T, H], or of size 0."""
    from max.dtype import DType
    from max.graph import TensorType

    shape = [h.topk_ids.shape[0], h.cfg.hidden_size] if h.cfg.shared_expert else [0, 0]
    return TensorType(getattr(DType, h.cfg.combine_dtype), shape, h.topk_ids.device)


def sums_type(h: Handle) -> TensorType:
    """Type of what combine gives: [T, H]."""
    from max.dtype import DType
    from max.graph import TensorType

    shape = [h.topk_ids.shape[0], h.cfg.hidden_size]
    return TensorType(getattr(DType, h.cfg.output_dtype), shape, h.topk_ids.device)


def wait_values(
    cfg: EPConfig,
    h: Handle,
    mode: str,
    weights: TensorValue | None,
    bias0: TensorValue | None,
    bias1: TensorValue | None,
) -> list[TensorValue]:
    """What combine_wait takes beside the shared rows: ids, weights, num_tokens, biases. Checks weights and biases."""
    check_wait(cfg, h, mode, weights, bias0, bias1)
    given = bias0 if bias0 is not None else bias1
    dtype = "bfloat16" if given is None else given.dtype.name
    weights = h.weights if weights is None else weights
    device = h.topk_ids.device
    return [
        h.topk_ids,
        or_absent(weights, "float32", 2, device),
        or_absent(h.num_tokens, "int32", 1, device),
        or_absent(bias0, dtype, 2, device),
        or_absent(bias1, dtype, 2, device),
    ]


def at(values: Sequence | None, i: int) -> Any:
    """An entry of an optional list."""
    return None if values is None else values[i]


def dispatch_calls(
    ranks: Sequence[Rank],
    xs: Values,
    topk_ids: Values,
    weights: Values | None,
    num_tokens: Values | None,
    x_scales: Values | None,
    input_scale: Values | None,
) -> list[tuple[list[TensorValue], PendingDispatch]]:
    """For each rank the inputs of an op of dispatch, after checks, and what its second half has to know."""
    check_lists(
        ranks,
        ("xs", "topk_ids"),
        xs=xs,
        topk_ids=topk_ids,
        weights=weights,
        num_tokens=num_tokens,
        x_scales=x_scales,
        input_scale=input_scale,
    )
    calls = []
    for i, (rank, x, ids) in enumerate(zip(ranks, xs, topk_ids, strict=True)):
        w, n, scales, factor = at(weights, i), at(num_tokens, i), at(x_scales, i), at(input_scale, i)
        check_dispatch(rank.cfg, x, ids, w, n, scales, factor)
        values = [
            x,
            or_absent(scales, "float32", 2, rank.device),
            ids,
            or_absent(w, "float32", 2, rank.device),
            or_absent(n, "int32", 1, rank.device),
            or_absent(factor, "float32", 1, rank.device),
        ]
        calls.append((values, PendingDispatch(ids, w, n)))
    return calls
